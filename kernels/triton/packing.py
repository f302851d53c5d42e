# mypy: allow-untyped-defs, allow-incomplete-defs
"""Where steps lie: rows of memory, and packed sequences with an entry per step, so that no kernel searches for a
bound."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sinuous.kernels.precision import is_double


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """dtype of the arithmetic in a kernel whose inputs have `dtype`; that of their real parts."""
    return tl.float64 if is_double(dtype) else tl.float32


class Steps(NamedTuple):
    """Entries of every step of a packed axis in processing order, int32 `[ΣT]`: its sequence, and the number of steps
    of that sequence before and after it."""

    sequence: Tensor
    before: Tensor
    after: Tensor


def packed_steps(cu_seqlens: Tensor, length: int, reverse: bool) -> Steps:
    """Describe every step, without waiting for the device. Empty sequences own no step."""
    bounds = cu_seqlens.to(torch.int32)
    time = torch.arange(length, device=bounds.device, dtype=torch.int32)
    sequence = torch.searchsorted(bounds[1:].contiguous(), time, right=True, out_int32=True)
    before, after = time - bounds[sequence], bounds[sequence + 1] - 1 - time
    if reverse:
        return Steps(sequence.flip(0), after.flip(0), before.flip(0))
    return Steps(sequence, before, after)


@triton.jit
def bounds_of(n, cu_seqlens, length, PACKED: tl.constexpr, REVERSE: tl.constexpr):
    """First processing step of sequence `n` in its row, its number of steps, and the row."""
    first, steps, batch = 0, length, n
    if PACKED:
        left, right = tl.load(cu_seqlens + n).to(tl.int32), tl.load(cu_seqlens + n + 1).to(tl.int32)
        first, steps, batch = (length - right if REVERSE else left), right - left, n * 0
    return first, steps, batch


@triton.jit
def row_of(p, batch, length, REVERSE: tl.constexpr):
    """The row of `[B T, …]` that is processed at step `p`."""
    return batch.to(tl.int64) * length + (length - 1 - p if REVERSE else p)


def on_device(t: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()
