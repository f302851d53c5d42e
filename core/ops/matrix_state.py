"""Shapes of the ops whose state is one matrix `[K, V]` for each head: `q [B, T, ·, K]`, `v [B, T, …, H, V]`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sinuous.kernels.precision import working_dtype
from sinuous.kernels.torch.packing import sequence_count


def state_shape(args: Any) -> tuple[int, ...]:
    """`(sequences, H, K, V)`."""
    return sequence_count(args.q, args.cu_seqlens), args.v.shape[-2], args.q.shape[3], args.v.shape[-1]


def chunk_states_shape(args: Any, chunk_size: int) -> tuple[int, ...]:
    """`(B, chunks, H, K, V)`, the states at chunk starts."""
    batch, length, _, keys = args.q.shape
    return batch, -(-length // chunk_size), args.v.shape[-2], keys, args.v.shape[-1]


def fake(args: Any) -> tuple[Tensor, Tensor]:
    """Empty y `[B, T, H, V]` in the dtype of v, and an empty final state."""
    y = args.v.new_empty((*args.q.shape[:2], *args.v.shape[-2:]))
    return y, y.new_empty(state_shape(args), dtype=working_dtype(args.q.dtype))
