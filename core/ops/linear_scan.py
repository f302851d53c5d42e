r"""Linear scan: a recurrence of single channels, real or complex.

    h_t = a_t ⊙ h_{t-1} + x_t,    y_t = h_t,    and h_t = x_t where a reset is set

LRU (arXiv 2303.06349), S5 (2208.04933), HGRN (2311.04823), RG-LRU (2402.19427), GateLoop (2311.01927), minGRU and
minLSTM (2410.01201), QRNN (1611.01576) and SRU (1709.02755) are this recurrence once their gates are computed. The
factor is not a logarithm, since it may be negative or complex. A reset is exact: nothing passes it, not even a NaN, and
no gradient passes it backward.

Source: Martin and Cundy, "Parallelizing Linear Recurrent Neural Nets Over Sequence Length" (arXiv 1709.04057), section
2. Beyond the public kernels: gradients through the initial and the final state, packed sequences, reversal, resets.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sinuous.core.ops.checks import check_packing, check_shape
from sinuous.core.ops.family import Family, define
from sinuous.core.ops.operators import operators
from sinuous.core.ops.public import public
from sinuous.core.ops.stepwise import State, run_steps
from sinuous.kernels.arguments import LinearScan
from sinuous.kernels.precision import working_dtype
from sinuous.kernels.torch.packing import sequence_count

CHUNK_SIZE = 64
"""Time steps between two states that the forward pass keeps for the backward pass."""


def recurrent(args: LinearScan, chunk_size: int = CHUNK_SIZE) -> tuple[Tensor, Tensor, Tensor]:
    """Run the definition step by step; autograd differentiates it to any order."""
    x = args.x.to(working_dtype(args.x.dtype))
    initial = x.new_zeros(_state(args)) if args.initial_state is None else args.initial_state.to(x.dtype)

    def step(state: State, x_t: Tensor, a_t: Tensor, reset_t: Tensor | None) -> tuple[Tensor, State]:
        h = state[0]
        if reset_t is not None:  # both, since 0 times NaN is NaN
            a_t, h = a_t.masked_fill(reset_t[:, None], 0), h.masked_fill(reset_t[:, None], 0)
        h = a_t * h + x_t
        return h, (h,)

    inputs = (x, args.a.to(x.dtype).expand(x.shape), args.reset)
    y, (final,), (states,) = run_steps(step, inputs, (initial,), x[:, :0], args.cu_seqlens, args.reverse, chunk_size)
    return y.to(args.x.dtype), final, states


def _state(args: LinearScan) -> tuple[int, ...]:
    return sequence_count(args.x, args.cu_seqlens), args.x.shape[2]


def _check_dtype(name: str, t: Tensor) -> None:
    if t.dtype == torch.complex32:
        raise ValueError(f"{name} must not be complex32 (got {t.dtype}); convert it with .to(torch.complex64)")
    if not t.is_complex():
        raise ValueError(f"{name} must be real or complex floating point (got {t.dtype}); convert it with .float()")


def _check(args: LinearScan) -> None:
    x, a, reset = args.x, args.a, args.reset
    for name, t in (("a", a), ("initial_state", args.initial_state)):
        if t is not None and t.is_complex() != x.is_complex():
            remedy = f"{name}.to({x.dtype})" if x.is_complex() else f"x.to({t.dtype})"
            raise ValueError(
                f"x is {x.dtype} and {name} is {t.dtype}: both must be real or both complex; pass {remedy}"
            )
    if x.ndim != 3:
        raise ValueError(f"x must have shape [B, T, D] (got {list(x.shape)}); time is axis 1 and channels are last")
    batch, length, width = x.shape
    shape = (width,) if a.ndim == 1 else (batch, length, width)
    check_shape("a", a, shape, "one factor per step and channel, [B, T, D], or per channel, [D]")
    if reset is not None and reset.dtype != torch.bool:
        raise ValueError(f"reset must be bool (got {reset.dtype}); pass reset.bool()")
    check_shape("reset", reset, (batch, length), "whether the state is dropped before a step, [B, T]")
    check_packing(args.cu_seqlens, batch, length)
    check_shape("initial_state", args.initial_state, _state(args), "[sequences, D]")


def _fake(args: LinearScan) -> tuple[Tensor, Tensor]:
    y = torch.empty(args.x.shape, dtype=args.x.dtype, device=args.x.device)
    return y, y.new_empty(_state(args), dtype=working_dtype(y.dtype))


def _chunk_states(args: LinearScan, chunk_size: int) -> tuple[int, ...]:
    batch, length, width = args.x.shape
    return batch, -(-length // chunk_size), width


def _multiply_adds(args: Any) -> int:
    return math.prod(args.x)


FAMILY = Family(
    name="linear_scan",
    arguments=LinearScan,
    outputs=("y", "final_state"),
    saved={"chunk_states": _chunk_states},
    integers=("reset", "cu_seqlens"),
    forms=("triton", "cpu", "torch", "recurrent"),
    fake=_fake,
    check=_check,
    recurrent=recurrent,
    options={"chunk_size": CHUNK_SIZE},
    multiply_adds=_multiply_adds,
    check_dtype=_check_dtype,
)
define(FAMILY)


@public
def linear_scan(
    x: Tensor,
    a: Tensor,
    *,
    reset: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Linear recurrence of single channels: `h_t = a_t ⊙ h_{t-1} + x_t`, and y = h.

    Args:
        x: input `[B, T, D]`, real or complex; packed sequences are `[1, ΣT, D]` with `cu_seqlens`.
        a: factors `[B, T, D]`, or constant `[D]`; complex where x is. They may be negative or larger than 1.
        reset: bool `[B, T]`; where true, the state is dropped before the step, so that h_t = x_t whatever a_t is.
        initial_state: state before the first step, `[B, D]` (`[sequences, D]` when packed); zeros if absent.
        return_state: return `(y, state)`, the state after the last step in fp32 or complex64 (double for double input).
        reverse: run from the last step to the first; the state is then the one after step 0.
        cu_seqlens: int32 or int64 `[sequences + 1]`, the boundaries of packed sequences, starting at 0, ending at ΣT.
        backend: `recurrent`, `torch`, `cpu` or `triton`; the fastest that can run if absent.

    Returns:
        y `[B, T, D]` in the dtype of x, or `(y, state)`. Both are differentiable in x, a and initial_state.

    Raises:
        ValueError: for a wrong shape, dtype or device, naming the argument, and for a backend that cannot run.

    Source: Martin and Cundy (arXiv 1709.04057), section 2.
    """
    y, state, _ = operators.linear_scan(x, a, reset, initial_state, cu_seqlens, reverse, backend or "")
    return (y, state) if return_state else y
