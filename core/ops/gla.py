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

import torch
from torch import Tensor

from sinuous.core.checks import check_choice
from sinuous.core.ops.checks import (
    check_attention,
    check_log_decay,
    check_packing,
    check_shape,
    sequence_count,
)
from sinuous.core.ops.family import Family, define
from sinuous.core.ops.flops import matrix_state
from sinuous.core.ops.public import public
from sinuous.core.ops.stepwise import State, run_steps
from sinuous.kernels.precision import working_dtype

CHUNK_SIZE = 64
"""Time steps between two states that the forward pass keeps for the backward pass."""

DECAY_OF = ("keys", "values")


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
    on_values: bool,
    reverse: bool,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the definition step by step; autograd differentiates it to any order."""
    dtype = working_dtype(q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    shape = (sequence_count(q, cu_seqlens), v.shape[2], q.shape[3], v.shape[3])
    initial = q.new_zeros(shape, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    u = None if bonus is None else bonus.to(dtype)

    def step(state: State, q_t: Tensor, k_t: Tensor, v_t: Tensor, a_t: Tensor) -> tuple[Tensor, State]:
        decay = a_t[..., None, :] if on_values else a_t[..., :, None]
        after = decay * state[0] + k_t[..., :, None] * v_t[..., None, :]
        read = after if u is None else state[0] + (u * k_t)[..., :, None] * v_t[..., None, :]
        return (q_t[..., None, :] @ read).squeeze(-2) * scale, (after,)

    inputs = (q.to(dtype), k.to(dtype), v.to(dtype), log_decay.to(dtype).exp())
    y, (final,), (states,) = run_steps(step, inputs, (initial,), inputs[2][:, :0], cu_seqlens, reverse, chunk_size)
    return y.to(v.dtype), final, states


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
    on_values: bool,
    reverse: bool,
) -> None:
    check_attention(q, k, v)
    batch, length, heads, values = v.shape
    if on_values:
        check_shape("log_decay", log_decay, (batch, length, heads, values), "one per value channel, [B, T, H, V]")
    else:
        check_shape("log_decay", log_decay, (batch, length, heads, q.shape[3]), "one per key channel, [B, T, H, K]")
    check_log_decay(log_decay)
    check_shape("bonus", bonus, (heads, q.shape[3]), "one per head and key channel, [H, K]")
    if bonus is not None and on_values:
        raise ValueError("bonus goes with decay_of='keys' only; leave it out")
    check_packing(cu_seqlens, batch, length)
    state = (sequence_count(q, cu_seqlens), heads, q.shape[3], values)
    check_shape("initial_state", initial_state, state, "[sequences, H, K, V]")


def _fake(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, **_: object) -> tuple[Tensor, Tensor]:
    state = (sequence_count(q, cu_seqlens), v.shape[2], q.shape[3], v.shape[3])
    return (
        torch.empty(v.shape, dtype=v.dtype, device=v.device),
        torch.empty(state, dtype=working_dtype(q.dtype), device=q.device),
    )


def _chunk_states(q: Tensor, v: Tensor, chunk_size: int, **_: object) -> tuple[int, ...]:
    return q.shape[0], (q.shape[1] + chunk_size - 1) // chunk_size, v.shape[2], q.shape[3], v.shape[3]


FAMILY = Family(
    name="gla",
    schema=(
        "Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? bonus, Tensor? initial_state, Tensor? cu_seqlens, "
        "float? scale, bool on_values, bool reverse, str backend"
    ),
    outputs=("y", "final_state"),
    saved={"chunk_states": _chunk_states},
    integers=("cu_seqlens",),
    forms=("triton", "torch", "recurrent"),
    fake=_fake,
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
    y, state, _ = torch.ops.sinuous.gla(
        q, k, v, log_decay, bonus, initial_state, cu_seqlens, scale, decay_of == "values", reverse, backend or ""
    )
    return (y, state) if return_state else y
