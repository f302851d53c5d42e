"""Properties of dplr: which vector reads and which one writes, its kin, decays of every strength, and peers."""

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

from sinuous.core.ops import delta_rule, dplr, gla
from sinuous.core.ops.laws import LAWS

DPLR = LAWS["dplr"]
INF = float("inf")
every_form = pytest.mark.parametrize("form", DPLR.family.forms[DPLR.family.forms.index("torch") :])

GATES = {
    "mild": lambda z: -0.1 * z.abs(),
    "strong": lambda z: -50 * z.abs(),
    "strong beside none": lambda z: torch.where(z > 1, -200 * z.abs(), -0.01 * z.abs()),
    "just within one piece": lambda z: torch.full_like(z, -60 / 64),
    "none": lambda z: 0 * z,
    "half of them none": lambda z: torch.where(z > 0, 0.0, -z.abs()),
    "resets of single channels": lambda z: torch.where(z > 1.5, -INF, -0.1 * z.abs()),
}


def noise(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def arguments(gate: str, *, variant: str = "full", length: int = 150) -> dict[str, Any]:
    inputs = draw(DPLR, variant, 2, length)
    return {**inputs, "log_decay": GATES[gate](noise(*inputs["log_decay"].shape))}


def delta(keys: int = 8) -> dict[str, Tensor]:
    """Inputs of a delta rule with a decay for every channel."""
    shape = (2, 100, 3, keys)
    return {
        "q": noise(*shape, seed=1),
        "k": F.normalize(noise(*shape, seed=2), dim=-1),
        "v": noise(*shape[:3], 5, seed=3),
        "beta": 2 * torch.sigmoid(noise(*shape[:3], seed=4)),
        "log_decay": F.logsigmoid(noise(*shape, seed=5)),
        "initial_state": noise(2, 3, keys, 5, seed=6),
    }


def kda(form: str, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, **options: Any) -> Any:
    """The delta rule after a decay, as the module's table maps it."""
    written = beta[..., None] * k
    return dplr(q, written, v, log_decay, k * log_decay.exp(), -written, backend=form, **options)


# The convention.


@every_form
def test_a_reads_and_b_writes(form: str) -> None:
    """Row 0 is added to row 1 with a = e_0 and b = e_1, and not the other way round; the second step does nothing."""
    zero, e = torch.zeros(1, 2, 1, 3), torch.eye(3).view(3, 1, 1, 1, 3).expand(3, 1, 2, 1, 3)
    S = torch.arange(1.0, 7).view(1, 1, 3, 2)
    a, b = e[0].clone(), e[1].clone()
    a[:, 1] = 0
    y, state = dplr(e[1], zero, zero[..., :2], zero, a, b, initial_state=S, scale=1.0, return_state=True, backend=form)
    assert state[0, 0].tolist() == [[1, 2], [4, 6], [5, 6]]
    assert y[0, :, 0].tolist() == [[4, 6], [4, 6]]


@pytest.mark.parametrize("length", [1, 2])
@every_form
def test_a_reads_ahead_of_the_decay(form: str, length: int) -> None:
    """The first step halves what is there and writes what was there before that."""
    S, one = torch.full((1, 1, 1, 1), 8.0), torch.ones(1, length, 1, 1)
    decay = torch.log(one / 2)
    decay[:, 1:] = 0
    a, b = one.clone(), one.clone()
    a[:, 1:] = 0
    y, state = dplr(one, 0 * one, one, decay, a, b, initial_state=S, return_state=True, scale=1.0, backend=form)
    assert y.flatten().tolist() == pytest.approx([8 / 2 + 8] * length)
    assert state.item() == pytest.approx(12)


def test_a_reset_is_read_before_it_forgets() -> None:
    one, S = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 8.0)
    forget = torch.full_like(one, -INF)
    for form in ("recurrent", "torch"):
        steps = [torch.cat([t, t], 1) for t in (one, 0 * one, one, forget, one, one)]
        _, state = dplr(*steps, initial_state=S, return_state=True, backend=form)
        assert state.item() == 8, form
        _, state = dplr(*steps[:4], 0 * steps[4], steps[5], initial_state=S, return_state=True, backend=form)
        assert state.item() == 0, form


def test_a_reflection_swaps_two_rows() -> None:
    k = torch.tensor([1.0, -1, 0], dtype=torch.float64).div(2**0.5).view(1, 1, 1, 3)
    S = noise(1, 1, 3, 4)
    _, state = dplr(k, 0 * k, S[:, :, :1], 0 * k, k, -2 * k, initial_state=S, return_state=True)
    assert error(state, S[:, :, [1, 0, 2]]) <= 1e-15


