"""Properties of gla: strong, absent and infinite decays, its kin, and the identities of its gradients."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_close, cast, draw, error, run, run_with_gradients
from torch import Tensor

from sinuous.core.ops import gla, ssd
from sinuous.core.ops.laws import LAWS

GLA = LAWS["gla"]
INF = float("inf")

GATES = {
    "mild": lambda z: -0.1 * z.abs(),
    "strong": lambda z: -50 * z.abs(),
    "strong beside none": lambda z: torch.where(z > 1, -200 * z.abs(), -0.01 * z.abs()),
    "none": lambda z: 0 * z,
    "half of them none": lambda z: torch.where(z > 0, 0.0, -z.abs()),
    "resets of single channels": lambda z: torch.where(z > 1.5, -INF, -0.1 * z.abs()),
}


def arguments(gate: str, *, bonus: bool, length: int = 150) -> dict[str, Any]:
    inputs = draw(GLA, "full" if bonus else "inclusive", 2, length)
    noise = torch.randn(inputs["log_decay"].shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return {**inputs, "log_decay": GATES[gate](noise)}


@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_every_gate_is_as_exact_in_single_precision(gate: str, bonus: bool) -> None:
    expected = run_with_gradients(GLA, "recurrent", arguments(gate, bonus=bonus))
    assert_close(run_with_gradients(GLA, "torch", arguments(gate, bonus=bonus)), expected, 1e-12)
    actual = run_with_gradients(GLA, "torch", cast(arguments(gate, bonus=bonus), torch.float32))
    assert_close(actual, expected, 5e-6)


@pytest.mark.parametrize("bonus", [False, True])
def test_a_reset_of_all_channels_forgets_everything(bonus: bool) -> None:
    inputs = draw(GLA, "full" if bonus else "inclusive", 2, 90)
    inputs["log_decay"][:, 37] = -INF
    y, state = run(GLA, "torch", inputs)
    later = {k: v[:, 37:] if k in GLA.time else v for k, v in inputs.items() if k != "initial_state"}
    fresh, fresh_state = run(GLA, "torch", later)
    start = 38 if bonus else 37  # a readout ahead of the update still sees the old state at the reset itself
    assert error(y[:, start:], fresh[:, start - 37 :]) <= 1e-12
    assert error(state, fresh_state) <= 1e-12


def test_strong_decays_ahead_of_the_readout_do_not_overflow() -> None:
    inputs = cast(draw(GLA, "full", 1, 64), torch.float32)
    inputs["log_decay"] = torch.full_like(inputs["log_decay"], -88.0)
    assert all(t.isfinite().all() for t in run_with_gradients(GLA, "torch", inputs).values())


@pytest.mark.parametrize("form", GLA.family.forms[GLA.family.forms.index("torch") :])
def test_equal_decays_of_all_channels_are_ssd(form: str) -> None:
    inputs = draw(GLA, "inclusive", 2, 100)
    decay = inputs["log_decay"][..., 0]
    inputs["log_decay"] = decay[..., None].expand_as(inputs["q"])
    y, state = run(GLA, form, inputs)
    expected = ssd(
        inputs["q"], inputs["k"], inputs["v"], decay, initial_state=inputs["initial_state"], return_state=True
    )
    assert error(y, expected[0]) <= 1e-12
    assert error(state, expected[1]) <= 1e-12


def test_decay_of_values_is_the_transpose() -> None:
    """The transposed state, S' = Sᵀ, decays by its keys."""
    inputs = draw(GLA, "values", 2, 100)
    eye = torch.eye(inputs["v"].shape[-1], dtype=torch.float64)
    keys, values, decay = inputs["v"], inputs["k"], inputs["log_decay"]
    _, state = run(GLA, "torch", inputs)
    turned = gla(
        torch.zeros_like(keys),
        keys,
        values,
        decay,
        initial_state=inputs["initial_state"].mT,
        return_state=True,
        backend="torch",
    )
    assert error(state, turned[1].mT) <= 1e-12
    assert eye.shape[0] == state.shape[-1]


