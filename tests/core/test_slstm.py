"""sLSTM and its family beyond the shared laws: closed form, torch's own cells, fresh units, stabiliser, extremes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from parity import assert_close, cast, cotangents, draw, error, gradients, named, run, run_with_gradients, with_leaves
from torch import Tensor, nn

from sinuous.core.ops import dispatch, slstm
from sinuous.core.ops.laws import LAWS

SLSTM = LAWS["slstm"]
FORMS = [form for form in SLSTM.family.forms if form != "triton"]
SEEDS = st.integers(0, 999)


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return available(request.param)


def available(form: str) -> str:
    reason = dispatch.unavailable("slstm", SLSTM.family.forms, form, torch.device("cpu"), torch.float32)
    if reason is not None:
        pytest.skip(f"{form}: {reason}")
    return form


every_form = pytest.mark.parametrize("form", FORMS)
"""For tests of hypothesis, which take no fixture of the scope of a function."""


def sample(length: int, seed: int = 0, variant: str = "plain") -> dict[str, Any]:
    return draw(SLSTM, variant, 2, length, seed=seed)


def without_recurrence(length: int, seed: int = 0) -> dict[str, Any]:
    arguments = sample(length, seed)
    return arguments | {"R": torch.zeros_like(arguments["R"])}


def weighted_average(gates: Tensor, R: Tensor, bias: Tensor) -> Tensor:
    """R = 0 from no state at all: y_t = σ(o_t) Σ_s w_ts tanh(z_s), where w_ts ∝ exp(i_s + Σ_{s < r ≤ t} log f_r)."""
    i, f, z, o = (gates + bias).unbind(2)
    sums = F.logsigmoid(f).cumsum(1)
    log_w = i[:, None] - sums[:, None] + sums[:, :, None]
    later = torch.ones(i.shape[1], i.shape[1], dtype=torch.bool).triu(1)
    weights = log_w.masked_fill(later[None, :, :, None, None], -torch.inf).softmax(2)
    return o.sigmoid() * (weights * z.tanh()[:, None]).sum(2)


def test_without_recurrence_it_is_a_weighted_average_of_the_past(form: str) -> None:
    arguments, leaves = with_leaves(without_recurrence(90))
    actual, expected = slstm(**arguments, backend=form), weighted_average(**arguments)
    assert error(actual, expected) <= 1e-13
    del leaves["R"]
    grads = cotangents({"y": expected}, seed=3)
    assert_close(gradients({"y": actual}, leaves, grads), gradients({"y": expected}, leaves, grads), 1e-11)


@given(seed=SEEDS, scale=st.floats(0.1, 30))
@every_form
def test_it_is_a_convex_combination_for_gates_of_any_size(form: str, seed: int, scale: float) -> None:
    arguments = without_recurrence(40, seed)
    arguments["gates"][:, :, :2] *= scale
    z, o = (arguments["gates"] + arguments["bias"])[:, :, 2:].unbind(2)
    actual = slstm(**arguments, backend=available(form)) / o.sigmoid()
    assert (actual.amax(1) <= z.tanh().amax(1) + 1e-12).all()
    assert (actual.amin(1) >= z.tanh().amin(1) - 1e-12).all()
    assert error(actual, weighted_average(**arguments) / o.sigmoid()) <= 1e-11


def test_against_the_equations_without_a_stabiliser(form: str) -> None:
    """The recurrence with c and n as the paper has them before it stabilises them; states in units of e^m."""
    arguments = sample(30, variant="full")
    y, (final_y, c, n, m) = run(SLSTM, form, arguments)
    (h, C, N, M), ys = arguments["initial_state"], []
    C, N = C * M.exp(), N * M.exp()
    for x_t in arguments["gates"].unbind(1):
        products = torch.stack([_product(R, h) for R in arguments["R"]], 1)
        i, f, z, o = (x_t + products + arguments["bias"]).unbind(1)
        C, N = f.sigmoid() * C + i.exp() * z.tanh(), f.sigmoid() * N + i.exp()
        h = o.sigmoid() * C / N
        ys.append(h)
    actual = {"y": y, "final_y": final_y, "c": c * m.exp(), "n": n * m.exp()}
    assert_close(actual, {"y": torch.stack(ys, 1), "final_y": h, "c": C, "n": N}, 1e-12)


def _product(R: Tensor, y: Tensor) -> Tensor:
    """`[H, D, D]` times `[B, H, D]`, head by head."""
    return torch.stack([y[:, h] @ R[h].T for h in range(R.shape[0])], 1)


def by_layer(kind: str, layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """torch's parameters as ours: its order of gates is i f z o in the LSTM, and reset, update, candidate in the GRU,
    where the candidate reads the state through the reset gate only."""
    width = layer.hidden_size
    W, U, b, c = (getattr(layer, f"{name}_l0") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    gates, R = (x @ W.T).unflatten(-1, (-1, width)), U.unflatten(0, (-1, width))
    b, c = b.unflatten(0, (-1, width)), c.unflatten(0, (-1, width))
    if kind == "lstm":
        bias = b + c
    else:
        gates = torch.cat([gates, torch.zeros_like(gates[:, :, :1])], 2)
        R = torch.stack([R[0], R[1], torch.zeros_like(R[2]), R[2]])
        bias = torch.stack([b[0] + c[0], b[1] + c[1], b[2], c[2]])
    return {"gates": gates.unsqueeze(3), "R": R.unsqueeze(1), "bias": bias.unsqueeze(1)}


@pytest.mark.parametrize(("kind", "cls"), [("lstm", nn.LSTM), ("gru", nn.GRU)])
def test_equals_the_cells_of_torch(form: str, kind: str, cls: type[nn.Module]) -> None:
    torch.manual_seed(0)
    layer = cls(5, 7, batch_first=True, dtype=torch.float64)
    x, y0, c0 = torch.randn(3, 70, 5).double(), torch.randn(3, 7).double(), torch.randn(3, 7).double()
    state = tuple(t.requires_grad_() for t in (x, y0, c0))
    leaves = {"x": state[0], "y0": state[1], **dict(layer.named_parameters())}
    if kind == "lstm":
        leaves["c0"] = state[2]
        expected, (last, last_c) = layer(x, (y0[None], c0[None]))
    else:
        expected, last = layer(x, y0[None])
        last_c = None
    zero = torch.zeros(3, 1, 7).double()
    initial = (y0[:, None], c0[:, None], zero, zero)
    y, (final, c, _, _) = slstm(
        **by_layer(kind, layer, x), cell=kind, initial_state=initial, return_state=True, backend=form
    )
    actual = {"y": y.squeeze(2), "last": final.transpose(0, 1)}
    peer = {"y": expected, "last": last}
    if last_c is not None:
        actual["c"], peer["c"] = c.transpose(0, 1), last_c
    assert_close(actual, peer, 1e-13)
    weights = cotangents(peer, seed=2)
    assert_close(gradients(actual, leaves, weights), gradients(peer, leaves, weights), 1e-12)


@pytest.mark.parametrize(("cell", "unused"), [("lstm", (2, 3)), ("gru", (1, 2, 3))])
def test_what_a_cell_does_not_use_is_handed_through(form: str, cell: str, unused: tuple[int, ...]) -> None:
    arguments, _ = with_leaves(sample(40, variant=cell))
    initial = arguments["initial_state"]
    y, final = run(SLSTM, form, arguments)
    for k in unused:
        assert torch.equal(final[k], initial[k])
        weight = torch.randn_like(final[k])
        (grad,) = torch.autograd.grad((y.sum(), final[k]), initial[k], (y.new_ones(()), weight), retain_graph=True)
        assert torch.equal(grad, weight)


def test_heads_are_separate(form: str) -> None:
    arguments = sample(40, variant="full")
    whole = named(run(SLSTM, form, arguments))
    for head in range(2):
        piece = {k: v[..., head : head + 1, :] for k, v in arguments.items() if k in ("gates", "bias")}
        piece["R"] = arguments["R"][:, head : head + 1]
        piece["initial_state"] = tuple(t[:, head : head + 1] for t in arguments["initial_state"])
        assert_close(named(run(SLSTM, form, piece)), {k: v[..., head : head + 1, :] for k, v in whole.items()}, 1e-13)


# Fresh units.


def test_a_fresh_unit_begins_with_its_first_input(form: str) -> None:
    """y_1 = σ(o) tanh(z) and m_1 = i whatever i and the m of the empty state."""
    arguments = sample(1)
    i, _, z, o = (arguments["gates"] + arguments["bias"])[:, 0].unbind(1)
    zero = torch.zeros_like(i)
    for m in (-100.0, 0.0, 100.0):
        y, (_, c, n, found_m) = run(SLSTM, form, arguments | {"initial_state": (zero, zero, zero, zero + m)})
        expected = {"y": (o.sigmoid() * z.tanh())[:, None], "c": z.tanh(), "n": torch.ones_like(n), "m": i}
        assert_close({"y": y, "c": c, "n": n, "m": found_m}, expected, 1e-14)


def test_units_and_rows_are_fresh_each_on_its_own(form: str) -> None:
    """A row that has begun changes nothing for one that has not, and a unit nothing for its neighbour."""
    arguments = without_recurrence(20)
    _, begun = run(SLSTM, form, arguments)
    mask = torch.rand(begun[0].shape, generator=torch.Generator().manual_seed(0)) < 0.5
    mixed = tuple(t * mask for t in begun)
    zeros = tuple(torch.zeros_like(t) for t in begun)
    of_mixed, of_begun, of_fresh = (
        named(run(SLSTM, form, arguments | {"initial_state": state})) for state in (mixed, begun, zeros)
    )
    for k, v in of_mixed.items():
        where = mask[:, None] if k == "y" else mask
        assert torch.equal(v, torch.where(where, of_begun[k], of_fresh[k])), k


def test_gradient_at_fresh_units(form: str) -> None:
    """Gradients of all but n, at which a fresh unit stands on a jump; there the gradient is that on its own side."""
    arguments = sample(9, variant="full")
    y, c, n, m = arguments["initial_state"]
    fresh = torch.rand(n.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    arguments["initial_state"] = (y, c * ~fresh, n * ~fresh, m)
    expected = run_with_gradients(SLSTM, "recurrent", arguments)
    assert_close(run_with_gradients(SLSTM, form, arguments), expected, 1e-12)

    def function(y: Tensor, c: Tensor, m: Tensor, gates: Tensor, R: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        inputs = {"gates": gates, "R": R, "bias": bias, "initial_state": (y, c, n * ~fresh, m)}
        return tuple(named(run(SLSTM, form, inputs)).values())

    values = (y, c * ~fresh, m, arguments["gates"][:, :4], arguments["R"], arguments["bias"])
    assert torch.autograd.gradcheck(function, tuple(t.detach().requires_grad_() for t in values), fast_mode=True)


# The stabiliser.


@pytest.mark.parametrize("shift", [-60.0, 5.0, 300.0])
def test_a_shift_of_the_input_gate_moves_m_alone(form: str, shift: float) -> None:
    arguments = sample(70)
    shifted = arguments | {"gates": arguments["gates"] + shift * torch.eye(4).double()[0, :, None, None]}
    expected, actual = (named(run(SLSTM, form, a)) for a in (arguments, shifted))
    assert_close(actual, expected | {"state.3": expected["state.3"] + shift}, 1e-11)


@pytest.mark.parametrize("shift", [-40.0, 3.0, 40.0])
def test_a_state_may_be_given_in_another_scale(form: str, shift: float) -> None:
    arguments = sample(70, variant="full")
    y, c, n, m = arguments["initial_state"]
    state = (y, c * math.exp(-shift), n * math.exp(-shift), m + shift)
    expected, actual = (named(run(SLSTM, form, a)) for a in (arguments, arguments | {"initial_state": state}))
    assert error(actual["y"], expected["y"]) <= 1e-11
    for part in ("state.1", "state.2"):
        values = [of[part] * of["state.3"].exp() for of in (actual, expected)]
        assert error(*values) <= 1e-11


def test_y_has_no_gradient_through_the_scale_of_the_state(form: str) -> None:
    """y of (s c, s n, m - log s) is that of (c, n, m): c dc + n dn = dm."""
    arguments, leaves = with_leaves(sample(50, variant="full"))
    y, _ = run(SLSTM, form, arguments)
    weight = cotangents({"y": y}, seed=4)["y"]
    c, n, m = (leaves[f"initial_state.{k}"] for k in (1, 2, 3))
    dc, dn, dm = torch.autograd.grad(y, (c, n, m), weight)
    assert dm.abs().max() > 1e-3
    assert error(c * dc + n * dn, dm) <= 1e-10


@given(seed=SEEDS, cut=st.integers(0, 70))
@every_form
def test_gradients_of_a_sequence_cut_in_two_are_those_of_the_whole(form: str, seed: int, cut: int) -> None:
    arguments, leaves = with_leaves(sample(70, seed, variant="full"))
    whole = named(run(SLSTM, available(form), arguments))
    first, state = run(SLSTM, form, {**arguments, "gates": arguments["gates"][:, :cut]})
    second, state = run(SLSTM, form, {**arguments, "gates": arguments["gates"][:, cut:], "initial_state": state})
    grads = cotangents(whole, seed=2)
    actual = gradients(named((torch.cat([first, second], 1), state)), leaves, grads)
    assert_close(actual, gradients(whole, leaves, grads), 1e-11)


# Extremes.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("i", "f"), [(80.0, 0.0), (-80.0, 0.0), (0.0, 80.0), (0.0, -80.0), (80.0, -80.0), (-80.0, 80.0)]
)
def test_extreme_gates(form: str, i: float, f: float, dtype: torch.dtype) -> None:
    arguments = sample(70)
    arguments["gates"][:, :, 0] *= i or 1
    arguments["gates"][:, :, 1] *= f or 1
    arguments["gates"] = arguments["gates"].float().double()
    expected = run_with_gradients(SLSTM, "recurrent", arguments)
    actual = run_with_gradients(SLSTM, form, cast(arguments, dtype))
    assert all(v.isfinite().all() for v in actual.values())
    assert_close(actual, expected, 1e-10 if dtype == torch.float64 else 2e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_minus_infinity_writes_nothing_or_forgets_everything(form: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    arguments = sample(70)
    arguments["gates"][:, :, :2].masked_fill_(torch.rand(2, 70, 2, 3, 5, generator=generator) < 0.3, -torch.inf)
    arguments["gates"][:, :3, 0] = -torch.inf
    expected = run_with_gradients(SLSTM, "recurrent", arguments)
    actual = run_with_gradients(SLSTM, form, cast(arguments, dtype))
    assert all(v.isfinite().all() for v in actual.values())
    assert_close(actual, expected, 1e-10 if dtype == torch.float64 else 1e-4)
    assert not actual["y"][:, :3].any()


def test_minus_infinity_at_the_forget_gate_is_an_exact_reset(form: str) -> None:
    for cell in ("slstm", "lstm"):
        arguments = without_recurrence(20) | {"cell": cell}
        arguments["gates"][:, 12, 1] = -torch.inf
        whole, _ = run(SLSTM, form, arguments)
        second, _ = run(SLSTM, form, arguments | {"gates": arguments["gates"][:, 12:]})
        torch.testing.assert_close(whole[:, 12:], second, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("cell", ["slstm", "lstm"])
def test_steps_masked_out_leave_the_memory_as_it_is(form: str, cell: str) -> None:
    """i = -inf and f = +inf: padding in front or behind changes neither c, n nor m."""
    arguments = without_recurrence(40) | {"cell": cell}
    padding = torch.zeros(2, 9, 4, 3, 5).double()
    padding[:, :, 0], padding[:, :, 1] = -torch.inf, torch.inf
    _, (_, *expected) = run(SLSTM, form, arguments)
    for pieces in ([padding, arguments["gates"]], [arguments["gates"], padding]):
        _, (_, *actual) = run(SLSTM, form, arguments | {"gates": torch.cat(pieces, 1)})
        assert_close(dict(enumerate(actual)), dict(enumerate(expected)), 1e-13)


def test_a_large_state_in_single_precision_over_a_long_time(form: str) -> None:
    arguments = sample(2000)
    arguments["gates"][:, :, 1] += 4
    expected = named(run(SLSTM, "recurrent", arguments))
    assert_close(named(run(SLSTM, form, cast(arguments, torch.float32))), expected, 1e-4)
