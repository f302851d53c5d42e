"""Longhorn in Triton; the kernels are in `channel_states` and `channel_states_backward`."""

from __future__ import annotations

from torch import Tensor

from sinuous.kernels.arguments import Longhorn
from sinuous.kernels.triton import channel_states_backward
from sinuous.kernels.triton.channel_states import forward

__all__ = ["backward", "forward"]


def backward(
    args: Longhorn, grads: tuple[Tensor | None, Tensor | None], chunk_states: Tensor, chunk_size: int
) -> list[Tensor | None]:
    """Gradients of x, dt, k, q, D, z, dt_bias and initial_state."""
    dx, ddt, _, *rest = channel_states_backward.backward(args, grads, chunk_states, chunk_size)
    return [dx, ddt, *rest]
