r"""Longhorn: a state per channel; each step moves it towards recalling the input from the key.

    β_t = sigmoid(dt_t + dt_bias),   ε_t = β_t / (1 + β_t |k_t|²)          per channel
    S_t = (1 - ε_t k_t²) ⊙ S_{t-1} + (ε_t x_t) k_tᵀ                         S ∈ R^{D×N}
    y_t = S_t q_t + D ⊙ x_t,   and y_t ⊙ silu(z_t) where a gate z is given

A row s of S solves min |s - s_{t-1}|² + β (s·k - x)² by one implicit step, s = (I - ε k kᵀ) s_{t-1} + ε x k, of whose
matrix only the diagonal is kept. Since ε k_n² < 1 the decay lies in (0, 1]: no other gate is needed, and a key of
zeros leaves the state as it is.

Source: Liu et al., "Longhorn: State Space Models are Amortized Online Learners" (arXiv 2407.14207), section 3;
reference implementation in Cranial-XIX/longhorn and longhorn_cuda. Beyond the reference: an initial state, gradients
through it and through the final state, reversal, and packed sequences.
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
from sinuous.kernels.arguments import Longhorn
from sinuous.kernels.precision import working_dtype
from sinuous.kernels.torch.packing import sequence_count

CHUNK_SIZE = 64
"""Time steps between two states that the forward pass keeps for the backward pass."""


def recurrent(args: Longhorn, chunk_size: int = CHUNK_SIZE) -> tuple[Tensor, Tensor, Tensor]:
    """Run the definition step by step; autograd differentiates it to any order."""
    dtype = working_dtype(args.x.dtype)
    x, dt, k, q = args.x.to(dtype), args.dt.to(dtype), args.k.to(dtype), args.q.to(dtype)
    beta = torch.sigmoid(dt if args.dt_bias is None else dt + args.dt_bias.to(dtype))
    epsilon = beta / (1 + beta * k.square().sum(-1, keepdim=True))
    initial = x.new_zeros(_state(args)) if args.initial_state is None else args.initial_state.to(dtype)

    def step(state: State, x_t: Tensor, epsilon_t: Tensor, k_t: Tensor, q_t: Tensor) -> tuple[Tensor, State]:
        decay = 1 - epsilon_t[..., None] * k_t.square()[:, None]
        after = decay * state[0] + (epsilon_t * x_t)[..., None] * k_t[:, None]
        return (after @ q_t[..., None]).squeeze(-1), (after,)

    y, (final,), (states,) = run_steps(
        step, (x, epsilon, k, q), (initial,), x[:, :0], args.cu_seqlens, args.reverse, chunk_size
    )
    y = y if args.D is None else y + args.D.to(dtype) * x
    y = y if args.z is None else y * F.silu(args.z.to(dtype))
    return y.to(args.x.dtype), final, states


def _state(args: Longhorn) -> tuple[int, ...]:
    return sequence_count(args.x, args.cu_seqlens), args.x.shape[2], args.k.shape[2]


def _check(args: Longhorn) -> None:
    x, k = args.x, args.k
    if x.ndim != 3:
        raise ValueError(f"x must have shape [B, T, D] (got {list(x.shape)}); time is axis 1 and channels are last")
    batch, length, width = x.shape
    check_shape("dt", args.dt, (batch, length, width), "one gate per channel, like x")
    if k.ndim != 3 or k.shape[:2] != x.shape[:2]:
        raise ValueError(
            f"k must have shape [{batch}, {length}, N], one key for all channels of a step (got {list(k.shape)})"
        )
    check_shape("q", args.q, tuple(k.shape), "queries are shaped like keys, [B, T, N]")
    check_shape("D", args.D, (width,), "one skip weight per channel")
    check_shape("z", args.z, (batch, length, width), "one gate per channel, like x")
    check_shape("dt_bias", args.dt_bias, (width,), "one bias per channel")
    check_packing(args.cu_seqlens, batch, length)
    check_shape("initial_state", args.initial_state, _state(args), "[sequences, D, N]")


def _fake(args: Longhorn) -> tuple[Tensor, Tensor]:
    y = torch.empty(args.x.shape, dtype=args.x.dtype, device=args.x.device)
    return y, y.new_empty(_state(args), dtype=working_dtype(y.dtype))


def _chunk_states(args: Longhorn, chunk_size: int) -> tuple[int, ...]:
    return args.x.shape[0], -(-args.x.shape[1] // chunk_size), args.x.shape[2], args.k.shape[2]


def _multiply_adds(args: Any) -> int:
    count: int = 4 * math.prod(args.x) * args.k[2]
    return count


FAMILY = Family(
    name="longhorn",
    arguments=Longhorn,
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
def longhorn(
    x: Tensor,
    dt: Tensor,
    k: Tensor,
    q: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Longhorn: `S_t = (1 - ε_t k_t²) S_{t-1} + ε_t x_t k_tᵀ`, `y_t = S_t q_t + D x_t`.

    Here `ε = β / (1 + β |k|²)` and `β = sigmoid(dt + dt_bias)`, per channel. Queries are not scaled.

    Args:
        x: input, to be recalled from the key, `[B, T, D]`; packed sequences are `[1, ΣT, D]` with `cu_seqlens`.
        dt: weight of the recall, before bias and sigmoid, `[B, T, D]`.
        k: keys, for all channels, `[B, T, N]`.
        q: queries, shaped like k.
        D: skip weight `[D]`.
        z: gate `[B, T, D]`; the output is multiplied by `silu(z)`.
        dt_bias: bias of dt `[D]`.
        initial_state: state before the first step, `[B, D, N]` (`[sequences, D, N]` when packed); zeros if absent.
        return_state: return `(y, state)`, the state after the last step in fp32 (fp64 for fp64 input).
        reverse: run from the last step to the first; the state is then the one after step 0.
        cu_seqlens: int32 or int64 `[sequences + 1]`, the boundaries of packed sequences, starting at 0, ending at ΣT.
        backend: `recurrent`, `torch`, `cpu` or `triton`; the fastest that can run if absent.

    Returns:
        y `[B, T, D]` in the dtype of x, or `(y, state)`. Both are differentiable in every tensor argument.

    Raises:
        ValueError: for a wrong shape, dtype or device, naming the argument, and for a backend that cannot run.

    Source: Longhorn (arXiv 2407.14207), section 3.
    """
    y, state, _ = operators.longhorn(x, dt, k, q, D, z, dt_bias, initial_state, cu_seqlens, reverse, backend or "")
    return (y, state) if return_state else y
