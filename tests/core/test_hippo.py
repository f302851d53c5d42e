"""HiPPO matrices, the starts of S4 and S4D, and their responses, against figures and dense matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sinuous.core import hippo
from sinuous.kernels.torch.discretization import discretize, matrix

N = 64


def doubles(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(A: Tensor, P: Tensor) -> Tensor:
    """`diag(Λ) - P P^*` over a state and its conjugate, complex `[2M, 2M]`, P `[R, M]`."""
    both = torch.cat([P, P.conj()], -1)
    return torch.diag(torch.cat([A, A.conj()])) - both.T @ both.conj()


def test_legs_by_hand() -> None:
    A, B = hippo.transition("legs", 3)
    expected = -torch.tensor([[1, 0, 0], [3**0.5, 2, 0], [5**0.5, 15**0.5, 3]], dtype=torch.float64)
    torch.testing.assert_close(A, expected)
    torch.testing.assert_close(B, torch.tensor([1, 3, 5], dtype=torch.float64).sqrt())


def test_legt_by_hand() -> None:
    A, B = hippo.transition("legt", 3)
    a, b, c = 3**0.5, 5**0.5, 15**0.5
    torch.testing.assert_close(A, -0.5 * torch.tensor([[1, -a, b], [a, 3, -c], [b, c, 5]], dtype=torch.float64))
    torch.testing.assert_close(B, 0.5 * torch.tensor([1, a, b], dtype=torch.float64))


def test_fout_by_hand() -> None:
    A, B = hippo.transition("fout", 4)
    r = 2**0.5
    expected = [[-1, 0, -r, 0], [0, 0, 0, 0], [-r, 0, -2, -math.pi], [0, 0, math.pi, 0]]
    torch.testing.assert_close(A, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(B, torch.tensor([1, 0, r, 0], dtype=torch.float64))


@pytest.mark.parametrize(("measure", "left"), [("legt", 0.05), ("fout", 0.3)])
def test_a_window_forgets_what_left_it(measure: str, left: float) -> None:
    """The response of the state to an impulse is of one size inside the window, of length 2, and small behind it."""
    A, B = hippo.transition(measure, N)
    early, late, behind = ((torch.linalg.matrix_exp(t * A) @ B).norm().item() for t in (0.5, 1.8, 2.2))
    assert late > 0.85 * early
    assert behind < left * early


@pytest.mark.parametrize("measure", hippo.MEASURES)
@pytest.mark.parametrize("size", [2, 4, 16, N])
def test_the_normal_form_is_the_matrix_in_another_basis(measure: str, size: int) -> None:
    start, V = hippo.nplr(measure, size, clip=None)
    A, B = hippo.transition(measure, size)
    basis = torch.cat([V, V.conj()], 1)
    torch.testing.assert_close(basis.mH @ basis, torch.eye(size, dtype=basis.dtype), atol=1e-12, rtol=0)
    torch.testing.assert_close(basis @ dense(start.A, start.P) @ basis.mH, A + 0j, atol=1e-10, rtol=0)
    torch.testing.assert_close(basis @ torch.cat([start.B, start.B.conj()]), B + 0j, atol=1e-11, rtol=0)
    assert start.P.shape[0] == (2 if measure == "legt" else 1)


def test_published_eigenvalues() -> None:
    legs, legt, fout = (hippo.nplr(measure, N)[0].A for measure in hippo.MEASURES)
    assert (legs.real == -0.5).all()
    assert legs.imag[:3].tolist() == pytest.approx([-1303.2738, -433.0308, -258.1522], abs=1e-4)
    assert legs.imag[-2:].tolist() == pytest.approx([-0.90586, -0.26386], abs=1e-5)
    assert hippo.nplr("legs", 4)[0].A.imag.tolist() == pytest.approx([-4.60329, -0.55650], abs=1e-5)
    assert legt.real.abs().max() < 1e-12
    assert legt.imag[0].item() == pytest.approx(-662.62, abs=1e-2)
    assert fout.real.abs().max() < 1e-12
    torch.testing.assert_close(fout.imag, -math.pi * torch.arange(31, -1, -1, dtype=torch.float64), atol=1e-10, rtol=0)
    assert torch.linalg.eigvals(hippo.transition("legs", 8)[0]).real.sort().values.tolist() == pytest.approx(
        list(range(-8, 0))
    )


def test_published_diagonal_starts() -> None:
    inv, lin, legs, real = (hippo.diagonal(name, N) for name in ("inv", "lin", "legs", "real"))
    assert inv.A.imag[:3].tolist() == pytest.approx([-1283.425, -414.227, -240.388], abs=1e-3)
    assert inv.A.imag[-1].item() == pytest.approx(-0.32336, abs=1e-5)
    assert lin.A[0] == -0.5
    assert lin.A[-1].item() == pytest.approx(-0.5 - 97.3894j, abs=1e-4)
    torch.testing.assert_close(legs.A, hippo.nplr("legs", N)[0].A)
    assert real.A.tolist() == [-(n + 1) for n in range(N // 2)]
    for start in (inv, lin, real):
        assert (start.B == 1).all()
    assert all(start.P.shape == (0, N // 2) for start in (inv, lin, legs, real))


def test_b_is_clipped_as_published() -> None:
    clipped, _ = hippo.nplr("legs", N)
    free, _ = hippo.nplr("legs", N, clip=None)
    assert free.B.imag.abs().max() > hippo.CLIP
    assert clipped.B.imag.abs().max() == hippo.CLIP
    torch.testing.assert_close(clipped.B.real, free.B.real)


def test_combinations_share_the_copies_out() -> None:
    start = hippo.start("hippo", 8, copies=4)
    for name, place in (("legs", 0), ("legs", 1), ("fout", 2), ("fourier", 3)):
        alone = hippo.start(name, 8)
        torch.testing.assert_close(start.A[place], alone.A[0])
        torch.testing.assert_close(start.B[place], alone.B[0])
        torch.testing.assert_close(start.P[:, place], alone.P[:, 0])
    padded = hippo.start("legs", 8, copies=1, rank=3)
    assert padded.P.shape == (3, 1, 4)
    assert not padded.P[1:].any()
    assert hippo.start("diag", 8, copies=2).P.shape[0] == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hippo.start("lags", 8), "measure must be one of 'legs', 'legt', 'fout'"),
        (lambda: hippo.start("diag-lags", 8), "a diagonal start must be one of 'legs', 'lin'"),
        (lambda: hippo.start("hippo", 8, copies=3), "'hippo' needs a multiple of 2 systems"),
        (lambda: hippo.start("legt", 8, rank=1), "rank must be at least 2 for 'legt'"),
        (lambda: hippo.nplr("legs", 7), r"size must be even and at least 2.*got 7"),
    ],
)
def test_refusals(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def pairs(t: Tensor) -> Tensor:
    return torch.view_as_real(t.resolve_conj())


def responses(A: Tensor, B: Tensor, C: Tensor, length: int) -> Tensor:
    """`C A^l B` step by step."""
    outputs, x = [], B
    for _ in range(length):
        outputs.append(C @ x)
        x = A @ x
    return torch.stack(outputs).real if outputs else torch.zeros(0, dtype=torch.float64)


@pytest.mark.parametrize("length", [0, 1, 2, 3, 64, 255, 256])
@pytest.mark.parametrize("measure", hippo.MEASURES)
def test_the_low_rank_response_is_that_of_the_dense_hippo_matrix(measure: str, length: int) -> None:
    """Odd lengths have no root of unity at -1; even ones have, where the published z is infinite."""
    A, B = hippo.transition(measure, 16)
    A = A - 0.01 * torch.eye(16, dtype=torch.float64)  # so that no mode stands still
    start, V = hippo.nplr(measure, 16, clip=None)
    dt, C = torch.tensor([0.003, 0.1], dtype=torch.float64), doubles(0, 2, 16)
    eye = torch.eye(16, dtype=torch.float64)
    expected = []
    for d, c in zip(dt, C, strict=True):
        left = eye - d / 2 * A
        expected.append(
            responses(torch.linalg.solve(left, eye + d / 2 * A), torch.linalg.solve(left, d * B), c, length)
        )
    actual = hippo.low_rank_response(
        dt, pairs(start.A - 0.01), pairs(start.B), pairs((C + 0j) @ V), pairs(start.P), length
    )
    torch.testing.assert_close(actual, torch.stack(expected), atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", hippo.DIAGONALS)
@pytest.mark.parametrize("length", [0, 1, 100])
def test_the_diagonal_response_is_that_of_a_matrix_exponential(name: str, length: int) -> None:
    start = hippo.diagonal(name, 16)
    dt, C = torch.tensor([0.003, 0.1], dtype=torch.float64), torch.view_as_complex(doubles(1, 2, 8, 2))
    A = torch.diag(torch.cat([start.A, start.A.conj()]))
    B = torch.cat([start.B, start.B.conj()])
    expected = []
    for d, c in zip(dt, C, strict=True):
        step = torch.linalg.matrix_exp(d * A)
        held = torch.linalg.solve(A, (step - torch.eye(16)) @ B)
        expected.append(responses(step, held, torch.cat([c, c.conj()]), length))
    actual = hippo.diagonal_response(
        dt, pairs(start.A).expand(2, 8, 2), pairs(start.B).expand(2, 8, 2), pairs(C), length
    )
    torch.testing.assert_close(actual, torch.stack(expected), atol=1e-10, rtol=0)


def test_without_a_low_rank_both_responses_are_one() -> None:
    A, B, C = doubles(2, 3, 4, 2), doubles(3, 3, 4, 2), doubles(4, 3, 4, 2)
    A[..., 0] = -A[..., 0].abs()
    dt = torch.tensor([0.01, 0.05, 0.1], dtype=torch.float64)
    expected = hippo.diagonal_response(dt, A, B, C, 50, "bilinear")
    actual = hippo.low_rank_response(dt, A, B, C, torch.zeros(1, 4, 2, dtype=torch.float64), 50)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)


def test_the_rules_agree_to_second_order_in_the_step() -> None:
    start = hippo.diagonal("lin", 8)
    A, B = pairs(start.A)[None], pairs(start.B)[None]
    errors = []
    for steps in (100, 200):  # of one unit of time, at a point that both sample
        dt = torch.tensor([1 / steps], dtype=torch.float64)
        held, trapezoid = (discretize(dt, A, B, None, rule) for rule in ("zoh", "bilinear"))
        powers = (torch.view_as_complex(s.factor.contiguous()) ** steps for s in (held, trapezoid))
        first, second = powers
        errors.append((first - second).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("dt", [0.001, 0.1])
def test_the_envelope_of_s4d_lin(dt: float) -> None:
    """Every mode decays as exp(-t/2): with B = C = 1, `|K_l| ≤ N Δ exp(-Δ l / 2)`."""
    start = hippo.diagonal("lin", N)
    A, B = pairs(start.A)[None], pairs(start.B)[None]
    K = hippo.diagonal_response(torch.tensor([dt]), A, B, B, 2000)[0]
    bound = N * dt * torch.exp(-dt * torch.arange(2000, dtype=torch.float64) / 2)
    assert (K.abs() <= bound * (1 + 1e-6)).all()


def test_a_low_rank_with_a_minus_sign_never_blows_up() -> None:
    draws, modes = 1000, 4
    A = torch.stack([-torch.exp(doubles(5, draws, modes)), 5 * doubles(6, draws, modes)], -1)
    P, B = 2 * doubles(7, 1, draws, modes, 2), doubles(8, draws, modes, 2)
    dt = torch.exp(2 * doubles(9, draws))
    system = discretize(dt, A, B, P, "bilinear")
    assert system.p is not None
    assert system.q is not None
    assert torch.linalg.eigvals(matrix(system.factor, system.p, system.q)).abs().max() < 1
    start, _ = hippo.nplr("legs", N)
    minus = dense(start.A, start.P)
    plus = 2 * torch.diag(torch.cat([start.A, start.A.conj()])) - minus
    assert torch.linalg.eigvals(minus).real.max() == pytest.approx(-1, abs=1e-6)
    assert torch.linalg.eigvalsh((minus + minus.mH) / 2).max() == pytest.approx(-0.5, abs=1e-9)
    assert torch.linalg.eigvals(plus).real.max() > 100  # with the other sign; how much is ill-conditioned
