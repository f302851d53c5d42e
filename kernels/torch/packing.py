"""Time in processing order: sequences cut into segments, and reversal as a mirror."""

from __future__ import annotations

import itertools
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Maybe = TypeVar("Maybe", Tensor, Tensor | None)


class Segment(NamedTuple):
    """Steps `start:stop` that carry one state. `first` and `last` are the index of the sequence that begins at `start`
    or ends at `stop`, and None where the state is carried from or to a neighbouring segment."""

    start: int
    stop: int
    first: int | None
    last: int | None


def sequence_count(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """Number of states that an op carries: the batch size, or the number of packed sequences."""
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def sequences(length: int, cu_seqlens: Tensor | None) -> list[slice]:
    """Steps of each sequence; an ordinary batch is one."""
    bounds = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    return [slice(begin, end) for begin, end in itertools.pairwise(bounds)]


def segments(length: int, chunk_size: int, cu_seqlens: Tensor | None) -> list[Segment]:
    """Cut time at every multiple of `chunk_size` and at every sequence boundary; empty sequences have no segment."""
    result = []
    for n, steps in enumerate(sequences(length, cu_seqlens)):
        start = steps.start
        while start < steps.stop:
            stop = min(steps.stop, (start // chunk_size + 1) * chunk_size)
            result.append(Segment(start, stop, n if start == steps.start else None, n if stop == steps.stop else None))
            start = stop
    return result


def rows(states: Tensor, n: int, cu_seqlens: Tensor | None) -> Tensor:
    """The states of sequence `n`: one row of a packed batch, all rows of an ordinary one."""
    return states if cu_seqlens is None else states[n : n + 1]


def mirror(cu_seqlens: Tensor | None, length: int) -> Tensor | None:  # TorchScript compiles it: no type variable
    """Sequence boundaries as they lie after the whole packed time axis is flipped."""
    return None if cu_seqlens is None else length - cu_seqlens.flip(0)


def flip_time(t: Maybe) -> Maybe:
    return None if t is None else t.flip(1)


def flip_sequences(states: Maybe, cu_seqlens: Tensor | None) -> Maybe:
    """Flipping packed time reverses the order of the sequences, and so that of their states."""
    return states if states is None or cu_seqlens is None else states.flip(0)


class SequenceRows(NamedTuple):
    """Packed sequences as the rows of a batch, each in processing order from its first place on.

    steps: the step of the packed axis at each place, int64 `[sequences, longest]`, 0 where there is none;
    there: whether there is one.
    """

    steps: Tensor
    there: Tensor

    @classmethod
    def of(cls, cu_seqlens: Tensor, reverse: bool, device: torch.device) -> SequenceRows:
        bounds = cu_seqlens.to(device).long()
        lengths = bounds.diff()[:, None]
        place = torch.arange(int(lengths.max()), device=device)
        there = place < lengths
        steps = bounds[1:, None] - 1 - place if reverse else bounds[:-1, None] + place
        return cls(steps.masked_fill_(~there, 0), there)

    def read(self, t: Tensor) -> Tensor:
        """`[1, T, …]` as `[sequences, longest, …]`, with zeros where there is no step."""
        rows: Tensor = t[0].index_select(0, self.steps.flatten()).unflatten(0, self.steps.shape)
        return rows.masked_fill_(~self.there.view(*self.there.shape, *(1,) * (t.ndim - 2)), 0)

    def write(self, t: Tensor, rows: Tensor) -> None:
        """Fill `t`, `[1, T, …]`, from rows."""
        t[0].index_copy_(0, self.steps[self.there], rows[self.there].to(t.dtype))
