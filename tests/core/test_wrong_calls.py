"""Wrong inputs to the calls of mixers, stacks, models and layers end in a sentence that names the argument."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sinuous.core import mixers
from sinuous.core.nn import Recurrent
from sinuous.core.sequence_model import SequenceModel
from sinuous.core.stack import Stack

DIM, BATCH, STEPS = 24, 3, 12
MIXERS = mixers.list_mixers()
CAUSAL = [name for name in MIXERS if mixers.mixer_class(name).causal]


def refused(call: Callable[..., object], name: str, *arguments: Any, **options: Any) -> None:
    """The call ends in a ValueError that names the argument and says what it got."""
    with pytest.raises(ValueError, match=rf"(^|\W){name}\b.*(\(got |is on )"):
        call(*arguments, **options)


def misunderstood(name: str, calls: Mapping[str, Callable[[], object]]) -> list[str]:
    """Those of the calls that do not end in a ValueError that names the argument and says what it got."""
    wrong = []
    for kind, call in calls.items():
        try:
            refused(call, name)
        except (Exception, pytest.fail.Exception) as error:
            wrong.append(f"{kind}: {type(error).__name__} {str(error)[:200]}")
    return wrong


def stepwise(kind: str, x: Any) -> Any:
    """What a step gets where a sequence would be `x`."""
    if kind == "without a batch":
        return x[0]
    return x[:, 0] if isinstance(x, Tensor) and x.ndim > 1 else x


def sequence(*shape: int) -> Tensor:
    return torch.randn(*(shape or (BATCH, STEPS, DIM)))


INPUTS: dict[str, Any] = {
    "narrow": sequence(BATCH, STEPS, DIM - 1),
    "wide": sequence(BATCH, STEPS, 2 * DIM),
    "of width one": sequence(BATCH, STEPS, 1),
    "without a batch": sequence(STEPS, DIM),
    "with an axis more": sequence(1, BATCH, STEPS, DIM),
    "of no axes": torch.tensor(1.0),
    "float64": sequence().double(),
    "bfloat16": sequence().bfloat16(),
    "whole numbers": torch.ones(BATCH, STEPS, DIM, dtype=torch.long),
    "flags": torch.ones(BATCH, STEPS, DIM, dtype=torch.bool),
    "complex": torch.ones(BATCH, STEPS, DIM, dtype=torch.complex64),
    "on meta": sequence().to("meta"),
    "None": None,
    "a number": 0.5,
    "a word": "abc",
    "a list": [[[0.5] * DIM] * STEPS] * BATCH,
    "an array": np.zeros((BATCH, STEPS, DIM), dtype=np.float32),
}
BOUNDARIES: dict[str, Any] = {
    "a list": [0, STEPS],
    "a word": "abc",
    "a number": STEPS,
    "floats": torch.tensor([0.0, STEPS]),
    "without a beginning": torch.tensor([1, STEPS]),
    "too short": torch.tensor([0, STEPS - 1]),
    "too long": torch.tensor([0, STEPS + 1]),
    "falling": torch.tensor([0, 8, 4, STEPS]),
    "one number": torch.tensor([0]),
    "two axes": torch.tensor([[0, STEPS]]),
}
GRIDS: dict[str, Any] = {
    "too many cells": (3, 5),
    "too few cells": (3, 3),
    "negative": (-3, -4),
    "four axes": (3, 2, 2, 1),
    "no axes": (),
    "a number": STEPS,
    "floats": (3.0, 4.0),
    "a word": "3x4",
    "None in it": (3, None),
}


@pytest.mark.parametrize("name", ["ss2d", "plstm_grid"])
def test_a_mixer_of_two_axes_refuses_a_third(name: str) -> None:
    mixer = mixers.build_mixer(name, DIM)
    with pytest.raises(ValueError, match=r"grid must have 2 sides for this mixer .got 3 x 2 x 2"):
        mixer(torch.randn(BATCH, STEPS, DIM), grid=(3, 2, 2))


@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_names_a_wrong_input(name: str) -> None:
    mixer = mixers.build_mixer(name, DIM)
    assert misunderstood("x", {kind: partial(mixer, x) for kind, x in INPUTS.items()}) == []
    if mixer.causal:
        state = mixer.initial_state(BATCH)
        for rest in ((), (state,)):
            assert misunderstood("x", {kind: partial(mixer.prefill, x, *rest) for kind, x in INPUTS.items()}) == []
        steps = {kind: partial(mixer.step, stepwise(kind, x), state) for kind, x in INPUTS.items()}
        assert misunderstood("x(_t)?", steps) == []


@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_names_wrong_boundaries_and_a_wrong_grid(name: str) -> None:
    mixer, row = mixers.build_mixer(name, DIM), sequence(1, STEPS, DIM)
    assert misunderstood("cu_seqlens", {kind: partial(mixer, row, edges) for kind, edges in BOUNDARIES.items()}) == []
    assert misunderstood("grid", {kind: partial(mixer, row, None, grid) for kind, grid in GRIDS.items()}) == []


@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_takes_packed_sequences_in_one_row_only(name: str) -> None:
    mixer = mixers.build_mixer(name, DIM)
    refused(mixer, "packed input has batch size 1", sequence(), torch.tensor([0, STEPS]))
    with pytest.raises(ValueError, match=r"cu_seqlens.*have no grid"):
        mixer(sequence(1, STEPS, DIM), torch.tensor([0, STEPS]), (3, 4))


def wrong_states(mixer: mixers.Mixer) -> dict[str, Any]:
    state = mixer.initial_state(BATCH)
    other = mixers.build_mixer("rwkv4" if type(mixer).__name__ != "RWKV4" else "mamba", DIM)
    wide = mixers.build_mixer(NAMES[type(mixer)], 2 * DIM)
    return {
        "of one row": mixer.initial_state(1),
        "of another batch": mixer.initial_state(BATCH + 1),
        "of another mixer": other.initial_state(BATCH),
        "of another width": wide.initial_state(BATCH),
        "with a part more": (*state, state[0]),
        "with a part less": tuple(state)[:-1],
        "one tensor": state[0],
        "of arrays": type(state)(*(part.numpy() for part in state)),
        "a number": 3,
        "a word": "abc",
        "a list": [0.0],
        "a dictionary": dict(state._asdict()),
    }


NAMES = {mixers.mixer_class(name): name for name in MIXERS}


@pytest.mark.parametrize("name", CAUSAL)
def test_a_mixer_names_a_wrong_state(name: str) -> None:
    mixer = mixers.build_mixer(name, DIM)
    states = wrong_states(mixer)
    x = sequence()
    assert misunderstood("state", {kind: partial(mixer.prefill, x, state) for kind, state in states.items()}) == []
    assert misunderstood("state", {kind: partial(mixer.step, x[:, 0], state) for kind, state in states.items()}) == []


BATCH_SIZES = (-1, 2.0, "2", None, [2], True, math.nan, torch.tensor([2]))


@pytest.mark.parametrize("name", CAUSAL)
def test_a_mixer_names_a_wrong_batch_size(name: str) -> None:
    mixer = mixers.build_mixer(name, DIM)
    sizes = {str(size): partial(mixer.initial_state, size) for size in BATCH_SIZES}
    assert misunderstood("batch_size", sizes) == []
    assert all(part.shape[0] == 0 for part in mixer.initial_state(0))


@functools.cache
def stacks() -> dict[str, Any]:
    return {
        "stack": Stack(DIM, 2, ["mamba", "mlstm"]),
        "sharing stack": Stack(DIM, 2, "rwkv7"),
        "post-norm": Stack(DIM, 2, "gla", norm_placement="post"),
    }


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", stacks())
def test_a_stack_names_a_wrong_input(name: str, kind: str) -> None:
    stack, x = stacks()[name], INPUTS[kind]
    if kind in ("float64", "bfloat16"):
        return  # a residual stream need not have the dtype of the parameters
    refused(stack, "x", x)
    refused(stack.prefill, "x", x)
    refused(stack.forward_intermediates, "x", x, taps=[0])
    refused(stack.step, "x(_t)?", stepwise(kind, x), stack.initial_state(BATCH))


def wrong_states_of_a_stack(stack: Any) -> dict[str, Any]:
    state = stack.initial_state(BATCH)
    return {
        "of a block more": (*state, state[0]),
        "of a block less": state[:-1],
        "turned": state[::-1],
        "of one row": stack.initial_state(1),
        "of another batch": stack.initial_state(BATCH + 1),
        "of one block": state[0],
        "with a tensor": (state[0][0], state[1]),
        "a number": 3,
        "a word": "ab",
        "a dictionary": {0: state[0], 1: state[1]},
    }


@pytest.mark.parametrize("kind", wrong_states_of_a_stack(Stack(DIM, 2, "mamba")))
@pytest.mark.parametrize("name", stacks())
def test_a_stack_names_a_wrong_state(name: str, kind: str) -> None:
    stack = stacks()[name]
    if kind == "turned" and name != "stack":
        return  # blocks of one kind have states of one form
    state = wrong_states_of_a_stack(stack)[kind]
    refused(stack.prefill, "state", sequence(), state)
    refused(stack.step, "state", sequence()[:, 0], state)


@pytest.mark.parametrize("taps", [3, None, [2], [-1], ["a"], [0.5]], ids=str)
def test_a_stack_names_wrong_taps(taps: Any) -> None:
    refused(Stack(DIM, 2).forward_intermediates, "taps", sequence(), taps=taps)


VOCAB = 13
IDS: dict[str, Any] = {
    "above the vocabulary": torch.tensor([[1, VOCAB]]),
    "negative": torch.tensor([[1, -1]]),
    "without a batch": torch.tensor([1, 2]),
    "with an axis more": torch.tensor([[[1, 2]]]),
    "flags": torch.tensor([[True, False]]),
    "small integers": torch.tensor([[1, 2]], dtype=torch.int8),
    "complex": torch.ones(1, 2, DIM, dtype=torch.complex64),
    "narrow embeddings": torch.randn(1, 2, DIM - 1),
    "embeddings without a batch": torch.randn(2, DIM),
    "on meta": torch.tensor([[1, 2]], device="meta"),
    "None": None,
    "a number": 3,
    "a word": "abc",
    "a list": [[1, 2]],
    "an array": np.array([[1, 2]]),
}


@pytest.mark.parametrize("kind", IDS)
def test_a_model_names_wrong_ids(kind: str) -> None:
    model, x = SequenceModel(VOCAB, DIM, 2), IDS[kind]
    name = "(x|ids|embeddings)"
    refused(model, name, x)
    refused(model.prefill, name, x)
    x_t = x[:, -1] if isinstance(x, Tensor) and x.ndim > 1 else x
    refused(model.step, name, torch.tensor(1) if kind == "without a batch" else x_t, model.initial_state(1))


def test_padding_of_the_vocabulary_can_be_embedded() -> None:
    assert SequenceModel(VOCAB, DIM, 1, pad_vocab_multiple=16)(torch.tensor([[15]])).shape == (1, 1, 16)


@pytest.mark.parametrize("size", BATCH_SIZES, ids=str)
def test_models_and_layers_name_a_wrong_batch_size(size: Any) -> None:
    for module in (SequenceModel(VOCAB, DIM, 2), Stack(DIM, 2), Recurrent("mamba", 5, 8)):
        refused(module.initial_state, "batch_size", size)


LAYER_INPUTS: dict[str, Any] = {
    "narrow": sequence(STEPS, BATCH, 4),
    "with an axis more": sequence(1, STEPS, BATCH, 5),
    "of one axis": sequence(5),
    "float64": sequence(STEPS, BATCH, 5).double(),
    "whole numbers": torch.ones(STEPS, BATCH, 5, dtype=torch.long),
    "on meta": sequence(STEPS, BATCH, 5).to("meta"),
    "None": None,
    "a number": 3,
    "a word": "abc",
    "a list": [[[0.5] * 5]],
    "an array": np.zeros((STEPS, BATCH, 5), dtype=np.float32),
}


@pytest.mark.parametrize("kind", LAYER_INPUTS)
@pytest.mark.parametrize("hidden_size", [5, 8])
def test_a_layer_names_a_wrong_input(kind: str, hidden_size: int) -> None:
    layer, x = Recurrent("mamba", 5, hidden_size), LAYER_INPUTS[kind]
    refused(layer, "x", x)
    x_t = x[0] if isinstance(x, Tensor) and x.ndim > 1 else x
    refused(layer.step, "x(_t)?", x_t, layer.initial_state(BATCH))


@pytest.mark.parametrize("kind", ["of one row", "of another batch", "of another mixer", "a part more", 3, "ab", [None]])
def test_a_layer_names_a_wrong_state(kind: Any) -> None:
    layer = Recurrent("mamba", 5, 8, num_layers=2)
    states = {
        "of one row": layer.initial_state(1),
        "of another batch": layer.initial_state(BATCH + 1),
        "of another mixer": Recurrent("gla", 5, 8, num_layers=2).initial_state(BATCH),
        "a part more": (*layer.initial_state(BATCH), None),
    }
    state = kind if isinstance(kind, list) else states.get(kind, kind)
    refused(layer, "state", sequence(STEPS, BATCH, 5), state)
    refused(layer.step, "state", sequence(BATCH, 5), state)
