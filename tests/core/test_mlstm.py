"""mLSTM beyond the shared laws: the paper's quadratic form, the invariances of the stabiliser, and extreme gates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from parity import assert_close, cast, cotangents, draw, error, gradients, named, run, run_with_gradients, with_leaves
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sinuous.core.ops import dispatch, mlstm, ssd
from sinuous.core.ops.laws import LAWS

MLSTM = LAWS["mlstm"]
FORMS = ("recurrent", "torch")
SEEDS = st.integers(0, 999)
every_form = pytest.mark.parametrize("form", FORMS)


def sample(length: int, seed: int = 0, variant: str = "plain") -> dict[str, Any]:
    return draw(MLSTM, variant, 2, length, seed=seed)


def quadratic(
    q: Tensor, k: Tensor, v: Tensor, input_gate: Tensor, forget_gate: Tensor, eps: float, *, floor: bool
) -> Tensor:
    """All pairs of steps at once: xLSTM (arXiv 2405.04517), appendix A.3. The `floor` is the recurrent form's m_0 = 0,
    which the paper's maximum over the row does not have."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    sums, log_i = F.logsigmoid(forget_gate).cumsum(1).mT, input_gate.mT
    log_D = sums[..., :, None] - sums[..., None, :] + log_i[..., None, :]
    log_D = log_D.masked_fill(torch.ones_like(log_D).triu(1).bool(), -torch.inf)
    m = log_D.amax(-1)
    if floor:
        m = torch.maximum(m, sums)
    S = q @ k.mT * q.shape[-1] ** -0.5 * (log_D - m[..., None]).exp()
    denominator = torch.maximum(S.sum(-1).abs(), (-m).exp()) + eps
    return (S @ v / denominator[..., None]).transpose(1, 2)


@pytest.mark.parametrize(("eps", "floor"), [(1e-6, True), (0.1, True), (0.0, False)])
@every_form
def test_equals_the_quadratic_form(form: str, eps: float, floor: bool) -> None:
    arguments = sample(150)
    assert error(mlstm(**arguments, eps=eps, backend=form), quadratic(**arguments, eps=eps, floor=floor)) <= 1e-12


@pytest.mark.parametrize(("eps", "floor"), [(1e-6, True), (0.1, True), (0.0, False)])
@every_form
def test_the_gradient_is_that_of_the_quadratic_form(form: str, eps: float, floor: bool) -> None:
    arguments, leaves = with_leaves(sample(150))
    actual, expected = mlstm(**arguments, eps=eps, backend=form), quadratic(**arguments, eps=eps, floor=floor)
    grads = cotangents({"y": expected}, seed=3)
    assert_close(gradients({"y": actual}, leaves, grads), gradients({"y": expected}, leaves, grads), 1e-10)


@pytest.mark.parametrize("variant", ["full", "sigmoid", "unnormalised"])
@every_form
def test_a_sequence_cut_in_two_has_the_gradients_of_the_whole(form: str, variant: str) -> None:
    arguments, leaves = with_leaves(sample(150, variant=variant))
    whole = named(run(MLSTM, form, arguments))
    grads = cotangents(whole, seed=2)
    expected = gradients(whole, leaves, grads)
    for cut in (1, 64, 100):
        first = {k: v[:, :cut] if k in MLSTM.time else v for k, v in arguments.items()}
        second = {k: v[:, cut:] if k in MLSTM.time else v for k, v in arguments.items()}
        y, state = run(MLSTM, form, first)
        rest, state = run(MLSTM, form, {**second, "initial_state": state})
        actual = named((torch.cat([y, rest], 1), state))
        assert_close(actual, whole, 1e-12)
        assert_close(gradients(actual, leaves, grads), expected, 1e-10)


@given(seed=SEEDS, shift=st.floats(-2, 60))
@every_form
def test_a_constant_on_all_input_gates_cancels_where_the_normaliser_dominates(
    form: str, seed: int, shift: float
) -> None:
    arguments = sample(70, seed)
    arguments |= {"q": arguments["q"].abs() + 1, "k": arguments["k"].abs() + 1}
    arguments["input_gate"] = arguments["input_gate"].abs() + 2
    expected = mlstm(**arguments, eps=0, backend=form)
    shifted = {**arguments, "input_gate": arguments["input_gate"] + shift}
    assert error(mlstm(**shifted, eps=0, backend=form), expected) <= 1e-10


