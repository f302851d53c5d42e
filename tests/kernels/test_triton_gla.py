"""The Triton kernels of gla against the definition, in Triton's interpreter on CPU tensors."""

from __future__ import annotations

from functools import partial

import interpreted
import pytest
import torch
from interpreted import BOUNDS, GATES, MARKS
from parity import assert_close, cast, draw, error, run_with_gradients

from sinuous.core.ops.laws import LAWS

pytestmark = MARKS

GLA = LAWS["gla"]
INF = float("inf")

DECAYS = {"mild": lambda z: -0.1 * z.abs(), **GATES}

single = partial(interpreted.single, GLA)
compare = partial(interpreted.compare, GLA)


@pytest.mark.parametrize(("batch", "length"), [(2, 0), (0, 3), (2, 1), (1, 63), (1, 64), (2, 65)])
@pytest.mark.parametrize("variant", GLA.variants)
def test_equals_the_definition(variant: str, batch: int, length: int) -> None:
    compare(single(variant, batch, length))


@pytest.mark.parametrize("gate", DECAYS)
@pytest.mark.parametrize("variant", ["full", "inclusive", "values"])
def test_every_gate_is_as_exact(variant: str, gate: str) -> None:
    arguments = single(variant, 1, 100)
    noise = torch.randn(arguments["log_decay"].shape, generator=torch.Generator().manual_seed(5))
    found = compare({**arguments, "log_decay": DECAYS[gate](noise)}, 1e-5)
    assert (found["log_decay"][DECAYS[gate](noise) == -INF] == 0).all()


@pytest.mark.parametrize("of", ["keys", "values"])
def test_states_in_several_blocks_with_masked_tails(of: str) -> None:
    q, k = torch.randn(2, 1, 70, 2, 71)
    v, log_decay = torch.randn(1, 70, 2, 93), -torch.rand(1, 70, 2, 71 if of == "keys" else 93)
    compare({"q": q, "k": k, "v": v, "log_decay": log_decay, "decay_of": of})


@pytest.mark.parametrize("variant", ["full", "inclusive", "values"])
def test_reverse(variant: str) -> None:
    compare({**single(variant, 1, 130), "reverse": True})


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("variant", GLA.variants)
def test_packed(variant: str, reverse: bool) -> None:
    arguments = single(variant, 1, BOUNDS[-1], len(BOUNDS) - 1)
    compare({**arguments, "cu_seqlens": torch.tensor(BOUNDS, dtype=torch.int32), "reverse": reverse})


def test_the_absence_of_an_initial_state() -> None:
    arguments = single("full", 2, 70)
    del arguments["initial_state"]
    compare(arguments)


def test_a_scale() -> None:
    compare({**single("full", 1, 70), "scale": 0.7})
    compare({**single("values", 1, 70), "scale": 0.7})


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("variant", ["full", "values"])
def test_chunk_states_are_those_of_the_definition(variant: str, reverse: bool) -> None:
    arguments = single(variant, 1, BOUNDS[-1], len(BOUNDS) - 1)
    arguments["on_values"] = arguments["decay_of"] == "values"
    arguments |= {"cu_seqlens": torch.tensor(BOUNDS), "scale": None, "reverse": reverse}
    values = [arguments.get(name) for name in GLA.family.arguments._fields]
    found, wanted = (torch.ops.sinuous.gla(*values, form)[2] for form in ("triton", "recurrent"))
    assert error(found, wanted) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["full", "values"])
def test_half_precision_inputs(variant: str, dtype: torch.dtype) -> None:
    arguments = single(variant, 1, 65)
    arguments["log_decay"][:, 30] = -INF
    arguments |= cast({k: arguments[k] for k in GLA.time}, dtype)
    found = run_with_gradients(GLA, "triton", arguments)
    wanted = run_with_gradients(GLA, "recurrent", cast(arguments, torch.float64))
    assert found["y"].dtype == dtype
    assert found["state"].dtype == torch.float32
    assert_close(found, {k: wanted[k] for k in ("y", "state")}, GLA.bf16[0])
    assert_close(found, wanted, GLA.bf16[1])


@pytest.mark.parametrize("variant", ["full", "values"])
def test_float64(variant: str) -> None:
    compare(draw(GLA, variant, 2, 70), 1e-12)


@pytest.mark.parametrize("variant", ["full", "values"])
def test_inputs_that_are_not_contiguous(variant: str) -> None:
    arguments = single(variant, 2, 9)
    tensors = {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    strided = {k: v.repeat_interleave(2, -1)[..., ::2] for k, v in tensors.items()}
    assert not strided["q"].is_contiguous()
    wanted = run_with_gradients(GLA, "recurrent", arguments)
    assert_close(run_with_gradients(GLA, "triton", {**arguments, **strided}), wanted, 1e-4)


def test_a_nan_stays_in_its_sequence() -> None:
    arguments = single("full", 1, BOUNDS[-1], len(BOUNDS) - 1)
    arguments["cu_seqlens"] = torch.tensor(BOUNDS)
    clean = run_with_gradients(GLA, "triton", arguments)
    for name in GLA.time:
        spoilt = arguments[name].clone()
        spoilt[0, 70] = float("nan")
        found = run_with_gradients(GLA, "triton", {**arguments, name: spoilt})
        for part in (slice(0, 64), slice(127, 130)):
            assert all(torch.equal(found[k][:, part], clean[k][:, part]) for k in (*GLA.time, "y"))
        assert found["y"][0, 70:127].isnan().any()


def test_same_bits_twice() -> None:
    first, second = (run_with_gradients(GLA, "triton", single("full", 2, 70)) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