@pytest.mark.parametrize("form", ["recurrent", "torch"])
def test_gradient_identity_of_the_keys(form: str) -> None:
    """Σ_t (q ⊙ dq - k ⊙ dk) + rowsum(S_T ⊙ dS_T) = rowsum(S_0 ⊙ dS_0), per key channel, whatever the decays are."""
    inputs = draw(GLA, "inclusive", 2, 100)
    got = run_with_gradients(GLA, form, inputs)
    cotangent = torch.Generator().manual_seed(1)
    torch.randn(got["y"].shape, generator=cotangent, dtype=torch.float64)
    dstate = torch.randn(got["state"].shape, generator=cotangent, dtype=torch.float64)
    time = (inputs["q"] * got["q"] - inputs["k"] * got["k"]).sum(1)
    left = time + (got["state"] * dstate).sum(-1)
    assert error(left, (inputs["initial_state"] * got["initial_state"]).sum(-1)) <= 1e-11


@settings(max_examples=15)
@given(cuts=st.lists(st.integers(0, 120), max_size=4), gate=st.sampled_from(sorted(GATES)), bonus=st.booleans())
def test_cut_anywhere_and_carried_on(cuts: list[int], gate: str, bonus: bool) -> None:
    inputs = arguments(gate, bonus=bonus, length=120)
    whole, final = run(GLA, "torch", inputs)
    edges, state, parts = sorted({0, 120, *cuts}), inputs["initial_state"], []
    for a, b in itertools.pairwise(edges):
        piece = {k: v[:, a:b] if k in GLA.time else v for k, v in inputs.items()}
        y, state = run(GLA, "torch", {**piece, "initial_state": state})
        parts.append(y)
    assert error(torch.cat(parts, 1), whole) <= 1e-11
    assert error(state, final) <= 1e-11


def test_the_scale_is_that_of_the_queries() -> None:
    inputs = draw(GLA, "full", 1, 30)
    scaled = run(GLA, "torch", {**inputs, "scale": 3.0})
    unscaled = run(GLA, "torch", {**inputs, "scale": 1.0, "q": 3 * inputs["q"]})
    assert error(scaled[0], unscaled[0]) <= 1e-14
    default = run(GLA, "torch", inputs)
    assert error(default[0], run(GLA, "torch", {**inputs, "scale": inputs["q"].shape[-1] ** -0.5})[0]) == 0


def loop(q: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """RWKV-6, equation 18 of arXiv 2404.05892, one head, in numbers: wkv_t = diag(u) kᵀv + Σ_i diag(Π w) k_iᵀ v_i."""
    outputs = []
    for t in range(q.shape[0]):
        wkv = torch.diag(u) @ k[t][:, None] @ v[t][None]
        for i in range(t):
            wkv = wkv + torch.diag(w[i + 1 : t].prod(0)) @ k[i][:, None] @ v[i][None]
        outputs.append(q[t] @ wkv)
    return torch.stack(outputs)


def test_the_bonus_is_that_of_rwkv6() -> None:
    torch.manual_seed(0)
    q, k, v, w = (torch.randn(9, 4, dtype=torch.float64) for _ in range(4))
    u, decay = torch.randn(4, dtype=torch.float64), -torch.exp(w)
    y = gla(*(t[None, :, None] for t in (q, k, v, decay)), bonus=u[None], scale=1.0, backend="torch")
    assert error(y[0, :, 0], loop(q, k, v, decay.exp(), u)) <= 1e-13


def test_gates_of_hgrn2_need_no_key() -> None:
    """The published layer ties k = 1 - exp(g): the op must take g near 0 without losing k."""
    x = torch.full((1, 64, 1, 4), 12.0)
    g = F.logsigmoid(x)
    y = gla(torch.ones_like(x), -torch.expm1(g), torch.ones_like(x), g, scale=1.0, backend="torch")
    expected = gla(*(t.double() for t in (torch.ones_like(x), -torch.expm1(g), torch.ones_like(x), g)), scale=1.0)
    assert error(y, expected) <= 1e-6
