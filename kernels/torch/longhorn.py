"""Longhorn in chunks of plain torch; the passes through time are in `channel_states`."""

from __future__ import annotations

import torch
from torch import Tensor

from sinuous.kernels.arguments import Longhorn
from sinuous.kernels.torch import channel_states
from sinuous.kernels.torch.channel_states import ChannelStatesSegment


class _ImplicitStep:
    """ε = β / (1 + β |k|²) with β = sigmoid(raw), a = 1 - ε k²; here k is B and ε is Δ."""

    def step_sizes(self, raw: Tensor, B: Tensor) -> Tensor:
        beta = torch.sigmoid(raw)
        return beta / (1 + beta * B.square().sum(-1, keepdim=True))

    def decays(self, delta: Tensor, B: Tensor) -> Tensor:
        return torch.addcmul(B.new_ones(()), delta[..., None, :], B.square()[..., None], value=-1)

    def backward(self, segment: ChannelStatesSegment, ddecay: Tensor, ddelta: Tensor) -> tuple[Tensor, Tensor]:
        """∂ε/∂raw = β (1 - β) / (1 + β |k|²)² and ∂ε/∂|k|² = -ε²."""
        k, epsilon = segment.B, segment.delta
        depsilon = ddelta - (k.square()[..., None, :] @ ddecay).squeeze(-2)
        dnorm = (depsilon * epsilon.square()).sum(-1, keepdim=True)
        dk = -2 * k * ((ddecay @ epsilon[..., None]).squeeze(-1) + dnorm)
        beta = torch.sigmoid(segment.raw)
        shrink = 1 + beta * k.square().sum(-1, keepdim=True)
        return depsilon * beta * (1 - beta) / shrink.square(), dk


def forward(args: Longhorn, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, final_state, chunk_states)`; see sinuous.core.ops.longhorn."""
    return channel_states.forward(_ImplicitStep(), args, chunk_size)


def backward(
    args: Longhorn, grads: tuple[Tensor | None, Tensor | None], chunk_states: Tensor, chunk_size: int
) -> list[Tensor | None]:
    """Gradients of x, dt, k, q, D, z, dt_bias and initial_state."""
    return channel_states.backward(_ImplicitStep(), args, grads, chunk_states, chunk_size)
