"""Means over time, of some positions and of packed sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from sinuous.core import norms


def mean_over_time(x: Tensor, counted: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """Mean of features over the positions of each sequence that count, in at least fp32; zero where none does.

    Args:
        x: `[B, T, D]`, packed `[1, ΣT, D]`.
        counted: bool `[B, T]`; all do, if absent.
        cu_seqlens: boundaries of packed sequences, `[N + 1]`.

    Returns:
        `[B, D]`, or `[N, D]`, in the dtype of `x`.
    """
    wide = norms.at_least_fp32(x)
    count = wide.new_ones(x.shape[:2])
    if counted is not None:
        wide = torch.where(counted.unsqueeze(-1), wide, 0.0)
        count = counted.to(wide.dtype)
    if cu_seqlens is None:
        total, positions = wide.sum(1), count.sum(1)
    else:
        lengths = cu_seqlens.diff()
        total, positions = (torch.segment_reduce(part[0], "sum", lengths=lengths, axis=0) for part in (wide, count))
    return (total / positions.clamp(min=1).unsqueeze(-1)).to(x.dtype)
