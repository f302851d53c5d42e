"""The Triton linear scan against the definition, in Triton's interpreter on CPU tensors."""

from __future__ import annotations

from functools import partial

import interpreted
import pytest
import torch
from interpreted import BOUNDS, MARKS
from parity import assert_close, cast, draw, error, run_with_gradients

from sinuous.core.ops.laws import LAWS
from sinuous.kernels.arguments import LinearScan

pytestmark = MARKS

SCAN = LAWS["linear_scan"]
single = partial(interpreted.single, SCAN)
compare = partial(interpreted.compare, SCAN)


@pytest.mark.parametrize(
    ("variant", "batch", "length"),
    [
        ("full", 2, 0),
        ("full", 0, 3),
        ("full", 2, 1),
        ("full", 1, 63),
        ("full", 2, 65),
        ("plain", 1, 130),
        ("constant", 1, 65),
        ("complex", 1, 65),
        ("complex_constant", 1, 65),
        ("one_channel", 1, 65),
    ],
)
def test_equals_the_definition(variant: str, batch: int, length: int) -> None:
    compare(single(variant, batch, length))


@pytest.mark.parametrize("absent", ["reset", "initial_state"])
def test_each_optional_argument_may_be_absent(absent: str) -> None:
    arguments = single("complex", 1, 9)
    del arguments[absent]
    compare(arguments)


def test_channels_in_two_blocks_with_a_masked_tail() -> None:
    x, a = torch.randn(2, 1, 5, 70)
    compare({"x": x, "a": a.sigmoid()})


@pytest.mark.parametrize("variant", ["full", "complex"])
def test_reverse(variant: str) -> None:
    compare({**single(variant, 1, 70), "reverse": True})


def test_time_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    from sinuous.kernels.triton import linear_scan

    monkeypatch.setattr(linear_scan, "SERIAL_PROGRAMS", 1)
    compare(single("full", 1, 70))
    compare({**single("complex", 1, 130, len(BOUNDS) - 1), "cu_seqlens": torch.tensor(BOUNDS)})


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("variant", ["full", "complex_constant"])
def test_packed(variant: str, reverse: bool) -> None:
    arguments = single(variant, 1, BOUNDS[-1], len(BOUNDS) - 1)
    compare({**arguments, "cu_seqlens": torch.tensor(BOUNDS, dtype=torch.int32), "reverse": reverse})


@pytest.mark.parametrize("reverse", [False, True])
def test_chunk_states_are_those_of_the_definition(reverse: bool) -> None:
    arguments = single("full", 1, BOUNDS[-1], len(BOUNDS) - 1) | {"cu_seqlens": torch.tensor(BOUNDS)}
    args = LinearScan(**arguments, reverse=reverse)
    found, wanted = (torch.ops.sinuous.linear_scan(*args, form)[2] for form in ("triton", "recurrent"))
    assert error(found, wanted) <= 1e-6


def test_nothing_passes_a_reset() -> None:
    """Neither a NaN before it nor the gradient after it, over the edges of chunks as within one."""
    arguments = single("plain", 1, 80)
    reset = torch.zeros(1, 80, dtype=torch.bool)
    reset[0, [20, 70]] = True
    x = arguments["x"].clone()
    x[0, 5] = torch.nan
    x.requires_grad_()
    y = SCAN.call(x, arguments["a"], reset=reset, backend="triton")
    wanted = SCAN.call(x, arguments["a"], reset=reset, backend="recurrent")
    assert torch.equal(y.isnan(), wanted.isnan())
    assert not y[0, 20:].isnan().any()
    torch.testing.assert_close(y, wanted, equal_nan=True)
    weight = torch.ones_like(y)
    weight[0, 75] = torch.nan
    (gradient,) = torch.autograd.grad(y, x, weight)
    assert gradient[0, 70:76].isnan().all()
    assert not gradient[0, :70].isnan().any()


@pytest.mark.parametrize(
    ("variant", "dtype"), [("full", torch.bfloat16), ("constant", torch.bfloat16), ("full", torch.float16)]
)
def test_half_precision_inputs(variant: str, dtype: torch.dtype) -> None:
    arguments = single(variant, 1, 65)
    arguments |= cast({k: arguments[k] for k in SCAN.time}, dtype)
    found = run_with_gradients(SCAN, "triton", arguments)
    wanted = run_with_gradients(SCAN, "recurrent", cast(arguments, torch.float64))
    assert found["y"].dtype == dtype
    assert found["state"].dtype == torch.float32
    assert_close(found, {k: wanted[k] for k in ("y", "state")}, SCAN.bf16[0])
    assert_close(found, wanted, SCAN.bf16[1])


@pytest.mark.parametrize("variant", ["full", "complex"])
def test_double_precision(variant: str) -> None:
    compare(draw(SCAN, variant, 1, 65), 1e-12)


def test_inputs_that_are_not_contiguous() -> None:
    arguments = single("complex", 2, 9)
    strided = {k: v.repeat_interleave(2, -1)[..., ::2] for k, v in arguments.items()}
    assert not strided["x"].is_contiguous()
    assert_close(run_with_gradients(SCAN, "triton", strided), run_with_gradients(SCAN, "recurrent", arguments), 1e-4)


def test_dispatch_prefers_triton_when_interpreting() -> None:
    from sinuous.core.ops import dispatch

    for dtype in (torch.float32, torch.complex64):
        assert dispatch.choose("linear_scan", SCAN.family.forms, "", torch.device("cpu"), dtype) == "triton"
