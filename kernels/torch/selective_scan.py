"""Selective scan in chunks of plain torch; the passes through time are in `channel_states`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.kernels.arguments import SelectiveScan
from sinuous.kernels.precision import working_dtype
from sinuous.kernels.torch import channel_states
from sinuous.kernels.torch.channel_states import ChannelStatesSegment, grouped


class _ZeroOrderHold:
    """Δ = softplus(raw) or raw itself, a = exp(Δ A); adds up the gradient of A."""

    def __init__(self, args: SelectiveScan) -> None:
        shape = (*grouped(args.B, args.A.shape[0]), args.A.shape[1])
        self.A = args.A.to(working_dtype(args.u.dtype)).reshape(shape).mT.contiguous()
        self.dA = torch.zeros_like(self.A)
        self.dt_softplus = args.dt_softplus

    def step_sizes(self, raw: Tensor, B: Tensor) -> Tensor:
        return F.softplus(raw) if self.dt_softplus else raw

    def decays(self, delta: Tensor, B: Tensor) -> Tensor:
        return (delta[..., None, :] * self.A).exp_()

    def backward(self, segment: ChannelStatesSegment, ddecay: Tensor, ddelta: Tensor) -> tuple[Tensor, None]:
        """With w = da ⊙ a: dA = Σ w Δ, and dΔ also gets Σ_n w A."""
        through_decay = ddecay.mul_(segment.decay)
        self.dA += torch.mul(through_decay, segment.delta[..., None, :], out=segment.states).sum((0, 1))
        ddelta = through_decay.mul_(self.A).sum(-2) + ddelta
        return (ddelta * torch.sigmoid(segment.raw) if self.dt_softplus else ddelta), None


def forward(args: SelectiveScan, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, final_state, chunk_states)`; see sinuous.core.ops.selective_scan."""
    return channel_states.forward(_ZeroOrderHold(args), args, chunk_size)


def backward(
    args: SelectiveScan, grads: tuple[Tensor | None, Tensor | None], chunk_states: Tensor, chunk_size: int
) -> list[Tensor | None]:
    """Gradients of u, dt, A, B, C, D, z, dt_bias and initial_state."""
    rule = _ZeroOrderHold(args)
    du, ddt, *rest = channel_states.backward(rule, args, grads, chunk_states, chunk_size)
    return [du, ddt, rule.dA.mT.flatten(0, 1), *rest]
