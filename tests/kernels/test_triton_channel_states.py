"""Selective scan and Longhorn in Triton against their definitions, in Triton's interpreter on CPU tensors."""

from __future__ import annotations

import pytest
import torch
from interpreted import BOUNDS, MARKS, compare, single
from parity import assert_close, cast, draw, error, run_with_gradients

from sinuous.core.ops.laws import LAWS, Laws

pytestmark = MARKS

SCAN, LONGHORN = LAWS["selective_scan"], LAWS["longhorn"]

both = pytest.mark.parametrize("laws", [SCAN, LONGHORN], ids=lambda laws: laws.family.name)


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
    ],
)
@both
def test_equals_the_definition(laws: Laws, variant: str, batch: int, length: int) -> None:
    compare(laws, single(laws, variant, batch, length))


@pytest.mark.parametrize(
    ("laws", "variant"), [(SCAN, "groups"), (SCAN, "one_channel"), (LONGHORN, "one_number")], ids=["G", "D=1", "D=N=1"]
)
def test_other_shapes(laws: Laws, variant: str) -> None:
    compare(laws, single(laws, variant, 1, 65))


@pytest.mark.parametrize("absent", ["D", "z", "dt_bias", "initial_state"])
@both
def test_each_optional_argument_may_be_absent(laws: Laws, absent: str) -> None:
    arguments = single(laws, "full", 1, 9)
    del arguments[absent]
    compare(laws, arguments)


def test_steps_without_softplus() -> None:
    arguments = single(SCAN, "full", 1, 9)
    compare(
        SCAN, {**arguments, "dt": arguments["dt"].abs(), "dt_bias": arguments["dt_bias"].abs(), "dt_softplus": False}
    )


def test_softplus_over_its_whole_range() -> None:
    arguments = single(SCAN, "plain", 1, 9)
    arguments["dt"] = torch.linspace(-15, 40, arguments["dt"].numel()).view_as(arguments["dt"])
    compare(SCAN, arguments)


@pytest.mark.parametrize("size", [0.0, 1e-3, 30.0])
def test_gates_and_keys_of_every_size(size: float) -> None:
    arguments = draw(LONGHORN, "full", 1, 70)
    arguments["dt"] = torch.linspace(-30, 15, arguments["dt"].numel(), dtype=torch.float64).view_as(arguments["dt"])
    arguments["k"] *= size
    wanted = run_with_gradients(LONGHORN, "recurrent", arguments)
    assert_close(run_with_gradients(LONGHORN, "triton", cast(arguments, torch.float32)), wanted, 1e-5)


def test_channels_in_two_blocks_with_a_masked_tail() -> None:
    u, dt, z = torch.randn(3, 1, 5, 70)
    one = {"B": torch.randn(1, 5, 1), "C": torch.randn(1, 5, 1)}
    compare(SCAN, {"u": u, "dt": dt, "z": z, "A": -torch.rand(70, 1), **one})
    compare(LONGHORN, {"x": u, "dt": dt, "z": z, "k": one["B"], "q": one["C"]})


@both
def test_reverse(laws: Laws) -> None:
    compare(laws, {**single(laws, "full", 1, 130), "reverse": True})


@both
def test_time_in_one_piece(laws: Laws, monkeypatch: pytest.MonkeyPatch) -> None:
    from sinuous.kernels.triton import channel_states

    monkeypatch.setattr(channel_states, "SERIAL_PROGRAMS", 1)
    compare(laws, single(laws, "full", 1, 70))
    compare(laws, {**single(laws, "plain", 1, 130, len(BOUNDS) - 1), "cu_seqlens": torch.tensor(BOUNDS)})


@pytest.mark.parametrize("reverse", [False, True])
@both
def test_packed(laws: Laws, reverse: bool) -> None:
    arguments = single(laws, "full", 1, BOUNDS[-1], len(BOUNDS) - 1)
    compare(laws, {**arguments, "cu_seqlens": torch.tensor(BOUNDS, dtype=torch.int32), "reverse": reverse})


@pytest.mark.parametrize("reverse", [False, True])
@both
def test_chunk_states_are_those_of_the_definition(laws: Laws, reverse: bool) -> None:
    arguments = single(laws, "full", 1, BOUNDS[-1], len(BOUNDS) - 1)
    arguments |= {"cu_seqlens": torch.tensor(BOUNDS), "dt_softplus": True, "reverse": reverse}
    values = [arguments[name] for name in laws.family.arguments._fields]
    op = getattr(torch.ops.sinuous, laws.family.name)
    found, wanted = (op(*values, form)[2] for form in ("triton", "recurrent"))
    assert error(found, wanted) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@both
def test_half_precision_inputs(laws: Laws, dtype: torch.dtype) -> None:
    arguments = single(laws, "full", 1, 65)
    arguments |= cast({k: arguments[k] for k in laws.time}, dtype)
    found = run_with_gradients(laws, "triton", arguments)
    wanted = run_with_gradients(laws, "recurrent", cast(arguments, torch.float64))
    assert found["y"].dtype == dtype
    assert found["state"].dtype == torch.float32
    assert_close(found, {k: wanted[k] for k in ("y", "state")}, laws.bf16[0])
    assert_close(found, wanted, laws.bf16[1])


@both
def test_float64(laws: Laws) -> None:
    compare(laws, draw(laws, "full", 1, 65), 1e-12)


@both
def test_inputs_that_are_not_contiguous(laws: Laws) -> None:
    arguments = single(laws, "full", 2, 9)
    strided = {k: v.repeat_interleave(2, -1)[..., ::2] for k, v in arguments.items()}
    assert not strided["z"].is_contiguous()
    assert_close(run_with_gradients(laws, "triton", strided), run_with_gradients(laws, "recurrent", arguments), 1e-4)


@both
def test_dispatch_prefers_triton_when_interpreting(laws: Laws) -> None:
    from sinuous.core.ops import dispatch

    chosen = dispatch.choose(laws.family.name, laws.family.forms, "", torch.device("cpu"), torch.float32)
    assert chosen == "triton"
