"""The Triton form of additive_decay against the definition, in Triton's interpreter on CPU tensors."""

from __future__ import annotations

from functools import partial

import interpreted
import pytest
import torch
from interpreted import BOUNDS, MARKS
from keys_over_time import KEYS, joined
from parity import assert_close, cast, draw, error, run_with_gradients

from sinuous.core.ops.laws import LAWS
from sinuous.kernels.arguments import AdditiveDecay

pytestmark = MARKS

OP = LAWS["additive_decay"]
INF = float("inf")

single = partial(interpreted.single, OP)
compare = partial(interpreted.compare, OP, bound=2e-6)


@pytest.mark.parametrize(("batch", "length"), [(2, 0), (0, 3), (2, 1), (1, 64), (1, 67)])
@pytest.mark.parametrize("variant", OP.variants)
def test_equals_the_definition(variant: str, batch: int, length: int) -> None:
    compare(single(variant, batch, length))


@pytest.mark.parametrize("keys", KEYS)
def test_every_key_is_as_exact(keys: str) -> None:
    found = draw(OP, "full", 1, 75)
    found["k"] = KEYS[keys](found["k"]).float().double()
    wanted = joined(run_with_gradients(OP, "recurrent", found))
    assert_close(joined(run_with_gradients(OP, "triton", found)), wanted, 1e-10)
    assert_close(joined(run_with_gradients(OP, "triton", cast(found, torch.float32))), wanted, 5e-6)


def test_states_in_several_blocks_with_masked_tails() -> None:
    q, k, factor = torch.randn(3, 1, 67, 1, 71)
    compare({"q": q, "k": k, "v": torch.randn(1, 67, 1, 93), "factor": factor})


@pytest.mark.parametrize("variant", ["full", "plain", "not_causal"])
def test_reverse(variant: str) -> None:
    compare({**single(variant, 1, 67), "reverse": True})


@pytest.mark.parametrize(("variant", "reverse"), [("full", True), ("plain", False), ("not_causal", True)])
def test_packed(variant: str, reverse: bool) -> None:
    arguments = single(variant, 1, BOUNDS[-1], len(BOUNDS) - 1)
    compare({**arguments, "cu_seqlens": torch.tensor(BOUNDS, dtype=torch.int32), "reverse": reverse})


def test_a_scale() -> None:
    compare({**single("full", 1, 70), "scale": 0.7})


@pytest.mark.parametrize("variant", ["causal", "not_causal"])
def test_an_initial_state_without_weight_counts_for_nothing(variant: str) -> None:
    found = single(variant, 2, 70)
    S, z = found["initial_state"]
    found["initial_state"] = (1e3 * S, z.masked_fill(torch.arange(5) < 3, -INF))
    gradients = compare(found)
    assert not gradients["initial_state.0"][:, :, :3].any()
    assert not gradients["initial_state.1"][:, :, :3].any()


@pytest.mark.parametrize(("form", "reverse"), [("triton", True), ("torch", False)])
def test_what_one_form_keeps_another_goes_on_with(form: str, reverse: bool) -> None:
    a = single("full", 1, BOUNDS[-1], len(BOUNDS) - 1)
    S, z = a["initial_state"]
    values = AdditiveDecay(a["q"], a["k"], a["v"], a["factor"], S, z, cu_seqlens=torch.tensor(BOUNDS), reverse=reverse)
    y, *state, kept_S, kept_z = torch.ops.sinuous.additive_decay(*values, "recurrent")
    kept = torch.ops.sinuous.additive_decay(*values, form)[3:]
    assert error(kept[0], kept_S) <= 1e-6
    assert error(kept[1], kept_z) <= 1e-6
    grads = [torch.randn_like(t) for t in (y, *state)]
    found = torch.ops.sinuous.additive_decay_backward(*grads, *values, *kept, "triton" if form == "torch" else "torch")
    wanted = torch.ops.sinuous.additive_decay_backward(*grads, *values, kept_S, kept_z, "recurrent")
    names = ("q", "k", "v", "factor", "S", "z")
    assert_close(dict(zip(names, found, strict=True)), dict(zip(names, wanted, strict=True)), 5e-6)


def test_gradients_of_the_outputs_alone() -> None:
    a = single("full", 1, 70)
    values = AdditiveDecay(a["q"], a["k"], a["v"], a["factor"], *a["initial_state"])
    y, *_, kept_S, kept_z = torch.ops.sinuous.additive_decay(*values, "triton")
    grads = (torch.randn_like(y), None, None)
    found, wanted = (
        torch.ops.sinuous.additive_decay_backward(*grads, *values, kept_S, kept_z, form)
        for form in ("triton", "recurrent")
    )
    assert max(error(a, b) for a, b in zip(found, wanted, strict=True)) <= 5e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype: torch.dtype) -> None:
    arguments = single("full", 1, 67)
    arguments["k"][:, 30] = -INF
    arguments |= cast({k: arguments[k] for k in OP.time}, dtype)
    found = run_with_gradients(OP, "triton", arguments)
    wanted = run_with_gradients(OP, "recurrent", cast(arguments, torch.float64))
    assert found["y"].dtype == dtype
    assert found["state.0"].dtype == torch.float32
    assert_close(found, {k: wanted[k] for k in ("y", "state.0", "state.1")}, OP.bf16[0])
    assert_close(found, wanted, OP.bf16[1])


@pytest.mark.parametrize("variant", ["full", "plain", "not_causal"])
def test_float64(variant: str) -> None:
    compare(draw(OP, variant, 1, 67), bound=1e-12)


def test_inputs_that_are_not_contiguous() -> None:
    arguments = single("full", 2, 9)
    strided = {k: arguments[k].repeat_interleave(2, -1)[..., ::2] for k in OP.time}
    strided["initial_state"] = tuple(t.repeat_interleave(2, -1)[..., ::2] for t in arguments["initial_state"])
    assert not strided["q"].is_contiguous()
    compare({**arguments, **strided})


def test_a_nan_stays_in_its_sequence() -> None:
    arguments = {**single("full", 1, 9, 3), "cu_seqlens": torch.tensor([0, 3, 6, 9])}
    clean = run_with_gradients(OP, "triton", arguments)
    for name in OP.time:
        spoilt = arguments[name].clone()
        spoilt[0, 4] = float("nan")
        found = run_with_gradients(OP, "triton", {**arguments, name: spoilt})
        for part in (slice(0, 3), slice(6, 9)):
            assert all(torch.equal(found[k][:, part], clean[k][:, part]) for k in (*OP.time, "y"))
        assert found["y"][0, 4:6].isnan().any()


def test_same_bits_twice() -> None:
    first, second = (run_with_gradients(OP, "triton", single("full", 2, 70)) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
