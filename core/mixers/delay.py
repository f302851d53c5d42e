"""Delay of a sequence by one step, with which only one of two directions sees the step itself."""

from __future__ import annotations

import torch
from torch import Tensor


def one_step_late(y: Tensor, cu_seqlens: Tensor | None, reverse: bool) -> Tensor:
    """Delay y by a step: `y_{t-1}` at t, and 0 at the first step of each sequence.

    Args:
        y: `[B, T, ...]`; packed sequences are `[1, ΣT, ...]` with `cu_seqlens`.
        cu_seqlens: boundaries of packed sequences.
        reverse: `y_{t+1}` at t, and 0 at the last step of each sequence.
    """
    none = torch.zeros_like(y[:, :1])
    late = torch.cat([y[:, 1:], none], 1) if reverse else torch.cat([none, y[:, :-1]], 1)
    if cu_seqlens is None:
        return late
    # Where sequences touch, the neighbour's step has come in.
    edges = cu_seqlens.new_zeros([y.shape[1] + 1], dtype=torch.bool).index_fill(0, cu_seqlens.long(), True)
    first = edges[1:] if reverse else edges[:-1]
    return late.masked_fill(first.view([-1] + [1] * (y.ndim - 2)), 0.0)
