"""Calls of Longhorn in C."""

from __future__ import annotations

import torch
from torch import Tensor

from sinuous.kernels.arguments import Longhorn
from sinuous.kernels.cpu.channel_states import ChannelStatesCall


def forward(args: Longhorn, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, final_state, chunk_states)`; see sinuous.core.ops.longhorn."""
    return ChannelStatesCall(args, chunk_size).forward()


def backward(
    args: Longhorn, grads: tuple[Tensor | None, Tensor | None], chunk_states: Tensor, chunk_size: int
) -> list[Tensor | None]:
    """Gradients of x, dt, k, q, D, z, dt_bias and initial_state."""
    dx, ddt, _, *rest = ChannelStatesCall(args, chunk_size).backward(grads, chunk_states)
    return [dx, ddt, *rest]


def self_test(dtype: torch.dtype) -> str | None:
    """Compile, load and compare one step with its closed form; None if all is well."""
    one, zero = torch.ones(1, 1, 1, dtype=dtype), torch.zeros(1, 1, 1, dtype=dtype)
    y, state, _ = forward(Longhorn(one, zero, one * 2, one, initial_state=zero + 3), chunk_size=64)
    exact = (3 + 0.5 * 2) / (1 + 0.5 * 4) * one  # the minimum of (s - 3)² + β (2 s - 1)² for β = 1/2
    if not (torch.allclose(y, exact) and torch.allclose(state, exact)):
        return f"the compiled longhorn is wrong on this machine (got {y.item():.6g}, wanted {exact.item():.6g})"
    return None
