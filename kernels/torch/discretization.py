r"""Continuous linear systems made discrete, in real arithmetic on complex numbers that are pairs, `[…, 2]`.

Pairs, since a parameter is one for optimisers and for checkpoints, and since a gradient of real arithmetic means the
same below autograd and above it.

A system is `x' = A x + B u` with `A = diag(Λ) - Σ_r P_r P_r^*` over N = 2M states that come in conjugate pairs, of
which one of each is kept. With s^* x = 2 Re(Σ conj(s_m) x_m), the product over both halves, a discrete one is

    x_t = λ ⊙ x_{t-1} - Σ_r p_r (q_r^* x_{t-1}) + b u_t.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TERMS = 6
"""Terms of the series of sinh(z/2) / (z/2) where |z| < 1/2: the first that is left out is below 1e-19."""


class DiscreteSystem(NamedTuple):
    """A discrete system of each channel: factor λ and input b `[D, M, 2]`; low rank p and q `[R, D, M, 2]`, or None."""

    factor: Tensor
    b: Tensor
    p: Tensor | None
    q: Tensor | None


def pair(real: Tensor, imag: Tensor) -> Tensor:
    return torch.stack([real, imag], -1)


def conj(a: Tensor) -> Tensor:
    return a * a.new_tensor([1.0, -1.0])


def as_complex(a: Tensor) -> Tensor:
    return torch.view_as_complex(a.contiguous())


def times(a: Tensor, b: Tensor) -> Tensor:
    return torch.view_as_real(as_complex(a) * as_complex(b))


def reciprocal(a: Tensor) -> Tensor:
    return conj(a) / a.square().sum(-1, keepdim=True)


def exp(a: Tensor) -> Tensor:
    real, imag = a.unbind(-1)
    return torch.exp(real).unsqueeze(-1) * pair(torch.cos(imag), torch.sin(imag))


def plus_one(a: Tensor) -> Tensor:
    return a + a.new_tensor([1.0, 0.0])


def relative_expm1(z: Tensor) -> Tensor:
    """(e^z - 1) / z, and 1 at 0, without loss of digits near 0 in the value or in the derivative.

    It is e^{z/2} sinh(z/2) / (z/2), whose second factor has a short series in z².
    """
    whole = as_complex(z)
    small = whole.abs() < 0.5
    inside, outside = torch.where(small, whole / 2, 0), torch.where(small, 1, whole)
    one = torch.ones((), dtype=whole.dtype, device=whole.device)
    square, series = inside * inside, one
    for n in range(TERMS, 0, -1):
        series = torch.addcmul(one, square, series, value=1 / (2 * n * (2 * n + 1)))
    return torch.view_as_real(torch.where(small, torch.exp(inside) * series, (torch.exp(outside) - 1) / outside))


def dot(a: Tensor, b: Tensor) -> Tensor:
    """a^* b = 2 Re(Σ conj(a_m) b_m), `[…, M, 2]` to `[…]`."""
    return 2 * (a * b).sum((-2, -1))


def zoh(dt: Tensor, A: Tensor, B: Tensor) -> DiscreteSystem:
    """Zero-order hold: `λ = exp(ΔA)`, `b = (exp(ΔA) - 1) / A · B`; dt `[D]`, A and B `[D, M, 2]` or `[M, 2]`."""
    dt = dt[:, None, None]
    z = dt * A
    return DiscreteSystem(exp(z), dt * times(relative_expm1(z), B), None, None)


def bilinear(dt: Tensor, A: Tensor, B: Tensor, P: Tensor | None) -> DiscreteSystem:
    r"""Trapezoidal rule: `Ā = (1 - Δ/2 A)^{-1} (1 + Δ/2 A)`, `b = (1 - Δ/2 A)^{-1} Δ B`; P `[R, D or 1, M, 2]`.

    With `g = 1 / (1 - Δ/2 Λ)` and `G = (1 + Δ/2 P^* (g ⊙ P))^{-1}`, R×R and real, Woodbury's identity gives
    `λ = 2g - 1`, `p = Δ (g ⊙ P) G`, `q = conj(g) ⊙ P` and `b = Δ g ⊙ B - Δ/2 p (q^* B)`.
    """
    dt = dt[:, None, None]
    g = reciprocal(plus_one(-0.5 * dt * A))
    factor, b = plus_one(2 * g - 2 * exp(torch.zeros_like(g))), dt * times(g, B)
    if P is None:
        return DiscreteSystem(factor, b.expand_as(factor), None, None)
    scaled = times(g, P)
    inner = dot(P.unsqueeze(1), scaled.unsqueeze(0)).movedim(-1, 0)
    eye = torch.eye(P.shape[0], dtype=P.dtype, device=P.device)
    G = torch.linalg.inv(eye + 0.5 * dt * inner)
    columns = G.permute(1, 2, 0)[..., None, None]
    p = dt * (scaled.unsqueeze(1) * columns).sum(0)
    q = times(conj(g), P)
    return DiscreteSystem(factor, b - 0.5 * dt * (p * dot(q, B)[..., None, None]).sum(0), p, q)


def discretize(dt: Tensor, A: Tensor, B: Tensor, P: Tensor | None, discretization: str) -> DiscreteSystem:
    """The discrete system, in double precision, by rule `zoh`, for diagonal ones, or `bilinear`; P `[R, D, M, 2]`,
    `[R, M, 2]` or None."""
    dt, A, B = dt.double(), A.double(), B.double()
    if discretization == "zoh":
        return zoh(dt, A, B)
    if P is not None:
        P = P.double().unsqueeze(1) if P.ndim == 3 else P.double()
    return bilinear(dt, A, B, P)


def rotations(factor: Tensor) -> Tensor:
    """Products with the numbers `[D, M, 2]` as block-diagonal matrices `[D, N, N]` over pairs."""
    real, imag = factor.unbind(-1)
    blocks: Tensor = torch.stack([real, -imag, imag, real], -1).unflatten(-1, (2, 2))
    width, modes = real.shape
    diagonal = torch.eye(modes, dtype=real.dtype, device=real.device)[:, None, :, None]
    return (blocks[:, :, :, None, :] * diagonal).reshape(width, 2 * modes, 2 * modes)


def matrix(factor: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Ā as a real matrix `[D, N, N]` over the pairs of a state, `[D, M, 2]` flattened to `[D, N]`."""
    low_rank = p.flatten(2).unsqueeze(-1) * (2 * q.flatten(2)).unsqueeze(-2)
    return rotations(factor) - low_rank.sum(0)
