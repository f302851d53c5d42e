"""Calls of Longhorn in C."""

from __future__ import annotations

import torch
from torch import Tensor

from sinuous.kernels.cpu.channel_states import ChannelStatesCall
from sinuous.kernels.precision import at_least_fp32


def _norm(k: Tensor) -> Tensor:
    return at_least_fp32(k).square().sum(-1)


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
    options = (initial_state, cu_seqlens, False, reverse, chunk_size)
    return ChannelStatesCall("longhorn", x, dt, None, k, q, D, z, dt_bias, _norm(k), *options).forward()


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
    options = (initial_state, cu_seqlens, False, reverse, chunk_size)
    call = ChannelStatesCall("longhorn", x, dt, None, k, q, D, z, dt_bias, _norm(k), *options)
    d = call.backward(grads, chunk_states)
    assert d.norm is not None
    dk = d.B.view(k.shape) + 2 * k.to(call.dtype) * d.norm[..., None]
    return [d.u, d.dt, dk, d.C.view(q.shape), d.D, d.z, d.dt_bias, d.initial_state]


def self_test(dtype: torch.dtype) -> str | None:
    """Compile, load and compare one step with its closed form; None if all is well."""
    one, zero = torch.ones(1, 1, 1, dtype=dtype), torch.zeros(1, 1, 1, dtype=dtype)
    y, state, _ = forward(one, zero, one * 2, one, None, None, None, zero + 3, None, False, 64)
    exact = (3 + 0.5 * 2) / (1 + 0.5 * 4) * one  # the minimum of (s - 3)² + β (2 s - 1)² for β = 1/2
    if not (torch.allclose(y, exact) and torch.allclose(state, exact)):
        return f"the compiled longhorn is wrong on this machine (got {y.item():.6g}, wanted {exact.item():.6g})"
    return None
