"""The Triton kernels of delta_rule against the definition, in Triton's interpreter on CPU tensors."""

from __future__ import annotations

from functools import partial
from typing import Any

import interpreted
import pytest
import torch
import torch.nn.functional as F
from interpreted import BOUNDS, MARKS
from parity import assert_close, cast, draw, error, run_with_gradients

from sinuous.core.ops.laws import LAWS

pytestmark = MARKS

DELTA = LAWS["delta_rule"]
single = partial(interpreted.single, DELTA)
compare = partial(interpreted.compare, DELTA)


def drawn(length: int, keys: int, values: int, factors: tuple[int, ...] = (), seed: int = 0) -> dict[str, Any]:
    """One row and one head, without decay."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(1, length, *shape, generator=generator)

    return {
        "q": normal(1, keys),
        "k": F.normalize(normal(*factors, 1, keys), dim=-1),
        "v": normal(*factors, 1, values),
        "beta": 2 * normal(*factors, 1).sigmoid(),
        "initial_state": torch.randn(1, 1, keys, values, generator=generator),
    }


@pytest.mark.parametrize(("batch", "length"), [(2, 0), (0, 3), (2, 1), (1, 63), (1, 64), (2, 65), (1, 131)])
@pytest.mark.parametrize("variant", DELTA.variants)
def test_equals_the_definition(variant: str, batch: int, length: int) -> None:
    compare(single(variant, batch, length))


@pytest.mark.parametrize(("keys", "values"), [(37, 70), (128, 24)])
def test_states_in_several_blocks_with_masked_tails(keys: int, values: int) -> None:
    decay = -torch.rand(1, 70, 1, generator=torch.Generator().manual_seed(1))
    compare({**drawn(70, keys, values), "log_decay": decay})


@pytest.mark.parametrize(("keys", "dtype"), [(200, torch.float16), (130, torch.float32)])
def test_keys_wider_than_a_block_or_a_program_holds(keys: int, dtype: torch.dtype) -> None:
    compare(cast(drawn(66, keys, 20), dtype), DELTA.bf16[1] if dtype == torch.float16 else 1e-4)


@pytest.mark.parametrize("variant", ["full", "product"])
def test_rows_of_half_precision(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice as many to a segment, so that states are kept where segments begin, and blocks are joined twice."""
    from sinuous.kernels.triton import delta_rule

    tiles = delta_rule.tiles
    monkeypatch.setattr(delta_rule, "tiles", lambda *of: {**tiles(*of), "CHUNK": 64})
    arguments = single(variant, 1, BOUNDS[-1], len(BOUNDS) - 1)
    compare({**arguments, "cu_seqlens": torch.tensor(BOUNDS)}, 1e-5)


@pytest.mark.parametrize("factors", [1, 5, 70])
def test_numbers_of_factors(factors: int) -> None:
    """One on an axis of its own, one that no chunk is a multiple of, and more than a chunk has rows."""
    length = 3 if factors == 70 else 67
    decay = -torch.rand(1, length, 1, generator=torch.Generator().manual_seed(1))
    compare({**drawn(length, 16, 8, (factors,)), "log_decay": decay})


@pytest.mark.parametrize("variant", ["full", "product", "three_factors"])
def test_reverse(variant: str) -> None:
    compare({**single(variant, 2, 130), "reverse": True})


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("variant", ["plain", "full", "product", "three_factors"])
def test_packed(variant: str, reverse: bool) -> None:
    arguments = single(variant, 1, BOUNDS[-1], len(BOUNDS) - 1)
    compare({**arguments, "cu_seqlens": torch.tensor(BOUNDS, dtype=torch.int32), "reverse": reverse})


@pytest.mark.parametrize("variant", ["full", "product"])
def test_the_absence_of_an_initial_state(variant: str) -> None:
    arguments = single(variant, 2, 70)
    del arguments["initial_state"]
    compare(arguments)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("variant", ["full", "product"])
