"""Properties of the delta rule: its kin, its limits in β, and the published implementations."""

from __future__ import annotations

import importlib
import inspect
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_close, cast, draw, error, run, run_with_gradients
from torch import Tensor

from sinuous.core.ops import delta_rule, ssd
from sinuous.core.ops.laws import LAWS

DELTA = LAWS["delta_rule"]
INF = float("inf")
every_form = pytest.mark.parametrize("form", ["recurrent", "torch"])


def both(inputs: dict[str, Any], bound: float = 1e-10, single: float = 1e-4) -> None:
    """The torch form equals the definition, gradients included, in double and in single precision."""
    expected = run_with_gradients(DELTA, "recurrent", inputs)
    assert all(t.isfinite().all() for t in expected.values())
    assert_close(run_with_gradients(DELTA, "torch", inputs), expected, bound)
    assert_close(run_with_gradients(DELTA, "torch", cast(inputs, torch.float32)), expected, single)


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_beta_at_its_limits(beta: float) -> None:
    inputs = draw(DELTA, "full", 2, 130)
    both({**inputs, "beta": torch.full_like(inputs["beta"], beta)})


def test_keys_of_zero_write_nothing() -> None:
    inputs = draw(DELTA, "full", 2, 130)
    inputs["k"][:, ::3] = 0
    both(inputs)


@pytest.mark.parametrize("decay", ["none", "half of them none", "strong", "resets"])
def test_decays_of_every_strength(decay: str) -> None:
    inputs = draw(DELTA, "full", 2, 130)
    g = inputs["log_decay"]
    inputs["log_decay"] = {
        "none": 0 * g,
        "half of them none": torch.where(torch.arange(130)[:, None] % 2 == 0, 0.0, g),
        "strong": 60 * g,
        "resets": torch.where(torch.arange(130)[:, None] % 29 == 7, -INF, g),
    }[decay]
    both(inputs)


def test_a_reset_forgets_everything() -> None:
    inputs = draw(DELTA, "full", 2, 90)
    inputs["log_decay"][:, 37] = -INF
    y, state = run(DELTA, "torch", inputs)
    later = {k: v[:, 37:] if k in DELTA.time else v for k, v in inputs.items() if k != "initial_state"}
    fresh, fresh_state = run(DELTA, "torch", later)
    assert error(y[:, 37:], fresh) <= 1e-12
    assert error(state, fresh_state) <= 1e-12


@every_form
def test_no_decay_equals_a_decay_of_one(form: str) -> None:
    inputs = draw(DELTA, "full", 2, 70)
    without = {k: v for k, v in inputs.items() if k != "log_decay"}
    y, state = run(DELTA, form, without)
    expected = run(DELTA, form, {**inputs, "log_decay": 0 * inputs["log_decay"]})
    assert error(y, expected[0]) <= 1e-13
    assert error(state, expected[1]) <= 1e-13


@every_form
def test_orthogonal_keys_make_it_linear_attention(form: str) -> None:
    inputs = draw(DELTA, "full", 1, 16)
    keys = torch.eye(16, dtype=torch.float64)[None, :, None].expand(1, 16, 2, 16)
    y = delta_rule(inputs["q"], keys, inputs["v"], inputs["beta"], inputs["log_decay"], backend=form)
    expected = ssd(inputs["q"], keys, inputs["beta"][..., None] * inputs["v"], inputs["log_decay"])
    assert error(y, expected) <= 1e-12


@every_form
def test_one_factor_equals_none(form: str) -> None:
    inputs = draw(DELTA, "full", 2, 70)
    one = {**inputs, **{name: inputs[name].unsqueeze(2) for name in ("k", "v", "beta")}}
    assert_close(
        {"y": run(DELTA, form, one)[0], "state": run(DELTA, form, one)[1]},
        {"y": run(DELTA, form, inputs)[0], "state": run(DELTA, form, inputs)[1]},
        1e-13,
    )


