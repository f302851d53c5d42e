"""Properties of longhorn: what a step minimises, keys of zeros and of any size, identities of gradients."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_close, cast, draw, error, run, run_with_gradients

from sinuous.core.ops import dispatch, linear_scan, longhorn
from sinuous.core.ops.laws import LAWS

LONGHORN = LAWS["longhorn"]


@pytest.fixture(params=[f for f in LONGHORN.family.forms if f != "triton"])
def form(request: pytest.FixtureRequest) -> str:
    reason = dispatch.unavailable("longhorn", LONGHORN.family.forms, request.param, torch.device("cpu"), torch.float32)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return str(request.param)


def test_the_equation_number_by_number(form: str) -> None:
    inputs = draw(LONGHORN, "full", 2, 5)
    x, dt, k, q, D, z, bias, S = (t.tolist() for t in inputs.values())
    y, state = run(LONGHORN, form, inputs)
    expected = torch.empty_like(y)
    for b, t, d in itertools.product(range(2), range(5), range(19)):
        beta = 1 / (1 + math.exp(-dt[b][t][d] - bias[d]))
        epsilon = beta / (1 + beta * sum(key**2 for key in k[b][t]))
        for n, key in enumerate(k[b][t]):
            S[b][d][n] = (1 - epsilon * key**2) * S[b][d][n] + epsilon * x[b][t][d] * key
        read = sum(s * query for s, query in zip(S[b][d], q[b][t], strict=True)) + D[d] * x[b][t][d]
        expected[b, t, d] = read * z[b][t][d] / (1 + math.exp(-z[b][t][d]))
    assert error(y, expected) <= 1e-14
    assert error(state, torch.tensor(S, dtype=torch.float64)) <= 1e-14


@pytest.mark.parametrize("keys", ["one number", "one at a time"])
def test_a_step_minimises_what_it_approximates_where_the_approximation_is_exact(form: str, keys: str) -> None:
    """argmin_s |s - s_0|² + β (s·k - x)² solves (I + β k kᵀ) s = s_0 + β x k; its matrix is diagonal for such keys."""
    inputs = draw(LONGHORN, "one_number" if keys == "one number" else "full", 3, 1)
    size = inputs["k"].shape[-1]
    if keys == "one at a time":
        inputs["k"] = (
            torch.eye(size, dtype=torch.float64)[[2, 0, 15], None] * torch.tensor([0.1, -3.0, 1.7])[:, None, None]
        )
    _, state = run(LONGHORN, form, inputs)
    beta = torch.sigmoid(inputs["dt"] + inputs["dt_bias"])[:, 0, :, None]
    k, x = inputs["k"], inputs["x"][:, 0, :, None]
    system = torch.eye(size, dtype=torch.float64) + beta[..., None] * k[:, :, :, None] * k[:, :, None]
    expected = torch.linalg.solve(system, inputs["initial_state"] + beta * x * k)
    assert error(state, expected) <= 1e-14


def test_strong_keys_store_what_their_queries_recall(form: str) -> None:
    """Orthogonal keys of norm c and gates wide open: y = x · c² / (1 + c²)."""
    size, width, c = 8, 5, 100.0
    x = torch.randn(1, size, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    k = torch.eye(size, dtype=torch.float64)[None] * c
    open_gates = torch.full_like(x, 50.0)
    _, state = longhorn(x, open_gates, k, k, return_state=True, backend=form)
    nothing = torch.zeros_like(x)
    recalled = longhorn(nothing, nothing - 1e4, k, k, initial_state=state, backend=form)
    assert error(recalled, x * c**2 / (1 + c**2)) <= 1e-14


def test_it_is_a_linear_scan_of_every_number_of_the_state(form: str) -> None:
    inputs = draw(LONGHORN, "plain", 2, 100)
    x, dt, k, q = inputs.values()
    epsilon = dt.sigmoid() / (1 + dt.sigmoid() * k.square().sum(-1, keepdim=True))
    shape = (*x.shape, k.shape[-1])
    decay = (1 - epsilon[..., None] * k[:, :, None].square()).expand(shape)
    states = linear_scan(((epsilon * x)[..., None] * k[:, :, None]).flatten(2), decay.flatten(2)).view(shape)
    assert error(run(LONGHORN, form, inputs)[0], (states * q[:, :, None]).sum(-1)) <= 1e-12


def test_keys_of_zeros_leave_the_state_as_it_is_to_the_bit(form: str) -> None:
    inputs = cast(draw(LONGHORN, "full", 2, 100), torch.float32)
    _, state = run(LONGHORN, form, {**inputs, "k": torch.zeros_like(inputs["k"])})
    assert torch.equal(state, inputs["initial_state"])


@pytest.mark.parametrize("size", [1e-12, 1e-3, 30, 1e8])
def test_keys_of_any_size_are_as_exact_in_single_precision(form: str, size: float) -> None:
    inputs = draw(LONGHORN, "full", 2, 100)
    inputs = cast(cast({**inputs, "k": inputs["k"] * size}, torch.float32), torch.float64)
    expected = run_with_gradients(LONGHORN, "recurrent", inputs)
    if form == "recurrent" or size > 30:
        # As autograd derives it from the definition, the gradient of dt is a difference of nearly equal numbers for
        # |k| ≫ 1; the other forms have it in closed form.
        del expected["dt"], expected["dt_bias"]
    assert_close(run_with_gradients(LONGHORN, form, inputs), expected, 1e-11)
    assert_close(run_with_gradients(LONGHORN, form, cast(inputs, torch.float32)), expected, 2e-6)


@pytest.mark.parametrize("dt", [-1e4, -90.0, 90.0, 1e4])
def test_shut_and_open_gates(form: str, dt: float) -> None:
    inputs = draw(LONGHORN, "full", 2, 100)
    inputs["dt"] = torch.full_like(inputs["dt"], dt)
    expected = run_with_gradients(LONGHORN, "recurrent", inputs)
    inputs = run_with_gradients(LONGHORN, form, cast(inputs, torch.float32))
    for name in ("dt", "dt_bias"):  # of a sigmoid that has saturated: nothing but rounding is left
        assert inputs.pop(name).abs().max() <= expected.pop(name).abs().max() + 1e-30
    assert_close(inputs, expected, 2e-6)


def test_gradient_identities(form: str) -> None:
    """y and the last state are linear in (x, S_0), and y without D in q: Euler's theorem for each."""
    inputs = draw(LONGHORN, "full", 2, 100)
    del inputs["D"]
    got = run_with_gradients(LONGHORN, form, inputs)
    generator = torch.Generator().manual_seed(1)
    dy, dstate = (torch.randn(got[n].shape, generator=generator, dtype=torch.float64) for n in ("y", "state"))
    read, carried = (got["y"] * dy).sum(), (got["state"] * dstate).sum()
    assert error((inputs["q"] * got["q"]).sum(), read) <= 1e-12
    through_inputs = (inputs["x"] * got["x"]).sum() + (inputs["initial_state"] * got["initial_state"]).sum()
    assert error(through_inputs, read + carried) <= 1e-12


