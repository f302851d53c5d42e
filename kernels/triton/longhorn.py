"""Longhorn in Triton; the kernels are in `channel_states` and `channel_states_backward`."""

from __future__ import annotations

from torch import Tensor

from sinuous.kernels.triton import channel_states, channel_states_backward


def forward(
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
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, final_state, chunk_states)`; see sinuous.core.ops.longhorn."""
    return channel_states.forward(
        x, dt, None, k, q, D, z, dt_bias, initial_state, cu_seqlens, False, reverse, chunk_size
    )


def backward(
    grads: tuple[Tensor | None, Tensor | None],
    x: Tensor,
    dt: Tensor,
    k: Tensor,
    q: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_states: Tensor,
    reverse: bool,
    chunk_size: int,
) -> list[Tensor | None]:
    """Gradients of x, dt, k, q, D, z, dt_bias and initial_state."""
    dx, ddt, _, *rest = channel_states_backward.backward(
        grads, x, dt, None, k, q, D, z, dt_bias, initial_state, cu_seqlens, False, reverse, chunk_states, chunk_size
    )
    return [dx, ddt, *rest]
