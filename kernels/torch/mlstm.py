"""mLSTM in chunks of plain torch."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.kernels.precision import working_dtype
from sinuous.kernels.torch import chunked
from sinuous.kernels.torch.chunked import (
    Decays,
    Recurrence,
    Stabiliser,
    State,
    Tensors,
    gradient_of_sums,
    run_sums,
    weighted_decays,
)


class Options(NamedTuple):
    """Options that are the same for every segment."""

    scale: float
    eps: float
    stabilised: bool  # exponential input gate
    normalize: bool


class MLSTMSegment(NamedTuple):
    """A segment's inputs, products of its gates, and the terms of its readout; without a normaliser the last three are
    None."""

    q: Tensor  # [B,H,c,K]
    k: Tensor  # [B,H,c,K]
    v: Tensor  # [B,H,c,V]
    log_f: Tensor  # [B,H,c]
    decays: Decays
    stabiliser: Stabiliser | None
    weights: Tensor  # [B,H,c,c], s (q_i · k_j) times input gate j and the forget gates from j to i
    numerator: Tensor  # [B,H,c,V]
    normaliser: Tensor | None  # [B,H,c], s n_i · q_i
    floor: Tensor | None  # [B,H,c], e^-m
    denominator: Tensor | None  # [B,H,c,1]


def _segment(state: State, inputs: Tensors, options: Options) -> MLSTMSegment:
    (C, n, m), (q, k, v, input_gate, forget_gate) = state, inputs
    assert q is not None
    assert k is not None
    assert v is not None
    assert input_gate is not None
    assert forget_gate is not None
    log_f = F.logsigmoid(forget_gate)
    log_i = input_gate if options.stabilised else F.logsigmoid(input_gate)
    E, stabiliser = weighted_decays(log_f, log_i, m if options.stabilised else None)
    weights = (q @ k.mT).mul_(options.scale).mul_(E.between)
    numerator = (weights @ v).addcmul_(q @ C, E.since_start[..., None], value=options.scale)
    if not options.normalize:
        return MLSTMSegment(q, k, v, log_f, E, stabiliser, weights, numerator, None, None, None)
    through_n = (q @ n[..., None]).squeeze(-1)
    normaliser = weights.sum(-1).addcmul_(through_n, E.since_start, value=options.scale)
    floor = torch.ones_like(normaliser) if stabiliser is None else (-stabiliser.m).exp()
    denominator = torch.maximum(normaliser.abs(), floor).add_(options.eps)[..., None]
    return MLSTMSegment(q, k, v, log_f, E, stabiliser, weights, numerator, normaliser, floor, denominator)


def _forward(state: State, inputs: Tensors, parameters: Tensors, options: Options) -> tuple[Tensor, State]:
    (C, n, m), segment = state, _segment(state, inputs, options)
    total, until_end = segment.decays.whole, segment.decays.until_end[..., None]
    y = segment.numerator if segment.denominator is None else segment.numerator.div_(segment.denominator)
    weighted = until_end * segment.k
    C = (weighted.mT @ segment.v).addcmul_(total[..., None], C)
    n = torch.addcmul(weighted.sum(-2), total, n)
    return y, (C, n, m if segment.stabiliser is None else segment.stabiliser.m[..., -1])


def _backward(
    state: State, inputs: Tensors, parameters: Tensors, dy: Tensor, dstate: State, options: Options
) -> tuple[State, Tensors, Tensors]:
    (C, n, _), (dC, dn, dm), segment = state, dstate, _segment(state, inputs, options)
    _, _, _, input_gate, forget_gate = inputs
    assert input_gate is not None
    assert forget_gate is not None
    (q, k, v), E, scale = segment[:3], segment.decays, options.scale
    since_start, until_end, total = E.since_start[..., None], E.until_end[..., None], E.whole
    dnumerator, dnormaliser, through_eps = dy, None, None
    if segment.denominator is not None:
        dnumerator = dy / segment.denominator
        assert segment.normaliser is not None
        assert segment.floor is not None
        ddenominator = (dnumerator * segment.numerator.div_(segment.denominator)).sum(-1).neg_()
        through_eps = ddenominator * options.eps  # the gradient of m in ε e^m
        dnormaliser = ddenominator * segment.normaliser.sign() * (segment.normaliser.abs() > segment.floor)
    into_start, dweights = dnumerator @ C.mT, dnumerator @ v.mT
    if dnormaliser is not None:
        into_start.addcmul_(dnormaliser[..., None], n[..., None, :])
        dweights.add_(dnormaliser[..., None])
    through_end = (v @ dC.mT).add_(dn[..., None, :]).mul_(until_end)
    dv = (segment.weights.mT @ dnumerator).addcmul_(k @ dC, until_end)
    dscores = dweights.mul_(E.between)
    dq = (dscores @ k).addcmul_(into_start, since_start).mul_(scale)
    dk = torch.add(through_end, dscores.mT @ q, alpha=scale)
    from_keys = (k * dk).sum(-1)
    ends = (q * dq).sum(-1) - from_keys
    # <C, dC> + <n, dn> after the segment: how the loss changes with e^m, all else being as it is.
    through_total = total.squeeze(-1) * ((C * dC).sum((-2, -1)) + (n * dn).sum(-1))
    end = (k * through_end).sum((-2, -1), dtype=torch.float64) + through_total
    weighted = q * since_start
    dC = (weighted.mT @ dnumerator).mul_(scale).addcmul_(total[..., None], dC)
    dn = total * dn
    if dnormaliser is not None:
        dn = dn.add_((dnormaliser[..., None, :] @ weighted).squeeze(-2), alpha=scale)
    if segment.stabiliser is not None:
        assert through_eps is not None
        # Each m is one input gate, or m before the segment, plus the logarithms of the forget gates since then.
        into_m = F.pad(through_eps.double(), (1, 0))
        into_m[..., -1] += dm - end
        own = segment.stabiliser.own
        into_m = run_sums(into_m, F.pad(own | segment.log_f.isneginf(), (1, 0)))
        into_gates = into_m[..., 1:].masked_fill(~own, 0).to(ends.dtype)
        dinput_gate, ends, end = from_keys + into_gates, ends + through_eps - into_gates, dm
        dm = into_m[..., 0].to(dm.dtype) + (C * dC).sum((-2, -1)) + (n * dn).sum(-1)
    else:
        dinput_gate = from_keys * torch.sigmoid(-input_gate)
    dlog_f = gradient_of_sums(segment.log_f, ends, end)
    dforget_gate = dlog_f * torch.sigmoid(-forget_gate)
    return (dC, dn, dm), (dq, dk, dv, dinput_gate, dforget_gate), ()


def _recurrence(q: Tensor, scale: float | None, eps: float, input_activation: str, normalize: bool) -> Recurrence:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options = Options(scale, eps, input_activation == "exp", normalize)
    return Recurrence(functools.partial(_forward, options=options), functools.partial(_backward, options=options))


def initial_states(q: Tensor, v: Tensor, states: Tensors, cu_seqlens: Tensor | None) -> State:
    """C `[sequences, H, K, V]`, n `[sequences, H, K]` and m `[sequences, H]`, contiguous; zeros for None."""
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype, heads = working_dtype(q.dtype), v.shape[2]
    shapes = (sequences, heads, q.shape[3], v.shape[3]), (sequences, heads, q.shape[3]), (sequences, heads)
    return tuple(
        torch.zeros(shape, dtype=dtype, device=q.device) if t is None else t.to(dtype).contiguous()
        for t, shape in zip(states, shapes, strict=True)
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    initial_C: Tensor | None,
    initial_n: Tensor | None,
    initial_m: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
    eps: float,
    input_activation: str,
    normalize: bool,
    reverse: bool,
    chunk_size: int,
) -> tuple[Tensor, ...]:
    """`(y, C, n, m, chunk_C, chunk_n, chunk_m)`; see sinuous.core.ops.mlstm."""
    y, final, chunk_states = chunked.forward(
        _recurrence(q, scale, eps, input_activation, normalize),
        (q, k, v, input_gate, forget_gate),
        (),
        initial_states(q, v, (initial_C, initial_n, initial_m), cu_seqlens),
        torch.empty_like(v),
        cu_seqlens,
        reverse,
        chunk_size,
    )
    return y, *final, *chunk_states


def backward(
    grads: Tensors,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    initial_C: Tensor | None,
    initial_n: Tensor | None,
    initial_m: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
    eps: float,
    input_activation: str,
    normalize: bool,
    reverse: bool,
    chunk_C: Tensor,
    chunk_n: Tensor,
    chunk_m: Tensor,
    chunk_size: int,
) -> list[Tensor | None]:
    """Gradients of q, k, v, input_gate, forget_gate, initial_C, initial_n and initial_m."""
    initial = (initial_C, initial_n, initial_m)
    dinputs, _, dinitial = chunked.backward(
        _recurrence(q, scale, eps, input_activation, normalize),
        (q, k, v, input_gate, forget_gate),
        (),
        initial_states(q, v, initial, cu_seqlens),
        (chunk_C, chunk_n, chunk_m),
        grads[0],
        grads[1:],
        cu_seqlens,
        reverse,
        chunk_size,
        value=2,
    )
    return [*dinputs, *(None if t is None else d for t, d in zip(initial, dinitial, strict=True))]
