"""Tensors as a C kernel takes them: one floating point type, channels contiguous, any strides over batch and time."""

from __future__ import annotations

import ctypes
import struct
from typing import NamedTuple

import torch
from torch import Tensor

from sinuous.kernels.torch.packing import mirror


def real(x: Tensor) -> torch.dtype:
    """The type that a kernel computes in: double for double, float for all else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Timed(NamedTuple):
    """A tensor `[B, T, …]` in processing order: `pointer` is at the step that is processed first."""

    tensor: Tensor | None  # keeps the memory alive during the call
    pointer: int
    batch: int
    time: int

    @classmethod
    def of(cls, t: Tensor | None, dtype: torch.dtype, reverse: bool) -> Timed:
        if t is None:
            return cls(None, 0, 0, 0)
        t = t if t.dtype == dtype else t.to(dtype)  # `to` takes longer than to see that it has nothing to do
        if t.stride(-1) != 1 and t.shape[-1] > 1:
            t = t.contiguous()
        batch, time = t.stride(0), t.stride(1)
        if not reverse:
            return cls(t, t.data_ptr(), batch, time)
        return cls(t, t.data_ptr() + max(t.shape[1] - 1, 0) * time * t.element_size(), batch, -time)


def whole(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return t if t is None or (t.dtype == dtype and t.is_contiguous()) else t.to(dtype).contiguous()


def pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def bounds(cu_seqlens: Tensor | None, length: int, reverse: bool) -> Tensor | None:
    """Sequence boundaries in processing order as contiguous int64."""
    if cu_seqlens is None:
        return None
    ordered = mirror(cu_seqlens, length) if reverse else cu_seqlens
    return ordered.to(torch.int64).contiguous() if ordered is not None else None


def fields(names: str) -> dict[str, int]:
    """A C struct of 8-byte fields, numbers or addresses, in order and all 0: to be copied and filled.

    A dictionary packed at the call takes a third of the time of a `ctypes.Structure` of as many fields.
    """
    return dict.fromkeys(names.split(), 0)


_FAILURES = {1: "out of memory", 2: "the compiled library has another layout of arguments; delete it from the cache"}


def run(function: ctypes._NamedFuncPointer, arguments: dict[str, int]) -> None:
    """Call a kernel with its struct, which begins with its own size: so the kernel sees a layout that is not its."""
    count = len(arguments) + 1
    code = function(struct.pack(f"{count}q", 8 * count, *arguments.values()))
    if code != 0:
        raise RuntimeError(f"a C kernel did not run: {_FAILURES.get(code, code)}")