@every_form
def test_a_change_of_basis_changes_nothing_without_decay(form: str) -> None:
    inputs = arguments("none")
    turn = torch.linalg.qr(noise(16, 16))[0]
    turned = {name: t @ turn if name in ("q", "k", "a", "b") else t for name, t in inputs.items()}
    turned["initial_state"] = turn.mT @ inputs["initial_state"]
    y, state = run(DPLR, form, inputs)
    y_turned, state_turned = run(DPLR, form, turned)
    assert error(y_turned, y) <= 1e-12
    assert error(turn @ state_turned, state) <= 1e-12


# Its kin.


@every_form
def test_nothing_read_is_gla(form: str) -> None:
    inputs = draw(DPLR, "full", 2, 100)
    y, state = run(DPLR, form, {**inputs, "a": 0 * inputs["a"]})
    expected = gla(
        *(inputs[name] for name in ("q", "k", "v", "log_decay")),
        initial_state=inputs["initial_state"],
        return_state=True,
    )
    assert error(y, expected[0]) <= 1e-12
    assert error(state, expected[1]) <= 1e-12


@every_form
def test_no_decay_is_the_delta_rule(form: str) -> None:
    inputs = delta()
    without = {**inputs, "log_decay": 0 * inputs["log_decay"]}
    y, state = kda(form, **without, return_state=True)
    without.pop("log_decay")
    expected = delta_rule(**without, return_state=True)
    assert error(y, expected[0]) <= 1e-12
    assert error(state, expected[1]) <= 1e-12


@every_form
def test_equal_decays_of_all_channels_are_the_gated_delta_rule(form: str) -> None:
    inputs = delta()
    decay = inputs["log_decay"][..., 0]
    y, state = kda(form, **{**inputs, "log_decay": decay[..., None].expand_as(inputs["q"])}, return_state=True)
    expected = delta_rule(**{**inputs, "log_decay": decay}, return_state=True)
    assert error(y, expected[0]) <= 1e-12
    assert error(state, expected[1]) <= 1e-12


@every_form
def test_kda_decays_before_it_reads(form: str) -> None:
    actual = delta()
    q, k, v, beta, g, S = actual.values()
    outputs = []
    for t in range(q.shape[1]):
        S = g[:, t].exp()[..., None] * S
        wrong = v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t])
        S = S + torch.einsum("bh,bhk,bhv->bhkv", beta[:, t], k[:, t], wrong)
        outputs.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
    y, state = kda(form, **actual, scale=1.0, return_state=True)
    assert error(y, torch.stack(outputs, 1)) <= 1e-12
    assert error(state, S) <= 1e-12


@every_form
def test_comba_reads_with_a_vector_of_its_own(form: str) -> None:
    actual = delta()
    q, k, v, beta, g, S = actual.values()
    decay, p = g[..., 0], 0.7 * k + 0.1 * q
    written = beta[..., None] * k
    y = dplr(
        q, written, v, decay[..., None].expand_as(k), p * decay.exp()[..., None], -written,
        initial_state=S, scale=1.0, backend=form,
    )  # fmt: skip
    outputs = []
    for t in range(q.shape[1]):
        S = decay[:, t].exp()[..., None, None] * S
        wrong = v[:, t] - torch.einsum("bhkv,bhk->bhv", S, p[:, t])
        S = S + torch.einsum("bh,bhk,bhv->bhkv", beta[:, t], k[:, t], wrong)
        outputs.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
    assert error(y, torch.stack(outputs, 1)) <= 1e-12


@every_form
def test_rwkv7_is_a_product_of_transitions(form: str) -> None:
    """y_t = Σ_{i ≤ t} r_tᵀ (A_t … A_{i+1} k_i) v_i with A = diag(w) - (κ ⊙ α) κᵀ, summed as it stands."""
    length, keys = 20, 4
    r, k, kappa, alpha, w = (noise(length, keys, seed=n) for n in range(5))
    v = noise(length, 3, seed=9)
    kappa, alpha, decay = F.normalize(kappa, dim=-1), torch.sigmoid(alpha), -0.6065 * torch.sigmoid(w)
    A = torch.diag_embed(decay.exp()) - (kappa * alpha)[:, :, None] * kappa[:, None]
    expected = []
    for t in range(length):
        total, product = torch.zeros(3, dtype=torch.float64), torch.eye(keys, dtype=torch.float64)
        for i in range(t, -1, -1):
            total = total + (r[t] @ product @ k[i]) * v[i]
            product = product @ A[i]
        expected.append(total)
    inputs = (r, k, v, decay, -kappa, kappa * alpha)
    y = dplr(*(t[None, :, None] for t in inputs), scale=1.0, backend=form)
    assert error(y[0, :, 0], torch.stack(expected)) <= 1e-12


# Decays of every strength.


