"""RWKV-4's time mixing against the average that it is, at keys of any size, and against transformers' layer."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sinuous.core.mixers import RWKV4, RWKV4State
from sinuous.core.sequence_model import SequenceModel

DIM, WIDTH = 12, 20


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(**options: Any) -> RWKV4:
    """Build in float64, with no two parameters alike."""
    mixer = RWKV4(DIM, WIDTH, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def sequence(batch: int = 2, length: int = 23) -> Tensor:
    return torch.randn(batch, length, DIM, dtype=torch.float64)


def written_out(m: RWKV4, x: Tensor) -> Tensor:
    """Every output as one softmax over all steps up to its own."""
    before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
    k, v, r = (
        layer(x * mix + before * (1 - mix))
        for layer, mix in ((m.key, m.time_mix_k), (m.value, m.time_mix_v), (m.receptance, m.time_mix_r))
    )
    step = torch.arange(x.shape[1])
    age = (step[:, None] - 1 - step)[..., None]
    scores = k[:, None] - age * m.time_decay.exp()
    scores = torch.where((age == -1), k[:, None] + m.time_first, scores).masked_fill(age < -1, -math.inf)
    return m.output(torch.sigmoid(r) * (scores.softmax(2) * v[:, None]).sum(2))


def gradients(y: Tensor, m: RWKV4, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, [x, *m.parameters()], torch.linspace(-1, 1, y.numel()).view_as(y).to(y)))


@pytest.mark.parametrize("size", [1.0, 30.0, 2000.0])
def test_is_its_average_and_so_are_its_gradients(size: float) -> None:
    mixer, x = build(), sequence().requires_grad_()
    with torch.no_grad():
        mixer.key.weight.mul_(size)
    y, expected = mixer(x), written_out(mixer, x)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=1e-10)
    for grad, expected_grad in zip(gradients(y, mixer, x), gradients(expected, mixer, x), strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=1e-10 * size, rtol=1e-9)


@pytest.mark.parametrize("shift", [-700.0, 0.0, 700.0])
def test_what_all_keys_have_in_common_does_not_matter_in_single_precision(shift: float) -> None:
    mixer, x = build(), sequence(1, 3000)
    expected = mixer(x)
    single = RWKV4(DIM, WIDTH)
    single.load_state_dict(mixer.state_dict())
    key = single.key.forward
    single.key.forward = lambda z: key(z) + shift  # type: ignore[method-assign]
    y, bound = single(x.float()), 3e-5 if shift else 1e-6  # half of the last place of 700 is 3e-5
    assert (y - expected).square().mean().sqrt() < bound * expected.square().mean().sqrt()


def test_a_state_is_worth_the_past() -> None:
    mixer, x = build(), sequence()
    _, state = mixer.prefill(x[:, :9])
    same = RWKV4State(state.conv, state.sums * math.exp(-3), state.log_scale + 3)
    for start in (state, same):
        y, after = mixer.prefill(x[:, 9:], start)
        torch.testing.assert_close(y, written_out(mixer, x)[:, 9:], atol=1e-12, rtol=1e-10)
        y_t, _ = mixer.step(x[:, 0], after)
        again = torch.cat([x, x[:, :1]], 1)
        torch.testing.assert_close(y_t, written_out(mixer, again)[:, -1], atol=1e-12, rtol=1e-10)


def test_a_past_that_weighs_more_than_all_keys_stays_seen() -> None:
    mixer, x = build(), sequence(length=4)
    with torch.no_grad():
        mixer.time_decay.fill_(-8.0)
    mean = torch.randn(2, WIDTH, dtype=torch.float64)
    ones = torch.ones_like(mean)
    state = RWKV4State(x[:, :1] * 0, torch.cat([mean, ones], -1), 1e4 * ones)
    gate = torch.sigmoid(mixer.receptance(x + torch.diff(x, dim=1, prepend=x[:, :1] * 0) * (mixer.time_mix_r - 1)))
    torch.testing.assert_close(mixer.prefill(x, state)[0], mixer.output(gate * mean[:, None]), atol=1e-12, rtol=1e-10)


def test_a_packed_sequence_that_is_no_number_reaches_no_other() -> None:
    mixer, x, edges = build(), sequence(1), [0, 6, 6, 7, 15, 23]
    x[:, 6:7] = math.nan
    x[:, 15:] = math.inf
    y = mixer(x, torch.tensor(edges))
    for a, b in itertools.pairwise(edges):
        torch.testing.assert_close(y[:, a:b], mixer(x[:, a:b]), atol=1e-12, rtol=1e-10, equal_nan=True)
    assert y[:, :6].isfinite().all()
    assert y[:, 7:15].isfinite().all()


def test_equals_the_layer_of_transformers() -> None:
    rwkv = pytest.importorskip("transformers.models.rwkv.modeling_rwkv")
    theirs = rwkv.RwkvSelfAttention(rwkv.RwkvConfig(hidden_size=DIM, attention_hidden_size=WIDTH))
    mixer, x = build().float(), sequence().float()
    state = mixer.state_dict()
    for short, long in (("k", "key"), ("v", "value"), ("r", "receptance")):
        state[f"time_mix_{long}"] = state.pop(f"time_mix_{short}")
    theirs.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), theirs(x)[0], atol=1e-5, rtol=1e-5)


def test_has_the_published_names_and_starts_as_published() -> None:
    shapes = {name: tuple(t.shape) for name, t in RWKV4(DIM, WIDTH).state_dict().items()}
    mixings = {f"time_mix_{n}": (1, 1, DIM) for n in "kvr"}
    layers = {f"{n}.weight": (WIDTH, DIM) for n in ("key", "value", "receptance")}
    vectors = {"time_decay": (WIDTH,), "time_first": (WIDTH,)}
    assert shapes == vectors | mixings | layers | {"output.weight": (DIM, WIDTH)}
    m = RWKV4(64, block_index=3, num_blocks=5)
    assert m.time_decay[0] == -5
    torch.testing.assert_close(m.time_decay[[32, 63]], torch.tensor([-5 + 8 * (32 / 63) ** 1.675, 3.0]))
    torch.testing.assert_close(m.time_first[:3].exp() / 0.3, torch.tensor([0.0, 0.5, -0.5]).exp())
    torch.testing.assert_close(m.time_mix_k[0, 0, 16], torch.tensor(0.25**0.4))
    torch.testing.assert_close(m.time_mix_v[0, 0, 16], torch.tensor(0.25**0.4 + 0.225))
    torch.testing.assert_close(m.time_mix_r[0, 0, 16], torch.tensor(0.25**0.2))
    torch.testing.assert_close(m.value.weight @ m.value.weight.mT, torch.eye(64), atol=1e-5, rtol=0)
    assert not any(layer.weight.any() for layer in (m.key, m.receptance, m.output))
    assert m.no_weight_decay() == {*vectors, *mixings}
    model = SequenceModel(11, 16, 3, "rwkv4")
    assert [block.mixer.block_index for block in model.layers] == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_hidden_size": 0}, "attention_hidden_size must be at least 1"),
        ({"block_index": 2, "num_blocks": 2}, r"block_index must be one of the 2 .*got 2"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RWKV4(DIM, **options)
