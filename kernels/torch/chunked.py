"""Recurrences whose state is made of matrices, in chunks of plain torch: the loop over time, written once for them all.

A family gives two functions that pass one segment. This module cuts time, carries the state, keeps it at chunk starts
and passes the segments from last to first for the gradients, so that time and memory are linear in T in both
directions. Inside a segment tensors are head-major, `[B, H, c, …]`, and in the precision of the state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.kernels.precision import working_dtype
from sinuous.kernels.torch.packing import Segment, flip_sequences, mirror, rows, segments, sequence_count

State = tuple[Tensor, ...]
Tensors = Sequence[Tensor | None]

NARROW = 80.0
"""Width of a range of exponents that fp32 passes in two factors: e^±40 each and their product are normal numbers."""

LARGEST_RANGE = 60.0
"""Greatest fall of the sums G of logarithms of decays in a channel of a segment. With a reference r in the middle
exp(G - r) stays within exp(±30), and masked entries reach exp(60): both far from overflow."""

LOWEST = -1e30
"""Lower bound of a stabiliser m, so that e^{x - m} is 0 and not NaN where both are -inf."""

LARGEST_ROUNDING = 10.0
"""Most that the rounding of a stabiliser m may change it, so that a state in units of e^m stays finite for any m."""


class Recurrence(NamedTuple):
    """A family's passes over one segment.

    Attributes:
        forward: `(state, inputs, parameters) -> (y, state)`.
        backward: `(state, inputs, parameters, dy, dstate) -> (dstate, dinputs, dparameters)`, where `state` is the one
            before the segment, `dstate` the gradient of the one after it and, in the result, of the one before it.
    """

    forward: Callable[[State, Tensors, Tensors], tuple[Tensor, State]]
    backward: Callable[[State, Tensors, Tensors, Tensor, State], tuple[State, Tensors, Tensors]]


def initial_matrix(q: Tensor, v: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> State:
    """The one matrix `[sequences, H, K, V]` before the first step, contiguous; zeros where `initial_state` is None."""
    dtype = working_dtype(q.dtype)
    if initial_state is not None:
        return (initial_state.to(dtype).contiguous(),)
    sequences = sequence_count(q, cu_seqlens)
    return (torch.zeros(sequences, v.shape[-2], q.shape[-1], v.shape[-1], dtype=dtype, device=q.device),)


def _place(segment: Segment, length: int, reverse: bool) -> slice:
    return slice(length - segment.stop, length - segment.start) if reverse else slice(segment.start, segment.stop)


def _read(t: Tensor, place: slice, dtype: torch.dtype, reverse: bool) -> Tensor:
    steps = t[:, place].flip(1) if reverse else t[:, place]
    return steps.transpose(1, 2).to(dtype).contiguous()


def _write(t: Tensor, place: slice, steps: Tensor, reverse: bool) -> None:
    steps = steps.transpose(1, 2)
    t[:, place] = steps.flip(1) if reverse else steps


def forward(
    recurrence: Recurrence,
    inputs: Tensors,
    parameters: Tensors,
    initial: State,
    y: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
    chunk_size: int,
) -> tuple[Tensor, State, State]:
    """Fill `y`; return it with the final state and the states at multiples of `chunk_size`, `[B, chunks, …]`.

    Args:
        inputs: `[B, T, H, …]`.
        parameters: tensors without a time axis.
        initial: states before the first step, one row per sequence.
        y: `[B, T, H, V]`, to be filled.
    """
    dtype, length = initial[0].dtype, y.shape[1]
    bounds = mirror(cu_seqlens, length) if reverse else cu_seqlens
    initial = tuple(flip_sequences(t, cu_seqlens) if reverse else t for t in initial)
    final = tuple(t.clone() for t in initial)
    state, chunk_states = initial, [tuple(t.new_empty(y.shape[0], 0, *t.shape[1:]) for t in initial)]
    for segment in segments(length, chunk_size, bounds):
        first, last, place = segment.first, segment.last, _place(segment, length, reverse)
        state = state if first is None else tuple(rows(t, first, bounds) for t in initial)
        if segment.start % chunk_size == 0:
            chunk_states.append(tuple(t.unsqueeze(1) for t in state))
        segment_inputs = [None if t is None else _read(t, place, dtype, reverse) for t in inputs]
        output, state = recurrence.forward(state, segment_inputs, parameters)
        _write(y, place, output, reverse)
        if last is not None:
            for t, new in zip(final, state, strict=True):
                rows(t, last, bounds).copy_(new)
    final = tuple(flip_sequences(t, cu_seqlens) if reverse else t for t in final)
    return y, final, tuple(torch.cat(parts, 1) for parts in zip(*chunk_states, strict=True))


def backward(
    recurrence: Recurrence,
    inputs: Tensors,
    parameters: Tensors,
    initial: State,
    chunk_states: State,
    dy: Tensor | None,
    dfinal: Tensors,
    cu_seqlens: Tensor | None,
    reverse: bool,
    chunk_size: int,
    value: int,
) -> tuple[list[Tensor | None], list[Tensor | None], State]:
    """Gradients of the inputs, in their dtypes, of the parameters and of the initial state.

    Args:
        value: index in `inputs` of the one that has the shape of y.
    """
    like = inputs[value]
    assert like is not None
    dtype, length = initial[0].dtype, like.shape[1]
    bounds = mirror(cu_seqlens, length) if reverse else cu_seqlens
    dinitial = tuple(
        torch.zeros_like(t) if d is None else d.to(dtype, copy=True) for t, d in zip(initial, dfinal, strict=True)
    )
    if reverse:
        initial, dinitial = (tuple(flip_sequences(t, cu_seqlens) for t in states) for states in (initial, dinitial))
    dinputs = [None if t is None else torch.empty_like(t) for t in inputs]
    dparameters = [None if t is None else torch.zeros(t.shape, dtype=dtype, device=t.device) for t in parameters]
    carry = dinitial
    for segment in reversed(segments(length, chunk_size, bounds)):
        first, last, place = segment.first, segment.last, _place(segment, length, reverse)
        if last is not None:
            carry = tuple(rows(t, last, bounds) for t in dinitial)
        if first is None:
            state = tuple(t[:, segment.start // chunk_size] for t in chunk_states)
        else:
            state = tuple(rows(t, first, bounds) for t in initial)
        segment_inputs = [None if t is None else _read(t, place, dtype, reverse) for t in inputs]
        like_y = segment_inputs[value]
        assert like_y is not None
        output = torch.zeros_like(like_y) if dy is None else _read(dy, place, dtype, reverse)
        carry, dsegment, dparameters_here = recurrence.backward(state, segment_inputs, parameters, output, carry)
        for t, gradient in zip(dinputs, dsegment, strict=True):
            if t is not None and gradient is not None:
                _write(t, place, gradient, reverse)
        for t, gradient in zip(dparameters, dparameters_here, strict=True):
            if t is not None and gradient is not None:
                t += gradient
        if first is not None:
            for t, new in zip(dinitial, carry, strict=True):
                rows(t, first, bounds).copy_(new)
    if reverse:
        dinitial = tuple(flip_sequences(t, cu_seqlens) for t in dinitial)
    return dinputs, dparameters, dinitial


def _short_segments(log_decay: Tensor, start: int, stop: int) -> list[slice]:
    """Steps of `log_decay` `[B, H, c, D]` halved, and halved again, until no channel decays by more than exp(-60)."""
    # A NaN compares false: a row that has one does not change how the others are computed.
    if stop - start < 2 or not bool((log_decay[:, :, start:stop].sum(2) < -LARGEST_RANGE).any()):
        return [slice(start, stop)]
    middle = (start + stop) // 2
    return _short_segments(log_decay, start, middle) + _short_segments(log_decay, middle, stop)


def in_short_segments(recurrence: Recurrence, gate: int) -> Recurrence:
    """The same recurrence with a segment halved, and halved again, where a channel of `inputs[gate]`, logarithms of
    decays `[B, H, c, D]`, decays in it by more than exp(-60). A single step may decay by any amount."""

    def cut(inputs: Tensors) -> tuple[list[slice], list[Tensors]]:
        log_decay = inputs[gate]
        assert log_decay is not None
        places = _short_segments(log_decay, 0, log_decay.shape[2])
        if len(places) == 1:
            return places, [inputs]
        return places, [[None if t is None else t[:, :, place] for t in inputs] for place in places]

    def forward(state: State, inputs: Tensors, parameters: Tensors) -> tuple[Tensor, State]:
        outputs = []
        for part in cut(inputs)[1]:
            y, state = recurrence.forward(state, part, parameters)
            outputs.append(y)
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)), state

    def backward(
        state: State, inputs: Tensors, parameters: Tensors, dy: Tensor, dstate: State
    ) -> tuple[State, Tensors, Tensors]:
        (places, parts), states, gradients = cut(inputs), [state], []
        for part in parts[:-1]:
            states.append(recurrence.forward(states[-1], part, parameters)[1])
        for place, part, before in zip(places[::-1], parts[::-1], states[::-1], strict=True):
            dstate, *gradient = recurrence.backward(before, part, parameters, dy[:, :, place], dstate)
            gradients.append(gradient)
        if len(gradients) == 1:
            return dstate, gradients[0][0], gradients[0][1]
        dinputs, dparameters = zip(*gradients[::-1], strict=True)
        whole = [None if parts[0] is None else torch.cat(parts, 2) for parts in zip(*dinputs, strict=True)]
        total = [None if parts[0] is None else torch.stack(parts).sum(0) for parts in zip(*dparameters, strict=True)]
        return dstate, whole, total

    return Recurrence(forward, backward)


class Decays(NamedTuple):
    """Products of decays inside a segment of c steps; with G_i the sum of the logarithms up to step i, inclusive:

    between: exp(G_i - G_j) for i ≥ j and 0 above the diagonal, `[…, c, c]`;
    since_start: exp(G_i), `[…, c]`;
    until_end: exp(G_c - G_i), `[…, c]`;
    whole: exp(G_c), `[…, 1]`.
    """

    between: Tensor
    since_start: Tensor
    until_end: Tensor
    whole: Tensor


class _Sums(NamedTuple):
    """Sums of logarithms of decays up to each step, inclusive, and how many resets there were, both `[…, c]`. A reset,
    -inf, is left out of the sum; without any the count is None."""

    # In float64, since a difference of two long sums is all that is left of them.
    sums: Tensor
    resets: Tensor | None

    @classmethod
    def of(cls, log_decay: Tensor) -> _Sums:
        resets = torch.isneginf(log_decay)
        if not bool(resets.any()):
            return cls(log_decay.double().cumsum(-1), None)
        return cls(log_decay.masked_fill(resets, 0).double().cumsum(-1), resets.cumsum(-1))

    def apart(self) -> Tensor:
        """Whether step j (last axis) does not reach step i: it is later, or there is a reset between them."""
        length = self.sums.shape[-1]
        apart = torch.ones(length, length, dtype=torch.bool, device=self.sums.device).triu_(1)
        if self.resets is None:
            return apart
        return apart | (self.resets[..., :, None] != self.resets[..., None, :])

    def products(
        self, columns: Tensor, rows: Tensor, start: Tensor, apart: Tensor, end: Tensor, dtype: torch.dtype
    ) -> Decays:
        """exp(column_j - row_i), exp(start - row_i), exp(column_j - end), exp(start - end); and 0 across a reset."""
        since_start, until_end, whole = start - rows, columns - end, start - end
        if self.resets is not None:
            since_start = since_start.masked_fill(self.resets > 0, -torch.inf)
            until_end = until_end.masked_fill(self.resets != self.resets[..., -1:], -torch.inf)
            whole = whole.masked_fill(self.resets[..., -1:] > 0, -torch.inf)
        between = _exp_of_differences(columns, rows, apart, dtype)
        return Decays(between, *(t.to(dtype).exp() for t in (since_start, until_end, whole)))


def _exp_of_differences(columns: Tensor, rows: Tensor, apart: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(column_j - row_i), `[…, c, c]`, and 0 where `apart`."""
    lowest = torch.minimum(columns.amin(-1), rows.amin(-1))
    highest = torch.maximum(columns.amax(-1), rows.amax(-1))
    if not bool((highest - lowest >= NARROW).any()):  # where one is NaN, so is the row, whichever way it goes
        # An outer product takes c exponentials in place of c², and loses nothing: both factors are rounded from fp64.
        middle = ((highest + lowest) / 2)[..., None]
        left, right = (middle - rows).exp().to(dtype), (columns - middle).exp().to(dtype)
        return (left[..., :, None] * right[..., None, :]).mul_(~apart)
    differences = columns[..., None, :] - rows[..., :, None]
    return differences.to(dtype).masked_fill_(apart, -torch.inf).exp_()


