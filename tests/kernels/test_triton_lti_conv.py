"""The Triton linear systems against the definition, in Triton's interpreter on CPU tensors."""

from __future__ import annotations

from functools import partial

import interpreted
import pytest
import torch
from interpreted import BOUNDS, MARKS
from parity import assert_close, cast, draw, run_with_gradients

from sinuous.core.ops.laws import LAWS

pytestmark = MARKS

LTI = LAWS["lti_conv"]
single = partial(interpreted.single, LTI)
compare = partial(interpreted.compare, LTI)
OF_KERNELS = pytest.mark.parametrize("variant", ["plain", "diagonal"])


@pytest.mark.parametrize(
    ("variant", "batch", "length"),
    [
        ("diagonal", 2, 0),
        ("diagonal", 0, 3),
        ("diagonal", 2, 1),
        ("diagonal", 1, 63),
        ("diagonal", 2, 131),
        ("plain", 1, 65),
        ("bilinear", 2, 70),
        ("full", 1, 9),
    ],
)
def test_equals_the_definition(variant: str, batch: int, length: int) -> None:
    compare(single(variant, batch, length))


@pytest.mark.parametrize("absent", ["D", "initial_state"])
def test_each_optional_argument_may_be_absent(absent: str) -> None:
    arguments = single("diagonal", 1, 9)
    del arguments[absent]
    compare(arguments)


def test_channels_in_several_blocks_with_a_masked_tail() -> None:
    compare(cast(LTI.wide(torch.randn, 1, 5, 1), torch.float32))


@OF_KERNELS
def test_reverse(variant: str) -> None:
    compare({**single(variant, 1, 70), "reverse": True})


@pytest.mark.parametrize("reverse", [False, True])
@OF_KERNELS
def test_packed(variant: str, reverse: bool) -> None:
    arguments = single(variant, 1, BOUNDS[-1], len(BOUNDS) - 1)
    compare({**arguments, "cu_seqlens": torch.tensor(BOUNDS, dtype=torch.int32), "reverse": reverse})


@pytest.mark.parametrize("packed", [False, True])
def test_time_in_one_piece(monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    from sinuous.kernels.triton import lti_conv

    monkeypatch.setattr(lti_conv, "SERIAL_PROGRAMS", 1)
    sequences = len(BOUNDS) - 1 if packed else 1
    arguments = single("diagonal", 1, BOUNDS[-1], sequences)
    compare({**arguments, "cu_seqlens": torch.tensor(BOUNDS)} if packed else arguments)


def test_programs_that_take_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from sinuous.kernels.triton import lti_conv

    monkeypatch.setattr(lti_conv, "PROGRAMS", 2)
    compare(single("diagonal", 2, 200))


def test_slow_modes_beside_quick_ones() -> None:
    """λ from 1 - 1e-6 to 0, over many chunks."""
    arguments = single("diagonal", 1, 400)
    decay = torch.logspace(-5, 4, arguments["A"][..., 0].numel()).view_as(arguments["A"][..., 0])
    arguments["A"] = torch.stack([-decay, arguments["A"][..., 1]], -1)
    arguments["dt"] = torch.full_like(arguments["dt"], 0.1)
    compare(arguments)


def test_nothing_leaks_between_sequences() -> None:
    arguments = single("diagonal", 1, BOUNDS[-1], len(BOUNDS) - 1) | {"cu_seqlens": torch.tensor(BOUNDS)}
    clean, state = LTI.call(**arguments, return_state=True, backend="triton")
    arguments["u"][0, 70] = torch.nan  # in the sequence of steps 64 to 126
    arguments["initial_state"][4] = torch.inf
    found, end = LTI.call(**arguments, return_state=True, backend="triton")
    kept = torch.ones(BOUNDS[-1], dtype=torch.bool)
    kept[64:127] = False
    assert torch.equal(found[0, kept], clean[0, kept])
    assert torch.equal(end[[0, 1, 2, 3, 5, 6]], state[[0, 1, 2, 3, 5, 6]])
    assert found[0, 70:127].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype: torch.dtype) -> None:
    arguments = single("diagonal", 1, 70)
    arguments["u"] = arguments["u"].to(dtype)
    found = run_with_gradients(LTI, "triton", arguments)
    wanted = run_with_gradients(LTI, "recurrent", cast(arguments, torch.float64))
    assert found["y"].dtype == dtype
    assert found["state"].dtype == torch.float32
    outputs = {k: v for k, v in wanted.items() if k in ("y", "state")}
    assert_close({k: found[k] for k in outputs}, outputs, LTI.bf16[0])
    assert_close(found, wanted, LTI.bf16[1])


@pytest.mark.parametrize("variant", ["plain", "diagonal", "bilinear"])
def test_double_precision(variant: str) -> None:
    compare(draw(LTI, variant, 1, 70), bound=1e-11)


def test_inputs_that_are_not_contiguous() -> None:
    arguments = single("diagonal", 2, 5)
    strided = arguments | {"u": arguments["u"].mT.contiguous().mT}
    assert not strided["u"].is_contiguous()
    compare(strided)
