"""Wrong settings and prompts of generation end in a sentence that names the argument."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from sinuous.core.generation import Sampling, generate, stream
from sinuous.core.sequence_model import SequenceModel

NO_COUNT = (0, -1, 2.0, math.nan, "3", [3], True, torch.tensor([3]), np.array([3, 4]))
NO_NUMBER = (math.nan, math.inf, -1.0, "0.5", [0.5], None, torch.tensor([0.5, 1.0]), np.array([0.5]), True)
NO_IDS = (5, None, "abc", ["a"], [0.5], np.array([1, 2]), torch.tensor([1]), {"a": 1})
SETTINGS: dict[str, tuple[Any, ...]] = {
    "temperature": NO_NUMBER,
    "top_k": NO_COUNT,
    "top_p": (*(value for value in NO_NUMBER if value is not None), 0.0, 1.5),
    "min_p": (*(value for value in NO_NUMBER if value is not None), 1.5),
    "repetition_penalty": (*NO_NUMBER, 0.0),
    "max_new_tokens": (*NO_COUNT, None),
    "max_length": NO_COUNT,
    "stop_tokens": NO_IDS,
    "stop_sequences": (*NO_IDS, [[]], [1, 2], [["a"]]),
    "seed": (0.5, "1", [0.5], True, math.nan, 2**70, {"a": 1}),
}
CALLS: dict[str, tuple[Any, ...]] = {
    "model": (None, 3, "mamba", torch.nn.Linear(2, 2)),
    "prompts": (None, 5, 0.5, {"a": 1}, [None], [[1], None], [[[1]]], [["a"]], object()),
    "sampling": (0.8, "greedy", {"temperature": 1.0}),
    "pad_id": (0.0, "0", [0], math.nan, True),
    "prefill_chunk": (*NO_COUNT, None),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in SETTINGS.items() for value in values])
def test_a_wrong_setting_is_named(name: str, value: Any) -> None:
    options = {name: value} if name == "temperature" else {"temperature": 1.0, name: value}
    with pytest.raises(ValueError, match=rf"^{name} must .*\(got "):
        Sampling(**options)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in CALLS.items() for value in values])
@pytest.mark.parametrize("call", [generate, stream])
def test_a_wrong_argument_is_named(call: Any, name: str, value: Any) -> None:
    arguments = {"model": SequenceModel(13, 8, 1), "prompts": [[1, 2], [3]], name: value}
    with pytest.raises(ValueError, match=rf"^(a )?{name.removesuffix('s')}s? must .*\(got "):
        call(**arguments)


@pytest.mark.parametrize("prompts", [[], [[]], torch.zeros(2, 0).long(), torch.zeros(1, 2, 3).long(), [[13]], [[-1]]])
def test_prompts_without_tokens_or_with_strange_ones_are_told_by_row(prompts: Any) -> None:
    with pytest.raises(ValueError, match=r"row 0|row of at least one token"):
        generate(SequenceModel(13, 8, 1), prompts)