def decays(log_decay: Tensor) -> Decays:
    """Products of `exp(log_decay)`, `[…, c]`, over the intervals of a segment; -inf is an exact reset."""
    cumulated = _Sums.of(log_decay)
    columns = -cumulated.sums
    return cumulated.products(
        columns, columns, columns.new_zeros(()), cumulated.apart(), columns[..., -1:], log_decay.dtype
    )


class Stabiliser(NamedTuple):
    """The running maximum m of a segment, `[…, c]`, and whether it is the weight of the step itself."""

    m: Tensor
    own: Tensor


def weighted_decays(log_decay: Tensor, log_weight: Tensor, start: Tensor | None) -> tuple[Decays, Stabiliser | None]:
    """Products of decays as above, times what each step j puts in, exp(log_weight_j), where j is summed over.

    With the stabiliser m before the segment in `start`, `[…]`, all of it is in units of e^m, whose running maximum
    m_i = max(m_{i-1} + log_decay_i, log_weight_i) is the second result: then no product exceeds 1. Those to the end of
    the segment are in units of the last m as it is returned, rounded.
    """
    cumulated = _Sums.of(log_decay)
    sums, apart = cumulated.sums, cumulated.apart()
    columns = log_weight.double() - sums
    if start is None:
        rows = -sums
        return cumulated.products(columns, rows, sums.new_zeros(()), apart, rows[..., -1:], log_decay.dtype), None
    start = start.double()[..., None]
    if cumulated.resets is None:
        rows = torch.maximum(columns.cummax(-1).values, start)
    else:
        among = columns[..., None, :].masked_fill(apart, -torch.inf).amax(-1)
        rows = torch.maximum(among, start.masked_fill(cumulated.resets > 0, -torch.inf))
    rows = rows.clamp_min_(LOWEST)
    exact = rows + sums
    m = exact.to(log_decay.dtype)
    rounding = (m - exact)[..., -1:].clamp_(-LARGEST_ROUNDING, LARGEST_ROUNDING)
    products = cumulated.products(columns, rows, start, apart, rows[..., -1:] + rounding, log_decay.dtype)
    return products, Stabiliser(m, columns >= rows)


