"""The Triton convolution against the definition, in Triton's interpreter on CPU tensors."""

from __future__ import annotations

from functools import partial

import interpreted
import pytest
import torch
from interpreted import MARKS
from parity import assert_close, cast, draw, run_with_gradients

from sinuous.core.ops.laws import LAWS

pytestmark = MARKS

CONVOLUTION = LAWS["causal_conv1d"]
BOUNDS = [0, 0, 2, 5, 37, 37, 70]
"""Empty sequences, sequences shorter than the filter, and boundaries off the edge of a tile."""

single = partial(interpreted.single, CONVOLUTION)
compare = partial(interpreted.compare, CONVOLUTION)


@pytest.mark.parametrize("length", [0, 1, 2, 63, 65, 130])
@pytest.mark.parametrize("variant", CONVOLUTION.variants)
def test_equals_the_definition(variant: str, length: int) -> None:
    compare(single(variant, 2, length))


def test_empty_batch() -> None:
    compare(single("full", 0, 3))


@pytest.mark.parametrize("absent", ["bias", "initial_state"])
def test_each_optional_argument_may_be_absent(absent: str) -> None:
    arguments = single("full", 1, 9)
    del arguments[absent]
    compare(arguments)


def test_channels_in_two_blocks_with_a_masked_tail() -> None:
    compare({"x": torch.randn(1, 35, 70), "weight": torch.randn(70, 3), "bias": torch.randn(70), "activation": "silu"})


@pytest.mark.parametrize("variant", ["full", "widest"])
def test_reverse(variant: str) -> None:
    compare({**single(variant, 2, 65), "reverse": True})


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("variant", CONVOLUTION.variants)
def test_packed(variant: str, reverse: bool) -> None:
    arguments = single(variant, 1, BOUNDS[-1], len(BOUNDS) - 1)
    compare({**arguments, "cu_seqlens": torch.tensor(BOUNDS), "reverse": reverse})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype: torch.dtype) -> None:
    arguments = single("full", 2, 65)
    arguments["x"] = arguments["x"].to(dtype)
    arguments["initial_state"] = arguments["initial_state"].to(dtype)
    found = run_with_gradients(CONVOLUTION, "triton", arguments)
    wanted = run_with_gradients(CONVOLUTION, "recurrent", cast(arguments, torch.float64))
    assert found["y"].dtype == dtype
    assert_close(found, {k: wanted[k] for k in ("y", "state")}, CONVOLUTION.bf16[0])
    assert_close(found, wanted, CONVOLUTION.bf16[1])


def test_float64() -> None:
    compare(draw(CONVOLUTION, "full", 2, 65), 1e-12)
