"""Recurrences whose state is made of matrices, in chunks of plain torch: the loop over time, written once for them all.

A family gives two functions that pass one chunk. This module cuts time, carries the state, keeps it at chunk starts
and runs the chunks from last to first for the gradients, so that time and memory are linear in T in both directions.
Inside a chunk tensors are head-major, `[B, H, c, …]`, and in the precision of the state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sinuous.kernels.precision import working_dtype
from sinuous.kernels.torch.packing import Segment, flip_sequences, mirror, rows, segments

State = tuple[Tensor, ...]
Tensors = Sequence[Tensor | None]

NARROW = 80.0
"""Width of a range of exponents that fp32 passes in two factors: e^±40 each and their product are normal numbers."""

LARGEST_RANGE = 60.0
"""Of the sums G of logarithms of decays per channel within what `in_pieces` passes at once. With a reference r in the
middle exp(G - r) stays within exp(±30), and what is masked reaches exp(60): both far from overflow."""

LOWEST = -1e30
"""Bound from below of a stabiliser m, so that e^{x - m} is 0 and not NaN where both are -inf."""


class Recurrence(NamedTuple):
    """How a family passes one chunk.

    Attributes:
        forward: `(state, inputs, parameters) -> (y, state)`.
        backward: `(state, inputs, parameters, dy, dstate) -> (dstate, dinputs, dparameters)`, where `state` is the one
            before the chunk, `dstate` the gradient of the one after it and, in the result, of the one before it.
    """

    forward: Callable[[State, Tensors, Tensors], tuple[Tensor, State]]
    backward: Callable[[State, Tensors, Tensors, Tensor, State], tuple[State, Tensors, Tensors]]


def initial_matrix(q: Tensor, v: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> State:
    """The one matrix `[sequences, H, K, V]` before the first step, contiguous, zeros if it is not given."""
    dtype = working_dtype(q.dtype)
    if initial_state is not None:
        return (initial_state.to(dtype).contiguous(),)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (torch.zeros(sequences, v.shape[-2], q.shape[-1], v.shape[-1], dtype=dtype, device=q.device),)


def _place(segment: Segment, length: int, reverse: bool) -> slice:
    return slice(length - segment.stop, length - segment.start) if reverse else slice(segment.start, segment.stop)


def _read(t: Tensor, place: slice, dtype: torch.dtype, reverse: bool) -> Tensor:
    piece = t[:, place].flip(1) if reverse else t[:, place]
    return piece.transpose(1, 2).to(dtype).contiguous()


def _write(t: Tensor, place: slice, piece: Tensor, reverse: bool) -> None:
    piece = piece.transpose(1, 2)
    t[:, place] = piece.flip(1) if reverse else piece


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
    """Fill `y`; returns it with the final state and the states at multiples of `chunk_size`, `[B, chunks, …]`.

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
    state, kept = initial, [tuple(t.new_empty(y.shape[0], 0, *t.shape[1:]) for t in initial)]
    for segment in segments(length, chunk_size, bounds):
        first, last, place = segment.first, segment.last, _place(segment, length, reverse)
        state = state if first is None else tuple(rows(t, first, bounds) for t in initial)
        if segment.start % chunk_size == 0:
            kept.append(tuple(t.unsqueeze(1) for t in state))
        pieces = [None if t is None else _read(t, place, dtype, reverse) for t in inputs]
        output, state = recurrence.forward(state, pieces, parameters)
        _write(y, place, output, reverse)
        if last is not None:
            for t, new in zip(final, state, strict=True):
                rows(t, last, bounds).copy_(new)
    final = tuple(flip_sequences(t, cu_seqlens) if reverse else t for t in final)
    return y, final, tuple(torch.cat(parts, 1) for parts in zip(*kept, strict=True))


