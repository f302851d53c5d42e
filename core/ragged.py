"""Runs of sequences of different lengths through a call that carries a state, without a padded step.

Rows begin together and end apart. The steps between one row's end and the next are a stage; the rows that are not yet
at their end run through it as one batch. So no padding touches a state, and rows of equal length cost one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Carry = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""`(x [n, T, ...], state or None) -> (y, state)`."""


class Stage(NamedTuple):
    """Output of the call for steps `start:stop` of `rows`."""

    rows: list[int]
    start: int
    stop: int
    output: Tensor


class Group(NamedTuple):
    """Rows whose states have one shape, and those states, in the order of the rows."""

    rows: list[int]
    state: Any


def run_ragged(call: Carry, x: Tensor, lengths: Sequence[int], state: Any = None) -> tuple[list[Stage], list[Group]]:
    """Run `call` over row r of `x`, `[B, T, ...]`, for its first `lengths[r]` steps.

    Args:
        call: runs some rows on from their state.
        x: inputs; steps beyond a row's length are not read.
        lengths: steps of each row, at least 1.
        state: before the first step, batch first; `None` for the start of all sequences.

    Returns:
        The outputs of all stages, and each row's state after its last step: in one group if states do not grow, else
        in a group for each length.
    """
    stages: list[Stage] = []
    ended: list[Group] = []
    rows, start = list(range(len(lengths))), 0
    for stop in sorted(set(lengths)):
        whole = len(rows) == len(lengths)
        steps = x[:, start:stop] if whole else x[torch.tensor(rows, device=x.device), start:stop]
        output, state = call(steps, state)
        stages.append(Stage(rows, start, stop, output))
        ends = [i for i, row in enumerate(rows) if lengths[row] == stop]
        goes_on = [i for i, row in enumerate(rows) if lengths[row] > stop]
        ended.append(Group([rows[i] for i in ends], select_rows(state, ends)))
        state, rows, start = select_rows(state, goes_on), [rows[i] for i in goes_on], stop
    return stages, _joined(ended)


def select_rows(state: Any, rows: Sequence[int]) -> Any:
    """Select rows of every tensor of a state."""

    def select(tensor: Tensor) -> Tensor:
        if list(rows) == list(range(tensor.shape[0])):
            return tensor
        return tensor.index_select(0, torch.tensor(list(rows), device=tensor.device, dtype=torch.long))

    return pytree.tree_map(select, state)


def _joined(groups: list[Group]) -> list[Group]:
    by_shape: dict[Any, list[Group]] = {}
    for group in groups:
        leaves, spec = pytree.tree_flatten(group.state)
        by_shape.setdefault((str(spec), *(leaf.shape[1:] for leaf in leaves)), []).append(group)
    joined = []
    for alike in by_shape.values():
        rows = [row for group in alike for row in group.rows]
        state = pytree.tree_map(lambda *parts: torch.cat(parts), *(group.state for group in alike))
        order = sorted(range(len(rows)), key=rows.__getitem__)
        joined.append(Group([rows[i] for i in order], select_rows(state, order)))
    return joined
