r"""Delta rule: a matrix state that is corrected towards v where it is read at k, with or without decay.

    S ← exp(g_t) S_{t-1}
    S ← S + β_j k_j (v_j - Sᵀ k_j)ᵀ        for the factors j = 1, …, n of step t
    S_t = S,    y_t = scale · S_tᵀ q_t      S ∈ R^{K×V}

One factor is DeltaNet, with a decay Gated DeltaNet; several are DeltaProduct and Gated DeltaProduct. The decay comes
before the reading. For keys of length one the transition has the eigenvalue 1 - β along k: β = 1 replaces what is
stored, and β up to 2 makes it negative, which state tracking needs. The op does not normalise keys.

Sources: Yang et al. (arXiv 2406.06484), section 3; with decay (arXiv 2412.06464), section 3; products, Siems et al.
(arXiv 2502.10297), section 4; negative eigenvalues, Grazzi et al. (arXiv 2411.12537).
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from sinuous.core.ops.checks import (
    check_log_decay,
    check_packing,
    check_shape,
)
from sinuous.core.ops.family import Family, define
from sinuous.core.ops.matrix_state import chunk_states_shape, fake, state_shape
from sinuous.core.ops.operators import operators
from sinuous.core.ops.public import public
from sinuous.core.ops.stepwise import State, run_steps
from sinuous.kernels.arguments import DeltaRule
from sinuous.kernels.precision import working_dtype

CHUNK_SIZE = 64
"""Time steps between two states that the forward pass keeps for the backward pass."""


def recurrent(args: DeltaRule, chunk_size: int = CHUNK_SIZE) -> tuple[Tensor, Tensor, Tensor]:
    """Run the definition step by step; autograd differentiates it to any order."""
    dtype = working_dtype(args.q.dtype)
    scale = args.q.shape[-1] ** -0.5 if args.scale is None else args.scale
    q, k, v, beta = (t.to(dtype) for t in (args.q, args.k, args.v, args.beta))
    if k.ndim == 4:
        k, v, beta = k[:, :, None], v[:, :, None], beta[:, :, None]
    decay = None if args.log_decay is None else args.log_decay.to(dtype).exp()
    initial = q.new_zeros(state_shape(args)) if args.initial_state is None else args.initial_state.to(dtype)

    def step(
        state: State, q_t: Tensor, k_t: Tensor, v_t: Tensor, beta_t: Tensor, a_t: Tensor | None
    ) -> tuple[Tensor, State]:
        S = state[0] if a_t is None else a_t[..., None, None] * state[0]
        for k_j, v_j, beta_j in zip(k_t.unbind(1), v_t.unbind(1), beta_t.unbind(1), strict=True):
            error = v_j - (k_j[..., None, :] @ S).squeeze(-2)
            S = S + (beta_j[..., None] * k_j)[..., :, None] * error[..., None, :]
        return (q_t[..., None, :] @ S).squeeze(-2) * scale, (S,)

    y, (final,), (states,) = run_steps(
        step, (q, k, v, beta, decay), (initial,), v[:, :0].sum(2), args.cu_seqlens, args.reverse, chunk_size
    )
    return y.to(args.v.dtype), final, states


def _check(args: DeltaRule) -> None:
    q, k, v, beta = args.q, args.k, args.v, args.beta
    if q.ndim != 4:
        raise ValueError(f"q must have shape [B, T, H, K] (got {list(q.shape)}); time is axis 1, heads are axis 2")
    batch, length, heads, keys = q.shape
    factors: tuple[int, ...] = ()
    if k.ndim == 5:
        factors = (k.shape[2],)
        if k.shape[2] < 1:
            raise ValueError("k has no factor; its axis 2 must be at least 1 long")
    many = ", n" if factors else ""
    check_shape("k", k, (batch, length, *factors, heads, keys), f"keys, [B, T{many}, H, K]")
    if v.ndim != k.ndim or v.shape[:-1] != k.shape[:-1]:
        shape = ", ".join(map(str, (*k.shape[:-1], "V")))
        raise ValueError(f"v must have shape [{shape}] (got {list(v.shape)}): values, one for each key")
    check_shape("beta", beta, tuple(k.shape[:-1]), f"one per key, [B, T{many}, H]")
    check_shape("log_decay", args.log_decay, (batch, length, heads), "one per step and head, [B, T, H]")
    check_log_decay(args.log_decay)
    if beta.device.type == "cpu" and beta.numel():  # on a GPU the look would wait for the device
        lowest, highest = beta.min().item(), beta.max().item()
        if lowest < 0 or highest > 2:
            raise ValueError(
                f"beta must lie in [0, 2] (got {lowest:.3g} to {highest:.3g}); pass sigmoid(x) or 2 * sigmoid(x)"
            )
    check_packing(args.cu_seqlens, batch, length)
    check_shape("initial_state", args.initial_state, state_shape(args), "[sequences, H, K, V]")


def _multiply_adds(args: Any) -> int:
    count: int = 4 * math.prod(args.v) * args.k[-1]
    return count


FAMILY = Family(
    name="delta_rule",
    arguments=DeltaRule,
    outputs=("y", "final_state"),
    saved={"chunk_states": chunk_states_shape},
    integers=("cu_seqlens",),
    forms=("triton", "torch", "recurrent"),
    fake=fake,
    check=_check,
    recurrent=recurrent,
    options={"chunk_size": CHUNK_SIZE},
    multiply_adds=_multiply_adds,
)
define(FAMILY)


@public
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Delta rule: `S ← exp(g_t) S`, then `S ← S + β k (v - Sᵀ k)ᵀ` for each factor, `y_t = scale · Sᵀ q_t`.

    Args:
        q: queries `[B, T, H, K]`; packed sequences are `[1, ΣT, H, K]` with `cu_seqlens`.
        k: keys `[B, T, H, K]`, or `[B, T, n, H, K]` for n factors per step; of length one for a stable state.
        v: values `[B, T, H, V]` or `[B, T, n, H, V]`.
        beta: strength of the correction in [0, 2], `[B, T, H]` or `[B, T, n, H]`.
        log_decay: g, ≤ 0, `[B, T, H]`; -inf forgets all that came before. None is no decay.
        scale: factor of the queries; K^-1/2 if absent.
        initial_state: state before the first step, `[B, H, K, V]` (`[sequences, …]` when packed); zeros if absent.
        return_state: return `(y, state)`, the state after the last step in fp32 (fp64 for fp64 input).
        reverse: run from the last step to the first; the factors of a step keep their order. The state is then the one
            after step 0.
        cu_seqlens: int32 or int64 `[sequences + 1]`, the boundaries of packed sequences, starting at 0, ending at ΣT.
        backend: `recurrent`, `torch` or `triton`; the fastest that can run if absent.

    Returns:
        y `[B, T, H, V]` in the dtype of v, or `(y, state)`. Both are differentiable in every tensor argument.

    Raises:
        ValueError: for a wrong shape, dtype, device or range, naming the argument, and for a backend that cannot run.

    Source: DeltaNet (arXiv 2406.06484), section 3; Gated DeltaNet (arXiv 2412.06464), section 3; DeltaProduct (arXiv
    2502.10297), section 4.
    """
    y, state, _ = operators.delta_rule(
        q, k, v, beta, log_decay, initial_state, cu_seqlens, scale, reverse, backend or ""
    )
    return (y, state) if return_state else y
