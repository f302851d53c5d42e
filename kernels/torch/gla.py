"""Linear recurrence with a decay per channel (GLA) in chunks of plain torch.

With G the sum of the logarithms of the decays, weights between steps are Σ_d q_id k_jd exp(G_id - G_jd), a product of
two matrices only after the exponential is taken apart, exp(G_i - r) exp(r - G_j). With r in the middle of a segment
both parts stay within exp(±30) as long as no channel decays by more than exp(-60) in it; a segment in which one does
is halved, and halved again, down to single steps, which need no exponential. Every product is then exact to rounding,
and a reset (-inf) is nothing special.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from sinuous.kernels.arguments import GLA
from sinuous.kernels.torch import chunked
from sinuous.kernels.torch.chunked import Recurrence, State, Tensors


class GLASegment(NamedTuple):
    """A segment's inputs and the decays that it needs; D is K, or V where values decay."""

    q: Tensor  # [B,H,c,K]
    k: Tensor  # [B,H,c,K]
    v: Tensor  # [B,H,c,V]
    bonus: Tensor | None  # [H,1,K]
    since_start: Tensor  # [B,H,c,D], up to the readout of each step
    after_middle: Tensor  # [B,H,c,D], exp(G - r) at the readout
    before_middle: Tensor  # [B,H,c,D], exp(r - G)
    until_end: Tensor  # [B,H,c,D]
    total: Tensor  # [B,H,D]


def _segment(inputs: Tensors, parameters: Tensors) -> GLASegment:
    q, k, v, log_decay = inputs
    assert q is not None
    assert k is not None
    assert v is not None
    assert log_decay is not None
    (bonus,) = parameters
    dtype = log_decay.dtype
    # In float64, since only differences of long sums are used of them.
    step = log_decay.double()
    sums = step.cumsum(2)
    readout = sums if bonus is None else sums - step
    total = sums[:, :, -1:]
    if log_decay.shape[2] == 1:  # where G may be -inf, and no decay lies between two readouts
        one = torch.ones_like(log_decay)
        since_start = one if bonus is not None else log_decay.exp()
        after, before, until_end = one, one, one
    else:
        middle = total / 2
        after, before = (readout - middle).to(dtype).exp(), (middle - sums).to(dtype).exp()
        since_start, until_end = readout.to(dtype).exp(), (total - sums).to(dtype).exp()
    bonus = None if bonus is None else bonus.to(dtype).unsqueeze(1)
    return GLASegment(q, k, v, bonus, since_start, after, before, until_end, total.squeeze(2).to(dtype).exp())


def _mask(weights: Tensor, bonus: Tensor | None) -> Tensor:
    return weights.tril_(0 if bonus is None else -1)


def _log_decay_gradient(p: GLASegment, at_readout: Tensor, at_step: Tensor, at_end: Tensor) -> Tensor:
    """Gradient of log_decay from those of G at each readout and at each step, `[B, H, c, D]`, and at the end,
    `[B, H, D]`."""
    ends = at_readout.double() + at_step
    ends[:, :, -1] += at_end
    gradient = ends.flip(2).cumsum(2).flip(2)
    # A readout ahead of its step's decay does not see it.
    return gradient if p.bonus is None else gradient - at_readout


def _bonus_weights(p: GLASegment, bonus: Tensor, scale: float) -> Tensor:
    """Weights with which each step reads its own value through the bonus, `[B, H, c, 1]`."""
    return (p.q * bonus * p.k).sum(-1, keepdim=True) * scale


def _forward_on_keys(S: Tensor, p: GLASegment, scale: float) -> tuple[Tensor, Tensor]:
    weights = _mask((p.q * p.after_middle) @ (p.k * p.before_middle).mT, p.bonus)
    y = (weights @ p.v + (p.q * p.since_start) @ S).mul_(scale)
    if p.bonus is not None:
        y.addcmul_(_bonus_weights(p, p.bonus, scale), p.v)
    return y, p.total[..., None] * S + (p.k * p.until_end).mT @ p.v


