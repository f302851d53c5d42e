"""mLSTM in chunks of plain torch.

Short sequences that begin without a state are one chunk, in which all pairs of steps meet: it reads no memory, and
forms one only where the state is asked for. With few and wide heads that is most of the work. Packed ones become the
rows of a batch for it.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.kernels.arguments import MLSTM
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
from sinuous.kernels.torch.packing import SequenceRows, sequence_count

MOST_PADDING = 4
"""Most places that the rows of packed sequences may have for each step."""

TOUCHED = 2**14
"""Most numbers that are written without a reader, so that what an op returns depends on its arguments alone where that
is cheap to look at."""


class MLSTMOptions(NamedTuple):
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


def _segment(state: State | None, inputs: Tensors, options: MLSTMOptions) -> MLSTMSegment:
    q, k, v, input_gate, forget_gate = inputs
    assert q is not None
    assert k is not None
    assert v is not None
    assert input_gate is not None
    assert forget_gate is not None
    log_f = F.logsigmoid(forget_gate)
    log_i = input_gate if options.stabilised else F.logsigmoid(input_gate)
    m = log_f.new_zeros(log_f.shape[:-1]) if state is None else state[2]
    E, stabiliser = weighted_decays(log_f, log_i, m if options.stabilised else None)
    weights = (q @ k.mT).mul_(options.scale).mul_(E.between)
    numerator = weights @ v
    if state is not None:
        numerator.addcmul_(q @ state[0], E.since_start[..., None], value=options.scale)
    if not options.normalize:
        return MLSTMSegment(q, k, v, log_f, E, stabiliser, weights, numerator, None, None, None)
    normaliser = weights.sum(-1)
    if state is not None:
        normaliser.addcmul_((q @ state[1][..., None]).squeeze(-1), E.since_start, value=options.scale)
    floor = torch.ones_like(normaliser) if stabiliser is None else (-stabiliser.m).exp()
    denominator = torch.maximum(normaliser.abs(), floor).add_(options.eps)[..., None]
    return MLSTMSegment(q, k, v, log_f, E, stabiliser, weights, numerator, normaliser, floor, denominator)


def _forward(state: State, inputs: Tensors, parameters: Tensors, options: MLSTMOptions) -> tuple[Tensor, State]:
    segment = _segment(state, inputs, options)
    return _read(segment), _after(state, segment)


def _read(segment: MLSTMSegment) -> Tensor:
    return segment.numerator if segment.denominator is None else segment.numerator.div_(segment.denominator)


def _after(state: State | None, segment: MLSTMSegment) -> State:
    """The state after a segment; without a state before it, that is zeros."""
    weighted = segment.decays.until_end[..., None] * segment.k
    C, n = weighted.mT @ segment.v, weighted.sum(-2)
    m = torch.zeros_like(segment.log_f[..., 0]) if state is None else state[2]
    if state is not None:
        total = segment.decays.whole
        C, n = C.addcmul_(total[..., None], state[0]), n.addcmul_(total, state[1])
    return C, n, m if segment.stabiliser is None else segment.stabiliser.m[..., -1]


def _backward(
    state: State, inputs: Tensors, parameters: Tensors, dy: Tensor, dstate: State, options: MLSTMOptions
) -> tuple[State, Tensors, Tensors]:
    before, gradients = _gradients(state, inputs, dy, dstate, options)
    assert before is not None
    return before, gradients, ()


def _gradients(
    state: State | None, inputs: Tensors, dy: Tensor, dstate: State | None, options: MLSTMOptions
) -> tuple[State | None, Tensors]:
    """Gradients of the state before a segment, if there is one, and of the inputs, from those of the output and of the
    state after it, if there is one."""
    segment = _segment(state, inputs, options)
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
    dweights = dnumerator @ v.mT
    if dnormaliser is not None:
        dweights.add_(dnormaliser[..., None])
    dscores = dweights.mul_(E.between)
    dv, dq, dk = segment.weights.mT @ dnumerator, dscores @ k, (dscores.mT @ q).mul_(scale)
    end, dm = torch.zeros_like(segment.log_f[..., 0], dtype=torch.float64), torch.zeros_like(segment.log_f[..., 0])
    if state is not None:
        into_start = dnumerator @ state[0].mT
        if dnormaliser is not None:
            into_start.addcmul_(dnormaliser[..., None], state[1][..., None, :])
        dq.addcmul_(into_start, since_start)
    dq.mul_(scale)
    if dstate is not None:
        dC, dn, dm = dstate
        through_end = (v @ dC.mT).add_(dn[..., None, :]).mul_(until_end)
        dv.addcmul_(k @ dC, until_end)
        dk.add_(through_end)
        # <C, dC> + <n, dn> after the segment: how the loss changes with e^m, all else being as it is.
        end += (k * through_end).sum((-2, -1), dtype=torch.float64)
        if state is not None:
            end += total.squeeze(-1) * ((state[0] * dC).sum((-2, -1)) + (state[1] * dn).sum(-1))
    from_keys = (k * dk).sum(-1)
    ends = (q * dq).sum(-1) - from_keys
    before: State | None = None
    if state is not None:
        assert dstate is not None
        weighted = q * since_start
        dC = (weighted.mT @ dnumerator).mul_(scale).addcmul_(total[..., None], dstate[0])
        dn = total * dstate[1]
        if dnormaliser is not None:
            dn = dn.add_((dnormaliser[..., None, :] @ weighted).squeeze(-2), alpha=scale)
        before = dC, dn, dm
    if segment.stabiliser is not None:
        assert through_eps is not None
        # Each m is one input gate, or m before the segment, plus the logarithms of the forget gates since then.
        into_m = F.pad(through_eps.double(), (1, 0))
        into_m[..., -1] += dm - end
        own = segment.stabiliser.own
        into_m = run_sums(into_m, F.pad(own | segment.log_f.isneginf(), (1, 0)))
        into_gates = into_m[..., 1:].masked_fill(~own, 0).to(ends.dtype)
        dinput_gate, ends, end = from_keys + into_gates, ends + through_eps - into_gates, dm.double()
        if before is not None:
            assert state is not None
            dC, dn, _ = before
            dm = into_m[..., 0].to(dm.dtype) + (state[0] * dC).sum((-2, -1)) + (state[1] * dn).sum(-1)
            before = dC, dn, dm
    else:
        dinput_gate = from_keys * torch.sigmoid(-input_gate)
    dlog_f = gradient_of_sums(segment.log_f, ends, end)
    dforget_gate = dlog_f * torch.sigmoid(-forget_gate)
    return before, (dq, dk, dv, dinput_gate, dforget_gate)


def _options(args: MLSTM) -> MLSTMOptions:
    scale = args.q.shape[-1] ** -0.5 if args.scale is None else args.scale
    return MLSTMOptions(scale, args.eps, args.input_activation == "exp", args.normalize)


def _recurrence(options: MLSTMOptions) -> Recurrence:
    return Recurrence(functools.partial(_forward, options=options), functools.partial(_backward, options=options))


def states_or_zeros(args: MLSTM, states: Tensors) -> State:
    """C `[sequences, H, K, V]`, n `[sequences, H, K]` and m `[sequences, H]`, contiguous; zeros for None."""
    sequences = sequence_count(args.q, args.cu_seqlens)
    dtype, heads, keys, values = working_dtype(args.q.dtype), args.v.shape[2], args.q.shape[3], args.v.shape[3]
    shapes = (sequences, heads, keys, values), (sequences, heads, keys), (sequences, heads)
    return tuple(
        args.q.new_zeros(shape, dtype=dtype) if t is None else t.to(dtype).contiguous()
        for t, shape in zip(states, shapes, strict=True)
    )


class MLSTMOneChunk(NamedTuple):
    """Sequences that are one chunk each: how they are read as a batch, head-major and in the precision of the state."""

    dtype: torch.dtype
    rows: SequenceRows | None
    reverse: bool

    @classmethod
    def of(cls, args: MLSTM, size: int) -> MLSTMOneChunk | None:
        """None where some sequence is too long, or has a state before it; or after it, packed."""
        cu_seqlens, keys, values, longest = args.cu_seqlens, args.q.shape[-1], args.v.shape[-1], args.q.shape[1]
        if args.v.numel() == 0 or any(t is not None for t in args.initial_state):
            return None
        if cu_seqlens is not None:
            if args.return_state:
                return None
            longest = int(cu_seqlens.diff().max())
            if (cu_seqlens.shape[0] - 1) * longest > MOST_PADDING * args.q.shape[1]:
                return None
        # To read a memory and to write it takes 2 K V products a step; to meet another step, K + V.
        if longest > min(4 * size, size + 2 * keys * values // (keys + values)):
            return None
        rows = None if cu_seqlens is None else SequenceRows.of(cu_seqlens, args.reverse, args.q.device)
        return cls(working_dtype(args.q.dtype), rows, args.reverse)

    def read(self, t: Tensor) -> Tensor:
        if self.rows is not None:
            t = self.rows.read(t)
        elif self.reverse:
            t = t.flip(1)
        return t.transpose(1, 2).to(self.dtype).contiguous()

    def write(self, like: Tensor, steps: Tensor) -> Tensor:
        steps = steps.transpose(1, 2)
        if self.rows is None:
            return (steps.flip(1) if self.reverse else steps).to(like.dtype)
        t = torch.empty_like(like)
        self.rows.write(t, steps)
        return t


def _unread(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """States that the backward pass of a single chunk does not read: zeros, or, where that would take time, memory that
    nobody has touched and that therefore takes no room."""
    return (like.new_zeros if math.prod(shape) <= TOUCHED else like.new_empty)(shape, dtype=dtype)


def _inputs(args: MLSTM) -> tuple[Tensor, ...]:
    return args.q, args.k, args.v, args.input_gate, args.forget_gate


def forward(args: MLSTM, chunk_size: int) -> tuple[Tensor | None, ...]:
    """`(y, C, n, m, chunk_C, chunk_n, chunk_m)`; see sinuous.core.ops.mlstm."""
    options, one = _options(args), MLSTMOneChunk.of(args, chunk_size)
    if one is not None:
        segment = _segment(None, [one.read(t) for t in _inputs(args)], options)
        state = _after(None, segment) if args.return_state else (None, None, None)
        batch, length, heads, keys = args.q.shape
        shape = (batch, -(-length // chunk_size), heads, keys, args.v.shape[3])
        unread = (_unread(args.q, size, one.dtype) for size in (shape, shape[:4], shape[:3]))
        return one.write(args.v, _read(segment)), *state, *unread
    y, final, chunk_states = chunked.forward(
        _recurrence(options),
        _inputs(args),
        (),
        states_or_zeros(args, args.initial_state),
        torch.empty_like(args.v),
        args.cu_seqlens,
        args.reverse,
        chunk_size,
    )
    return y, *(final if args.return_state else (None, None, None)), *chunk_states


def backward(
    args: MLSTM, grads: Tensors, chunk_C: Tensor, chunk_n: Tensor, chunk_m: Tensor, chunk_size: int
) -> list[Tensor | None]:
    """Gradients of q, k, v, input_gate, forget_gate, initial_C, initial_n and initial_m."""
    options, one, inputs = _options(args), MLSTMOneChunk.of(args, chunk_size), _inputs(args)
    dfinal: Tensors = grads[1:] if args.return_state else (None, None, None)
    if one is not None:
        dstate = None if all(t is None for t in dfinal) else states_or_zeros(args, dfinal)
        dy = one.read(torch.zeros_like(args.v) if grads[0] is None else grads[0])
        _, gradients = _gradients(None, [one.read(t) for t in inputs], dy, dstate, options)
        pairs = zip(inputs, gradients, strict=True)
        return [*(None if d is None else one.write(t, d) for t, d in pairs), None, None, None]
    dinputs, _, dinitial = chunked.backward(
        _recurrence(options),
        inputs,
        (),
        states_or_zeros(args, args.initial_state),
        (chunk_C, chunk_n, chunk_m),
        grads[0],
        dfinal,
        args.cu_seqlens,
        args.reverse,
        chunk_size,
        value=2,
    )
    return [*dinputs, *(None if t is None else d for t, d in zip(args.initial_state, dinitial, strict=True))]
