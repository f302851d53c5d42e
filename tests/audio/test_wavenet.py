"""WaveNet: one result for the whole, for parts and for steps; sizes and names as published."""

from __future__ import annotations

import pytest
import torch

from sinuous.audio import wavenet
from sinuous.core.generation import Sampling, generate
from sinuous.core.ragged import select_rows


def small(**options: object) -> wavenet.WaveNet:
    torch.manual_seed(0)
    return wavenet.test_wavenet(**options).double()


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"kernel_size": 3}, {"kernel_size": 1}, {"blocks": 1}])
@pytest.mark.parametrize("prefix", [0, 1, 7, 40])
def test_a_prefix_and_steps_give_what_the_whole_gives(options: dict[str, object], prefix: int) -> None:
    model = small(**options)
    x = torch.randint(256, (2, 40))
    whole = model(x)
    logits, state = model.prefill(x[:, :prefix])
    parts = [logits]
    for t in range(prefix, 40):
        y, state = model.step(x[:, t], state)
        parts.append(y.unsqueeze(1))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, model.prefill(x)[1], rtol=0, atol=1e-12)
    last, _ = model.prefill(x, last_only=True)
    torch.testing.assert_close(last, whole[:, -1:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"kernel_size": 3}])
def test_an_output_depends_on_its_receptive_field_and_on_nothing_else(options: dict[str, object]) -> None:
    model = small(**options)
    x = torch.randint(256, (1, model.receptive_field + 8))
    other = x.clone()
    other[0, 4] = (x[0, 4] + 97) % 256
    changed = (model(x) != model(other)).any(-1)[0].nonzero().squeeze(1)
    assert changed.min() == 4
    assert changed.max() == 4 + model.receptive_field - 1


def test_rows_are_what_they_are_alone() -> None:
    model, x = small(), torch.randint(256, (3, 20))
    logits, state = model.prefill(x)
    alone, own = model.prefill(x[1:2])
    torch.testing.assert_close(logits[1:2], alone)
    torch.testing.assert_close(select_rows(state, [1]), own)


def test_gradients_run_through_the_carried_state() -> None:
    model, x = small(), torch.randint(256, (1, 24))
    weights = list(model.parameters())
    whole = torch.autograd.grad(model(x)[:, -1].sum(), weights, allow_unused=True)
    _, state = model.prefill(x[:, :-3])
    parts = torch.autograd.grad(model.prefill(x[:, -3:], state)[0][:, -1].sum(), weights, allow_unused=True)
    torch.testing.assert_close(parts, whole)


def test_the_published_size() -> None:
    with torch.device("meta"):
        model = wavenet.wavenet_4m()
    assert sum(p.numel() for p in model.model.parameters()) == 4_113_152
    assert sum(p.numel() for p in model.parameters()) == 4_244_480
    assert model.receptive_field == 4093


def test_older_files_of_the_authors_are_read() -> None:
    model = small()
    published = {
        name.replace(".0.", ".") if name[:2] in ("en", "de") else name: t for name, t in model.state_dict().items()
    }
    assert "encoder.weight" in published
    assert "model.filter_convs.0.weight" in published
    bare = {name.removeprefix("model."): t for name, t in published.items()}
    for state in (published, bare):
        torch.testing.assert_close(wavenet.checkpoint_filter_fn(state, model), dict(model.state_dict()))


def test_core_generation_runs_on_it() -> None:
    model = small()
    result = generate(model, [[128], [128, 3, 4]], Sampling(temperature=1.0, max_new_tokens=5, seed=0))
    alone = generate(model, [[128, 3, 4]], Sampling(temperature=1.0, max_new_tokens=5, seed=1))
    assert torch.equal(result.tokens[1], alone.tokens[0])


@pytest.mark.parametrize("x", [torch.zeros(2, 3), torch.zeros(3, dtype=torch.long), torch.full((1, 3), 256)])
def test_what_is_no_row_of_codes_is_refused(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="codes"):
        small()(x)