def test_chunk_states_are_those_of_the_definition(variant: str, reverse: bool) -> None:
    arguments = single(variant, 1, BOUNDS[-1], len(BOUNDS) - 1)
    arguments |= {"cu_seqlens": torch.tensor(BOUNDS), "scale": None, "reverse": reverse}
    values = [arguments[name] for name in DELTA.family.arguments._fields]
    found, wanted = (torch.ops.sinuous.delta_rule(*values, form)[2] for form in ("triton", "recurrent"))
    assert error(found, wanted) <= 1e-6


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("keys", ["distinct", "one, repeated", "zero", "orthogonal"])
def test_strengths_and_keys_of_every_kind(keys: str, beta: float) -> None:
    arguments = drawn(100, 32, 8)
    if keys == "one, repeated":
        # Of a length that is 1 in every precision: a reflection along a key that is longer by a rounding grows each
        # time, and then the order of sums in the matrix library decides the error.
        signs = arguments["k"][:, :1, :, :16].sign() / 4
        arguments["k"] = F.pad(signs, (8, 8)).expand(1, 100, 1, 32).clone()
    elif keys == "zero":
        arguments["k"][:, ::3] = 0
    elif keys == "orthogonal":
        arguments["k"] = torch.eye(32)[torch.arange(100) % 32].view(1, 100, 1, 32)
    compare({**arguments, "beta": torch.full_like(arguments["beta"], beta)}, 1e-5)


def test_strengths_of_zero_among_others() -> None:
    arguments = drawn(100, 32, 8)
    arguments["beta"][:, [0, 3, 15, 16, 17, 63, 64]] = 0
    compare(arguments, 1e-5)


@pytest.mark.parametrize("value", [-torch.inf, -1e4])
@pytest.mark.parametrize("variant", ["full", "product"])
def test_resets_and_all_but_resets(variant: str, value: float) -> None:
    arguments = single(variant, 2, 130)
    at = [0, 3, 4, 64, 100]
    arguments["log_decay"][0, at] = value
    found = compare(arguments)
    assert (found["log_decay"][0, at].abs() <= (0 if value == -torch.inf else 1e-4)).all()


def test_what_a_reset_hides_is_not_seen() -> None:
    arguments = drawn(90, 16, 8)
    decay = torch.zeros(1, 90, 1)
    decay[:, 70] = -torch.inf
    found = compare({**arguments, "log_decay": decay})
    after = {name: t[:, 70:] for name, t in arguments.items() if name != "initial_state"}
    y = DELTA.call(**after, backend="triton")
    assert error(found["y"][:, 70:], y) <= 1e-6
    assert error(found["state"], DELTA.call(**after, return_state=True, backend="triton")[1]) <= 1e-6


@pytest.mark.parametrize("variant", ["full", "product"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(variant: str, dtype: torch.dtype) -> None:
    arguments = single(variant, 1, 65)
    arguments |= cast({k: arguments[k] for k in DELTA.time}, dtype)
    found = run_with_gradients(DELTA, "triton", arguments)
    wanted = run_with_gradients(DELTA, "recurrent", cast(arguments, torch.float64))
    assert found["y"].dtype == dtype
    assert found["state"].dtype == torch.float32
    assert_close(found, {k: wanted[k] for k in ("y", "state")}, DELTA.bf16[0])
    assert_close(found, wanted, DELTA.bf16[1])


def test_float64() -> None:
    compare(draw(DELTA, "product", 2, 70), 1e-12)


@pytest.mark.parametrize("variant", ["full", "product"])
def test_inputs_that_are_not_contiguous(variant: str) -> None:
    arguments = single(variant, 2, 9)
    strided = {k: v.repeat_interleave(2, -1)[..., ::2] for k, v in arguments.items()}
    assert not strided["q"].is_contiguous()
    assert_close(run_with_gradients(DELTA, "triton", strided), run_with_gradients(DELTA, "recurrent", arguments), 1e-4)


def test_same_bits_twice() -> None:
    first, second = (run_with_gradients(DELTA, "triton", single("product", 2, 70)) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