def backward(
    recurrence: Recurrence,
    inputs: Tensors,
    parameters: Tensors,
    initial: State,
    kept: State,
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
        initial, dinitial = (tuple(flip_sequences(t, cu_seqlens) for t in part) for part in (initial, dinitial))
    dinputs = [None if t is None else torch.empty_like(t) for t in inputs]
    dparameters = [None if t is None else torch.zeros(t.shape, dtype=dtype, device=t.device) for t in parameters]
    carry = dinitial
    for segment in reversed(segments(length, chunk_size, bounds)):
        first, last, place = segment.first, segment.last, _place(segment, length, reverse)
        if last is not None:
            carry = tuple(rows(t, last, bounds) for t in dinitial)
        if first is None:
            state = tuple(t[:, segment.start // chunk_size] for t in kept)
        else:
            state = tuple(rows(t, first, bounds) for t in initial)
        pieces = [None if t is None else _read(t, place, dtype, reverse) for t in inputs]
        read = pieces[value]
        assert read is not None
        output = torch.zeros_like(read) if dy is None else _read(dy, place, dtype, reverse)
        carry, dpieces, dparts = recurrence.backward(state, pieces, parameters, output, carry)
        for t, piece in zip(dinputs, dpieces, strict=True):
            if t is not None and piece is not None:
                _write(t, place, piece, reverse)
        for t, part in zip(dparameters, dparts, strict=True):
            if t is not None and part is not None:
                t += part
        if first is not None:
            for t, new in zip(dinitial, carry, strict=True):
                rows(t, first, bounds).copy_(new)
    if reverse:
        dinitial = tuple(flip_sequences(t, cu_seqlens) for t in dinitial)
    return dinputs, dparameters, dinitial


def _pieces(log_decay: Tensor, start: int, stop: int) -> list[slice]:
    """Of `[B, H, c, D]`: a chunk, or its halves and so on, such that no channel decays in one by more than exp(-60)."""
    # A NaN compares false: a row that has one does not change how the others are computed.
    if stop - start < 2 or not bool((log_decay[:, :, start:stop].sum(2) < -LARGEST_RANGE).any()):
        return [slice(start, stop)]
    middle = (start + stop) // 2
    return _pieces(log_decay, start, middle) + _pieces(log_decay, middle, stop)


def in_pieces(recurrence: Recurrence, gate: int) -> Recurrence:
    """The same recurrence with a chunk passed in several pieces where a channel of `inputs[gate]`, logarithms of decays
    `[B, H, c, D]`, decays in it by more than exp(-60); a single step may decay by whatever."""

    def cut(inputs: Tensors) -> tuple[list[slice], list[Tensors]]:
        log_decay = inputs[gate]
        assert log_decay is not None
        places = _pieces(log_decay, 0, log_decay.shape[2])
        if len(places) == 1:
            return places, [inputs]
        return places, [[None if t is None else t[:, :, place] for t in inputs] for place in places]

    def forward(state: State, inputs: Tensors, parameters: Tensors) -> tuple[Tensor, State]:
        outputs = []
        for piece in cut(inputs)[1]:
            y, state = recurrence.forward(state, piece, parameters)
            outputs.append(y)
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)), state

    def backward(
        state: State, inputs: Tensors, parameters: Tensors, dy: Tensor, dstate: State
    ) -> tuple[State, Tensors, Tensors]:
        (places, pieces), states, found = cut(inputs), [state], []
        for piece in pieces[:-1]:
            states.append(recurrence.forward(states[-1], piece, parameters)[1])
        for place, piece, before in zip(places[::-1], pieces[::-1], states[::-1], strict=True):
            dstate, *gradients = recurrence.backward(before, piece, parameters, dy[:, :, place], dstate)
            found.append(gradients)
        if len(found) == 1:
            return dstate, found[0][0], found[0][1]
        dinputs, dparameters = zip(*found[::-1], strict=True)
        whole = [None if parts[0] is None else torch.cat(parts, 2) for parts in zip(*dinputs, strict=True)]
        total = [None if parts[0] is None else torch.stack(parts).sum(0) for parts in zip(*dparameters, strict=True)]
        return dstate, whole, total

    return Recurrence(forward, backward)


class Decays(NamedTuple):
    """Products of decays inside a chunk of c steps; with G_i the sum of the logarithms up to step i, inclusive:

    between: exp(G_i - G_j) for i ≥ j and 0 above the diagonal, `[…, c, c]`;
    since_start: exp(G_i), `[…, c]`;
    until_end: exp(G_c - G_i), `[…, c]`.
    """

    between: Tensor
    since_start: Tensor
    until_end: Tensor


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

    def products(self, columns: Tensor, rows: Tensor, start: Tensor, apart: Tensor, dtype: torch.dtype) -> Decays:
        """exp(column_j - row_i), exp(start - row_i) and exp(column_j - row_c), 0 where something lies between."""
        since_start, until_end = start - rows, columns - rows[..., -1:]
        if self.resets is not None:
            since_start = since_start.masked_fill(self.resets > 0, -torch.inf)
            until_end = until_end.masked_fill(self.resets != self.resets[..., -1:], -torch.inf)
        between = _exp_of_differences(columns, rows, apart, dtype)
        return Decays(between, since_start.to(dtype).exp(), until_end.to(dtype).exp())


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
    """Products of `exp(log_decay)`, `[…, c]`, over the intervals of a chunk; -inf is an exact reset."""
    found = _Sums.of(log_decay)
    columns = -found.sums
    return found.products(columns, columns, columns.new_zeros(()), found.apart(), log_decay.dtype)


def weighted_decays(log_decay: Tensor, log_weight: Tensor, start: Tensor | None) -> tuple[Decays, Tensor | None]:
    """Products of decays as above, times what each step j puts in, exp(log_weight_j), where j is summed over.

    With the stabiliser m before the chunk in `start`, `[…]`, all of it is in units of e^m, whose running maximum
    m_i = max(m_{i-1} + log_decay_i, log_weight_i), `[…, c]`, is the second result: then no product exceeds 1.
    """
    found = _Sums.of(log_decay)
    sums, apart = found.sums, found.apart()
    columns = log_weight.double() - sums
    if start is None:
        return found.products(columns, -sums, sums.new_zeros(()), apart, log_decay.dtype), None
    start = start.double()[..., None]
    if found.resets is None:
        rows = torch.maximum(columns.cummax(-1).values, start)
    else:
        among = columns[..., None, :].masked_fill(apart, -torch.inf).amax(-1)
        rows = torch.maximum(among, start.masked_fill(found.resets > 0, -torch.inf))
    rows = rows.clamp_min_(LOWEST)
    return found.products(columns, rows, start, apart, log_decay.dtype), (rows + sums).to(log_decay.dtype)


def decay_gradient(log_decay: Tensor, between: Tensor, since_start: Tensor, until_end: Tensor, total: Tensor) -> Tensor:
    """Gradient of `log_decay`, `[…, c]`, from the gradient of each product of decays times that product.

    Args:
        between, since_start, until_end: `dE ⊙ E` for the fields of `Decays`.
        total: the same of the whole chunk's decay, `[…]`.
    """
    ends = between.sum(-1, dtype=torch.float64) - between.sum(-2, dtype=torch.float64) + since_start - until_end
    return gradient_of_sums(log_decay, ends, until_end.sum(-1, dtype=torch.float64) + total)


def gradient_of_sums(log_decay: Tensor, ends: Tensor, end: Tensor) -> Tensor:
    """Gradient of `log_decay`, `[…, c]`, from that of its sum up to each step and, once more, of the whole, `[…]`."""
    ends = ends.double()
    ends[..., -1] += end
    gradient = ends.flip(-1).cumsum(-1).flip(-1).to(log_decay.dtype)
    return gradient.masked_fill_(torch.isneginf(log_decay), 0)
