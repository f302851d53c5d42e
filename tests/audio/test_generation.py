"""Clips drawn sample by sample: what they are alone, where they go on, what they cost, and what is refused."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sinuous
from sinuous.audio.engines import engine_of
from sinuous.audio.generation import CANDIDATES_APART, Clips, generate, score, stream
from sinuous.core import generation as core
from sinuous.core.sampling import Sampling
from sinuous.core.sequence_model import SequenceModel

V = 16


def build(name: str) -> Any:
    """A small model of 16 codes with some opinion about them."""
    torch.manual_seed(0)
    model: Any
    if name == "sequence":
        model = SequenceModel(V, 12, 2, pattern=("s4d", "mamba"), pad_vocab_multiple=24)
    else:
        model = sinuous.create_model(name, vocab_size=V)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(1.5)
    return model.eval()


@pytest.fixture(scope="module", params=["test_sashimi", "test_wavenet", "sequence"])
def model(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


def stepped(model: Any, codes: Tensor, before: int = V // 2) -> Tensor:
    """Logits `[B, T, V]` of each code, from the whole sequence at once."""
    read = torch.cat([torch.full_like(codes[:, :1], before), codes[:, :-1]], 1)
    with torch.no_grad():
        return model(read)[..., :V].double()


def equal(one: Clips, other: Clips) -> bool:
    return torch.equal(one.codes, other.codes) and torch.equal(one.bits, other.bits)


def test_codes_are_drawn_from_what_the_model_says_of_them(model: Any) -> None:
    clips = generate(model, 40, num_clips=3, temperature=0.8, top_p=0.9, seed=7)
    assert clips.codes.shape == clips.bits.shape == (3, 40)
    assert (clips.codes.dtype, clips.bits.dtype) == (torch.int64, torch.float32)
    assert clips.samples_per_second > 0
    logits = stepped(model, clips.codes)
    rule = Sampling(temperature=0.8, top_p=0.9)
    for clip in range(3):
        uniform = torch.rand(40, generator=torch.Generator().manual_seed(7 + clip), dtype=torch.float64)
        assert torch.equal(rule.choose(logits[clip], uniform), clips.codes[clip])
    bits = -logits.log_softmax(-1).gather(-1, clips.codes[..., None])[..., 0] / math.log(2)
    torch.testing.assert_close(clips.bits.double(), bits, rtol=0, atol=1e-4)


def test_a_clip_is_what_it_is_alone(model: Any) -> None:
    together = generate(model, 60, num_clips=3, prompt=[1, 2, 3], seed=5)
    for clip in range(3):
        alone = generate(model, 60, prompt=[1, 2, 3], seed=5 + clip)
        assert torch.equal(alone.codes[0], together.codes[clip])
        torch.testing.assert_close(alone.bits[0], together.bits[clip], rtol=0, atol=1e-4)
    assert not torch.equal(together.codes[0], together.codes[1])


def test_a_state_goes_on_sample_for_sample(model: Any) -> None:
    whole = generate(model, 50, num_clips=2, seed=3)
    begun = generate(model, 17, num_clips=2, seed=3)
    ended = generate(model, 33, state=begun.state, seed=3)
    assert torch.equal(torch.cat([begun.codes, ended.codes], 1), whole.codes)
    assert torch.equal(torch.cat([begun.bits, ended.bits], 1), whole.bits)
    assert equal(generate(model, 5, state=whole.state, seed=3), generate(model, 5, state=ended.state, seed=3))
    assert not torch.equal(generate(model, 33, state=begun.state, seed=4).codes, ended.codes)


def test_what_was_drawn_as_a_prompt_leads_to_the_same_place(model: Any) -> None:
    """A prefill and steps differ by rounding alone, from any prefix."""
    clips = generate(model, 23, num_clips=2, temperature=1.2, seed=1)
    heard = generate(model, 20, prompt=clips.codes, temperature=0, state=None)
    went_on = generate(model, 20, state=clips.state, temperature=0)
    assert torch.equal(heard.codes, went_on.codes)
    torch.testing.assert_close(heard.bits, went_on.bits, rtol=0, atol=1e-4)


def test_a_state_hears_a_prompt_first(model: Any) -> None:
    state = generate(model, 0, prompt=[4, 5, 6]).state
    later = generate(model, 15, prompt=[7, 8], state=state)
    assert equal(later, generate(model, 15, prompt=[7, 8], state=state))
    torch.testing.assert_close(later.bits, generate(model, 15, prompt=[4, 5, 6, 7, 8]).bits, rtol=0, atol=1e-4)


def test_one_state_goes_on_in_several_ways(model: Any) -> None:
    state = generate(model, 6, seed=2).state
    ways = generate(model, 20, num_clips=3, state=state, seed=2)
    assert torch.equal(ways.codes[0], generate(model, 20, state=state, seed=2).codes[0])
    assert torch.equal(ways.codes[2], generate(model, 20, state=state, seed=4).codes[0])
    assert not torch.equal(ways.codes[0], ways.codes[1])


def test_parts_are_the_whole(model: Any) -> None:
    whole = generate(model, 30, num_clips=2, prompt=[3], seed=9)
    parts = list(stream(model, 30, chunk=7, num_clips=2, prompt=[3], seed=9))
    assert [part.codes.shape[1] for part in parts] == [7, 7, 7, 7, 2]
    assert torch.equal(torch.cat([part.codes for part in parts], 1), whole.codes)
    endless = stream(model, chunk=4, num_clips=2, prompt=[3], seed=9)
    first = list(itertools.islice(endless, 3))
    assert torch.equal(torch.cat([part.codes for part in first], 1), whole.codes[:, :12])
    assert equal(generate(model, 5, state=first[-1].state, seed=9), generate(model, 5, state=first[-1].state, seed=9))


def test_scores_are_the_bits_of_what_is_drawn(model: Any) -> None:
    clips = generate(model, 45, num_clips=2, seed=1)
    scored = score(model, clips.codes)
    assert scored.shape == (2, 45)
    torch.testing.assert_close(scored, clips.bits, rtol=0, atol=1e-4)
    torch.testing.assert_close(score(model, clips.codes[1]), clips.bits[1], rtol=0, atol=1e-4)
    assert score(model, torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0)


def test_long_sounds_are_read_in_parts(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = generate(model, 45, num_clips=2, seed=1).codes
    whole, state = score(model, codes), generate(model, 0, prompt=codes).state
    monkeypatch.setattr("sinuous.audio.engines.READ", 7)
    torch.testing.assert_close(score(model, codes), whole, rtol=0, atol=1e-4)
    parts = generate(model, 12, prompt=codes, temperature=0)
    assert torch.equal(parts.codes, generate(model, 12, state=state, temperature=0).codes)


def test_uniform_logits_cost_all_bits() -> None:
    model = build("sequence")
    nn.init.zeros_(model.embedding.weight)
    assert torch.equal(generate(model, 9).bits, torch.full((1, 9), 4.0))
    assert torch.equal(score(model, [1, 2, 3]), torch.full((1, 3), 4.0))


def test_the_best_of_several_candidates_is_kept(model: Any) -> None:
    best = generate(model, 20, num_clips=2, best_of=3, seed=1)
    for clip in range(2):
        candidates = [generate(model, 20, seed=1 + clip + j * CANDIDATES_APART) for j in range(3)]
        assert not any(torch.equal(candidates[0].codes, other.codes) for other in candidates[1:])
        kept = min(candidates, key=lambda candidate: float(candidate.bits.mean()))
        assert torch.equal(best.codes[clip], kept.codes[0])
        alone = generate(model, 20, best_of=3, seed=1 + clip)
        assert torch.equal(alone.codes[0], best.codes[clip])
    later = generate(model, 5, state=best.state, temperature=0)
    torch.testing.assert_close(later.bits, generate(model, 5, prompt=best.codes, temperature=0).bits, rtol=0, atol=1e-4)


def test_it_draws_as_the_generation_of_tokens_does() -> None:
    model = build("sequence")
    tokens = core.generate(model, [V // 2, 3, 4], Sampling(temperature=1.0, max_new_tokens=30, seed=11)).tokens
    assert torch.equal(generate(model, 30, prompt=[3, 4], seed=11).codes[0], tokens[0])


def test_nothing_stays_in_the_model(model: Any) -> None:
    model.train()
    modules = [(name, type(module)) for name, module in model.named_modules()]
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    clips = generate(model, 5, num_clips=2)
    score(model, clips.codes)
    assert all(module.training for module in model.modules())
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert not torch.equal(generate(model, 5, num_clips=2).bits, clips.bits)
    logits, _ = model.prefill(clips.codes, clips.state.model)
    logits.sum().backward()
    model.zero_grad()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.div_(1.1)
    model.eval()


def test_the_code_of_silence_may_be_told(model: Any) -> None:
    codes = torch.tensor([[1, 2, 3, 4]])
    wanted = stepped(model, codes, 0).log_softmax(-1).gather(-1, codes[..., None])[..., 0] / -math.log(2)
    torch.testing.assert_close(score(model, codes, silence=0).double(), wanted, rtol=0, atol=1e-4)
    assert not torch.equal(score(model, codes, silence=0), score(model, codes))
    assert not torch.equal(generate(model, 20, silence=0).bits, generate(model, 20).bits)


def test_no_samples_give_a_state(model: Any) -> None:
    clips = generate(model, 0, num_clips=2)
    assert clips.codes.shape == clips.bits.shape == (2, 0)
    assert equal(generate(model, 8, state=clips.state, seed=1), generate(model, 8, num_clips=2, seed=1))


def test_logits_that_are_no_numbers_are_told() -> None:
    model = build("sequence")
    with torch.no_grad():
        model.norm_f.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="clip 0 are not numbers after 0 codes"):
        generate(model, 3)
    with pytest.raises(FloatingPointError, match="not numbers"):
        score(model, [1, 2])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_samples": 1.5}, "num_samples must be a whole number"),
        ({"num_samples": -1}, "num_samples must be 0 or more"),
        ({"num_clips": 0}, "num_clips must be at least 1"),
        ({"prompt": [V]}, f"prompt must lie between 0 and {V - 1} .got {V}"),
        ({"prompt": [[1, 2], [3]]}, "prompt must be codes"),
        ({"prompt": torch.zeros(3)}, "prompt must be whole numbers"),
        ({"prompt": torch.ones(2, 3, dtype=torch.long), "num_clips": 3}, "got 3 of num_clips and 2 of prompt"),
        ({"state": 3}, "give result.state"),
        ({"temperature": -1}, "temperature must be 0 or more"),
        ({"top_p": 0.0}, "top_p must lie above 0"),
        ({"temperature": 0, "top_p": 0.5}, "no effect at temperature 0"),
        ({"seed": 0.5}, "seed must be a whole number"),
        ({"engine": "cuda"}, "engine must be"),
        ({"best_of": 0}, "best_of must be at least 1"),
        ({"silence": V}, "silence must be a code"),
        ({"model": "sashimi_nano"}, "model must be a model of codes"),
    ],
)
def test_wrong_arguments_are_told_in_a_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        generate(**{"model": build("test_wavenet"), "num_samples": 4, **options})


def test_a_model_that_looks_ahead_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="causal"):
        generate(SequenceModel(V, 8, 1, pattern="s4", causal=False), 3)


@pytest.fixture(scope="module", params=["snet", "unet", "wavenet"])
def lowered(request: pytest.FixtureRequest) -> Any:
    """A small model that has a program in C, where there is a compiler."""
    torch.manual_seed(1)
    name = "test_wavenet" if request.param == "wavenet" else "test_sashimi"
    options = {"unet": True, "mixer": "s4d", "depth": 2} if request.param == "unet" else {}
    model = sinuous.create_model(name, vocab_size=V, **options).eval()
    try:
        engine_of(model, "c")
    except ValueError as reason:
        pytest.skip(str(reason))
    return model


def test_engines_draw_the_same_codes_and_take_over_from_each_other(lowered: Any) -> None:
    options: dict[str, Any] = {"num_clips": 2, "prompt": [1, 2, 3, 4, 5], "temperature": 0.9, "top_p": 0.95, "seed": 3}
    whole = {engine: generate(lowered, 60, engine=engine, **options) for engine in ("torch", "c")}
    assert torch.equal(whole["c"].codes, whole["torch"].codes)
    torch.testing.assert_close(whole["c"].bits, whole["torch"].bits, rtol=0, atol=1e-4)
    assert generate(lowered, 1).engine == "c"
    state, parts = None, []
    for engine, count in (("c", 13), ("torch", 22), ("c", 25)):
        arguments = options if state is None else {**options, "prompt": None, "state": state}
        part = generate(lowered, count, engine=engine, **arguments)
        state, parts = part.state, [*parts, part.codes]
    assert torch.equal(torch.cat(parts, 1), whole["c"].codes)
    scored = [score(lowered, whole["c"].codes, engine=engine) for engine in ("torch", "c")]
    torch.testing.assert_close(scored[1], scored[0], rtol=0, atol=1e-4)


def test_in_c_a_clip_is_to_the_bit_what_it_is_alone(lowered: Any) -> None:
    prompts = torch.randint(V, (3, 21), generator=torch.Generator().manual_seed(0))
    together = generate(lowered, 80, prompt=prompts, seed=5, engine="c")
    for clip in range(3):
        assert equal_rows(generate(lowered, 80, prompt=prompts[clip], seed=5 + clip, engine="c"), together, clip)


def equal_rows(alone: Clips, together: Clips, clip: int) -> bool:
    return torch.equal(alone.codes[0], together.codes[clip]) and torch.equal(alone.bits[0], together.bits[clip])


def test_models_without_a_program_run_in_torch_and_say_so() -> None:
    model = build("sequence")
    assert generate(model, 2).engine == "torch"
    with pytest.raises(ValueError, match=r"engine 'c' runs SaShiMi and WaveNet.*give engine='torch'"):
        generate(model, 2, engine="c")