@every_form
def test_factors_are_steps_of_a_longer_sequence(form: str) -> None:
    """DeltaProduct's own way of computing it: decay on the first of the steps, readout after the last."""
    inputs = draw(DELTA, "product", 2, 45)
    n = 2
    k, v, beta = (inputs[name].flatten(1, 2) for name in ("k", "v", "beta"))
    decay = torch.stack([inputs["log_decay"], 0 * inputs["log_decay"]], 2).flatten(1, 2)
    y, state = delta_rule(
        inputs["q"].repeat_interleave(n, 1),
        k,
        v,
        beta,
        decay,
        initial_state=inputs["initial_state"],
        return_state=True,
        backend=form,
    )
    product = run(DELTA, form, inputs)
    assert error(product[0], y[:, n - 1 :: n]) <= 1e-12
    assert error(product[1], state) <= 1e-12


def test_two_reflections_turn_by_twice_the_angle_of_their_keys() -> None:
    angle = 0.3
    keys = torch.tensor([[1.0, 0.0], [torch.cos(torch.tensor(angle)), torch.sin(torch.tensor(angle))]]).double()
    start = torch.eye(2, dtype=torch.float64)[None, None]
    zero = torch.zeros(1, 1, 2, 1, 2, dtype=torch.float64)
    _, state = delta_rule(
        torch.zeros(1, 1, 1, 2, dtype=torch.float64),
        keys[None, None, :, None],
        zero,
        torch.full((1, 1, 2, 1), 2.0, dtype=torch.float64),
        initial_state=start,
        return_state=True,
    )
    c, s = torch.cos(torch.tensor(2 * angle)).double(), torch.sin(torch.tensor(2 * angle)).double()
    torch.testing.assert_close(state[0, 0], torch.stack([torch.stack([c, -s]), torch.stack([s, c])]), atol=1e-7, rtol=0)


@settings(max_examples=15)
@given(cuts=st.lists(st.integers(0, 120), max_size=4), variant=st.sampled_from(["full", "product"]))
def test_cut_anywhere_and_carried_on(cuts: list[int], variant: str) -> None:
    inputs = draw(DELTA, variant, 2, 120)
    whole, final = run(DELTA, "torch", inputs)
    edges, state, parts = sorted({0, 120, *cuts}), inputs["initial_state"], []
    for a, b in itertools.pairwise(edges):
        piece = {k: v[:, a:b] if k in DELTA.time else v for k, v in inputs.items()}
        y, state = run(DELTA, "torch", {**piece, "initial_state": state})
        parts.append(y)
    assert error(torch.cat(parts, 1), whole) <= 1e-11
    assert error(state, final) <= 1e-11


@pytest.mark.parametrize("module", ["qwen3_next", "olmo_hybrid"])
def test_equals_transformers(module: str) -> None:
    path = f"transformers.models.{module}.modeling_{module}"
    pytest.importorskip("transformers", reason="needs transformers")
    try:
        # Around the torch code lies a wrapper that takes a kernel of another package where there is one.
        peer = inspect.unwrap(importlib.import_module(path).torch_recurrent_gated_delta_rule)
    except (ImportError, AttributeError):
        pytest.skip(f"this transformers has no {path}.torch_recurrent_gated_delta_rule")
    drawn = cast(draw(DELTA, "full", 2, 100), torch.float32)
    inputs = {name: t.clone().requires_grad_() for name, t in drawn.items()}
    y, state = peer(
        *(inputs[name] for name in ("q", "k", "v")),
        g=inputs["log_decay"],
        beta=inputs["beta"],
        initial_state=inputs["initial_state"],
        output_final_state=True,
    )
    chunked = run_with_gradients(DELTA, "torch", drawn)
    generator = torch.Generator().manual_seed(1)
    grads = [
        torch.randn(t.shape, generator=generator, dtype=torch.float64).float() for t in (chunked["y"], chunked["state"])
    ]
    gradients = torch.autograd.grad((y, state), list(inputs.values()), grads)
    expected: dict[str, Tensor] = {"y": y, "state": state, **dict(zip(inputs, gradients, strict=True))}
    assert_close(chunked, expected, 1e-4)


def test_long_unnormalised_keys_are_the_callers_own_choice() -> None:
    """The op does not normalise: with keys of length 2 and β = 1 the state grows, as the equation says."""
    k = F.normalize(torch.ones(1, 1, 1, 4), dim=-1) * 2
    _, state = delta_rule(k, k, 0 * k, torch.ones(1, 1, 1), initial_state=torch.ones(1, 1, 4, 4), return_state=True)
    torch.testing.assert_close(state, torch.full((1, 1, 4, 4), 1.0 - 4.0))
