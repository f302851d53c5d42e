"""The Triton kernels of ssd against the definition, in Triton's interpreter on CPU tensors."""

from __future__ import annotations

from functools import partial

import interpreted
import pytest
import torch
from interpreted import BOUNDS, MARKS
from parity import assert_close, cast, draw, error, run_with_gradients

from sinuous.core.ops.laws import LAWS

pytestmark = MARKS

SSD = LAWS["ssd"]
single = partial(interpreted.single, SSD)
compare = partial(interpreted.compare, SSD)


@pytest.mark.parametrize(("batch", "length"), [(2, 0), (0, 3), (2, 1), (2, 63), (1, 64), (2, 65), (1, 130)])
@pytest.mark.parametrize("variant", SSD.variants)
def test_equals_the_definition(variant: str, batch: int, length: int) -> None:
    compare(single(variant, batch, length))


def test_states_in_several_blocks_with_masked_tails() -> None:
    q, k = torch.randn(2, 1, 70, 2, 37)
    compare({"q": q, "k": k, "v": torch.randn(1, 70, 4, 41), "log_decay": -torch.rand(1, 70, 4)})


def test_more_heads_than_a_program_over_gates_takes() -> None:
    q, k = torch.randn(2, 1, 5, 1, 3)
    compare({"q": q, "k": k, "v": torch.randn(1, 5, 19, 2), "log_decay": -torch.rand(1, 5, 19)})


def test_heads_of_a_group_in_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    from sinuous.kernels.triton import matrix_states

    arguments = single("full", 2, 70)
    for programs in (1, 8, 10**6):
        monkeypatch.setattr(matrix_states, "PROGRAMS", programs)
        compare(arguments)


@pytest.mark.parametrize("variant", ["full", "constant"])
def test_reverse(variant: str) -> None:
    compare({**single(variant, 2, 130), "reverse": True})


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("variant", SSD.variants)
def test_packed(variant: str, reverse: bool) -> None:
    arguments = single(variant, 1, BOUNDS[-1], len(BOUNDS) - 1)
    compare({**arguments, "cu_seqlens": torch.tensor(BOUNDS, dtype=torch.int32), "reverse": reverse})


def test_the_absence_of_an_initial_state() -> None:
    arguments = single("full", 2, 70)
    del arguments["initial_state"]
    compare(arguments)


@pytest.mark.parametrize("reverse", [False, True])
def test_chunk_states_are_those_of_the_definition(reverse: bool) -> None:
    arguments = single("full", 1, BOUNDS[-1], len(BOUNDS) - 1)
    arguments |= {"cu_seqlens": torch.tensor(BOUNDS), "scale": None, "reverse": reverse}
    values = [arguments[name] for name in SSD.family.arguments._fields]
    found, wanted = (torch.ops.sinuous.ssd(*values, form)[2] for form in ("triton", "recurrent"))
    assert error(found, wanted) <= 1e-6


@pytest.mark.parametrize("value", [-torch.inf, -1e4])
def test_resets_and_all_but_resets(value: float) -> None:
    arguments = single("full", 2, 130)
    at = [0, 3, 4, 64, 100]
    arguments["log_decay"][0, at] = value
    found, wanted = (run_with_gradients(SSD, form, arguments) for form in ("triton", "recurrent"))
    assert_close(found, wanted, 1e-4)
    assert (found["log_decay"][0, at].abs() <= (0 if value == -torch.inf else 1e-4)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype: torch.dtype) -> None:
    arguments = single("full", 1, 65)
    arguments |= cast({k: arguments[k] for k in SSD.time}, dtype)
    found = run_with_gradients(SSD, "triton", arguments)
    wanted = run_with_gradients(SSD, "recurrent", cast(arguments, torch.float64))
    assert found["y"].dtype == dtype
    assert found["state"].dtype == torch.float32
    assert_close(found, {k: wanted[k] for k in ("y", "state")}, SSD.bf16[0])
    assert_close(found, wanted, SSD.bf16[1])


def test_float64() -> None:
    compare(draw(SSD, "full", 2, 70), 1e-12)


def test_inputs_that_are_not_contiguous() -> None:
    arguments = single("full", 2, 9)
    strided = {k: v.repeat_interleave(2, -1)[..., ::2] for k, v in arguments.items()}
    assert not strided["q"].is_contiguous()
    assert_close(run_with_gradients(SSD, "triton", strided), run_with_gradients(SSD, "recurrent", arguments), 1e-4)


def test_same_bits_twice() -> None:
    first, second = (run_with_gradients(SSD, "triton", single("full", 2, 70)) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