@pytest.mark.parametrize("variant", ["full", "free"])
@pytest.mark.parametrize("gate", GATES)
def test_every_gate_is_as_exact_in_single_precision(gate: str, variant: str) -> None:
    expected = run_with_gradients(DPLR, "recurrent", arguments(gate, variant=variant))
    assert all(t.isfinite().all() for t in expected.values())
    assert_close(run_with_gradients(DPLR, "torch", arguments(gate, variant=variant)), expected, 1e-12)
    actual = run_with_gradients(DPLR, "torch", cast(arguments(gate, variant=variant), torch.float32))
    assert_close(actual, expected, 1e-5)


def test_a_gradient_of_a_strong_decay_is_not_drowned() -> None:
    """Gradients of decays stay right where every step decays by exp(-70), and they are some 1e-30 of the others."""
    inputs = draw(DPLR, "full", 1, 9)
    inputs["log_decay"] = torch.full_like(inputs["log_decay"], -70.0)
    expected = run_with_gradients(DPLR, "recurrent", inputs)["log_decay"]
    assert 0 < expected.abs().max() < 1e-28
    assert error(run_with_gradients(DPLR, "torch", inputs)["log_decay"], expected) <= 1e-12


@every_form
def test_a_reset_of_all_channels_forgets_all_that_is_not_read(form: str) -> None:
    inputs = draw(DPLR, "full", 2, 90)
    inputs["log_decay"][:, 37] = -INF
    inputs["a"][:, 37] = 0
    y, state = run(DPLR, form, inputs)
    later = {k: v[:, 37:] if k in DPLR.time else v for k, v in inputs.items() if k != "initial_state"}
    fresh, fresh_state = run(DPLR, form, later)
    assert error(y[:, 37:], fresh) <= 1e-12
    assert error(state, fresh_state) <= 1e-12


@pytest.mark.parametrize("form", ["recurrent", "torch"])
def test_gradient_identity_of_the_keys(form: str) -> None:
    """Whatever the decays: scaling a row of the state with k and b, and q and a against it, changes nothing, so that
    Σ_t (q dq + a da - k dk - b db) + rowsum(S_T ⊙ dS_T) = rowsum(S_0 ⊙ dS_0) per key channel."""
    inputs = draw(DPLR, "free", 2, 100)
    got = run_with_gradients(DPLR, form, inputs)
    generator = torch.Generator().manual_seed(1)
    torch.randn(got["y"].shape, generator=generator, dtype=torch.float64)
    dstate = torch.randn(got["state"].shape, generator=generator, dtype=torch.float64)
    time = sum(sign * (inputs[name] * got[name]).sum(1) for name, sign in (("q", 1), ("a", 1), ("k", -1), ("b", -1)))
    left = time + (got["state"] * dstate).sum(-1)
    assert error(left, (inputs["initial_state"] * got["initial_state"]).sum(-1)) <= 1e-11


@settings(max_examples=15)
@given(
    cuts=st.lists(st.integers(0, 120), max_size=4),
    gate=st.sampled_from(sorted(GATES)),
    variant=st.sampled_from(["full", "free"]),
)
def test_cut_anywhere_and_carried_on(cuts: list[int], gate: str, variant: str) -> None:
    inputs = arguments(gate, variant=variant, length=120)
    whole, final = run(DPLR, "torch", inputs)
    edges, state, parts = sorted({0, 120, *cuts}), inputs["initial_state"], []
    for a, b in itertools.pairwise(edges):
        piece = {k: v[:, a:b] if k in DPLR.time else v for k, v in inputs.items()}
        y, state = run(DPLR, "torch", {**piece, "initial_state": state})
        parts.append(y)
    assert error(torch.cat(parts, 1), whole) <= 1e-11
    assert error(state, final) <= 1e-11


@pytest.mark.parametrize("name", ["recurrent_kimi_delta_attention", "chunk_kimi_delta_attention"])
def test_equals_kimi_delta_attention_of_transformers(name: str) -> None:
    path = "transformers.models.kimi_linear.modeling_kimi_linear"
    pytest.importorskip("transformers", reason="needs transformers")
    try:
        # Around the torch code lies a wrapper that takes a kernel of another package where there is one.
        peer = inspect.unwrap(getattr(importlib.import_module(path), name))
    except (ImportError, AttributeError):
        pytest.skip(f"this transformers has no {path}.{name}")
    actual = cast(delta(), torch.float32)

    def gradients(call: Any) -> dict[str, Tensor]:
        inputs = {key: t.clone().requires_grad_() for key, t in actual.items()}
        y, state = call(inputs)
        grads = [noise(*t.shape, seed=7).float() for t in (y, state)]
        return {
            "y": y,
            "state": state,
            **dict(zip(inputs, torch.autograd.grad((y, state), list(inputs.values()), grads), strict=True)),
        }

    expected = gradients(
        lambda t: peer(
            t["q"], t["k"], t["v"], t["log_decay"], t["beta"], initial_state=t["initial_state"], output_final_state=True
        )
    )
    assert_close(gradients(lambda t: kda("torch", **t, return_state=True)), expected, 1e-4)
