"""Linear attention to a softmax of the keys over time (LightNet) in plain torch: causal in chunks, else in two passes.

Weights between steps are Σ_d q_id f_jd exp(k_jd - z_id) with z_i ≥ k_j for all j ≤ i, a product of two matrices only
after the exponential is taken apart, exp(r - z_i) exp(k_j - r). z does not fall, so with r in the middle of what it
passes in a segment both parts stay below exp(30) as long as no channel of z rises by more than 60 after the first step;
a segment in which one does is halved, and halved again, down to single steps. A key that underflows has a share of
less than exp(-50) in its softmax.

Gradients: z enters y_i as exp(-z_i) only, so that dL/dz_i = -q_i ⊙ dL/dq_i, and likewise -Σ_v S ⊙ dL/dS at the end.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from sinuous.kernels.arguments import AdditiveDecay
from sinuous.kernels.precision import working_dtype
from sinuous.kernels.torch import chunked
from sinuous.kernels.torch.chunked import LOWEST, Recurrence, State, Tensors
from sinuous.kernels.torch.packing import rows, sequence_count, sequences

SMALLEST_SUM = 1e-290
"""Bound below which a sum of exponentials, taken relative to the largest of a segment, has lost digits."""


class AdditiveDecaySegment(NamedTuple):
    """A segment's inputs and the exponentials that it needs."""

    q: Tensor  # [B,H,c,K]
    v: Tensor  # [B,H,c,V]
    factor: Tensor | None  # [B,H,c,K]
    after: Tensor  # [B,H,c,K], exp(r - z_i)
    before: Tensor  # [B,H,c,K], exp(k_j - r)
    since_start: Tensor  # [B,H,c,K], exp(z_0 - z_i)
    share: Tensor  # [B,H,c,K], exp(k_j - z_c)
    total: Tensor  # [B,H,K], exp(z_0 - z_c)
    z: Tensor  # [B,H,K], z_c, in float64


def _running(z: Tensor, k: Tensor) -> Tensor:
    """z after each step, `[B, H, c, K]`, in float64, since only differences of long sums are used of it."""
    logs = torch.cat([z[:, :, None].double(), k.double()], 2)
    top = logs.amax(2, keepdim=True).clamp_min(LOWEST)
    sums = (logs - top).exp_().cumsum(2)[:, :, 1:]
    if bool((sums < SMALLEST_SUM).any()):
        return logs.logcumsumexp(2)[:, :, 1:]
    return sums.log_().add_(top)


def _segment(state: State, inputs: Tensors) -> AdditiveDecaySegment:
    (_, z), (q, k, v, factor, zs, _) = state, inputs
    assert q is not None
    assert k is not None
    assert v is not None
    assert zs is not None
    floored = zs.clamp_min(LOWEST)
    start, end = z[:, :, None], floored[:, :, -1:]
    middle = (floored[:, :, :1] + end) / 2
    return AdditiveDecaySegment(
        q,
        v,
        factor,
        (middle - floored).to(k.dtype).exp_(),
        (k - middle).to(k.dtype).exp_(),
        (start - floored).to(k.dtype).exp_(),
        (k - end).to(k.dtype).exp_(),
        (start - end).squeeze(2).to(k.dtype).exp_(),
        zs[:, :, -1],
    )


def _times(t: Tensor, factor: Tensor | None) -> Tensor:
    return t if factor is None else t * factor


def _forward_segment(state: State, inputs: Tensors, parameters: Tensors, scale: float) -> tuple[Tensor, State]:
    (S, _), p = state, _segment(state, inputs)
    weights = ((p.q * p.after) @ _times(p.before, p.factor).mT).tril_()
    y = (weights @ p.v + (p.q * p.since_start) @ S).mul_(scale)
    return y, (p.total[..., None] * S + _times(p.share, p.factor).mT @ p.v, p.z)


