"""Calls of the selective scan in C."""

from __future__ import annotations

import torch
from torch import Tensor

from sinuous.kernels.cpu.channel_states import ChannelStatesCall


def forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, final_state, chunk_states)`; see sinuous.core.ops.selective_scan."""
    options = (initial_state, cu_seqlens, dt_softplus, reverse, chunk_size)
    return ChannelStatesCall("selective_scan", u, dt, A, B, C, D, z, dt_bias, None, *options).forward()


def backward(
    grads: tuple[Tensor | None, Tensor | None],
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_states: Tensor,
    dt_softplus: bool,
    reverse: bool,
    chunk_size: int,
) -> list[Tensor | None]:
    """Gradients of u, dt, A, B, C, D, z, dt_bias and initial_state."""
    options = (initial_state, cu_seqlens, dt_softplus, reverse, chunk_size)
    call = ChannelStatesCall("selective_scan", u, dt, A, B, C, D, z, dt_bias, None, *options)
    d = call.backward(grads, chunk_states)
    return [d.u, d.dt, d.A, d.B.view(B.shape), d.C.view(C.shape), d.D, d.z, d.dt_bias, d.initial_state]


def self_test(dtype: torch.dtype) -> str | None:
    """Compile, load and compare one step with its closed form; None if all is well."""
    one, zero = torch.ones(1, 1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype)
    y, state, _ = forward(one, one, zero - 1, one, one, None, None, None, zero[None] + 2, None, False, False, 64)
    exact = 2 * torch.exp(-one) + 1
    if not (torch.allclose(y, exact) and torch.allclose(state, exact)):
        return f"the compiled scan is wrong on this machine (got {y.item():.6g}, wanted {exact.item():.6g})"
    return None
