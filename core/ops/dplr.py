r"""DPLR: a matrix state whose transition is diagonal plus low rank: a decay per channel, and a pair of vectors.

    S_t = diag(exp g_t) S_{t-1} + b_t (a_tᵀ S_{t-1}) + k_t v_tᵀ        S ∈ R^{K×V}
    y_t = scale · S_tᵀ q_t

a reads the state before it decays; what it reads is written at b. In a rule that decays first and reads afterwards, a
contains the decay:

    DeltaNet            S + β k (v - Sᵀ k)ᵀ                                 g = 0, a = k, b = -β k, k ← β k
    KDA                 (I - β k kᵀ) diag(exp g) S + β k vᵀ                 a = k ⊙ exp g, b = -β k, k ← β k
    Gated DeltaNet      as KDA, with one g per head
    Comba               exp(g) S + β k (v - exp(g) Sᵀ p)ᵀ                   a = p exp g, b = -β k, k ← β k
    RWKV-7              (diag(exp g) - κ (κ ⊙ α)ᵀ)ᵀ S + k vᵀ               a = -κ, b = κ ⊙ α
    IPLR                (I + b aᵀ) S + k vᵀ                                 g = 0

Where nothing decays the state stays bounded as long as b = -λ a with 0 ≤ λ |a|² ≤ 2; the op does not check that, nor
does it normalise.

Sources: RWKV-7, Peng et al. (arXiv 2503.14456), section 4; KDA, Kimi Team (arXiv 2510.26692), section 3; Comba, Hu et
al. (arXiv 2506.02475); names of arguments as in `dplr_delta_rule` of fla-org/flash-linear-attention. Beyond the public
kernels: decays without a bound, exact resets by g = -inf.
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
from sinuous.kernels.arguments import DPLR
from sinuous.kernels.precision import working_dtype

CHUNK_SIZE = 64
"""Time steps between two states that the forward pass keeps for the backward pass."""


def recurrent(args: DPLR, chunk_size: int = CHUNK_SIZE) -> tuple[Tensor, Tensor, Tensor]:
    """Run the definition step by step; autograd differentiates it to any order."""
    dtype = working_dtype(args.q.dtype)
    scale = args.q.shape[-1] ** -0.5 if args.scale is None else args.scale
    q, k, v, a, b = (t.to(dtype) for t in (args.q, args.k, args.v, args.a, args.b))
    decay = args.log_decay.to(dtype).exp()
    initial = q.new_zeros(state_shape(args)) if args.initial_state is None else args.initial_state.to(dtype)

    def step(
        state: State, q_t: Tensor, k_t: Tensor, v_t: Tensor, decay_t: Tensor, a_t: Tensor, b_t: Tensor
    ) -> tuple[Tensor, State]:
        read = a_t[..., None, :] @ state[0]
        S = decay_t[..., :, None] * state[0] + b_t[..., :, None] * read + k_t[..., :, None] * v_t[..., None, :]
        return (q_t[..., None, :] @ S).squeeze(-2) * scale, (S,)

    y, (final,), (states,) = run_steps(
        step, (q, k, v, decay, a, b), (initial,), v[:, :0], args.cu_seqlens, args.reverse, chunk_size
    )
    return y.to(args.v.dtype), final, states


def _check(args: DPLR) -> None:
    check_attention(args.q, args.k, args.v)
    keys = tuple(args.q.shape)
    check_shape("log_decay", args.log_decay, keys, "one per key channel, [B, T, H, K]")
    check_log_decay(args.log_decay)
    check_shape("a", args.a, keys, "the vector that reads the state, shaped like keys, [B, T, H, K]")
    check_shape("b", args.b, keys, "the vector that it is written at, shaped like keys, [B, T, H, K]")
    check_packing(args.cu_seqlens, keys[0], keys[1])
    check_shape("initial_state", args.initial_state, state_shape(args), "[sequences, H, K, V]")


FAMILY = Family(
    name="dplr",
    arguments=DPLR,
    outputs=("y", "final_state"),
    saved={"chunk_states": chunk_states_shape},
    integers=("cu_seqlens",),
    forms=("triton", "torch", "recurrent"),
    fake=fake,
    check=_check,
    recurrent=recurrent,
    options={"chunk_size": CHUNK_SIZE},
    multiply_adds=matrix_state(5),
)
define(FAMILY)


@public
def dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Diagonal plus low rank: `S_t = diag(exp g_t) S_{t-1} + b_t (a_tᵀ S_{t-1}) + k_t v_tᵀ`, `y_t = scale · S_tᵀ q_t`.

    Args:
        q: queries `[B, T, H, K]`; packed sequences are `[1, ΣT, H, K]` with `cu_seqlens`.
        k: keys, shaped like q.
        v: values `[B, T, H, V]`.
        log_decay: g, ≤ 0, `[B, T, H, K]`; -inf forgets the channel, after a has read it.
        a: vector that reads the state before the decay, shaped like q; times exp(g) for a rule that reads after it.
        b: vector at which that is written, shaped like q.
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

    Source: RWKV-7 (arXiv 2503.14456), section 4; KDA (arXiv 2510.26692), section 3.
    """
    y, state, _ = operators.dplr(q, k, v, log_decay, a, b, initial_state, cu_seqlens, scale, reverse, backend or "")
    return (y, state) if return_state else y
