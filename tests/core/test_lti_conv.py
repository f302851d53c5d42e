"""lti_conv against dense matrices, closed forms and itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity import assert_close, cast, draw, named, run, run_with_gradients, with_leaves
from torch import Tensor

from sinuous.core import hippo
from sinuous.core.ops import lti_conv
from sinuous.core.ops.laws import LAWS
from sinuous.kernels.torch import lti_conv as by_blocks_or_transforms
from sinuous.kernels.torch.discretization import relative_expm1

LAW = LAWS["lti_conv"]
STARTS = [("legs", "bilinear"), ("legt", "bilinear"), ("fout", "bilinear"), ("diag-lin", "zoh"), ("diag-inv", "zoh")]


@pytest.fixture(params=["recurrent", "torch", "transforms"], scope="module")
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend; "transforms" are what torch takes for long sequences elsewhere than on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "transforms":
            patch.setattr(by_blocks_or_transforms, "by_transforms", lambda u, longest: True)
        yield "recurrent" if request.param == "recurrent" else "torch"


def doubles(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def published(init: str, discretization: str, width: int, length: int, size: int = 64) -> dict[str, Any]:
    """A layer's system as it starts: shared A, B, P, steps between 0.001 and 0.1."""
    start = hippo.start(init, size)
    low_rank = {"P": torch.view_as_real(start.P[:, 0].resolve_conj())} if start.P.shape[0] else {}
    return {
        "u": doubles(0, 2, length, width),
        "dt": torch.logspace(-3, -1, width, dtype=torch.float64),
        "A": torch.view_as_real(start.A[0]),
        "B": torch.view_as_real(start.B[0].resolve_conj()),
        "C": 0.5**0.5 * doubles(1, width, size // 2, 2),
        "D": doubles(2, width),
        "discretization": discretization,
        **low_rank,
    }


def dense_steps(dt: float, A: Tensor, B: Tensor, discretization: str) -> tuple[Tensor, Tensor]:
    """Ā and B̄ of a dense system."""
    eye = torch.eye(A.shape[0], dtype=A.dtype)
    if discretization == "zoh":
        step = torch.linalg.matrix_exp(dt * A)
        return step, torch.linalg.solve(A, (step - eye) @ B)
    left = eye - dt / 2 * A
    return torch.linalg.solve(left, eye + dt / 2 * A), torch.linalg.solve(left, dt * B)


@pytest.mark.parametrize("variant", ["plain", "full", "bilinear", "shared"])
def test_equals_a_dense_system(form: str, variant: str) -> None:
    arguments = draw(LAW, variant, 2, 90)
    y, state = run(LAW, form, arguments)
    u, dt, width = arguments["u"], arguments["dt"], arguments["u"].shape[2]
    A, B, C = (torch.view_as_complex(arguments[n]) for n in "ABC")
    A, B = A.expand(width, -1), B.expand(width, -1)
    modes = A.shape[1]
    P = torch.view_as_complex(arguments.get("P", torch.zeros(1, width, modes, 2, dtype=torch.float64)))
    P = P[:, None].expand(-1, width, -1) if P.ndim == 2 else P
    for d in range(width):
        low = torch.cat([P[:, d], P[:, d].conj()], 1)
        A_d = torch.diag(torch.cat([A[d], A[d].conj()])) - low.T @ low.conj()
        step, held = dense_steps(dt[d].item(), A_d, torch.cat([B[d], B[d].conj()]), arguments["discretization"])
        readout = torch.cat([C[d], C[d].conj()])
        x = torch.zeros(2, 2 * modes, dtype=A.dtype)
        if "initial_state" in arguments:
            half = torch.view_as_complex(arguments["initial_state"][:, d].contiguous())
            x = torch.cat([half, half.conj()], 1)
        skip = arguments["D"][d] if "D" in arguments else 0.0
        for t in range(90):
            x = x @ step.T + u[:, t, d, None] * held
            torch.testing.assert_close(y[:, t, d] + 0j, x @ readout + skip * u[:, t, d], atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(
            torch.view_as_complex(state[:, d].contiguous()), x[:, :modes], atol=1e-10, rtol=1e-10
        )


@pytest.mark.parametrize(("init", "discretization"), STARTS)
def test_the_forms_agree_on_published_systems(init: str, discretization: str) -> None:
    arguments = published(init, discretization, width=8, length=256)
    expected = lti_conv(**arguments, backend="recurrent")
    torch.testing.assert_close(lti_conv(**arguments, backend="torch"), expected, atol=1e-9, rtol=0)
    single = cast(arguments, torch.float32)
    for form in ("recurrent", "torch"):
        torch.testing.assert_close(lti_conv(**single, backend=form).double(), expected, atol=3e-4, rtol=0)
    impulse = {**single, "u": torch.nn.functional.one_hot(torch.zeros(1, 8).long(), 256).mT.float()}
    torch.testing.assert_close(
        lti_conv(**impulse, backend="torch"), lti_conv(**impulse, backend="recurrent"), atol=5e-6, rtol=0
    )


@pytest.mark.parametrize("form", ["torch", "transforms"], indirect=True)
@pytest.mark.parametrize("lengths", [(90,), (1, 40, 0, 49), (64, 26)])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("variant", LAW.variants)
def test_outputs_states_and_gradients_of_the_definition(
    form: str, variant: str, reverse: bool, lengths: tuple[int, ...]
) -> None:
    packed = {"cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)])} if len(lengths) > 1 else {}
    arguments = {**draw(LAW, variant, 1, 90, sequences=len(lengths)), "reverse": reverse, **packed}
    expected = run_with_gradients(LAW, "recurrent", arguments)
    assert_close(run_with_gradients(LAW, form, arguments), expected, 1e-10)


@pytest.mark.parametrize("form", ["torch", "transforms"], indirect=True)
@pytest.mark.parametrize(("init", "discretization"), STARTS)
def test_is_the_convolution_with_the_response(form: str, init: str, discretization: str) -> None:
    arguments = published(init, discretization, width=3, length=300)
    arguments["A"] = arguments["A"] - torch.tensor([1e-4, 0.0])  # so that no mode stands still
    system = {n: arguments[n].expand(3, -1, -1) for n in "ABC"}
    if discretization == "bilinear":
        K = hippo.low_rank_response(arguments["dt"], **system, P=arguments["P"], length=300)
    else:
        K = hippo.diagonal_response(arguments["dt"], **system, length=300)
    u = arguments["u"].mT
    expected = torch.fft.irfft(torch.fft.rfft(u, n=600) * torch.fft.rfft(K, n=600), n=600)[..., :300].mT
    actual = lti_conv(**arguments, backend=form)
    torch.testing.assert_close(actual, expected + arguments["D"] * arguments["u"], atol=1e-9, rtol=0)


@pytest.mark.parametrize("size", [1, 7, 64])
@pytest.mark.parametrize(("init", "discretization"), STARTS)
def test_pieces_with_the_state_carried_equal_the_whole(form: str, init: str, discretization: str, size: int) -> None:
    arguments = published(init, discretization, width=4, length=150)
    whole, end = lti_conv(**arguments, return_state=True, backend=form)
    state, ys = None, []
    for start in range(0, 150, size):
        piece = {**arguments, "u": arguments["u"][:, start : start + size]}
        y, state = lti_conv(**piece, initial_state=state, return_state=True, backend=form)
        ys.append(y)
    torch.testing.assert_close(torch.cat(ys, 1), whole, atol=1e-10, rtol=0)
    torch.testing.assert_close(state, end, atol=1e-10, rtol=0)


@given(factor=st.integers(2, 5), seed=st.integers(0, 20))
def test_another_rate_samples_the_same_signal(form: str, factor: int, seed: int) -> None:
    """Zero-order hold is exact for an input that is held: a step `factor` times as long is as many short ones."""
    arguments = draw(LAW, "diagonal", 2, 30, seed=seed)
    held = {**arguments, "u": arguments["u"].repeat_interleave(factor, 1), "dt": arguments["dt"] / factor}
    actual = named(run(LAW, form, held))
    expected = named(run(LAW, form, arguments))
    assert_close({"y": actual["y"][:, factor - 1 :: factor], "state": actual["state"]}, expected, 1e-10)


@pytest.mark.parametrize(("init", "discretization"), STARTS)
def test_half_the_samples_at_twice_the_step_are_near(init: str, discretization: str) -> None:
    """The same for any rule and a signal that is smooth at both rates: the error is of the order of the step."""
    errors = []
    for steps in (400, 800):
        t = torch.arange(steps, dtype=torch.float64) / steps
        fine = published(init, discretization, width=1, length=0, size=8)
        fine |= {"u": torch.sin(9 * t)[None, :, None], "dt": torch.tensor([1.0 / steps], dtype=torch.float64)}
        coarse = {**fine, "u": fine["u"][:, ::2], "dt": 2 * fine["dt"]}
        errors.append((lti_conv(**fine)[:, ::2] - lti_conv(**coarse)).abs().max().item())
    assert errors[1] < 0.6 * errors[0]


def test_an_integrator(form: str) -> None:
    """A = 0 is where (exp(ΔA) - 1) / A has no value of its own: y is the sum of Δu."""
    u, dt = doubles(0, 2, 70, 3), torch.tensor([0.1, 1.0, 2.0], dtype=torch.float64)
    one = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    y = lti_conv(u, dt, torch.zeros_like(one), one, 0.5 * one, backend=form)
    torch.testing.assert_close(y, dt * u.cumsum(1))


@given(re=st.floats(-3, 3), im=st.floats(-30, 30), scale=st.sampled_from([1e-12, 1e-6, 1e-3, 0.1, 0.17, 1.0]))
def test_the_held_input_keeps_its_digits(re: float, im: float, scale: float) -> None:
    z = scale * complex(re, im)
    expected = sum(z**n / torch.arange(1, n + 2).double().prod().item() for n in range(120))
    actual = torch.view_as_complex(relative_expm1(torch.tensor([z.real, z.imag], dtype=torch.float64))).item()
    assert abs(actual - expected) <= 1e-12 * max(1.0, abs(expected)) * (1e4 if abs(z) > 15 else 1)


@pytest.mark.parametrize("z", [0j, 1e-9 + 1e-9j, 0.4 + 0.2j, 0.5 + 0j, -2 + 7j])
def test_the_held_input_has_its_derivative(z: complex) -> None:
    x = torch.tensor([z.real, z.imag], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(relative_expm1, x)


def test_shared_systems_equal_their_copies(form: str) -> None:
    arguments = draw(LAW, "shared", 2, 80)
    copies = {n: arguments[n].unsqueeze(-3).repeat_interleave(6, -3) for n in ("A", "B", "P")}
    actual = run_with_gradients(LAW, form, arguments)
    expected = run_with_gradients(LAW, form, {**arguments, **copies})
    summed = {n: expected[n].sum(-3) if n in copies else t for n, t in expected.items()}
    assert_close(actual, summed, 1e-11)


@given(cuts=st.lists(st.integers(0, 90), max_size=4), seed=st.integers(0, 99), reverse=st.booleans())
@pytest.mark.parametrize("variant", ["full", "diagonal"])
def test_cut_anywhere(form: str, variant: str, cuts: list[int], seed: int, reverse: bool) -> None:
    arguments = draw(LAW, variant, 2, 90, seed=seed)
    whole = run(LAW, form, {**arguments, "reverse": reverse})
    edges = sorted({0, 90, *cuts})
    pieces = list(itertools.pairwise(edges))
    ys = []
    for start, stop in reversed(pieces) if reverse else pieces:
        y, state = run(LAW, form, {**arguments, "u": arguments["u"][:, start:stop], "reverse": reverse})
        arguments["initial_state"] = state
        ys.append(y)
    assert_close(named((torch.cat(ys[::-1] if reverse else ys, 1), state)), named(whole), 1e-12)


@given(seed=st.integers(0, 99), factor=st.floats(-3, 3))
def test_linear_in_the_input_and_the_initial_state(form: str, seed: int, factor: float) -> None:
    first, second = (draw(LAW, "full", 2, 20, seed=s) for s in (seed, seed + 1))
    moved = ("u", "initial_state")
    shared = {k: v for k, v in first.items() if k not in moved}
    both = {k: first[k] + factor * second[k] for k in moved}
    parts = [named(run(LAW, form, {**shared, **{k: a[k] for k in moved}})) for a in (first, second)]
    actual = named(run(LAW, form, {**shared, **both}))
    assert_close(actual, {k: parts[0][k] + factor * parts[1][k] for k in actual}, 1e-11)


@pytest.mark.parametrize("form", ["torch", "transforms"], indirect=True)
def test_slow_modes_in_single_precision(form: str) -> None:
    """A factor that decays by 5e-5 a step, which fp32 cannot hold to more than three digits, over 20000 steps."""
    arguments = published("diag-lin", "zoh", width=4, length=20000)
    arguments["dt"] = torch.full((4,), 1e-4, dtype=torch.float64)
    expected = run_with_gradients(LAW, form, arguments)
    assert_close(run_with_gradients(LAW, form, cast(arguments, torch.float32)), expected, 2e-5)


@pytest.mark.parametrize("variant", ["full", "diagonal"])
def test_compiled_gradients_are_those_of_eager(form: str, variant: str) -> None:
    arguments, leaves = with_leaves(draw(LAW, variant, 2, 70))

    def loss(**inputs: Any) -> Tensor:
        y = lti_conv(**inputs, backend=form)
        assert isinstance(y, Tensor)
        return y.square().sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(**arguments), list(leaves.values()))
    torch.testing.assert_close(actual, torch.autograd.grad(loss(**arguments), list(leaves.values())))