@given(seed=SEEDS, shift=st.floats(-20, 20))
@every_form
def test_the_state_is_in_units_of_its_stabiliser(form: str, seed: int, shift: float) -> None:
    arguments = sample(70, seed, "full") | {"eps": 0.0}
    C, n, m = arguments["initial_state"]
    same = (math.exp(-shift) * C, math.exp(-shift) * n, m + shift)
    (expected, (C, n, m)), (y, actual) = (run(MLSTM, form, arguments | {"initial_state": s}) for s in ((C, n, m), same))
    assert error(y, expected) <= 1e-10
    scale = (actual[2] - m).exp()
    assert error(scale[..., None, None] * actual[0], C) <= 1e-10
    assert error(scale[..., None] * actual[1], n) <= 1e-10


@every_form
def test_without_eps_the_gradient_of_the_stabiliser_is_what_it_does_to_the_state(form: str) -> None:
    arguments, leaves = with_leaves(sample(70, variant="full") | {"eps": 0.0})
    y = run(MLSTM, form, arguments)[0]
    actual = gradients({"y": y}, leaves, cotangents({"y": y}, seed=4))
    expected = torch.zeros_like(actual["initial_state.2"])
    for part in ("initial_state.0", "initial_state.1"):
        expected += (leaves[part] * actual[part]).flatten(2).sum(-1)
    assert error(actual["initial_state.2"], expected) <= 1e-10


