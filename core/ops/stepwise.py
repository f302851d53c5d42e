"""Loop over time that runs the definition of a recurrence: plain torch, which autograd differentiates to any order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sinuous.kernels.torch.packing import flip_sequences, flip_time, mirror, rows, segments

State = tuple[Tensor, ...]


def run_steps(
    step: Callable[..., tuple[Tensor, State]],
    inputs: Sequence[Tensor | None],
    initial: State,
    nothing: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
    chunk_size: int,
) -> tuple[Tensor, State, State]:
    """Run `step` over time, packed sequences and reversal included.

    Args:
        step: `(state, *inputs_t) -> (y_t, state)`; states have one row per sequence of the batch.
        inputs: time on axis 1, `[B, T, …]`; None is handed on as None.
        initial: states before the first step, `[sequences, …]`.
        nothing: the output for no steps at all, `[B, 0, …]`.
        cu_seqlens: boundaries of packed sequences.
        reverse: run from the last step to the first.
        chunk_size: steps between two states that are returned.

    Returns:
        `y [B, T, …]`; the final states; and the states at multiples of `chunk_size`, detached, `[B, chunks, …]`.
    """
    length = next(t.shape[1] for t in inputs if t is not None)
    if reverse:
        flipped = tuple(flip_sequences(t, cu_seqlens) for t in initial)
        bounds = mirror(cu_seqlens, length)
        y, final, states = run_steps(step, [flip_time(t) for t in inputs], flipped, nothing, bounds, False, chunk_size)
        return y.flip(1), tuple(flip_sequences(t, cu_seqlens) for t in final), states
    count = 1 if cu_seqlens is None else initial[0].shape[0]
    finals = {n: tuple(rows(t, n, cu_seqlens) for t in initial) for n in range(count)}
    chunk_states = [tuple(t.new_empty(nothing.shape[0], 0, *t.shape[1:]) for t in initial)]
    steps = zip(*([None] * length if t is None else t.unbind(1) for t in inputs), strict=True)
    ys, state = [], initial
    for segment in segments(length, chunk_size, cu_seqlens):
        first = segment.first
        state = state if first is None else tuple(rows(t, first, cu_seqlens) for t in initial)
        if segment.start % chunk_size == 0:
            chunk_states.append(tuple(t.detach().unsqueeze(1) for t in state))
        for _, inputs_t in zip(range(segment.start, segment.stop), steps, strict=False):
            y_t, state = step(state, *inputs_t)
            ys.append(y_t)
        if segment.last is not None:
            finals[segment.last] = state
    y = torch.stack(ys, 1) if ys else nothing
    final = tuple(torch.cat(parts) for parts in zip(*finals.values(), strict=True))
    return y, final, tuple(torch.cat(parts, 1) for parts in zip(*chunk_states, strict=True))