def _backward_segment(
    state: State, inputs: Tensors, parameters: Tensors, dy: Tensor, dstate: State, scale: float
) -> tuple[State, Tensors, Tensors]:
    (S, _), (dS, dz), p = state, dstate, _segment(state, inputs)
    queries, before, share = p.q * p.after, _times(p.before, p.factor), _times(p.share, p.factor)
    dy = dy * scale
    dweights = (dy @ p.v.mT).tril_()
    dv = (queries @ before.mT).tril_().mT @ dy + share @ dS
    dq = (dweights @ before) * p.after + (dy @ S.mT) * p.since_start
    inside, at_end = dweights.mT @ queries, p.v @ dS.mT
    dfactor = None if p.factor is None else inside * p.before + at_end * p.share
    # The gradient of z at the end, which scales the state there and all that follows.
    dend = dz - p.total * (S * dS).sum(-1) - (share * at_end).sum(2)
    dzs = -p.q * dq
    through_z = (p.after * dzs).flip(2).cumsum(2).flip(2) * p.before + p.share * dend[:, :, None]
    dk = inside * before + at_end * share + through_z
    dS = p.total[..., None] * dS + (p.q * p.since_start).mT @ dy
    dz = (S * dS).sum(-1) + (p.since_start * dzs).sum(2) + p.total * dend
    return (dS, dz), (dq, dk, dv, dfactor, None, None), ()


def _with_z(state: State, inputs: Tensors) -> tuple[State, Tensors]:
    """The state with z in float64, and the inputs with z after each step and by how much it falls there."""
    (S, z), k = state, inputs[1]
    assert k is not None
    z, zs = z.double(), _running(z, k)
    floored = zs.clamp_min(LOWEST)
    falls = torch.zeros_like(zs)
    torch.sub(floored[:, :, :-1], floored[:, :, 1:], out=falls[:, :, 1:])
    return (S, z), (*inputs, zs, falls)


def _recurrence(scale: float) -> Recurrence:
    passes = Recurrence(
        functools.partial(_forward_segment, scale=scale), functools.partial(_backward_segment, scale=scale)
    )
    short = chunked.in_short_segments(passes, gate=5)

    def forward(state: State, inputs: Tensors, parameters: Tensors) -> tuple[Tensor, State]:
        y, (S, z) = short.forward(*_with_z(state, inputs), parameters)
        return y, (S, z.to(S.dtype))

    def backward(
        state: State, inputs: Tensors, parameters: Tensors, dy: Tensor, dstate: State
    ) -> tuple[State, Tensors, Tensors]:
        dstate, dinputs, _ = short.backward(*_with_z(state, inputs), parameters, dy, dstate)
        return dstate, dinputs[:4], ()

    return Recurrence(forward, backward)


def initial_states(args: AdditiveDecay) -> State:
    """S `[sequences, H, K, V]` and z `[sequences, H, K]` before the first step; S is 0 where z is -inf."""
    q, v, S, z = args.q, args.v, args.initial_S, args.initial_z
    count = sequence_count(q, args.cu_seqlens)
    dtype, shape = working_dtype(q.dtype), (count, v.shape[2], q.shape[3])
    z = torch.full(shape, -torch.inf, dtype=dtype, device=q.device) if z is None else z.to(dtype)
    if S is None:
        return torch.zeros(*shape, v.shape[3], dtype=dtype, device=q.device), z
    return S.to(dtype).masked_fill(torch.isneginf(z)[..., None], 0), z


def _inputs(args: AdditiveDecay) -> Tensors:
    return args.q, args.k, args.v, args.factor


def _scale(args: AdditiveDecay) -> float:
    return args.q.shape[-1] ** -0.5 if args.scale is None else args.scale


class AdditiveDecaySequence(NamedTuple):
    """One sequence, or a batch of them, passed at once, head-major and in the precision of the state."""

    q: Tensor  # [B,H,T,K]
    v: Tensor  # [B,H,T,V]
    factor: Tensor | None  # [B,H,T,K]
    share: Tensor  # [B,H,T,K], exp(k - z)
    total: Tensor  # [B,H,K], exp(z_0 - z)


def _sequence(inputs: Tensors, place: slice, z: Tensor) -> tuple[AdditiveDecaySequence, Tensor]:
    """The steps at `place`, begun with z, and z after them, in float64."""
    q, k, v, factor = (None if t is None else t[:, place].transpose(1, 2).to(z.dtype) for t in inputs)
    assert q is not None
    assert k is not None
    assert v is not None
    before = z.double()
    after = torch.cat([before[:, :, None], k.double()], 2).logsumexp(2)
    end = after.clamp_min(LOWEST)
    share = (k - end[:, :, None]).to(z.dtype).exp_()
    return AdditiveDecaySequence(q, v, factor, share, (before - end).to(z.dtype).exp_()), after


