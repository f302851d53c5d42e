"""The Triton selective scan against the definition, in Triton's interpreter on CPU tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity import assert_close, cast, draw, error, run_with_gradients

from sinuous.core.ops.laws import LAWS
from sinuous.kernels.triton import INTERPRETED

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 in the environment"),
]

SCAN = LAWS["selective_scan"]
BOUNDS = [0, 0, 5, 64, 64, 127, 128, 130]
"""Empty sequences first and within, boundaries on and off the edge of a chunk, sequences of one and two steps."""


def compare(arguments: dict[str, Any], bound: float = 1e-4) -> None:
    wanted = run_with_gradients(SCAN, "recurrent", arguments)
    assert_close(run_with_gradients(SCAN, "triton", arguments), wanted, bound)


def single(variant: str, batch: int, length: int, sequences: int | None = None) -> dict[str, Any]:
    return cast(draw(SCAN, variant, batch, length, sequences), torch.float32)


@pytest.mark.parametrize(
    ("variant", "batch", "length"),
    [
        ("full", 2, 0),
        ("full", 0, 3),
        ("full", 2, 1),
        ("full", 1, 63),
        ("full", 1, 65),
        ("full", 1, 130),
        ("plain", 2, 65),
        ("groups", 1, 65),
        ("one_channel", 1, 65),
    ],
)
def test_equals_the_definition(variant: str, batch: int, length: int) -> None:
    compare(single(variant, batch, length))


@pytest.mark.parametrize("absent", ["D", "z", "dt_bias", "initial_state"])
def test_each_optional_argument_may_be_absent(absent: str) -> None:
    arguments = single("full", 1, 9)
    del arguments[absent]
    compare(arguments)


def test_steps_without_softplus() -> None:
    arguments = single("full", 1, 9)
    compare({**arguments, "dt": arguments["dt"].abs(), "dt_bias": arguments["dt_bias"].abs(), "dt_softplus": False})


def test_softplus_over_its_whole_range() -> None:
    arguments = single("plain", 1, 9)
    arguments["dt"] = torch.linspace(-15, 40, arguments["dt"].numel()).view_as(arguments["dt"])
    compare(arguments)


def test_channels_in_two_blocks_with_a_masked_tail() -> None:
    u, dt, z = torch.randn(3, 1, 5, 70)
    compare({"u": u, "dt": dt, "z": z, "A": -torch.rand(70, 1), "B": torch.randn(1, 5, 1), "C": torch.randn(1, 5, 1)})


def test_reverse() -> None:
    compare({**single("full", 1, 130), "reverse": True})


def test_time_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    from sinuous.kernels.triton import selective_scan

    monkeypatch.setattr(selective_scan, "SERIAL_PROGRAMS", 1)
    compare(single("full", 1, 70))
    compare({**single("plain", 1, 130, len(BOUNDS) - 1), "cu_seqlens": torch.tensor(BOUNDS)})


@pytest.mark.parametrize("reverse", [False, True])
def test_packed(reverse: bool) -> None:
    arguments = single("full", 1, BOUNDS[-1], len(BOUNDS) - 1)
    compare({**arguments, "cu_seqlens": torch.tensor(BOUNDS, dtype=torch.int32), "reverse": reverse})


@pytest.mark.parametrize("reverse", [False, True])
def test_chunk_states_are_those_of_the_definition(reverse: bool) -> None:
    arguments = single("full", 1, BOUNDS[-1], len(BOUNDS) - 1)
    arguments |= {"cu_seqlens": torch.tensor(BOUNDS), "dt_softplus": True, "reverse": reverse}
    values = [arguments[name] for _, name in SCAN.family.arguments]
    found, wanted = (torch.ops.sinuous.selective_scan(*values, form)[2] for form in ("triton", "recurrent"))
    assert error(found, wanted) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype: torch.dtype) -> None:
    arguments = single("full", 1, 65)
    arguments |= cast({k: arguments[k] for k in SCAN.time}, dtype)
    found = run_with_gradients(SCAN, "triton", arguments)
    wanted = run_with_gradients(SCAN, "recurrent", cast(arguments, torch.float64))
    assert found["y"].dtype == dtype
    assert found["state"].dtype == torch.float32
    assert_close(found, {k: wanted[k] for k in ("y", "state")}, SCAN.bf16[0])
    assert_close(found, wanted, SCAN.bf16[1])


def test_float64() -> None:
    compare(draw(SCAN, "full", 1, 65), 1e-12)


def test_inputs_that_are_not_contiguous() -> None:
    arguments = single("full", 2, 9)
    strided = {k: v.repeat_interleave(2, -1)[..., ::2] for k, v in arguments.items()}
    assert not strided["u"].is_contiguous()
    assert_close(run_with_gradients(SCAN, "triton", strided), run_with_gradients(SCAN, "recurrent", arguments), 1e-4)


def test_dispatch_prefers_triton_when_interpreting() -> None:
    from sinuous.core.ops import dispatch

    chosen = dispatch.choose("selective_scan", SCAN.family.forms, "", torch.device("cpu"), torch.float32)
    assert chosen == "triton"
