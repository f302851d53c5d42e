r"""GLA: linear recurrence of a matrix state with one decay per channel.

    S_t = diag(exp g_t) S_{t-1} + k_t v_tᵀ          S ∈ R^{K×V}
    y_t = scale · S_tᵀ q_t

or, with a bonus u, reading the state before the update, and the step's own key and value with weight u:

    y_t = scale · (S_{t-1} + diag(u) k_t v_tᵀ)ᵀ q_t

`decay_of="values"` decays the other axis: S_t = S_{t-1} diag(exp g_t) + k_t v_tᵀ.

Sources: gated linear attention, Yang et al. (arXiv 2312.06635), section 4; HGRN2, Qin et al. (arXiv 2404.07904); the
bonus is that of RWKV-5 and 6, Peng et al. (arXiv 2404.05892), section 4; decaying values are the first of the two
passes of GSA, Zhang et al. (arXiv 2409.07146). Beyond the public kernels: exact gradients through the final state,
exact resets by g = -inf.
"""

from __future__ import annotations

from torch import Tensor

from sinuous.core.checks import check_choice
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
from sinuous.kernels.arguments import GLA
from sinuous.kernels.precision import working_dtype

CHUNK_SIZE = 64
"""Time steps between two states that the forward pass keeps for the backward pass."""

DECAY_OF = ("keys", "values")


def recurrent(args: GLA, chunk_size: int = CHUNK_SIZE) -> tuple[Tensor, Tensor, Tensor]:
    """Run the definition step by step; autograd differentiates it to any order."""
    dtype = working_dtype(args.q.dtype)
    scale = args.q.shape[-1] ** -0.5 if args.scale is None else args.scale
    q, k, v, decay = args.q.to(dtype), args.k.to(dtype), args.v.to(dtype), args.log_decay.to(dtype).exp()
    initial = q.new_zeros(state_shape(args)) if args.initial_state is None else args.initial_state.to(dtype)
    u = None if args.bonus is None else args.bonus.to(dtype)

    def step(state: State, q_t: Tensor, k_t: Tensor, v_t: Tensor, a_t: Tensor) -> tuple[Tensor, State]:
        decay_t = a_t[..., None, :] if args.on_values else a_t[..., :, None]
        after = decay_t * state[0] + k_t[..., :, None] * v_t[..., None, :]
        read = after if u is None else state[0] + (u * k_t)[..., :, None] * v_t[..., None, :]
        return (q_t[..., None, :] @ read).squeeze(-2) * scale, (after,)

    y, (final,), (states,) = run_steps(
        step, (q, k, v, decay), (initial,), v[:, :0], args.cu_seqlens, args.reverse, chunk_size
    )
    return y.to(args.v.dtype), final, states


def _check(args: GLA) -> None:
    check_attention(args.q, args.k, args.v)
    batch, length, heads, values = args.v.shape
    keys = args.q.shape[3]
    if args.on_values:
        check_shape("log_decay", args.log_decay, (batch, length, heads, values), "one per value channel, [B, T, H, V]")
    else:
        check_shape("log_decay", args.log_decay, (batch, length, heads, keys), "one per key channel, [B, T, H, K]")
    check_log_decay(args.log_decay)
    check_shape("bonus", args.bonus, (heads, keys), "one per head and key channel, [H, K]")
    if args.bonus is not None and args.on_values:
        raise ValueError("bonus goes with decay_of='keys' only; leave it out")
    check_packing(args.cu_seqlens, batch, length)
    check_shape("initial_state", args.initial_state, state_shape(args), "[sequences, H, K, V]")


FAMILY = Family(
    name="gla",
    arguments=GLA,
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
def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    bonus: Tensor | None = None,
    decay_of: str = "keys",
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Linear recurrence, a decay per channel: `S_t = diag(exp g_t) S_{t-1} + k_t v_tᵀ`, `y_t = scale · S_tᵀ q_t`.

    Args:
        q: queries `[B, T, H, K]`; packed sequences are `[1, ΣT, H, K]` with `cu_seqlens`.
        k: keys, shaped like q.
        v: values `[B, T, H, V]`.
        log_decay: g, ≤ 0, `[B, T, H, K]`, or `[B, T, H, V]` for the decay of values; -inf forgets all that came before.
        bonus: u `[H, K]`; with it, y_t reads `S_{t-1} + diag(u) k_t v_tᵀ`.
        decay_of: `"keys"` or `"values"`: the axis of S that decays.
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

    Source: GLA (arXiv 2312.06635), section 4.
    """
    check_choice("decay_of", decay_of, DECAY_OF)
    y, state, _ = operators.gla(
        q, k, v, log_decay, bonus, initial_state, cu_seqlens, scale, decay_of == "values", reverse, backend or ""
    )
    return (y, state) if return_state else y
