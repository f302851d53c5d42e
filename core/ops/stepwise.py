"""Loop over time that runs the definition of a recurrence: plain torch, which autograd differentiates to any order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from sinuous.kernels.torch.packing import flip_sequences, flip_time, mirror, rows, segments

State = tuple[Tensor, ...]

_AS_ONE_SCAN: ContextVar[bool] = ContextVar("as_one_scan", default=False)


@contextmanager
def as_one_scan() -> Iterator[None]:
    """Inside, `run_steps` is one `scan` of torch, which a tracer keeps as a loop; else it would trace every step."""
    token = _AS_ONE_SCAN.set(True)
    try:
        yield
    finally:
        _AS_ONE_SCAN.reset(token)


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
    if _AS_ONE_SCAN.get():
        return _scan_steps(step, inputs, initial, length)
    count = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
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


def _scan_steps(
    step: Callable[..., tuple[Tensor, State]], inputs: Sequence[Tensor | None], initial: State, length: int
) -> tuple[Tensor, State, State]:
    """`run_steps` from the first step on, of sequences that are not packed; of the states, only the first is kept."""
    chunk_states = tuple(t.unsqueeze(1) for t in initial)
    if length == 1:
        y_t, state = step(initial, *(None if t is None else t[:, 0] for t in inputs))
        return y_t.unsqueeze(1), state, chunk_states

    from torch._higher_order_ops.scan import scan  # a part of torch that importing the ops should not wait for

    def body(state: list[Tensor], steps: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        present = iter(steps)
        y_t, after = step(tuple(state), *(None if t is None else next(present) for t in inputs))
        return [t.clone() for t in after], y_t.clone()  # a scan refuses outputs that share memory

    final, y = scan(body, list(initial), [t.transpose(0, 1) for t in inputs if t is not None])
    return y.transpose(0, 1), tuple(final), chunk_states
