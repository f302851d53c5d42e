r"""S6, the selective scan of Mamba.

    Δ_t = softplus(dt_t + dt_bias)
    h_t = exp(Δ_t A) ⊙ h_{t-1} + (Δ_t u_t) B_t          h ∈ R^{D×N}
    y_t = C_t · h_t + D ⊙ u_t,   and y_t ⊙ silu(z_t) where a gate z is given

Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752), section 3.2
and algorithm 2; reference implementation in state-spaces/mamba. A is discretised by zero-order hold and B by Euler's
rule, as there. Beyond the reference: an initial state, gradients through it and through the final state, reversal,
and packed sequences.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.core.ops.checks import check_packing, check_shape
from sinuous.core.ops.family import Family, define
from sinuous.core.ops.operators import operators
from sinuous.core.ops.public import public
from sinuous.core.ops.stepwise import State, run_steps
from sinuous.kernels.arguments import SelectiveScan
from sinuous.kernels.precision import working_dtype
from sinuous.kernels.torch.packing import sequence_count

CHUNK_SIZE = 64
"""Time steps between two states that the forward pass keeps for the backward pass."""


def recurrent(args: SelectiveScan, chunk_size: int = CHUNK_SIZE) -> tuple[Tensor, Tensor, Tensor]:
    """Run the definition step by step; autograd differentiates it to any order."""
    dtype = working_dtype(args.u.dtype)
    A, x = args.A.to(dtype), args.u.to(dtype)
    B, C = (t if t.ndim == 4 else t.unsqueeze(2) for t in (args.B.to(dtype), args.C.to(dtype)))
    delta = args.dt.to(dtype) if args.dt_bias is None else args.dt.to(dtype) + args.dt_bias.to(dtype)
    delta = F.softplus(delta) if args.dt_softplus else delta
    initial = x.new_zeros(_state(args)) if args.initial_state is None else args.initial_state.to(dtype)

    def step(state: State, x_t: Tensor, delta_t: Tensor, B_t: Tensor, C_t: Tensor) -> tuple[Tensor, State]:
        B_t, C_t = _per_channel(B_t, A.shape[0]), _per_channel(C_t, A.shape[0])
        h = torch.exp(delta_t[..., None] * A) * state[0] + (delta_t * x_t)[..., None] * B_t
        return (h * C_t).sum(-1), (h,)

    y, (final,), (states,) = run_steps(
        step, (x, delta, B, C), (initial,), x[:, :0], args.cu_seqlens, args.reverse, chunk_size
    )
    y = y if args.D is None else y + args.D.to(dtype) * x
    y = y if args.z is None else y * F.silu(args.z.to(dtype))
    return y.to(args.u.dtype), final, states


def _per_channel(t: Tensor, width: int) -> Tensor:
    """Rows `[B,G,N]` of one step for all channels: channel d reads group d // (D/G), and a single group broadcasts."""
    return t if t.shape[1] == 1 else t.repeat_interleave(width // t.shape[1], 1)


def _state(args: SelectiveScan) -> tuple[int, ...]:
    return sequence_count(args.u, args.cu_seqlens), *args.A.shape


def _check(args: SelectiveScan) -> None:
    u, A, B, C = args.u, args.A, args.B, args.C
    if u.ndim != 3:
        raise ValueError(f"u must have shape [B, T, D] (got {list(u.shape)}); time is axis 1 and channels are last")
    batch, length, width = u.shape
    check_shape("dt", args.dt, (batch, length, width), "one step size per channel, like u")
    if A.ndim != 2 or A.shape[0] != width:
        raise ValueError(f"A must have shape [D, N] with D = {width} (got {list(A.shape)})")
    state = A.shape[1]
    for name, t in (("B", B), ("C", C)):
        if t.ndim == 4 and t.shape[2] > 0 and width % t.shape[2] == 0:
            check_shape(name, t, (batch, length, t.shape[2], state), "[B, T, G, N]")
        elif t.ndim == 4:
            raise ValueError(
                f"{name} has {t.shape[2]} groups, which do not divide the {width} channels of u; pass [B, T, N] or "
                f"[B, T, G, N] (got {list(t.shape)})"
            )
        else:
            check_shape(name, t, (batch, length, state), "[B, T, N] or [B, T, G, N]")
    if B.ndim != C.ndim or B.shape != C.shape:
        raise ValueError(f"B and C must have the same shape (got {list(B.shape)} and {list(C.shape)})")
    check_shape("D", args.D, (width,), "one skip weight per channel")
    check_shape("z", args.z, (batch, length, width), "one gate per channel, like u")
    check_shape("dt_bias", args.dt_bias, (width,), "one bias per channel")
    check_packing(args.cu_seqlens, batch, length)
    check_shape("initial_state", args.initial_state, _state(args), "[sequences, D, N]")
    # On a GPU the look would wait for the device.
    if A.device.type == "cpu" and A.numel() and (highest := A.max().item()) > 0:
        raise ValueError(f"A must be ≤ 0 (got max {highest:.3g}); pass -exp(A_log)")


def _fake(args: SelectiveScan) -> tuple[Tensor, Tensor]:
    y = torch.empty(args.u.shape, dtype=args.u.dtype, device=args.u.device)
    return y, y.new_empty(_state(args), dtype=working_dtype(y.dtype))


def _chunk_states(args: SelectiveScan, chunk_size: int) -> tuple[int, ...]:
    return args.u.shape[0], -(-args.u.shape[1] // chunk_size), *args.A.shape


def _multiply_adds(args: Any) -> int:
    """9 B T D N and, for the skip, B T D: as VMamba and its successors count the scan."""
    count: int = math.prod(args.u) * (9 * args.A[1] + 1)
    return count


FAMILY = Family(
    name="selective_scan",
    arguments=SelectiveScan,
    outputs=("y", "final_state"),
    saved={"chunk_states": _chunk_states},
    integers=("cu_seqlens",),
    forms=("triton", "cpu", "torch", "recurrent"),
    fake=_fake,
    check=_check,
    recurrent=recurrent,
    options={"chunk_size": CHUNK_SIZE},
    multiply_adds=_multiply_adds,
)
define(FAMILY)


@public
def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Selective scan (S6): `h_t = exp(Δ_t A) h_{t-1} + (Δ_t u_t) B_t`, `y_t = C_t · h_t + D u_t`.

    Args:
        u: input `[B, T, D]`; packed sequences are `[1, ΣT, D]` with `cu_seqlens`.
        dt: step sizes before bias and softplus, `[B, T, D]`.
        A: continuous-time decay, ≤ 0, `[D, N]`; `-exp(A_log)` in Mamba.
        B: input projection `[B, T, N]`, or `[B, T, G, N]` for G groups of D/G neighbouring channels.
        C: readout, shaped like B.
        D: skip weight `[D]`.
        z: gate `[B, T, D]`; the output is multiplied by `silu(z)`.
        dt_bias: bias of the step sizes `[D]`.
        dt_softplus: pass `dt + dt_bias` through softplus.
        initial_state: state before the first step, `[B, D, N]` (`[sequences, D, N]` when packed); zeros if absent.
        return_state: return `(y, state)`, the state after the last step in fp32 (fp64 for fp64 input).
        reverse: run from the last step to the first; the state is then the one after step 0.
        cu_seqlens: int32 or int64 `[sequences + 1]`, the boundaries of packed sequences, starting at 0, ending at ΣT.
        backend: `recurrent`, `torch`, `cpu` or `triton`; the fastest that can run if absent.

    Returns:
        y `[B, T, D]` in the dtype of u, or `(y, state)`. Both are differentiable in every tensor argument.

    Raises:
        ValueError: for a wrong shape, dtype, device or range, naming the argument, and for a backend that cannot run.

    Source: Mamba (arXiv 2312.00752), section 3.2 and algorithm 2.
    """
    y, state, _ = operators.selective_scan(
        u, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, reverse, backend or ""
    )
    return (y, state) if return_state else y
