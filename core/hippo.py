r"""HiPPO matrices in normal plus low-rank form, diagonal systems beside them, and impulse responses: starts of S4.

HiPPO keeps the past of a signal as coefficients of a basis, weighted by a measure. `x' = A x + B u` with

    legs    Legendre polynomials, all of the past         A_nk = -√(2n+1) √(2k+1) below the diagonal, -(n+1) on it
    legt    Legendre polynomials, a window of length 2    A_nk = -½ √(2n+1) √(2k+1) · ((-1)^(n-k) above the diagonal)
    fout    Fourier basis, a window of length 2           A = S - B B^T, S skew-symmetric with frequencies 0, π, 2π, …

Each is normal but for a low rank, `A = V (diag(Λ) - Σ_r P_r P_r^*) V^*` with V unitary, which is what S4 computes with.
Diagonal systems (S4D) start from Λ alone, or from the simple sequences that it is near to:

    legs    Λ of HiPPO-LegS                  lin     -½ - πin
    inv     -½ - i N/π (N / (2n+1) - 1)      real    -(n+1)

One of each conjugate pair is kept, the one with the negative imaginary part, n = 0 … N/2 - 1.

Source: Gu et al. (arXiv 2008.07669), appendix D, for the matrices; Gu et al. (2206.12037), sections 3 and 4, for FouT
and the scale of time; S4 (2111.00396), section 3 and appendix C, for the low rank and the response; S4D (2206.11893),
section 4.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sinuous.core.checks import check_choice
from sinuous.kernels.torch.discretization import as_complex, conj, discretize, matrix

MEASURES = ("legs", "legt", "fout")
DIAGONALS = ("legs", "lin", "inv", "real")
COMBINATIONS = {
    "hippo": ("legs", "fout"),
    "diag": ("diag-inv", "diag-lin"),
    "all": ("legs", "fout", "diag-inv", "diag-lin"),
}
"""Starts that copies of a system share out among themselves, the first ones first."""

REAL_PARTS = {"legs": -0.5, "legt": 0.0, "fout": 0.0}
"""Real parts that all eigenvalues of a measure's normal part have."""

CLIP = 2.0
"""Bound of the imaginary parts of B, as the authors have it."""


class Start(NamedTuple):
    """Λ and B `[…, M]`, P `[R, …, M]`, complex128 on the CPU."""

    A: Tensor
    B: Tensor
    P: Tensor


def _check_size(size: int) -> None:
    if size < 2 or size % 2:
        raise ValueError(f"size must be even and at least 2, for conjugate pairs (got {size})")