@every_form
def test_a_large_eps_is_differentiated_through_states_and_resets(form: str) -> None:
    arguments = draw(MLSTM, "full", 2, 6) | {"eps": 0.5}
    arguments["forget_gate"] -= 2
    arguments["forget_gate"][0, 3] = -torch.inf
    arguments["input_gate"][1, 2] = -torch.inf
    q, k, v, i, f, (C, n, m) = (arguments[name] for name in (*MLSTM.time, "initial_state"))
    finite = tuple(t.requires_grad_() for t in (q, k, v, C, n, m))

    def function(q: Tensor, k: Tensor, v: Tensor, C: Tensor, n: Tensor, m: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        gates = {"input_gate": i + shift[0], "forget_gate": f + shift[1]}
        inputs = {"q": q, "k": k, "v": v, "initial_state": (C, n, m), "eps": 0.5}
        return tuple(named(run(MLSTM, form, inputs | gates)).values())

    shift = torch.zeros(2, 2, 6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (*finite, shift), fast_mode=True)


@every_form
def test_the_scale_belongs_to_the_queries_and_not_to_the_state(form: str) -> None:
    arguments = sample(70)
    y, state = mlstm(**arguments, scale=0.3, return_state=True, backend=form)
    scaled, same = mlstm(**arguments | {"q": 0.3 * arguments["q"]}, scale=1.0, return_state=True, backend=form)
    assert error(scaled, y) <= 1e-12
    for part, other in zip(state, same, strict=True):
        assert torch.equal(part, other)


@given(seed=SEEDS)
@every_form
def test_sigmoid_without_normaliser_is_ssd_with_gated_keys(form: str, seed: int) -> None:
    arguments, leaves = with_leaves(sample(70, seed, "unnormalised"))
    C, _, m = arguments["initial_state"]
    actual = named(run(MLSTM, form, arguments))
    keys = arguments["input_gate"].sigmoid()[..., None] * arguments["k"]
    log_decay = F.logsigmoid(arguments["forget_gate"])
    y, S = ssd(arguments["q"], keys, arguments["v"], log_decay, initial_state=C, return_state=True, backend=form)
    assert isinstance(S, Tensor)
    pair, expected = {"y": actual["y"], "state": actual["state.0"]}, {"y": y, "state": S}
    grads = cotangents(expected, seed=1)
    used = {k: leaf for k, leaf in leaves.items() if k not in ("initial_state.1", "initial_state.2")}
    assert_close(pair, expected, 1e-12)
    assert_close(gradients(pair, used, grads), gradients(expected, used, grads), 1e-10)
    assert torch.equal(actual["state.2"], m)


@every_form
def test_one_step_by_hand(form: str) -> None:
    q, k, v = torch.tensor([2.0, 1.0]), torch.tensor([0.5, -1.0]), torch.tensor([3.0, 4.0])
    log_f, i, eps = F.logsigmoid(torch.tensor(1.0)), torch.tensor(-1.5), 0.01
    q4, k4, v4 = (t.view(1, 1, 1, 2) for t in (q, k + 1, v))
    y, (C, n, m) = mlstm(q4, k4, v4, i.view(1, 1, 1), torch.ones(1, 1, 1), eps=eps, return_state=True, backend=form)
    assert m.item() == pytest.approx(log_f.item())  # the initial m, 0, takes part in the maximum
    weight = (i - log_f).exp()
    torch.testing.assert_close(n.view(2), weight * (k + 1))
    torch.testing.assert_close(C.view(2, 2), weight * (k + 1)[:, None] * v[None])
    dot = weight * 2**-0.5 * (q @ (k + 1))
    torch.testing.assert_close(y.view(2), dot * v / (max(abs(dot), (-log_f).exp()) + eps))


@every_form
def test_eps_is_a_millionth_if_it_is_not_given(form: str) -> None:
    arguments = sample(70)
    arguments |= {"input_gate": arguments["input_gate"] + 20, "k": 1e-6 * arguments["k"]}  # where it makes a difference
    y = mlstm(**arguments, backend=form)
    assert error(y, quadratic(**arguments, eps=1e-6, floor=True)) <= 1e-12
    assert error(y, quadratic(**arguments, eps=1.1e-6, floor=True)) >= 0.01


@pytest.mark.parametrize("shift", [1e2, 1e4])
@every_form
def test_single_precision_at_large_input_gates(form: str, shift: float) -> None:
    single = cast(sample(300, variant="full"), torch.float32)
    single["input_gate"] += shift
    expected = run_with_gradients(MLSTM, "recurrent", cast(single, torch.float64))
    expected = {name: t for name, t in expected.items() if not name.startswith("state")}
    assert_close(run_with_gradients(MLSTM, form, single), expected, 1e-4)
    # The state is in units of e^m with m as it is returned, which is rounded: it is used as it is made.
    first = {k: v[:, :99] if k in MLSTM.time else v for k, v in single.items()}
    second = {k: v[:, 99:] if k in MLSTM.time else v for k, v in single.items()}
    rest, _ = run(MLSTM, form, second | {"initial_state": run(MLSTM, form, first)[1]})
    assert error(rest, expected["y"][:, 99:]) <= 1e-4


@pytest.mark.parametrize("gate", ["input_gate", "forget_gate"])
@pytest.mark.parametrize("value", [-1e4, 1e4])
@every_form
def test_extreme_gates_stay_finite(form: str, gate: str, value: float) -> None:
    arguments = cast(sample(70, variant="full"), torch.float32)
    arguments[gate] = arguments[gate] + value * (arguments[gate] > arguments[gate].mean())
    actual = run_with_gradients(MLSTM, form, arguments)
    for name, t in actual.items():
        assert t.isfinite().all(), name


@every_form
def test_an_input_gate_of_minus_infinity_writes_nothing(form: str) -> None:
    arguments = sample(70, variant="full")
    masked = torch.zeros(70, dtype=torch.bool)
    masked[3:9] = masked[-2:] = True
    arguments["input_gate"][:, masked] = -torch.inf
    arguments["forget_gate"][:, masked] = torch.inf
    y, state = run(MLSTM, form, arguments)
    short = {k: v[:, ~masked] if k in MLSTM.time else v for k, v in arguments.items()}
    assert_close(named((y[:, ~masked], state)), named(run(MLSTM, form, short)), 1e-12)
    for name, t in run_with_gradients(MLSTM, form, arguments).items():
        assert t.isfinite().all(), name


@pytest.mark.parametrize("at", [0, 30, 64])
@every_form
def test_a_forget_gate_of_minus_infinity_starts_anew(form: str, at: int) -> None:
    arguments = sample(90, variant="full") | {"eps": 0.0}
    arguments["forget_gate"][0, at] = -torch.inf
    y, state = run(MLSTM, form, arguments)
    fresh = {k: v[:1, at:] if k in MLSTM.time else v for k, v in arguments.items()}
    del fresh["initial_state"]
    rest, after = run(MLSTM, form, fresh)
    assert error(y[:1, at:], rest) <= 1e-12
    assert error(state[2][:1].exp() * state[1][0, :, 0], after[2].exp() * after[1][0, :, 0]) <= 1e-12
    actual, expected = (run_with_gradients(MLSTM, name, arguments) for name in (form, "recurrent"))
    assert_close(actual, expected, 1e-10)
    assert all(t.isfinite().all() for t in actual.values())


@every_form
def test_nothing_kept_and_nothing_written_is_zero(form: str) -> None:
    arguments = sample(70, variant="full")
    arguments["forget_gate"][:, 20] = arguments["input_gate"][:, 20] = -torch.inf
    actual = run_with_gradients(MLSTM, form, arguments)
    assert (actual["y"][:, 20] == 0).all()
    assert all(t.isfinite().all() for t in actual.values())


def test_single_precision_over_a_long_sequence() -> None:
    arguments = draw(MLSTM, "plain", 1, 4096)
    arguments["forget_gate"] -= 4
    actual = run_with_gradients(MLSTM, "torch", cast(arguments, torch.float32))
    assert_close(actual, run_with_gradients(MLSTM, "torch", arguments), 1e-4)


# A single chunk without a state before it.

PACKED = [0, 5, 5, 45, 46, 70, 70]


def outputs_alone(arguments: dict[str, Any], form: str, **options: Any) -> dict[str, Tensor]:
    """The outputs and all gradients, where no state is asked for."""
    arguments, leaves = with_leaves(arguments)
    y = mlstm(**arguments, **options, backend=form)
    return {"y": y, **gradients({"y": y}, leaves, cotangents({"y": y}, seed=5))}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 69, 70, 150])
