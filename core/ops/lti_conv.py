r"""Convolution with the response of a linear time-invariant system: LSSL, S4, S4D, DSS.

    x'(t) = A x(t) + B u(t),   y(t) = C x(t) + D u(t)         for each channel, A = diag(Λ) - Σ_r P_r P_r^*

discretised with a step Δ for each channel, by zero-order hold (if A is diagonal) or the trapezoidal ("bilinear") rule:

    zoh        Ā = exp(ΔA),                        B̄ = A^{-1} (Ā - 1) B
    bilinear   Ā = (1 - Δ/2 A)^{-1} (1 + Δ/2 A),   B̄ = (1 - Δ/2 A)^{-1} Δ B

    x_t = Ā x_{t-1} + B̄ u_t,   y_t = C x_t + D u_t

The N numbers of a state come in conjugate pairs, of which one is kept: `C x = 2 Re(Σ_m C_m x_m)` over M = N/2, and
likewise in P^* x. C is that of the recurrence itself. In the authors' code it is the product with 1 - Ā^L; here the
same parameters serve any length and any Δ. A low rank with a minus sign keeps A Hurwitz wherever Λ is:
A + A^* = 2 Re Λ - 2 P P^*.

Source: Gu, Goel and Ré, "Efficiently Modeling Long Sequences with Structured State Spaces" (arXiv 2111.00396), sections
2 and 3 and appendix C; Goel et al. (2202.09729), section 4.2 for the sign of P; Gu et al. (2206.11893), section 3, for
diagonal systems. Beyond the reference: gradients through the initial and the final state, packed sequences, reversal.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sinuous.core.checks import check_choice
from sinuous.core.ops.checks import (
    check_floating,
    check_packing,
    check_shape,
)
from sinuous.core.ops.family import Family, define
from sinuous.core.ops.operators import operators
from sinuous.core.ops.public import public
from sinuous.core.ops.stepwise import State, run_steps
from sinuous.kernels.arguments import LTIConv
from sinuous.kernels.precision import working_dtype
from sinuous.kernels.torch.discretization import conj, discretize, dot, times
from sinuous.kernels.torch.packing import sequence_count

DISCRETIZATIONS = ("zoh", "bilinear")


def recurrent(args: LTIConv) -> tuple[Tensor, Tensor]:
    """Run the definition step by step; autograd differentiates it to any order."""
    dtype = working_dtype(args.u.dtype)
    # The step in double precision: a slow mode's factor is so near 1 that fp32 would lose most of what it decays by.
    system = discretize(args.dt, args.A, args.B, args.P, args.discretization)
    factor, b, p, q = (None if t is None else t.to(dtype) for t in system)
    assert factor is not None
    assert b is not None
    readout = conj(args.C.to(dtype))
    skip = None if args.D is None else args.D.to(dtype)
    u = args.u.to(dtype)
    initial = u.new_zeros(_state(args)) if args.initial_state is None else args.initial_state.to(dtype)

    def step(state: State, u_t: Tensor) -> tuple[Tensor, State]:
        (x,) = state
        new = times(factor, x) + b * u_t[..., None, None]
        if p is not None and q is not None:
            new = new - (p * dot(q, x.unsqueeze(1))[..., None, None]).sum(1)
        y_t = dot(readout, new)
        return y_t if skip is None else y_t + skip * u_t, (new,)

    chunk_size = max(u.shape[1], 1)
    y, (final,), _ = run_steps(step, (u,), (initial,), u[:, :0], args.cu_seqlens, args.reverse, chunk_size)
    return y.to(args.u.dtype), final


def _state(args: LTIConv) -> tuple[int, ...]:
    return sequence_count(args.u, args.cu_seqlens), args.u.shape[2], args.A.shape[-2], 2


def _check_dtype(name: str, t: Tensor) -> None:
    if t.is_complex() and name not in ("u", "dt", "D"):
        raise ValueError(f"{name} must be pairs of real numbers (got {t.dtype}); pass torch.view_as_real({name})")
    check_floating(name, t)


def _check(args: LTIConv) -> None:
    u, dt, A, P = args.u, args.dt, args.A, args.P
    if u.ndim != 3:
        raise ValueError(f"u must have shape [B, T, D] (got {list(u.shape)}); time is axis 1 and channels are last")
    batch, length, width = u.shape
    check_shape("dt", dt, (width,), "one step per channel")
    # On a GPU the look would wait for the device.
    if dt.device.type == "cpu" and dt.numel() and (shortest := dt.min().item()) <= 0:
        raise ValueError(f"dt must be > 0 (got min {shortest:.3g}); pass log_dt.exp() or softplus(x)")
    if A.ndim not in (2, 3) or A.shape[-1] != 2 or A.shape[-2] < 1:
        raise ValueError(f"A must have shape [D, M, 2] or [M, 2] (got {list(A.shape)}): one of each conjugate pair")
    modes = A.shape[-2]
    for name, t in (("A", A), ("B", args.B), ("C", args.C)):
        shape = (modes, 2) if t.ndim == 2 else (width, modes, 2)
        check_shape(name, t, shape, "[D, M, 2], or [M, 2] where all channels have the same")
    check_choice("discretization", args.discretization, DISCRETIZATIONS)
    if P is not None:
        if P.ndim not in (3, 4) or P.shape[0] < 1:
            raise ValueError(f"P must have shape [R, D, M, 2] or [R, M, 2] with R ≥ 1 (got {list(P.shape)})")
        shape = (modes, 2) if P.ndim == 3 else (width, modes, 2)
        check_shape("P", P, (P.shape[0], *shape), "[R, D, M, 2], or [R, M, 2] where all channels have the same")
        if args.discretization != "bilinear":
            raise ValueError("zero-order hold is for a diagonal A; with P pass discretization='bilinear'")
    check_shape("D", args.D, (width,), "one skip weight per channel")
    check_packing(args.cu_seqlens, batch, length)
    check_shape("initial_state", args.initial_state, _state(args), "[sequences, D, M, 2]")


def _fake(args: LTIConv) -> tuple[Tensor, Tensor]:
    y = torch.empty(args.u.shape, dtype=args.u.dtype, device=args.u.device)
    return y, y.new_empty(_state(args), dtype=working_dtype(y.dtype))


def _multiply_adds(args: Any) -> int:
    """8 for each pair: a complex product with the state, the input in, the real part out; 8 more for each rank of P."""
    ranks = 0 if args.P is None else args.P[0]
    count: int = 8 * (1 + ranks) * math.prod(args.u) * args.A[-2]
    return count


FAMILY = Family(
    name="lti_conv",
    arguments=LTIConv,
    outputs=("y", "final_state"),
    saved={},
    integers=("cu_seqlens",),
    forms=("triton", "torch", "recurrent"),
    fake=_fake,
    check=_check,
    recurrent=recurrent,
    options={},
    multiply_adds=_multiply_adds,
    check_dtype=_check_dtype,
)
define(FAMILY)


@public
def lti_conv(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    P: Tensor | None = None,
    D: Tensor | None = None,
    discretization: str = "zoh",
    initial_state: Tensor | None = None,
    return_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Convolution with the response of a linear system: `y_t = Σ_j C Ā^j B̄ u_{t-j} + D u_t`.

    Complex numbers are pairs, `torch.view_as_real(z)`; M = N/2 of the N numbers of a state are stored; the others are
    their conjugates. A, B, C and P may leave out the axis of channels where all have the same.

    Args:
        u: input `[B, T, D]`; packed sequences are `[1, ΣT, D]` with `cu_seqlens`.
        dt: steps Δ > 0, `[D]`; a signal sampled at half the rate needs 2Δ.
        A: the diagonal Λ, `[D, M, 2]` or `[M, 2]`, with real parts below 0 if the system is to be stable.
        B: input, shaped likewise.
        C: readout, shaped likewise.
        P: low rank, `[R, D, M, 2]` or `[R, M, 2]`: A is `diag(Λ) - Σ_r P_r P_r^*`; diagonal if absent.
        D: skip weight `[D]`.
        discretization: `zoh`, without P, or `bilinear`.
        initial_state: state before the first step, `[B, D, M, 2]` (`[sequences, …]` when packed); zeros if absent.
        return_state: return `(y, state)`, the state after the last step in fp32 (fp64 for fp64 input).
        reverse: run from the last step to the first; the state is then the one after step 0.
        cu_seqlens: int32 or int64 `[sequences + 1]`, the boundaries of packed sequences, starting at 0, ending at ΣT.
        backend: `recurrent`, `torch` or `triton`; the fastest that can run if absent.

    Returns:
        y `[B, T, D]` in the dtype of u, or `(y, state)`. Both are differentiable in every tensor argument.

    Raises:
        ValueError: for a wrong shape, dtype, device or range, naming the argument, for an unknown discretization or
            `zoh` with P, and for a backend that cannot run.

    Source: S4 (arXiv 2111.00396), sections 2 and 3; S4D (arXiv 2206.11893), section 3.
    """
    y, state = operators.lti_conv(
        u, dt, A, B, C, P, D, initial_state, cu_seqlens, discretization, reverse, backend or ""
    )
    return (y, state) if return_state else y