def _forward_sequences(args: AdditiveDecay, initial: State) -> tuple[Tensor, State]:
    scale, bounds, y = _scale(args), args.cu_seqlens, torch.empty_like(args.v)
    final = tuple(t.clone() for t in initial)
    for n, place in enumerate(sequences(y.shape[1], bounds)):
        S, z = (rows(t, n, bounds) for t in initial)
        w, z = _sequence(_inputs(args), place, z)
        S = w.total[..., None] * S + _times(w.share, w.factor).mT @ w.v
        y[:, place] = ((w.q @ S) * scale).transpose(1, 2)
        for t, new in zip(final, (S, z), strict=True):
            rows(t, n, bounds).copy_(new)
    return y, final


def _backward_sequences(
    args: AdditiveDecay, grads: Tensors, initial: State, final_S: Tensor
) -> tuple[list[Tensor | None], State]:
    scale, bounds, (dy, *dfinal) = _scale(args), args.cu_seqlens, grads
    inputs = _inputs(args)
    dinputs = [None if t is None else torch.empty_like(t) for t in inputs]
    dinitial = tuple(
        torch.zeros_like(t) if d is None else d.to(t.dtype, copy=True) for t, d in zip(initial, dfinal, strict=True)
    )
    for n, place in enumerate(sequences(args.q.shape[1], bounds)):
        S_before, z_before, S, dS, dz = (rows(t, n, bounds) for t in (*initial, final_S, *dinitial))
        w, _ = _sequence(inputs, place, z_before)
        dread = torch.zeros_like(w.v) if dy is None else dy[:, place].transpose(1, 2).to(S.dtype) * scale
        dS_all = dS + w.q.mT @ dread
        dend = dz - (S * dS_all).sum(-1)
        at_end, share = w.v @ dS_all.mT, _times(w.share, w.factor)
        dfactor = None if w.factor is None else at_end * w.share
        gradients = (dread @ S.mT, at_end * share + w.share * dend[:, :, None], share @ dS_all, dfactor)
        for t, gradient in zip(dinputs, gradients, strict=True):
            if t is not None and gradient is not None:
                t[:, place] = gradient.transpose(1, 2)
        dS_before = w.total[..., None] * dS_all
        dz.copy_((S_before * dS_before).sum(-1) + w.total * dend)
        dS.copy_(dS_before)
    return dinputs, dinitial


def forward(args: AdditiveDecay, chunk_size: int) -> tuple[Tensor, ...]:
    """`(y, S, z, kept_S, kept_z)`, the last two the states at chunk starts, or the final ones if not causal; see
    sinuous.core.ops.additive_decay."""
    initial = initial_states(args)
    if not args.causal:
        y, final = _forward_sequences(args, initial)
        return y, *final, *(t.clone() for t in final)
    y, final, kept = chunked.forward(
        _recurrence(_scale(args)),
        _inputs(args),
        (),
        initial,
        torch.empty_like(args.v),
        args.cu_seqlens,
        args.reverse,
        chunk_size,
    )
    return y, *final, *kept


def backward(
    args: AdditiveDecay, grads: Tensors, kept_S: Tensor, kept_z: Tensor, chunk_size: int
) -> list[Tensor | None]:
    """Gradients of q, k, v, factor, initial_S and initial_z."""
    initial = initial_states(args)
    if args.causal:
        dinputs, _, (dS, dz) = chunked.backward(
            _recurrence(_scale(args)),
            _inputs(args),
            (),
            initial,
            (kept_S, kept_z),
            grads[0],
            grads[1:],
            args.cu_seqlens,
            args.reverse,
            chunk_size,
            value=2,
        )
    else:
        dinputs, (dS, dz) = _backward_sequences(args, grads, initial, kept_S)
    if args.initial_S is not None:
        dS = dS.masked_fill(torch.isneginf(initial[1])[..., None], 0)
    return [*dinputs, None if args.initial_S is None else dS, None if args.initial_z is None else dz]
