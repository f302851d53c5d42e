"""Reading a sequence one step late: how the two directions of a mixer come to see a step once between them."""

from __future__ import annotations

import torch
from torch import Tensor


def one_step_late(y: Tensor, cu_seqlens: Tensor | None, reverse: bool) -> Tensor:
    """`y_{t-1}` at t, and 0 at the first step of each sequence; for `reverse`, `y_{t+1}` and the last step.

    Args:
        y: `[B, T, ...]`; packed sequences are `[1, ΣT, ...]` with `cu_seqlens`.
    """
    none = torch.zeros_like(y[:, :1])
    late = torch.cat([y[:, 1:], none], 1) if reverse else torch.cat([none, y[:, :-1]], 1)
    if cu_seqlens is None:
        return late
    # Where sequences touch, the neighbour's step has come in.
    edges = cu_seqlens.new_zeros([y.shape[1] + 1], dtype=torch.bool).index_fill(0, cu_seqlens.long(), True)
    first = edges[1:] if reverse else edges[:-1]
    return late.masked_fill(first.view([-1] + [1] * (y.ndim - 2)), 0.0)
