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

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.core.ops.checks import (
    check_packing,
    check_shape,
    sequence_count,
)
from sinuous.core.ops.family import Family, define
from sinuous.core.ops.public import public
from sinuous.core.ops.stepwise import State, run_steps
from sinuous.kernels.arguments import Longhorn
from sinuous.kernels.precision import working_dtype

CHUNK_SIZE = 64
"""Time steps between two states that the forward pass keeps for the backward pass."""


def recurrent(
    x: Tensor,
    dt: Tensor,
    k: Tensor,
    q: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the definition step by step; autograd differentiates it to any order."""
    dtype = working_dtype(x.dtype)
    u, k, q = x.to(dtype), k.to(dtype), q.to(dtype)
    beta = torch.sigmoid(dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype))
    epsilon = beta / (1 + beta * k.square().sum(-1, keepdim=True))
    shape = (sequence_count(x, cu_seqlens), x.shape[2], k.shape[2])
    initial = u.new_zeros(shape) if initial_state is None else initial_state.to(dtype)

    def step(state: State, u_t: Tensor, epsilon_t: Tensor, k_t: Tensor, q_t: Tensor) -> tuple[Tensor, State]:
        decay = 1 - epsilon_t[..., None] * k_t.square()[:, None]
        after = decay * state[0] + (epsilon_t * u_t)[..., None] * k_t[:, None]
        return (after @ q_t[..., None]).squeeze(-1), (after,)

    y, (final,), (states,) = run_steps(
        step, (u, epsilon, k, q), (initial,), u[:, :0], cu_seqlens, reverse, chunk_size
    )  # fmt: skip
    y = y if D is None else y + D.to(dtype) * u
    y = y if z is None else y * F.silu(z.to(dtype))
    return y.to(x.dtype), final, states


def _check(
    x: Tensor,
    dt: Tensor,
    k: Tensor,
    q: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> None:
    if x.ndim != 3:
        raise ValueError(f"x must have shape [B, T, D] (got {list(x.shape)}); time is axis 1 and channels are last")
    batch, length, width = x.shape
    check_shape("dt", dt, (batch, length, width), "one gate per channel, like x")
    if k.ndim != 3 or k.shape[:2] != x.shape[:2]:
        raise ValueError(
            f"k must have shape [{batch}, {length}, N], one key for all channels of a step (got {list(k.shape)})"
        )
    state = k.shape[2]
    check_shape("q", q, (batch, length, state), "queries are shaped like keys, [B, T, N]")
    check_shape("D", D, (width,), "one skip weight per channel")
    check_shape("z", z, (batch, length, width), "one gate per channel, like x")
    check_shape("dt_bias", dt_bias, (width,), "one bias per channel")
    check_packing(cu_seqlens, batch, length)
    check_shape("initial_state", initial_state, (sequence_count(x, cu_seqlens), width, state), "[sequences, D, N]")


def _fake(x: Tensor, k: Tensor, cu_seqlens: Tensor | None, **_: object) -> tuple[Tensor, Tensor]:
    state = (sequence_count(x, cu_seqlens), x.shape[2], k.shape[2])
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        torch.empty(state, dtype=working_dtype(x.dtype), device=x.device),
    )


def _chunk_states_shape(x: Tensor, k: Tensor, chunk_size: int, **_: object) -> tuple[int, ...]:
    return x.shape[0], (x.shape[1] + chunk_size - 1) // chunk_size, x.shape[2], k.shape[2]


def _multiply_adds(x: Sequence[int], k: Sequence[int], **_: object) -> int:
    return 4 * x[0] * x[1] * x[2] * k[2]


FAMILY = Family(
    name="longhorn",
    arguments=Longhorn,
    by_name=True,
    outputs=("y", "final_state"),
    saved={"chunk_states": _chunk_states_shape},
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
    y, state, _ = torch.ops.sinuous.longhorn(
        x, dt, k, q, D, z, dt_bias, initial_state, cu_seqlens, reverse, backend or ""
    )
    return (y, state) if return_state else y
