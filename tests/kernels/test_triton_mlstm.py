"""The Triton kernels of mlstm against the definition, in Triton's interpreter on CPU tensors."""

from __future__ import annotations

from functools import partial

import interpreted
import pytest
import torch
from interpreted import BOUNDS, MARKS
from parity import assert_close, cast, draw, error, run, run_with_gradients

from sinuous.core.ops.laws import LAWS

pytestmark = MARKS

MLSTM = LAWS["mlstm"]
single = partial(interpreted.single, MLSTM)
compare = partial(interpreted.compare, MLSTM)


@pytest.mark.parametrize(("batch", "length"), [(2, 0), (0, 3), (2, 1), (1, 64), (2, 65), (1, 130)])
@pytest.mark.parametrize("variant", MLSTM.variants)
def test_equals_the_definition(variant: str, batch: int, length: int) -> None:
    compare(single(variant, batch, length))


def test_states_in_several_blocks_with_masked_tails() -> None:
    q, k = torch.randn(2, 1, 70, 2, 37)
    i, f = torch.randn(2, 1, 70, 2)
    compare({"q": q, "k": k, "v": torch.randn(1, 70, 2, 41), "input_gate": i, "forget_gate": f + 2})


def test_more_heads_than_a_program_over_gates_takes() -> None:
    q, k, v = torch.randn(3, 1, 5, 19, 2)
    i, f = torch.randn(2, 1, 5, 19)
    compare({"q": q, "k": k, "v": v, "input_gate": i, "forget_gate": f})


@pytest.mark.parametrize("variant", ["full", "unnormalised"])
def test_reverse(variant: str) -> None:
    compare({**single(variant, 2, 130), "reverse": True})


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("variant", MLSTM.variants)
def test_packed(variant: str, reverse: bool) -> None:
    arguments = single(variant, 1, BOUNDS[-1], len(BOUNDS) - 1)
    compare({**arguments, "cu_seqlens": torch.tensor(BOUNDS, dtype=torch.int32), "reverse": reverse})


@pytest.mark.parametrize("m", [-40.0, 40.0])
def test_the_source_of_the_last_stabiliser(m: float) -> None:
    """The gradient of m reaches an early step, or the m at the start, through chunks that leave it as it is."""
    arguments = draw(MLSTM, "full", 2, 150)
    C, n, _ = arguments["initial_state"]
    arguments["initial_state"] = (C, n, torch.full((2, 2), m, dtype=torch.float64))
    arguments["forget_gate"] += 4
    arguments["input_gate"][:, 10] = 30
    compare(arguments, 1e-10)


@pytest.mark.parametrize("reverse", [False, True])
def test_chunk_states_are_those_of_the_definition(reverse: bool) -> None:
    arguments = single("full", 1, BOUNDS[-1], len(BOUNDS) - 1)
    arguments |= dict(zip(("initial_C", "initial_n", "initial_m"), arguments["initial_state"], strict=True))
    arguments |= {"cu_seqlens": torch.tensor(BOUNDS), "reverse": reverse}
    arguments |= {"input_activation": "exp", "normalize": True, "return_state": True}
    values = [arguments[name] for name in MLSTM.family.arguments._fields]
    found, wanted = (torch.ops.sinuous.mlstm(*values, form)[4:] for form in ("triton", "recurrent"))
    assert len(found) == 3
    assert all(error(f, w) <= 1e-6 for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("gate", ["input_gate", "forget_gate"])
@pytest.mark.parametrize("value", [-torch.inf, -1e4, 1e4])
def test_extreme_gates(gate: str, value: float) -> None:
    arguments = single("full", 1, 130)
    arguments[gate][0, [0, 3, 4, 64, 100], 0] = value
    found = run_with_gradients(MLSTM, "triton", arguments)
    assert error(found["y"], run(MLSTM, "recurrent", cast(arguments, torch.float64))[0]) <= 1e-4
    # States are in units of e^m, and so in those of the m of single precision.
    assert_close(found, run_with_gradients(MLSTM, "recurrent", arguments), 1e-4)


@pytest.mark.parametrize("split", [64, 77])
def test_states_at_large_input_gates_are_in_units_of_the_m_that_is_returned(split: int) -> None:
    """m is rounded to single precision, by up to 5e-4 here, in the definition as in the kernels."""
    arguments = single("full", 1, 130)
    arguments["input_gate"] += 1e4
    found, wanted = (run_with_gradients(MLSTM, form, arguments) for form in ("triton", "recurrent"))
    assert_close(found, wanted, 1e-4)
    first, second = (
        {name: t[:, part] if name in MLSTM.time else t for name, t in arguments.items()}
        for part in (slice(None, split), slice(split, None))
    )
    second["initial_state"] = run(MLSTM, "triton", first)[1]
    exact, _ = run(MLSTM, "recurrent", cast(arguments, torch.float64))
    assert error(run(MLSTM, "triton", second)[0], exact[:, split:]) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype: torch.dtype) -> None:
    arguments = single("full", 1, 65)
    arguments |= cast({k: arguments[k] for k in MLSTM.time}, dtype)
    found = run_with_gradients(MLSTM, "triton", arguments)
    wanted = run_with_gradients(MLSTM, "recurrent", cast(arguments, torch.float64))
    assert found["y"].dtype == dtype
    assert found["state.0"].dtype == torch.float32
    assert_close(found, {k: v for k, v in wanted.items() if k.startswith(("y", "state"))}, MLSTM.bf16[0])
    assert_close(found, wanted, MLSTM.bf16[1])


def test_float64() -> None:
    compare(draw(MLSTM, "full", 2, 70), 1e-12)


def test_same_bits_twice() -> None:
    first, second = (run_with_gradients(MLSTM, "triton", single("full", 2, 70)) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
