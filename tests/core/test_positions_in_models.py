"""Rotary positions of mlstm, and positions that are told to a model: they are carried, packed, generated with."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from sinuous.core import mixers
from sinuous.core.generation import Sampling, generate
from sinuous.core.mixers import positions
from sinuous.core.sequence_model import SequenceModel

VOCAB, DIM = 11, 16
EDGES = [0, 5, 5, 12, 13]
ROTARY = ("head", "inner")
both = pytest.mark.parametrize("rotary", ROTARY)


def mixer_of(rotary: str | None, **options: Any) -> mixers.MLSTM:
    mixer = mixers.MLSTM(DIM, num_heads=2, rotary=rotary, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def model_of(rotary: str | None, depth: int = 2, **options: Any) -> SequenceModel:
    mlstm = {"mlstm": {"rotary": rotary, "num_heads": 2}}
    model = SequenceModel(VOCAB, DIM, depth, ("mlstm",), mlstm, tie_head=False, dtype=torch.float64, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


def differ(found: Tensor, other: Tensor) -> bool:
    return bool((found - other).abs().max() > 1e-6)


def ids(batch: int = 2, length: int = 13) -> Tensor:
    return torch.randint(VOCAB, (batch, length))


def test_neighbours_are_turned_as_complex_numbers_at_any_place() -> None:
    x, places = torch.randn(2, 3, 2, 8, dtype=torch.float64), torch.tensor([[0, 1, 70], [5, 12_345, 300_000_000]])
    angle = places[..., None].double() * 5e5 ** (-torch.arange(4).double() / 4)
    turned = torch.view_as_complex(x.unflatten(-1, [4, 2])) * torch.polar(torch.ones_like(angle), angle)[:, :, None]
    expected = torch.view_as_real(turned).flatten(-2)
    torch.testing.assert_close(positions.rotate(x, places, 5e5, True), expected, atol=1e-7, rtol=0)
    single = positions.rotate(x.float(), places, 5e5, True)
    torch.testing.assert_close(single, expected.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rotary", [None, *ROTARY])
def test_gates_see_rotated_queries_and_keys_over_the_inner_width_only(rotary: str | None) -> None:
    """A shift of all positions leaves the products of queries and keys as they are, and so all that is made of them."""
    mixer, x, places = mixer_of(rotary), torch.randn(2, 13, DIM, dtype=torch.float64), torch.arange(13).expand(2, 13)
    y = mixer(x)
    close(mixer(x, position_ids=places), y)
    assert differ(mixer(x, position_ids=places + 7), y) is (rotary == "inner")
    assert differ(mixer(x, position_ids=2 * places), y) is (rotary is not None)


@both
@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("prefix", [0, 1, 6, 13])
def test_prefill_and_steps_equal_forward(rotary: str, told: bool, prefix: int) -> None:
    model, x = model_of(rotary), ids()
    places = torch.randint(0, 90, x.shape) if told else None
    y, state = model.prefill(x[:, :prefix], position_ids=None if places is None else places[:, :prefix])
    outputs = [y]
    for t in range(prefix, x.shape[1]):
        y_t, state = model.step(x[:, t], state, None if places is None else places[:, t])
        outputs.append(y_t[:, None])
    close(torch.cat(outputs, 1), model(x, position_ids=places))


@both
def test_a_state_goes_on_from_the_last_position(rotary: str) -> None:
    model, x = model_of(rotary), ids()
    start = torch.tensor([40, 7])
    places = start[:, None] + torch.arange(13)
    _, state = model.prefill(x[:, :4], position_ids=places[:, :4])
    assert [part.position.tolist() for part in state] == [[44, 11], [44, 11]]
    close(model.prefill(x[:, 4:], state)[0], model(x, position_ids=places)[:, 4:])
    _, state = model.prefill(x[:, :0], state)
    assert state[0].position.tolist() == [44, 11]
    assert model.initial_state(3)[1].position.tolist() == [0, 0, 0]


@both
@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences_restart_at_zero_or_where_they_are_told(rotary: str, causal: bool) -> None:
    model, x, bounds = model_of(rotary, causal=causal), ids(1), torch.tensor(EDGES)
    parts = list(itertools.pairwise(EDGES))
    close(model(x, bounds), torch.cat([model(x[:, a:b]) for a, b in parts], 1))
    places = torch.randint(0, 90, x.shape)
    separate = [model(x[:, a:b], position_ids=places[:, a:b]) for a, b in parts]
    close(model(x, bounds, places), torch.cat(separate, 1))


def test_positions_go_with_tokens_that_are_visited_in_another_order() -> None:
    layers, x = model_of("inner").layers, torch.randn(2, 13, DIM, dtype=torch.float64)
    places, move = torch.randint(0, 90, (2, 13)), torch.randperm(13)
    found = layers(x, orders=[torch.stack([move, move.argsort()])], position_ids=places)
    close(found, layers(x[:, move], position_ids=places[:, move])[:, move.argsort()])


def test_gradient_checkpointing_passes_positions_on() -> None:
    model, x, places = model_of("inner").train(), ids(), torch.randint(0, 90, (2, 13))
    y = model(x, position_ids=places)
    model.set_grad_checkpointing()
    close(model(x, position_ids=places), y)


@pytest.mark.parametrize("pattern", [("mamba",), ("rwkv7",), ("mlstm", "slstm", "rwkv7")])
def test_mixers_that_know_no_positions_ignore_them(pattern: tuple[str, ...]) -> None:
    model, x, places = SequenceModel(VOCAB, DIM, 3, pattern), ids(), torch.randint(0, 90, (2, 13))
    assert torch.equal(model(x, position_ids=places), model(x))
    y, state = model.prefill(x, position_ids=places)
    same, other = model.prefill(x)
    assert torch.equal(y, same)
    assert torch.equal(model.step(x[:, 0], state, places[:, 0])[0], model.step(x[:, 0], other)[0])


@both
def test_scripts_and_exports_with_positions_of_any_length(rotary: str) -> None:
    model, x, places = model_of(rotary), ids(), torch.randint(0, 90, (2, 13))
    embedded = model.embedding(x).detach()
    scripted = torch.jit.script(model.layers)
    close(scripted(embedded, position_ids=places), model.layers(embedded, position_ids=places))
    steps = torch.export.Dim("steps", min=2, max=200)
    shapes = {"x": {1: steps}, "cu_seqlens": None, "position_ids": {1: steps}}
    program = torch.export.export(model, (x, None, places), dynamic_shapes=shapes)
    x, places = ids(length=100), torch.randint(0, 90, (2, 100))
    close(program.module()(x, None, places), model(x, position_ids=places))


@pytest.mark.parametrize("chunk", [2, 2048])
def test_generation_goes_on_from_the_positions_of_the_prompts(chunk: int) -> None:
    model, greedy = model_of("inner"), Sampling(max_new_tokens=4)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
    places = [[0, 30, 31], [5, 4, 3, 2, 1, 70, 2], [8, 8]]  # the last two say where new tokens stand, too
    found = generate(model, prompts, greedy, position_ids=places, prefill_chunk=chunk).tokens
    for row, (prompt, told) in enumerate(zip(prompts, places, strict=True)):
        tokens, all_places = list(prompt), list(told)
        while len(all_places) < len(prompt) + 4:
            all_places.append(all_places[-1] + 1)
        for _ in range(4):
            logits = model(torch.tensor([tokens]), position_ids=torch.tensor([all_places[: len(tokens)]]))
            tokens.append(int(logits[0, -1].argmax()))
        assert found[row].tolist() == tokens[len(prompt) :]
    plain = generate(model, prompts, greedy).tokens
    counted = [list(range(len(prompt))) for prompt in prompts]
    assert [t.tolist() for t in plain] == [
        t.tolist() for t in generate(model, prompts, greedy, position_ids=counted).tokens
    ]


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (torch.zeros(2, 12, dtype=torch.long), r"position_ids must be int64 \[B, T\].*got \[2, 12\] for \[2, 13\]"),
        (torch.zeros(1, 13, dtype=torch.long), r"give every row its positions"),
        (torch.zeros(2, 13), r"got torch.float32.*convert them with .long\(\)"),
        ([1, 2], r"got .*list.*convert them with torch.tensor"),
    ],
)
def test_positions_that_do_not_fit_are_refused(places: Any, message: str) -> None:
    model, x = model_of("inner"), ids()
    for call in (lambda: model(x, position_ids=places), lambda: model.prefill(x, position_ids=places)):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match=r"must be int64 \[B\]|convert them"):
        model.step(x[:, 0], model.initial_state(2), places)


@pytest.mark.parametrize(
    ("places", "more", "message"),
    [
        ([[0, 1]], {}, "whole number for each token of the 2 prompts .got 1 rows"),
        ([[0, 1], [1]], {}, r"got torch.int64 \[1\] in row 1"),
        ([[0, 1], [1, 2]], {"pad_id": 0}, "do not go with pad_id"),
    ],
)
def test_positions_of_prompts_that_do_not_fit_are_refused(places: Any, more: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model_of("inner"), [[1, 2], [3, 4]], position_ids=places, **more)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rotary": "pairs"}, "rotary must be 'head' or 'inner'"),
        ({"rotary": "head", "num_heads": 64}, "needs an even width .got 1 channels in a head"),
        ({"rotary": "head", "rotary_theta": -1.0}, "rotary_theta"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixers.MLSTM(DIM, **options)