def transition(measure: str, size: int) -> tuple[Tensor, Tensor]:
    """Build A `[N, N]` and B `[N]` of a measure, in double precision.

    Raises:
        ValueError: if there is no such measure.
    """
    check_choice("measure", measure, MEASURES)
    n = torch.arange(size, dtype=torch.float64, device="cpu")
    root = torch.sqrt(2 * n + 1)
    outer = root.outer(root)
    if measure == "legs":
        return -outer.tril(-1) - torch.diag(n + 1), root
    if measure == "legt":
        signs = torch.where((n[:, None] - n) % 2 == 0, 1.0, -1.0).to(n)
        return -0.5 * (outer.tril() + (outer * signs).triu(1)), 0.5 * root
    even = n % 2 == 0
    B = torch.where(n == 0, torch.ones_like(n), even * math.sqrt(2))
    frequencies = math.pi * (n[1:] // 2) * even[:-1]
    skew = torch.diag(frequencies, -1) - torch.diag(frequencies, 1)
    return skew - B.outer(B), B


def low_rank(measure: str, size: int) -> Tensor:
    """Build P `[R, N]` such that `A + Σ_r P_r P_r^T` is normal: rank 2 for `legt`, else 1."""
    n = torch.arange(size, dtype=torch.float64, device="cpu")
    if measure == "legs":
        return torch.sqrt(n + 0.5)[None]
    if measure == "legt":
        even = n % 2 == 0
        return torch.sqrt(n + 0.5) * torch.stack([~even, even])
    return transition(measure, size)[1][None]


def normal_part(measure: str, size: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues `[N]`, sorted by imaginary part, and eigenvectors, in columns, of `A + Σ_r P_r P_r^T`, complex128.

    That sum is a multiple of the identity plus a skew-symmetric matrix. So all real parts are equal, and the imaginary
    ones come from a Hermitian eigenvalue problem; the general one would be ill-conditioned.
    """
    A, _ = transition(measure, size)
    P = low_rank(measure, size)
    normal = A + P.T @ P
    skew = (normal - normal.T) / 2
    frequencies, vectors = torch.linalg.eigh(torch.complex(torch.zeros_like(skew), -skew))
    return torch.complex(torch.full_like(frequencies, REAL_PARTS[measure]), frequencies), vectors


def nplr(measure: str, size: int, clip: float | None = CLIP) -> tuple[Start, Tensor]:
    """Build a measure's system in the basis V in which it is diagonal plus low rank; and V itself, `[N, M]`.

    `A = 2 Re(V diag(Λ) V^*) - Σ_r P_r P_r^T`, `B ← V^* B`, `P ← V^* P`; imaginary parts of B are clipped to ±`clip`.

    Raises:
        ValueError: if there is no such measure, or the size is odd.
    """
    _check_size(size)
    eigenvalues, vectors = normal_part(measure, size)
    A, V = eigenvalues[: size // 2].clone(), vectors[:, : size // 2].clone()
    if measure == "fout":  # both eigenvalues of the constant's pair are 0, which leaves its vectors open
        A[-1] = 0
        V[:, -1] = 0
        V[:2, -1] = torch.tensor([1, 1j], dtype=V.dtype, device=V.device) / math.sqrt(2)
    B = V.mH @ transition(measure, size)[1].to(V.dtype)
    P = low_rank(measure, size).to(V.dtype) @ V.conj()
    if clip is not None:
        B = torch.complex(B.real, B.imag.clamp(-clip, clip))
    return Start(A, B, P), V


def diagonal(name: str, size: int) -> Start:
    """Build a diagonal system by name. B is 1, or that of HiPPO for `legs`; P has rank 0.

    Raises:
        ValueError: if there is no such start, or the size is odd.
    """
    _check_size(size)
    check_choice("a diagonal start", name, DIAGONALS)
    if name == "legs":
        start, _ = nplr("legs", size)
        return Start(start.A, start.B, start.P[:0])
    n = torch.arange(size // 2, dtype=torch.float64, device="cpu")
    if name == "lin":
        A = torch.complex(torch.full_like(n, -0.5), -math.pi * n)
    elif name == "inv":
        A = torch.complex(torch.full_like(n, -0.5), -size / math.pi * (size / (2 * n + 1) - 1))
    else:
        A = torch.complex(-(n + 1), torch.zeros_like(n))
    return Start(A, torch.ones_like(A), A.new_zeros(0, size // 2))


def start(name: str, size: int, copies: int = 1, rank: int | None = None) -> Start:
    """Build the systems that a layer starts from: A and B `[copies, M]`, P `[rank, copies, M]`.

    Args:
        name: `legs`, `legt`, `fout` (`fourier`), one of `diag-lin`, `diag-inv`, `diag-legs`, `diag-real`, or a
            combination: `hippo`, `diag`, `all`, of which every start gets as many neighbouring copies.
        size: N, even.
        copies: systems, S.
        rank: rows of P; those that a start does not need are 0. `None` is as many as needed.

    Raises:
        ValueError: if there is no such start, the size is odd, the rank too low or the copies are no multiple of the
            starts of a combination.
    """
    names = COMBINATIONS.get(name, (name,))
    if copies < 1 or copies % len(names):
        raise ValueError(f"{name!r} needs a multiple of {len(names)} systems (got {copies})")
    parts = []
    for each in names:
        if each.startswith("diag-"):
            parts.append(diagonal(each.removeprefix("diag-"), size))
        else:
            parts.append(nplr("fout" if each == "fourier" else each, size)[0])
    needed = max(part.P.shape[0] for part in parts)
    rank = needed if rank is None else rank
    if rank < needed:
        raise ValueError(f"rank must be at least {needed} for {name!r} (got {rank})")
    each_has = copies // len(names)
    filled = [torch.cat([p.P, p.P.new_zeros(rank - p.P.shape[0], size // 2)]) for p in parts]
    return Start(
        torch.stack([p.A for p in parts]).repeat_interleave(each_has, 0),
        torch.stack([p.B for p in parts]).repeat_interleave(each_has, 0),
        torch.stack(filled, 1).repeat_interleave(each_has, 1),
    )


def diagonal_response(dt: Tensor, A: Tensor, B: Tensor, C: Tensor, length: int, discretization: str = "zoh") -> Tensor:
    """Impulse response `[D, length]` of a diagonal system with the arguments of `lti_conv`, in double precision.

        K_l = 2 Re Σ_m C_m b_m λ_m^l

    S4D's Vandermonde product, as a product of two tables of √length powers.
    """
    factor, b, _, _ = discretize(dt, A, B, None, discretization)
    weight = as_complex(C.double()) * as_complex(b)
    log = torch.log(as_complex(factor))[..., None]
    if discretization == "zoh":
        log = dt.double()[:, None, None] * as_complex(A.double())[..., None]
    side = max(math.isqrt(max(length - 1, 0)) + 1, 1)
    steps = torch.arange(side, dtype=torch.float64, device=dt.device)
    near, far = torch.exp(log * steps), torch.exp(log * side * steps)
    return 2 * torch.einsum("dmi,dmj->dij", weight[..., None] * far, near).real.flatten(1)[:, :length]


def low_rank_response(dt: Tensor, A: Tensor, B: Tensor, C: Tensor, P: Tensor, length: int) -> Tensor:
    r"""Impulse response `K_l = C Ā^l B̄`, `[D, length]`, of a system with P and the arguments of `lti_conv`, in double
    precision.

    S4's generating function, `Σ_l K_l ω^l` at the roots of unity: with `C̃ = C (1 - Ā^L)`, `f = (1 + ω) / 2` and the
    sums over all N states `⟨v, w⟩ = Σ Δ v w / (1 - ω - f ΔΛ)`,

        k̂(ω) = ⟨C̃, B⟩ - f ⟨C̃, P⟩ (1 + f ⟨P^*, P⟩)^{-1} ⟨P^*, B⟩

    Written in f rather than in z = 2 (1 - ω) / (1 + ω), it is regular at ω = -1, where z is infinite and
    `k̂ = ½ Σ Δ C̃ B`. At ω = 1 it is not regular if a mode has Λ = 0: real parts must be below 0.
    """
    dt, A, B, C, P = (t.double() for t in (dt, A, B, C, P))
    if length == 0:
        return dt.new_zeros(dt.shape[0], 0)
    P = P.unsqueeze(1) if P.ndim == 3 else P
    factor, _, p, q = discretize(dt, A, B, P, "bilinear")
    assert p is not None
    assert q is not None
    rows = conj(C).expand_as(factor).flatten(1).unsqueeze(1)
    cut = rows - rows @ torch.linalg.matrix_power(matrix(factor, p, q), length)
    readout = as_complex(conj(cut.squeeze(1).unflatten(-1, (-1, 2))))
    A, B, P = (as_complex(t.expand(*t.shape[:-3], *factor.shape)) for t in (A, B, P))

    def both(t: Tensor) -> Tensor:
        return torch.cat([t, t.conj()], -1)

    turns = torch.arange(length // 2 + 1, dtype=torch.float64, device=dt.device) * (-2 * math.pi / length)
    omega = torch.polar(torch.ones_like(turns), turns)
    f = (1 + omega) / 2
    resolvent = dt[:, None, None] / ((1 - omega) - f * (dt[:, None] * both(A))[..., None])
    left = torch.cat([both(readout)[None], both(P).conj()])
    right = torch.cat([both(B)[None], both(P)])
    sums = torch.einsum("idn,jdn,dnl->dlij", left, right, resolvent)
    eye = torch.eye(P.shape[0], dtype=sums.dtype, device=dt.device)
    corrected = torch.linalg.solve(eye + f[:, None, None] * sums[..., 1:, 1:], sums[..., 1:, :1])
    spectrum = sums[..., 0, 0] - f * (sums[..., :1, 1:] @ corrected)[..., 0, 0]
    response: Tensor = torch.fft.irfft(spectrum, n=length)
    return response