def run_sums(values: Tensor, first: Tensor) -> Tensor:
    """Sums of `values`, `[…, c]`, from each step to the one before the next that is the `first` of a run; fp64."""
    length = values.shape[-1]
    sums = F.pad(values.double().flip(-1).cumsum(-1).flip(-1), (0, 1))
    places = torch.arange(length, device=values.device).expand_as(first).masked_fill(~first, length)
    after = F.pad(places, (0, 1), value=length)[..., 1:].flip(-1).cummin(-1).values.flip(-1)
    return sums[..., :-1] - sums.gather(-1, after)


def decay_gradient(log_decay: Tensor, between: Tensor, since_start: Tensor, until_end: Tensor, total: Tensor) -> Tensor:
    """Gradient of `log_decay`, `[…, c]`, from the gradient of each product of decays times that product.

    Args:
        between, since_start, until_end: `dE ⊙ E` for the fields of `Decays`.
        total: the same of the whole segment's decay, `[…]`.
    """
    ends = between.sum(-1, dtype=torch.float64) - between.sum(-2, dtype=torch.float64) + since_start - until_end
    return gradient_of_sums(log_decay, ends, until_end.sum(-1, dtype=torch.float64) + total)


def gradient_of_sums(log_decay: Tensor, ends: Tensor, end: Tensor) -> Tensor:
    """Gradient of `log_decay`, `[…, c]`, from that of its sum up to each step and, once more, of the whole, `[…]`."""
    ends = ends.double()
    ends[..., -1] += end
    gradient = ends.flip(-1).cumsum(-1).flip(-1).to(log_decay.dtype)
    return gradient.masked_fill_(torch.isneginf(log_decay), 0)
