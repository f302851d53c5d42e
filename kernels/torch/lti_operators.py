r"""The operators of a linear system over up to c steps at once, for the blocks and the transforms of lti_conv.

Over N = 2M real numbers of state, with the rows `E_j = C Ā^{j+1}`, the columns `W_j = Ā^j b`, the response
`K_j = C Ā^j b` and the power `Ā^c`. All come from one table of powers λ^j in double precision, so that a slow mode
stays exact over many steps. A diagonal system needs no more. With a low rank, `Ā = diag(λ) - Σ_r p_r q_r^*`,
step j feeds back `f_j = q^* x_j`, linear in the state before the block: f = G x_0, where G solves

    G_j = q^* λ^j - Σ_{i<j} (q^* λ^{j-1-i} p) G_i                     c·R equations, triangular, for each channel

and, as every state is what a diagonal system with the input `b u - p f` has,

    E_j = C λ^{j+1} - Σ_{i≤j} (C λ^{j-i} p) G_i          Ā^c = diag(λ^c) - Σ_i λ^{c-1-i} p G_i
    W_j = λ^j b - Σ_{i<j} λ^{j-1-i} p (G_i b)

That costs c N² for each channel, where products of matrices Ā would cost N³ each, and autograd passes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.kernels.arguments import LTIConv
from sinuous.kernels.torch.discretization import DiscreteSystem, as_complex, conj, discretize, rotations, times


class Operators(NamedTuple):
    """readout C `[D, N]`, response K `[D, c]`, rows E and columns W `[D, c, N]`; powers Ā^s, one for each of some sizes
    s: pairs `[D, M, 2]` of a diagonal system and matrices `[D, N, N]` of another one. The readout and the powers are in
    double precision for those who go on to multiply them."""

    readout: Tensor
    response: Tensor
    rows: Tensor
    columns: Tensor
    powers: tuple[Tensor, ...]


def is_matrix(power: Tensor, states: Tensor) -> bool:
    """Whether a power is that of a system with a low rank, given some states `[…, N]`."""
    return power.shape[1] == states.shape[-1]


def advance(power: Tensor, states: Tensor, adjoint: bool = False) -> Tensor:
    """`Ā^s x`, or its adjoint, of states `[D, B, N]`."""
    if is_matrix(power, states):
        return states @ (power if adjoint else power.mT)
    factor = (conj(power) if adjoint else power).unsqueeze(1)
    return times(factor, states.unflatten(-1, (-1, 2))).flatten(-2)


def squared(power: Tensor, states: Tensor) -> Tensor:
    """Ā^{2s}, given some states `[…, N]`."""
    return power @ power if is_matrix(power, states) else times(power, power)


def power_gradient(power: Tensor, states: Tensor, gradients: Tensor) -> Tensor:
    """Gradient of a power, from the `states` it multiplied and the `gradients` of the products, both `[D, B, N]`."""
    if is_matrix(power, states):
        return gradients.mT @ states
    return times(conj(states.unflatten(-1, (-1, 2))), gradients.unflatten(-1, (-1, 2))).sum(1)


def with_skip(response: Tensor, D: Tensor | None) -> Tensor:
    """The response with D, which goes from input to output directly, added to its first step."""
    if D is None:
        return response
    return torch.cat([response[:, :1] + D.to(response.dtype)[:, None], response[:, 1:]], 1)


def powers_of(factor: Tensor, count: int) -> Tensor:
    """λ^j of j = 0 … count, `[D, count + 1, M]`, complex, by doubling."""
    table, step = torch.ones_like(factor).unsqueeze(1), factor.unsqueeze(1)
    while table.shape[1] <= count:
        more = min(table.shape[1], count + 1 - table.shape[1])
        table = torch.cat([table, step * table[:, :more]], 1)
        step = step * step
    return table


class _Progressions(torch.autograd.Function):
    """`w λ^j` and `v conj(λ)^j` of j < length, `[D, S, length, M]`, and λ^s of some powers s, all complex.

    Autograd of the doublings would pass over tables in double precision many times; the sums that the gradients are
    made of need one pass.
    """

    @staticmethod
    def forward(
        ctx: Any, factor: Tensor, w: Tensor, v: Tensor, length: int, powers: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        exact = powers_of(factor, max(length - 1, *powers))
        table = exact[:, :length].to(dtype)
        # Not the lazy conj() here and elsewhere: in an op's body, below autograd, dispatch modes lose its mark.
        mirrored = table.conj_physical()
        before = [exact[:, power - 1] for power in powers]
        ctx.save_for_backward(factor, w, v, table, mirrored, *before)
        ctx.powers = powers
        products = (w.to(dtype).unsqueeze(2) * table.unsqueeze(1), v.to(dtype).unsqueeze(2) * mirrored.unsqueeze(1))
        return *products, *(exact[:, power] for power in powers)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        factor, w, v, table, mirrored, *before = ctx.saved_tensors
        dw, through_w = _sums(grads[0], mirrored, factor.conj_physical())
        dv, through_v = _sums(grads[1], table, factor)
        dfactor = (w.conj_physical() * through_w).sum(1) + (v * through_v.conj_physical()).sum(1)
        for power, below, dpower in zip(ctx.powers, before, grads[2:], strict=True):
            dfactor = dfactor + power * dpower * below.conj_physical()
        return dfactor, dw, dv, None, None, None


def _sums(grads: Tensor, table: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_j λ^j g_j and Σ_j j λ^{j-1} g_j, `[D, S, M]`, from `[D, S, length, M]` and the table of λ^j."""
    products = pairs(table[:, None, :-1] * grads[:, :, 1:])
    steps = torch.arange(1, table.shape[1], dtype=products.dtype, device=products.device)
    weights = torch.stack([torch.ones_like(steps), steps])
    plain, weighted = as_complex((weights @ products).unflatten(-1, (-1, 2))).to(factor.dtype).unbind(2)
    return grads[:, :, 0] + factor.unsqueeze(1) * plain, weighted


