"""Scalar-decay linear recurrence (SSD) in chunks of plain torch."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from sinuous.kernels.arguments import SSD
from sinuous.kernels.torch import chunked
from sinuous.kernels.torch.chunked import Decays, Recurrence, State, Tensors, decay_gradient, decays


class SSDSegment(NamedTuple):
    """A segment's inputs and decays; G groups of R heads share queries and keys."""

    q: Tensor  # [B,G,c,K]
    k: Tensor  # [B,G,c,K]
    v: Tensor  # [B,H,c,V]
    decays: Decays
    weights: Tensor  # [B,H,c,c], s (q_i · k_j) exp(G_i - G_j)


def _segment(inputs: Tensors, scale: float) -> SSDSegment:
    q, k, v, log_decay = inputs
    assert q is not None
    assert k is not None
    assert v is not None
    log_decay = v.new_zeros(1, 1, v.shape[2]) if log_decay is None else log_decay
    products = decays(log_decay)
    scores = (q @ k.mT).mul_(scale)
    weights = _per_head(scores, v).mul_(products.between)
    return SSDSegment(q, k, v, products, weights)


def _per_head(t: Tensor, v: Tensor) -> Tensor:
    """`[B, G, …]` to `[B, H, …]`: head h reads group h // (H/G)."""
    return t if t.shape[1] == v.shape[1] else t.repeat_interleave(v.shape[1] // t.shape[1], 1)


def _per_group(t: Tensor, q: Tensor) -> Tensor:
    """The transpose of `_per_head`."""
    return t if t.shape[1] == q.shape[1] else t.unflatten(1, (q.shape[1], -1)).sum(2)


def _forward(state: State, inputs: Tensors, parameters: Tensors, scale: float) -> tuple[Tensor, State]:
    segment, (S,) = _segment(inputs, scale), state
    E, k, v = segment.decays, _per_head(segment.k, segment.v), segment.v
    y = segment.weights @ v
    y.addcmul_(_per_head(segment.q, v) @ S, E.since_start[..., None], value=scale)
    update = k.mT @ (E.until_end[..., None] * v)
    return y, (update.addcmul_(S, E.since_start[..., -1:, None]),)


def _backward(
    state: State, inputs: Tensors, parameters: Tensors, dy: Tensor, dstate: State, scale: float
) -> tuple[State, Tensors, Tensors]:
    segment, (S,), (dS,) = _segment(inputs, scale), state, dstate
    E, v = segment.decays, segment.v
    q, k = _per_head(segment.q, v), _per_head(segment.k, v)
    through_start = (dy @ S.mT).mul_(E.since_start[..., None]).mul_(scale)
    through_end = (v @ dS.mT).mul_(E.until_end[..., None])
    dv = torch.addcmul(segment.weights.mT @ dy, k @ dS, E.until_end[..., None])
    dweights = dy @ v.mT
    total = E.since_start[..., -1:]
    dlog_decay = None
    if inputs[3] is not None:
        dlog_decay = decay_gradient(
            inputs[3],
            dweights * segment.weights,
            (through_start * q).sum(-1),
            (through_end * k).sum(-1),
            total.squeeze(-1) * (S * dS).sum((-2, -1)),
        )
    dscores = _per_group(dweights.mul_(E.between), segment.q).mul_(scale)
    dq = dscores @ segment.k + _per_group(through_start, segment.q)
    dk = dscores.mT @ segment.q + _per_group(through_end, segment.q)
    dstart = q.mT @ (E.since_start[..., None] * dy).mul_(scale)
    return (dstart.addcmul_(dS, total[..., None]),), (dq, dk, dv, dlog_decay), ()


def _recurrence(args: SSD) -> Recurrence:
    scale = args.q.shape[-1] ** -0.5 if args.scale is None else args.scale
    return Recurrence(functools.partial(_forward, scale=scale), functools.partial(_backward, scale=scale))


def _inputs(args: SSD) -> Tensors:
    log_decay = args.log_decay
    return args.q, args.k, args.v, None if log_decay is None else log_decay.expand(args.v.shape[:3])


def forward(args: SSD, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, final_state, chunk_states)`; see sinuous.core.ops.ssd."""
    y, (final,), (chunk_states,) = chunked.forward(
        _recurrence(args),
        _inputs(args),
        (),
        chunked.initial_matrix(args.q, args.v, args.initial_state, args.cu_seqlens),
        torch.empty_like(args.v),
        args.cu_seqlens,
        args.reverse,
        chunk_size,
    )
    return y, final, chunk_states


def backward(
    args: SSD, grads: tuple[Tensor | None, Tensor | None], chunk_states: Tensor, chunk_size: int
) -> list[Tensor | None]:
    """Gradients of q, k, v, log_decay and initial_state."""
    dy, dfinal = grads
    (dq, dk, dv, dlog_decay), _, (dinitial,) = chunked.backward(
        _recurrence(args),
        _inputs(args),
        (),
        chunked.initial_matrix(args.q, args.v, args.initial_state, args.cu_seqlens),
        (chunk_states,),
        dy,
        (dfinal,),
        args.cu_seqlens,
        args.reverse,
        chunk_size,
        value=2,
    )
    if dlog_decay is not None and args.log_decay is not None and args.log_decay.ndim == 1:
        dlog_decay = dlog_decay.sum((0, 1))
    return [dq, dk, dv, dlog_decay, None if args.initial_state is None else dinitial]
