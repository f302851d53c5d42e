"""The Triton kernels of dplr against the definition, in Triton's interpreter on CPU tensors."""

from __future__ import annotations

from functools import partial
from typing import Any

import interpreted
import pytest
import torch
import torch.nn.functional as F
from interpreted import GATES, MARKS
from parity import assert_close, cast, draw, error, run_with_gradients

from sinuous.core.ops.laws import LAWS

pytestmark = MARKS

DPLR = LAWS["dplr"]
INF = float("inf")
BOUNDS = [0, 0, 5, 64, 64, 69, 70, 72]
"""Empty sequences first and within, boundaries on and off the edge of a chunk, sequences of one and two steps."""

single = partial(interpreted.single, DPLR)
compare = partial(interpreted.compare, DPLR)


def drawn(length: int, keys: int, values: int) -> dict[str, Any]:
    """One row and one head."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(1, length, 1, *shape, generator=generator)

    a = F.normalize(normal(keys), dim=-1)
    return {
        "q": normal(keys),
        "k": normal(keys),
        "v": normal(values),
        "log_decay": -normal(keys).abs() / 4,
        "a": a,
        "b": -2 * a * normal(1).sigmoid(),
        "initial_state": torch.randn(1, 1, keys, values, generator=generator),
    }


@pytest.mark.parametrize(("batch", "length"), [(2, 0), (0, 3), (2, 1), (1, 63), (1, 64), (2, 65), (1, 131)])
def test_equals_the_definition(batch: int, length: int) -> None:
    compare(single("free", batch, length))


@pytest.mark.parametrize(("variant", "length"), [("plain", 1), ("plain", 65), ("full", 67), ("one_channel", 131)])
def test_float64(variant: str, length: int) -> None:
    """With one channel, transitions all but vanish, and their product is no better than its roundings."""
    compare(draw(DPLR, variant, 1, length), 1e-10)


@pytest.mark.parametrize("gate", GATES)
def test_every_gate_is_as_exact(gate: str) -> None:
    arguments = drawn(100, 16, 12)
    log_decay = GATES[gate](torch.randn(arguments["log_decay"].shape, generator=torch.Generator().manual_seed(5)))
    found = compare({**arguments, "log_decay": log_decay}, 1e-5)
    assert (found["log_decay"][log_decay == -INF] == 0).all()


@pytest.mark.parametrize(("keys", "values"), [(37, 70), (100, 8)])
def test_states_in_several_blocks_with_masked_tails(keys: int, values: int) -> None:
    compare(drawn(70, keys, values))


@pytest.mark.parametrize(("keys", "dtype"), [(130, torch.float16), (130, torch.float32)])
def test_keys_wider_than_a_block_or_a_program_holds(keys: int, dtype: torch.dtype) -> None:
    compare(cast(drawn(66, keys, 20), dtype), DPLR.bf16[1] if dtype == torch.float16 else 1e-4)


def test_reverse() -> None:
    compare({**single("full", 1, 70), "reverse": True})


@pytest.mark.parametrize("reverse", [False, True])
def test_packed(reverse: bool) -> None:
    arguments = single("full", 1, BOUNDS[-1], len(BOUNDS) - 1)
    compare({**arguments, "cu_seqlens": torch.tensor(BOUNDS, dtype=torch.int32), "reverse": reverse})


def test_the_absence_of_an_initial_state_and_a_scale() -> None:
    arguments = drawn(70, 8, 12)
    del arguments["initial_state"]
    compare({**arguments, "scale": 0.7})


@pytest.mark.parametrize("reverse", [False, True])
def test_chunk_states_are_those_of_the_definition(reverse: bool) -> None:
    arguments = single("full", 1, BOUNDS[-1], len(BOUNDS) - 1)
    arguments |= {"cu_seqlens": torch.tensor(BOUNDS), "scale": None, "reverse": reverse}
    values = [arguments[name] for name in DPLR.family.arguments._fields]
    found, wanted = (torch.ops.sinuous.dplr(*values, form)[2] for form in ("triton", "recurrent"))
    assert error(found, wanted) <= 1e-6


def test_one_form_backward_of_another() -> None:
    arguments = drawn(130, 16, 12)
    inputs = [arguments.get(name) for name in DPLR.family.arguments._fields[:-2]]
    options = [None, False]
    y, state, kept = torch.ops.sinuous.dplr(*inputs, *options, "torch")
    found, wanted = (
        torch.ops.sinuous.dplr_backward(y, state, *inputs, *options, kept, form) for form in ("triton", "torch")
    )
    assert all(error(f, w) <= 1e-5 for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("keys", "strength"), [("one, repeated", 1.0), ("one, repeated", 2.0), ("zero", 2.0), ("orthogonal", 2.0)]
)
def test_corrections_of_every_kind(keys: str, strength: float) -> None:
    """Transitions that forget and that reflect, of the delta rule without decay."""
    arguments = drawn(100, 32, 8)
    a = arguments["a"]
    if keys == "one, repeated":
        # Of a length that is 1 in every precision: a reflection along a key that is longer by a rounding grows each
        # time, and then the order of sums in the matrix library decides the error.
        a = F.pad(a[:, :1, :, :16].sign() / 4, (8, 8)).expand(1, 100, 1, 32).clone()
    elif keys == "zero":
        a[:, ::3] = 0
    else:
        a = torch.eye(32)[torch.arange(100) % 32].view(1, 100, 1, 32)
    compare({**arguments, "a": a, "b": -strength * a, "log_decay": torch.zeros_like(a)})


def test_what_a_reset_forgets_is_read_once_more_at_its_own_step() -> None:
    arguments = drawn(80, 16, 8)
    arguments["log_decay"][:, 70] = -INF
    arguments["a"][:, 70] = 0
    found = compare(arguments)
    after = {name: t[:, 70:] for name, t in arguments.items() if name != "initial_state"}
    y, state = DPLR.call(**after, return_state=True, backend="triton")
    assert error(found["y"][:, 70:], y) <= 1e-6
    assert error(found["state"], state) <= 1e-6
    arguments["a"][:, 70] = 1
    assert error(compare(arguments)["y"][:, 70:], y) > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype: torch.dtype) -> None:
    arguments = single("full", 1, 65)
    arguments["log_decay"][:, 30] = -INF
    arguments |= cast({k: arguments[k] for k in DPLR.time}, dtype)
    found = run_with_gradients(DPLR, "triton", arguments)
    wanted = run_with_gradients(DPLR, "recurrent", cast(arguments, torch.float64))
    assert found["y"].dtype == dtype
    assert found["state"].dtype == torch.float32
    assert_close(found, {k: wanted[k] for k in ("y", "state")}, DPLR.bf16[0])
    assert_close(found, wanted, DPLR.bf16[1])


def test_inputs_that_are_not_contiguous() -> None:
    arguments = single("full", 2, 9)
    strided = {k: v.repeat_interleave(2, -1)[..., ::2] for k, v in arguments.items()}
    assert not strided["q"].is_contiguous()
    assert_close(run_with_gradients(DPLR, "triton", strided), run_with_gradients(DPLR, "recurrent", arguments), 1e-4)


def test_a_nan_stays_in_its_sequence() -> None:
    arguments = single("full", 1, 9, 3)
    arguments["cu_seqlens"] = torch.tensor([0, 4, 6, 9])
    clean, arguments["log_decay"] = run_with_gradients(DPLR, "triton", arguments), arguments["log_decay"].clone()
    arguments["log_decay"][0, 4] = float("nan")
    found = run_with_gradients(DPLR, "triton", arguments)
    for part in (slice(0, 4), slice(6, 9)):
        assert all(torch.equal(found[k][:, part], clean[k][:, part]) for k in (*DPLR.time, "y"))
    assert found["y"][0, 4:6].isnan().all()


def test_same_bits_twice() -> None:
    first, second = (run_with_gradients(DPLR, "triton", drawn(70, 20, 8)) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
