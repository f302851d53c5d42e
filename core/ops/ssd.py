r"""SSD: linear recurrence of a matrix state with one decay per head.

    S_t = exp(g_t) S_{t-1} + k_t v_tᵀ          S ∈ R^{K×V}
    y_t = scale · S_tᵀ q_t

With g = 0 it is linear attention (Katharopoulos et al., arXiv 2006.16236), with constant g retention (Sun et al., arXiv
2307.08621) and lightning attention (Qin et al., arXiv 2401.04658), with g from the input Mamba-2 and simple GLA.

Source: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), sections 3 and 6; there q, k, v are C, B and Δ x, and
g = Δ A. Beyond the reference: exact gradients through the final state, reversal, exact resets by g = -inf.
"""

from __future__ import annotations

from torch import Tensor

from sinuous.core.ops.checks import (
    check_attention,
    check_log_decay,
    check_packing,
    check_shape,
)
from sinuous.core.ops.family import Family, define
from sinuous.core.ops.flops import matrix_state
from sinuous.core.ops.matrix_state import chunk_states_shape, fake, state_shape
from sinuous.core.ops.operators import operators
from sinuous.core.ops.public import public
from sinuous.core.ops.stepwise import State, run_steps
from sinuous.kernels.arguments import SSD
from sinuous.kernels.precision import working_dtype

CHUNK_SIZE = 64
"""Time steps between two states that the forward pass keeps for the backward pass."""


def recurrent(args: SSD, chunk_size: int = CHUNK_SIZE) -> tuple[Tensor, Tensor, Tensor]:
    """Run the definition step by step; autograd differentiates it to any order."""
    dtype, heads = working_dtype(args.q.dtype), args.v.shape[2]
    scale = args.q.shape[-1] ** -0.5 if args.scale is None else args.scale
    q, k = (t.to(dtype).repeat_interleave(heads // max(t.shape[2], 1), 2) for t in (args.q, args.k))
    v, log_decay = args.v.to(dtype), args.log_decay
    decay = None if log_decay is None else log_decay.to(dtype).exp().expand(v.shape[:3])
    initial = q.new_zeros(state_shape(args)) if args.initial_state is None else args.initial_state.to(dtype)

    def step(state: State, q_t: Tensor, k_t: Tensor, v_t: Tensor, a_t: Tensor | None) -> tuple[Tensor, State]:
        S = state[0] if a_t is None else a_t[..., None, None] * state[0]
        S = S + k_t[..., :, None] * v_t[..., None, :]
        return (q_t[..., None, :] @ S).squeeze(-2) * scale, (S,)

    y, (final,), (states,) = run_steps(
        step, (q, k, v, decay), (initial,), v[:, :0], args.cu_seqlens, args.reverse, chunk_size
    )
    return y.to(args.v.dtype), final, states


def _check(args: SSD) -> None:
    check_attention(args.q, args.k, args.v, grouped=True)
    batch, length, heads, _ = args.v.shape
    if args.log_decay is not None:
        shape = (heads,) if args.log_decay.ndim == 1 else (batch, length, heads)
        check_shape("log_decay", args.log_decay, shape, "one per step and head, [B, T, H], or one per head, [H]")
        check_log_decay(args.log_decay)
    check_packing(args.cu_seqlens, batch, length)
    check_shape("initial_state", args.initial_state, state_shape(args), "[sequences, H, K, V]")


FAMILY = Family(
    name="ssd",
    arguments=SSD,
    outputs=("y", "final_state"),
    saved={"chunk_states": chunk_states_shape},
    integers=("cu_seqlens",),
    forms=("triton", "torch", "recurrent"),
    fake=fake,
    check=_check,
    recurrent=recurrent,
    options={"chunk_size": CHUNK_SIZE},
    multiply_adds=matrix_state(3),
)
define(FAMILY)


@public
def ssd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Linear recurrence with one decay per head: `S_t = exp(g_t) S_{t-1} + k_t v_tᵀ`, `y_t = scale · S_tᵀ q_t`.

    Args:
        q: queries `[B, T, G, K]`; packed sequences are `[1, ΣT, G, K]` with `cu_seqlens`.
        k: keys, shaped like q.
        v: values `[B, T, H, V]`, H a multiple of G; head h reads group h // (H/G).
        log_decay: g, ≤ 0, `[B, T, H]` or constant `[H]`; -inf forgets all that came before. None is no decay.
        scale: factor of the queries; K^-1/2 if absent.
        initial_state: state before the first step, `[B, H, K, V]` (`[sequences, …]` when packed); zeros if absent.
        return_state: return `(y, state)`, the state after the last step in fp32 (fp64 for fp64 input).
        reverse: run from the last step to the first; the state is then the one after step 0.
        cu_seqlens: int32 or int64 `[sequences + 1]`, the boundaries of packed sequences, starting at 0, ending at ΣT.
        backend: `recurrent`, `torch` or `triton`; the fastest that can run if absent.

    Returns:
        y `[B, T, H, V]` in the dtype of v, or `(y, state)`. Both are differentiable in every tensor argument.

    Raises:
        ValueError: for a wrong shape, dtype, device or range, naming the argument, and for a backend that cannot run.

    Source: Mamba-2 (arXiv 2405.21060), sections 3 and 6.
    """
    y, state, _ = operators.ssd(q, k, v, log_decay, initial_state, cu_seqlens, scale, reverse, backend or "")
    return (y, state) if return_state else y