@settings(max_examples=15)
@given(cuts=st.lists(st.integers(0, 120), max_size=4), size=st.sampled_from([0.01, 1.0, 50.0]))
def test_cut_anywhere_and_carried_on(cuts: list[int], size: float) -> None:
    inputs: dict[str, Any] = draw(LONGHORN, "full", 2, 120)
    inputs["k"] = inputs["k"] * size
    whole, final = run(LONGHORN, "torch", inputs)
    edges, state, parts = sorted({0, 120, *cuts}), inputs["initial_state"], []
    for a, b in itertools.pairwise(edges):
        piece = {name: t[:, a:b] if name in LONGHORN.time else t for name, t in inputs.items()}
        y, state = run(LONGHORN, "torch", {**piece, "initial_state": state})
        parts.append(y)
    assert error(torch.cat(parts, 1), whole) <= 1e-12
    assert error(state, final) <= 1e-12


@given(seed=st.integers(0, 99), size=st.floats(1e-3, 1e3))
@settings(max_examples=20)
def test_no_number_of_a_state_grows_without_input(seed: int, size: float) -> None:
    """The decay is in (0, 1]: what is in the state shrinks and keeps its sign."""
    inputs: dict[str, Any] = draw(LONGHORN, "full", 2, 30, seed=seed)
    _, state = run(LONGHORN, "torch", {**inputs, "x": torch.zeros_like(inputs["x"]), "k": inputs["k"] * size})
    assert (state.abs() <= inputs["initial_state"].abs()).all()
    assert (state * inputs["initial_state"] >= 0).all()
