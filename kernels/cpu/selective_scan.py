"""Calls of the selective scan in C."""

from __future__ import annotations

import torch
from torch import Tensor

from sinuous.kernels.arguments import SelectiveScan
from sinuous.kernels.cpu.channel_states import ChannelStatesCall


def forward(args: SelectiveScan, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, final_state, chunk_states)`; see sinuous.core.ops.selective_scan."""
    return ChannelStatesCall(args, chunk_size).forward()


def backward(
    args: SelectiveScan, grads: tuple[Tensor | None, Tensor | None], chunk_states: Tensor, chunk_size: int
) -> list[Tensor | None]:
    """Gradients of u, dt, A, B, C, D, z, dt_bias and initial_state."""
    return ChannelStatesCall(args, chunk_size).backward(grads, chunk_states)


def self_test(dtype: torch.dtype) -> str | None:
    """Compile, load and compare one step with its closed form; None if all is well."""
    one, zero = torch.ones(1, 1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype)
    args = SelectiveScan(one, one, zero - 1, one, one, initial_state=zero[None] + 2, dt_softplus=False)
    y, state, _ = forward(args, chunk_size=64)
    exact = 2 * torch.exp(-one) + 1
    if not (torch.allclose(y, exact) and torch.allclose(state, exact)):
        return f"the compiled scan is wrong on this machine (got {y.item():.6g}, wanted {exact.item():.6g})"
    return None