def pairs(t: Tensor) -> Tensor:
    """`[…, N]` from `[…, M]`, complex."""
    return torch.view_as_real(t).flatten(-2)


def toeplitz(response: Tensor) -> Tensor:
    """Weights of step i in step o, `[…, c, c]` from `[…, c]`: K_{o-i} at `[i, o]`, and 0 for o < i."""
    length = response.shape[-1]
    return F.pad(response, (length - 1, 0)).unfold(-1, length, 1).flip(-2)


def sums_of_diagonals(t: Tensor) -> Tensor:
    """The transpose of `toeplitz`."""
    length = t.shape[1]
    skewed = F.pad(t.flip(1), (0, length)).flatten(1)[:, : length * (2 * length - 1)]
    sums: Tensor = skewed.unflatten(1, (length, 2 * length - 1)).sum(1)
    return sums[:, length - 1 :]


def _lower(t: Tensor) -> Tensor:
    """`[D, c·R, c·S]`, with t_{o-i} at `[(o, ·), (i, ·)]`, from `[D, c, R, S]`."""
    return toeplitz(t.movedim(1, -1)).permute(0, 4, 1, 3, 2).flatten(3).flatten(1, 2)


def _later(t: Tensor) -> Tensor:
    """Shifted by one step of axis 1, with zeros at the beginning."""
    return torch.cat([torch.zeros_like(t[:, :1]), t[:, :-1]], 1)


PARAMETERS = ("dt", "A", "B", "C", "P", "D")
"""Arguments that are the system's, not those of a sequence."""


def with_leaves(args: LTIConv, names: Sequence[str] = PARAMETERS) -> tuple[LTIConv, dict[str, Tensor]]:
    """The arguments with the named parameters, where there are any, as leaves of autograd, and these leaves."""
    present = {name: t for name in names if (t := getattr(args, name)) is not None}
    leaves: dict[str, Any] = {name: t.detach().requires_grad_() for name, t in present.items()}
    return args._replace(**leaves), leaves


def operators(sizes: tuple[int, ...], dtype: torch.dtype, args: LTIConv) -> Operators:
    """The operators of as many steps as the largest of `sizes` has, and the powers of all of them."""
    system, C = discretize(args.dt, args.A, args.B, args.P, args.discretization), args.C.double()
    return (_diagonal if system.p is None else _low_rank)(sizes, dtype, system, C)


def _diagonal(sizes: tuple[int, ...], dtype: torch.dtype, system: DiscreteSystem, C: Tensor) -> Operators:
    factor, b, C = as_complex(system.factor), as_complex(system.b), as_complex(C)
    narrow = dtype.to_complex()
    out_of = (2 * C).conj_physical().expand_as(factor)
    after = (out_of * factor.conj_physical()).unsqueeze(1)
    of_b, of_after, *powers = _Progressions.apply(factor, b.unsqueeze(1), after, max(sizes), sizes, narrow)
    columns, rows = (pairs(t.squeeze(1)) for t in (of_b, of_after))
    readout = pairs(out_of)
    response = columns @ readout.to(dtype).unsqueeze(-1)
    return Operators(readout, response.squeeze(-1), rows, columns, tuple(torch.view_as_real(t) for t in powers))


def _low_rank(sizes: tuple[int, ...], dtype: torch.dtype, system: DiscreteSystem, C: Tensor) -> Operators:
    assert system.p is not None
    assert system.q is not None
    length = max(sizes)
    factor, b, C = as_complex(system.factor), as_complex(system.b), as_complex(C)
    p, q = (as_complex(t).movedim(0, 1) for t in (system.p, system.q))
    out_of = (2 * C).conj_physical().expand_as(factor)
    into = torch.cat([b.unsqueeze(1), p], 1)
    after = torch.cat([(out_of * factor.conj_physical()).unsqueeze(1), 2 * q], 1)
    of_into, of_after, *powers = _Progressions.apply(factor, into, after, length, sizes, factor.dtype)
    (columns, now), (rows, fed) = ((pairs(t[:, 0]), pairs(t[:, 1:]).transpose(1, 2)) for t in (of_into, of_after))
    now, fed = now.flatten(1, 2), fed.flatten(1, 2)
    readout = pairs(out_of)

    def each(t: Tensor) -> Tensor:
        """`[D, c, R, …]` from `[D, c·R, …]`."""
        by_step: Tensor = t.unflatten(1, (length, -1))
        return by_step

    around = each(fed @ pairs(p).mT)
    eye = torch.eye(fed.shape[1], dtype=fed.dtype, device=fed.device)
    feedback: Tensor = torch.linalg.solve_triangular(eye + _lower(_later(around)), fed, upper=False, unitriangular=True)
    rows = rows - _lower(each(now @ readout.unsqueeze(-1)).transpose(2, 3)) @ feedback
    of_b = each(feedback @ pairs(b).unsqueeze(-1)).transpose(2, 3)
    columns = columns - _lower(_later(of_b)) @ now

    def power(size: int, diagonal: Tensor) -> Tensor:
        fed_back = feedback[:, : size * p.shape[1]]
        last_first = each(now)[:, :size].flip(1).flatten(1, 2)
        return rotations(torch.view_as_real(diagonal)) - last_first.mT @ fed_back

    matrices = tuple(power(size, diagonal) for size, diagonal in zip(sizes, powers, strict=True))
    response = (columns @ readout.unsqueeze(-1)).squeeze(-1)
    return Operators(readout, response.to(dtype), rows.to(dtype), columns.to(dtype), matrices)