@pytest.mark.parametrize("variant", ["plain", "sigmoid", "unnormalised", "one_channel"])
def test_without_a_state_to_return_nothing_else_changes(variant: str, length: int, reverse: bool) -> None:
    arguments = sample(length, variant=variant) | {"reverse": reverse}
    arguments.pop("initial_state", None)
    arguments["input_gate"][0, length // 2] += 8
    if length > 2:
        arguments["forget_gate"][1, length // 3] = -torch.inf
    expected = outputs_alone(arguments, "recurrent")
    assert_close(outputs_alone(arguments, "torch"), expected, 1e-10)
    assert_close({"y": run(MLSTM, "torch", arguments)[0]}, {"y": expected["y"]}, 1e-10)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bounds", [PACKED, [0, 1, 2, 3, 4, 5, 45, 46, 47, 70], [0, 0]])
@pytest.mark.parametrize("variant", ["plain", "sigmoid", "unnormalised"])
def test_short_packed_sequences_are_rows_of_a_batch(variant: str, bounds: list[int], reverse: bool) -> None:
    arguments = draw(MLSTM, variant, 1, bounds[-1]) | {"cu_seqlens": torch.tensor(bounds), "reverse": reverse}
    arguments.pop("initial_state", None)
    expected = outputs_alone(arguments, "recurrent")
    assert_close(outputs_alone(arguments, "torch"), expected, 1e-10)
    if bounds != PACKED:
        return
    arguments["v"][0, 7] = torch.nan
    y = mlstm(**arguments, backend="torch")
    assert y[0, [*range(5), *range(45, 70)]].isfinite().all()
    assert y[0, 7].isnan().all()


def test_one_chunk_without_a_state_forms_no_memory() -> None:
    """Neither forward nor backward makes a tensor of K × V that anything is written to."""
    made: list[str] = []

    class Large(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for t in result if isinstance(result, tuple) else (result,):
                if isinstance(t, Tensor) and t.shape[-2:] == (160, 120):
                    made.append(str(func))
            return result

    module = dispatch.kernel("mlstm", "torch")
    q, k, v = torch.randn(2, 50, 1, 160), torch.randn(2, 50, 1, 160), torch.randn(2, 50, 1, 120)
    gates = torch.randn(2, 50, 1), torch.randn(2, 50, 1)
    args = MLSTM.family.arguments(q, k, v, *gates, return_state=False)
    with Large():
        y, C, n, m, *unread = module.forward(args, 64)
        assert C is None
        assert n is None
        assert m is None
        module.backward(args, (torch.ones_like(y), None, None, None), *unread, 64)
    assert set(made) == {"aten.new_empty.default"}
    with Large():
        module.forward(args._replace(return_state=True), 64)
    assert set(made) != {"aten.new_empty.default"}


@pytest.mark.parametrize("form", ["torch", "recurrent"])
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck_of_one_chunk_without_a_state(form: str, packed: bool) -> None:
    arguments = sample(9) if not packed else draw(MLSTM, "plain", 1, 9)
    tensors = [arguments[name].requires_grad_() for name in MLSTM.time]
    bounds = torch.tensor([0, 4, 9]) if packed else None
    values = (*tensors, None, None, None, bounds, None, 1e-6, "exp", True, False, False, form)
    torch.library.opcheck(torch.ops.sinuous.mlstm.default, values)
