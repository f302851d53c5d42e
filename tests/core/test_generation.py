"""Generation: what a row gives is what it gives alone, and greedy tokens are those of the whole forward pass."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sinuous.core import generation
from sinuous.core.generation import Sampling, Token, generate, stream
from sinuous.core.ragged import run_ragged
from sinuous.core.sequence_model import SequenceModel

VOCAB = 13
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11], [12, 1, 5], [3, 3, 3, 3, 3, 3, 3, 3, 3, 3]]


def build(pattern: Any = "mamba", depth: int = 2, **options: Any) -> SequenceModel:
    """Build in float64 and with large weights, so that its choices are not all alike."""
    sizes = {"sliding_window_attention": {"window_size": 4}, "mamba2": {"d_state": 8}}
    sizes = {name: size for name, size in sizes.items() if name in pattern}
    model = SequenceModel(VOCAB, 24, depth, pattern, sizes, dtype=torch.float64, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return model


def greedy_by_forward(model: SequenceModel, prompt: list[int], steps: int) -> list[int]:
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids]))[0, -1, : model.vocab_size].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("chunk", [1, 3, 2048])
def test_greedy_is_the_argmax_of_the_whole_forward_pass(chunk: int) -> None:
    model = build(pad_vocab_multiple=16)
    with torch.no_grad():
        model.embedding.weight[VOCAB:] = 50.0  # what pads the vocabulary must never be chosen
    expected = [greedy_by_forward(model, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(row) for row in expected}) == len(PROMPTS)
    result = generate(model, PROMPTS, Sampling(max_new_tokens=12), prefill_chunk=chunk)
    assert [row.tolist() for row in result.tokens] == expected
    assert result.stop_reasons == ["length"] * 5


@pytest.mark.parametrize("chunk", [2, 2048])
def test_states_that_grow_or_count_positions_are_carried_too(chunk: int) -> None:
    model = build(["mamba2", "sliding_window_attention", "softmax_attention"], 3)
    expected = [greedy_by_forward(model, prompt, 9) for prompt in PROMPTS]
    result = generate(model, PROMPTS, Sampling(max_new_tokens=9), prefill_chunk=chunk)
    assert [row.tolist() for row in result.tokens] == expected
    assert len({tuple(row) for row in expected}) == len(PROMPTS)


SAMPLED = Sampling(temperature=1.3, top_k=9, top_p=0.95, min_p=0.01, repetition_penalty=1.2, max_new_tokens=15)


def with_(sampling: Sampling, **changes: Any) -> Sampling:
    return Sampling(**{**{name: getattr(sampling, name) for name in sampling.__dataclass_fields__}, **changes})


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    model, seeds = build(), [7, 11, 13, 17, 19]
    together = generate(model, PROMPTS, with_(SAMPLED, seed=seeds)).tokens
    alone = [generate(model, p, with_(SAMPLED, seed=s)).tokens[0] for p, s in zip(PROMPTS, seeds, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    turned = generate(model, PROMPTS[::-1], with_(SAMPLED, seed=seeds[::-1])).tokens[::-1]
    assert all(torch.equal(a, b) for a, b in zip(together, turned, strict=True))
    assert not torch.equal(together[0], generate(model, PROMPTS[0], with_(SAMPLED, seed=8)).tokens[0])


def test_one_seed_counts_up_and_none_follows_the_global_generator() -> None:
    model, same = build(), [[1, 2]] * 3
    counted = generate(model, same, with_(SAMPLED, seed=5)).tokens
    listed = generate(model, same, with_(SAMPLED, seed=[5, 6, 7])).tokens
    assert all(torch.equal(a, b) for a, b in zip(counted, listed, strict=True))
    assert len({tuple(row.tolist()) for row in counted}) == 3
    torch.manual_seed(3)
    first = generate(model, same, SAMPLED).tokens
    torch.manual_seed(3)
    again = generate(model, same, SAMPLED).tokens
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("form", ["lists", "tensors", "bytes", "padded"])
def test_prompts_come_in_several_forms(form: str) -> None:
    model = build()
    expected = generate(model, PROMPTS, Sampling(max_new_tokens=4)).tokens
    padded = torch.full((5, 10), 0)
    for row, prompt in zip(padded, PROMPTS, strict=True):
        row[10 - len(prompt) :] = torch.tensor(prompt)
    prompts = {"lists": PROMPTS, "tensors": [torch.tensor(p) for p in PROMPTS], "bytes": [bytes(p) for p in PROMPTS]}
    actual = generate(
        model, prompts.get(form, padded), Sampling(max_new_tokens=4), pad_id=0 if form == "padded" else None
    )
    assert all(torch.equal(a, b) for a, b in zip(actual.tokens, expected, strict=True))
    for single in (PROMPTS[0], torch.tensor(PROMPTS[0]), bytes(PROMPTS[0])):
        assert torch.equal(generate(model, single, Sampling(max_new_tokens=4)).tokens[0], expected[0])


def test_padding_on_both_sides_is_left_out_and_between_tokens_it_is_one() -> None:
    model = build()
    rows = torch.tensor([[0, 0, 5, 0, 6], [1, 2, 0, 3, 0], [5, 6, 0, 0, 0], [0, 7, 0, 0, 0]])
    result = generate(model, rows, Sampling(max_new_tokens=6), pad_id=0)
    expected = generate(model, [[5, 0, 6], [1, 2, 0, 3], [5, 6], [7]], Sampling(max_new_tokens=6))
    assert all(torch.equal(a, b) for a, b in zip(result.tokens, expected.tokens, strict=True))
    assert result.prompt_tokens == 10
    with pytest.raises(ValueError, match=r"nothing but pad_id 0 in row 1.*the token that starts a text"):
        generate(model, [[1, 0], [0, 0]], pad_id=0)


def test_random_numbers_do_not_depend_on_how_many_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sampling = build(), with_(SAMPLED, seed=3)
    expected = generate(model, PROMPTS, sampling).tokens
    monkeypatch.setattr(generation, "DRAWN_AT_ONCE", 4)
    assert all(torch.equal(a, b) for a, b in zip(generate(model, PROMPTS, sampling).tokens, expected, strict=True))


def test_a_stream_without_end_needs_no_memory_for_what_is_not_drawn_yet() -> None:
    endless = stream(model := build(), [[1], [2]], with_(SAMPLED, seed=3, max_new_tokens=10**15))
    first = [next(endless) for _ in range(30)]
    expected = generate(model, [[1], [2]], with_(SAMPLED, seed=3)).tokens
    assert [token.id for token in first if token.row == 1] == expected[1].tolist()


def test_stop_tokens_and_sequences_end_a_row_and_are_left_out() -> None:
    model = build()
    whole = [greedy_by_forward(model, prompt, 12) for prompt in PROMPTS]
    stop = whole[0][4]
    result = generate(model, PROMPTS, Sampling(max_new_tokens=12, stop_tokens=[stop]))
    for row, reason, tokens in zip(whole, result.stop_reasons, result.tokens, strict=True):
        expected = row[: row.index(stop)] if stop in row else row
        assert tokens.tolist() == expected
        assert reason == ("stop_token" if stop in row else "length")
    assert result.new_tokens == sum(min(12, row.index(stop) + 1 if stop in row else 12) for row in whole)

    sequence = whole[0][4:7]
    result = generate(model, PROMPTS, Sampling(max_new_tokens=12, stop_sequences=[sequence, [99]]))
    for row, reason, tokens in zip(whole, result.stop_reasons, result.tokens, strict=True):
        cut = next((i for i in range(len(row) - 2) if row[i : i + 3] == sequence), None)
        assert tokens.tolist() == row[:cut]
        assert reason == ("length" if cut is None else "stop_sequence")


def test_what_may_begin_a_stop_sequence_is_held_back() -> None:
    """A model that counts upward shows when each token comes out."""
    counting = Counting()
    stops = Sampling(max_new_tokens=6, stop_sequences=[[3, 4, 9], [6, 7]])
    run = stream(counting, [2], stops)
    steps = []
    for token in run:
        steps.append((token.id, counting.steps))
    assert steps == [(3, 2), (4, 2), (5, 2)]  # 3 and 4 wait for 5, which shows that they begin nothing
    assert generate(counting, [2], stops).tokens[0].tolist() == [3, 4, 5]
    assert generate(counting, [2], Sampling(max_new_tokens=2, stop_sequences=[[3, 4, 9]])).tokens[0].tolist() == [3, 4]


class Counting(SequenceModel):
    """Always gives the next number."""

    def __init__(self) -> None:
        super().__init__(VOCAB, 8, 1)
        self.steps = 0

    def prefill(self, x: Tensor, state: Any = None, *, last_only: bool = False) -> Any:
        return F.one_hot(x[:, -1:] + 1, VOCAB).double(), (x[:, -1],)

    def step(self, x_t: Tensor, state: Any) -> Any:
        self.steps += 1
        return F.one_hot((x_t + 1) % VOCAB, VOCAB).double(), (x_t,)


def test_stream_gives_what_generate_gives_and_leaves_no_mode_behind() -> None:
    model = build(drop_rate=0.9).train()
    model.layers[1].eval()
    expected = generate(model, PROMPTS, with_(SAMPLED, seed=1)).tokens
    rows: list[list[int]] = [[] for _ in PROMPTS]
    for token in (run := stream(model, PROMPTS, with_(SAMPLED, seed=1))):
        assert isinstance(token, Token)
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
        rows[token.row].append(token.id)
    assert rows == [row.tolist() for row in expected]
    assert model.training
    assert not model.layers[1].training
    run = stream(model, PROMPTS)
    next(run)
    assert not model.training
    run.close()
    assert model.training
    assert model(torch.tensor([[1, 2]])).requires_grad


def test_prompts_that_are_alike_are_read_once() -> None:
    model = build(["mamba2", "softmax_attention"])
    prompts = [PROMPTS[0], PROMPTS[2], PROMPTS[0], PROMPTS[0], PROMPTS[2]]
    sampling = with_(SAMPLED, seed=[1, 2, 3, 1, 4])
    apart = [
        generate(model, p, with_(SAMPLED, seed=s)).tokens[0] for p, s in zip(prompts, [1, 2, 3, 1, 4], strict=True)
    ]
    read: list[int] = []
    prefill = model.prefill
    model.prefill = lambda x, *args, **options: (read.append(x.numel()), prefill(x, *args, **options))[1]  # type: ignore
    together = generate(model, prompts, sampling)
    assert all(torch.equal(a, b) for a, b in zip(together.tokens, apart, strict=True))
    assert sum(read) == len(PROMPTS[0]) + len(PROMPTS[2])
    assert together.prompt_tokens == sum(map(len, prompts))


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_only_allowed_tokens_are_chosen(temperature: float) -> None:
    """Here such as rise; each row is asked with its new tokens and how many may follow."""
    model = build()
    asked: list[tuple[int, int, int]] = []

    def rising(row: int, tokens: Any, left: int, logits: Tensor) -> Tensor:
        assert logits.shape == (VOCAB,)
        asked.append((row, len(tokens), left))
        return torch.arange(VOCAB) > (tokens[-1] if len(tokens) else 0)

    sampling = Sampling(temperature=temperature, max_new_tokens=9, stop_tokens=[VOCAB - 1], seed=1)
    result = generate(model, PROMPTS, sampling, allowed=rising)
    for row, tokens in enumerate(result.tokens):
        assert tokens.tolist() == sorted(set(tokens.tolist()))
        calls = [call[1:] for call in asked if call[0] == row]
        assert calls == [(n, 9 - n) for n in range(len(calls))]
    assert "stop_token" in result.stop_reasons
    streamed = list(stream(model, PROMPTS, sampling, allowed=rising))
    assert [t.id for t in streamed if t.row == 2] == result.tokens[2].tolist()
    with pytest.raises(ValueError, match="no token for row 1 after 0 new tokens"):
        generate(model, PROMPTS, sampling, allowed=lambda row, *_: torch.full((VOCAB,), row != 1))


def test_lengths() -> None:
    model = build()
    result = generate(model, PROMPTS, Sampling(max_length=12, max_new_tokens=8))
    assert [len(row) for row in result.tokens] == [5, 8, 8, 8, 2]
    assert result.prompt_tokens == 24
    assert result.new_tokens == 31
    assert result.tokens_per_second > 0
    assert result.prefill_tokens_per_second > 0
    padded = result.padded(0)
    assert padded.shape == (5, 8)
    assert torch.equal(padded[0, :5], result.tokens[0])
    assert not padded[0, 5:].any()


def frequencies(sampling: Sampling, logits: Tensor, seen: Tensor | None = None) -> Tensor:
    """Frequencies of all tokens when uniform numbers are spread evenly."""
    uniform = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    ids = sampling.choose(logits.expand(20000, -1), uniform, None if seen is None else seen.expand(20000, -1))
    return torch.bincount(ids, minlength=logits.shape[-1]) / 20000


P = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04, 0.0])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, P),
        ({"temperature": 0.5}, P**2),
        ({"top_k": 2}, P * torch.tensor([1, 1, 0, 0, 0, 0])),
        ({"top_k": 100}, P),
        ({"top_p": 0.7}, P * torch.tensor([1, 1, 0, 0, 0, 0])),
        ({"top_p": 0.71}, P * torch.tensor([1, 1, 1, 0, 0, 0])),
        ({"top_p": 1e-6}, P * torch.tensor([1, 0, 0, 0, 0, 0])),
        ({"min_p": 0.14}, P * torch.tensor([1, 1, 1, 1, 0, 0])),
        ({"min_p": 0.5, "temperature": 2.0}, P.sqrt() * torch.tensor([1, 1, 1, 0, 0, 0])),
        ({"top_k": 3, "top_p": 0.75}, P * torch.tensor([1, 1, 0, 0, 0, 0])),
    ],
)
def test_choices_have_their_probabilities(options: dict[str, Any], expected: Tensor) -> None:
    actual = frequencies(Sampling(**{"temperature": 1.0, **options}), P.double().log())
    torch.testing.assert_close(actual, expected / expected.sum(), atol=2e-4, rtol=0)


def test_the_repetition_penalty_weakens_what_was_seen() -> None:
    logits, seen = torch.tensor([2.0, -1.0, 0.5, 2.0]), torch.tensor([True, True, False, False])
    expected = torch.tensor([2.0 / 1.5, -1.5, 0.5, 2.0]).softmax(-1)
    actual = frequencies(Sampling(temperature=1.0, repetition_penalty=1.5), logits, seen)
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=0)
    model, ids = build(), [1, 2]
    for _ in range(12):
        logits = model(torch.tensor([ids]))[0, -1]
        past = torch.tensor(sorted(set(ids)))
        logits[past] = torch.where(logits[past] > 0, logits[past] / 3, logits[past] * 3)
        ids.append(int(logits.argmax()))
    assert ids[2:] != greedy_by_forward(model, [1, 2], 12)
    result = generate(model, [[5], [1, 2], [3, 4, 5]], Sampling(repetition_penalty=3.0, max_new_tokens=12))
    assert result.tokens[1].tolist() == ids[2:]


def test_the_ends_of_the_uniform_numbers_choose_possible_tokens() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]])
    for number, token in ((0.0, 1), (1 - 2**-53, 3), (1.0, 3)):
        assert Sampling(temperature=1.0).choose(logits, torch.tensor([number], dtype=torch.float64)).item() == token


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, r"temperature must be 0 or more and finite \(got -1.0\)"),
        ({"temperature": 1.0, "top_k": 0}, "top_k must be at least 1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p must lie above 0"),
        ({"temperature": 1.0, "min_p": 2.0}, "min_p must lie between 0 and 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be more than 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"stop_sequences": [[1], []]}, "stop_sequences must have no empty sequence"),
        ({"top_p": 0.9}, "top_p has no effect at temperature 0.* give a temperature above 0"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "at least one token .got shape .0. in row 0"),
        ([[1], []], {}, "at least one token .got shape .0. in row 1"),
        (torch.zeros(0, 3, dtype=torch.long), {}, "there is no prompt"),
        ([[1, 13]], {}, "ids must lie between 0 and 12 .got 13 in row 0"),
        ([[1], [-1]], {}, "ids must lie between 0 and 12 .got -1 in row 1"),
        ([[0.5]], {}, "whole numbers .got torch.float32 in row 0"),
        ("abc", {}, "got text"),
        (["abc"], {}, "got text"),
        ([1, 2, 3], {"max_length": 3}, "max_length 3 leaves no room after the 3 tokens of row 0"),
        ([[1], [2]], {"seed": [1]}, "seed must have one number for each of the 2 rows .got 1"),
    ],
)
def test_bad_prompts_are_refused(prompts: Any, options: dict[str, Any], message: str) -> None:
    for call in (generate, stream):
        with pytest.raises(ValueError, match=message):
            call(build(), prompts, Sampling(**options))


def test_numbers_that_are_none_and_models_without_a_state_are_refused() -> None:
    model = build(tie_head=False)
    with torch.no_grad():
        model.embedding.weight[4] = torch.nan
    with pytest.raises(FloatingPointError, match="logits of row 1 are not numbers after 0 new tokens"):
        generate(model, [[1], [4]], Sampling(stop_tokens=range(VOCAB)))
    with pytest.raises(NotImplementedError, match="looks at the future"):
        generate(build(causal=False), [1])
    with pytest.raises(ValueError, match="prefill_chunk must be at least 1"):
        generate(model, [1], prefill_chunk=0)


def test_stages_read_each_step_once_and_no_padding() -> None:
    seen: list[list[float]] = [[] for _ in range(4)]
    lengths = [3, 1, 3, 5]
    x = torch.arange(20.0).view(4, 5)
    for row, length in enumerate(lengths):
        x[row, length:] = torch.nan

    def call(piece: Tensor, state: Any) -> tuple[Tensor, Any]:
        total = piece.sum(1) + (0 if state is None else state[0])
        return piece, (total,)

    stages, groups = run_ragged(call, x, lengths)
    for stage in stages:
        for row, output in zip(stage.rows, stage.output, strict=True):
            assert len(seen[row]) == stage.start
            seen[row] += output.tolist()
    assert seen == [x[row, :length].tolist() for row, length in enumerate(lengths)]
    assert [(s.start, s.stop) for s in stages] == list(itertools.pairwise([0, 1, 3, 5]))
    assert [group.rows for group in groups] == [[0, 1, 2, 3]]
    torch.testing.assert_close(groups[0].state[0], x.nansum(1))