def _backward_on_keys(
    S: Tensor, p: GLASegment, dy: Tensor, dS: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    queries, keys, dy_scaled = p.q * p.after_middle, p.k * p.before_middle, dy * scale
    dweights = _mask(dy_scaled @ p.v.mT, p.bonus)
    dq = (dweights @ keys) * p.after_middle + (dy_scaled @ S.mT) * p.since_start
    dk_inside = (dweights.mT @ queries) * p.before_middle
    dk_end = (p.v @ dS.mT) * p.until_end
    at_end = (p.k * dk_end).sum(2) + p.total * (S * dS).sum(-1)
    dk = dk_inside + dk_end
    dlog_decay = _log_decay_gradient(p, p.q * dq, -(p.k * dk), at_end)
    dv = _mask(queries @ keys.mT, p.bonus).mT @ dy_scaled + (p.k * p.until_end) @ dS
    dbonus = None
    if p.bonus is not None:
        dweight = (dy_scaled * p.v).sum(-1, keepdim=True)
        dv.addcmul_(_bonus_weights(p, p.bonus, scale), dy)
        dq, dk = dq + dweight * p.bonus * p.k, dk + dweight * p.bonus * p.q
        dbonus = (dweight * p.q * p.k).sum((0, 2))
    dS = p.total[..., None] * dS + (p.q * p.since_start).mT @ dy_scaled
    return dq, dk, dv, dlog_decay, dS, dbonus


def _forward_on_values(S: Tensor, p: GLASegment, scale: float) -> tuple[Tensor, Tensor]:
    weights = _mask(p.q @ p.k.mT, None)
    y = (weights @ (p.v * p.before_middle)) * p.after_middle + (p.q @ S) * p.since_start
    return y.mul_(scale), p.total[..., None, :] * S + p.k.mT @ (p.v * p.until_end)


def _backward_on_values(
    S: Tensor, p: GLASegment, dy: Tensor, dS: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    dy = dy * scale
    values, dinside, dstart = p.v * p.before_middle, dy * p.after_middle, dy * p.since_start
    weights = _mask(p.q @ p.k.mT, None)
    y = (weights @ values) * p.after_middle + (p.q @ S) * p.since_start
    dv_inside = (weights.mT @ dinside) * p.before_middle
    dv_end = (p.k @ dS) * p.until_end
    dv = dv_inside + dv_end
    at_end = (p.v * dv_end).sum(2) + p.total * (S * dS).sum(-2)
    dlog_decay = _log_decay_gradient(p, dy * y, -(p.v * dv), at_end)
    dweights = _mask(dinside @ values.mT, None)
    dq = dweights @ p.k + dstart @ S.mT
    dk = dweights.mT @ p.q + (p.v * p.until_end) @ dS.mT
    return dq, dk, dv, dlog_decay, p.total[..., None, :] * dS + p.q.mT @ dstart, None


def _forward(state: State, inputs: Tensors, parameters: Tensors, scale: float, on_values: bool) -> tuple[Tensor, State]:
    pass_ = _forward_on_values if on_values else _forward_on_keys
    y, S = pass_(state[0], _segment(inputs, parameters), scale)
    return y, (S,)


def _backward(
    state: State,
    inputs: Tensors,
    parameters: Tensors,
    dy: Tensor,
    dstate: State,
    scale: float,
    on_values: bool,
) -> tuple[State, Tensors, Tensors]:
    pass_ = _backward_on_values if on_values else _backward_on_keys
    dq, dk, dv, dlog_decay, dS, dbonus = pass_(state[0], _segment(inputs, parameters), dy, dstate[0], scale)
    return (dS,), (dq, dk, dv, dlog_decay), (dbonus,)


def _recurrence(args: GLA) -> Recurrence:
    scale = args.q.shape[-1] ** -0.5 if args.scale is None else args.scale
    passes = Recurrence(
        functools.partial(_forward, scale=scale, on_values=args.on_values),
        functools.partial(_backward, scale=scale, on_values=args.on_values),
    )
    return chunked.in_short_segments(passes, gate=3)


def forward(args: GLA, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, final_state, chunk_states)`; see sinuous.core.ops.gla."""
    y, (final,), (chunk_states,) = chunked.forward(
        _recurrence(args),
        (args.q, args.k, args.v, args.log_decay),
        (args.bonus,),
        chunked.initial_matrix(args.q, args.v, args.initial_state, args.cu_seqlens),
        torch.empty_like(args.v),
        args.cu_seqlens,
        args.reverse,
        chunk_size,
    )
    return y, final, chunk_states


def backward(
    args: GLA, grads: tuple[Tensor | None, Tensor | None], chunk_states: Tensor, chunk_size: int
) -> list[Tensor | None]:
    """Gradients of q, k, v, log_decay, bonus and initial_state."""
    dy, dfinal = grads
    inputs, (dbonus,), (dinitial,) = chunked.backward(
        _recurrence(args),
        (args.q, args.k, args.v, args.log_decay),
        (args.bonus,),
        chunked.initial_matrix(args.q, args.v, args.initial_state, args.cu_seqlens),
        (chunk_states,),
        dy,
        (dfinal,),
        args.cu_seqlens,
        args.reverse,
        chunk_size,
        value=2,
    )
    return [*inputs, dbonus, None if args.initial_state is None else dinitial]
