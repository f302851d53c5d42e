"""One call of a C kernel: tensors laid out as the kernel reads them, and its struct of numbers and addresses.

Arrays have one floating point type and contiguous last axes; those over time have any strides over batch and time, and
their address is that of the step that is processed first.
"""

from __future__ import annotations

import ctypes
import struct

import torch
from torch import Tensor

from sinuous.kernels.cpu import build
from sinuous.kernels.precision import is_double
from sinuous.kernels.torch.packing import Maybe, flip_sequences, mirror

_FAILURES = {1: "out of memory", 2: "the compiled library has another layout of arguments; delete it from the cache"}


def fields(names: str) -> dict[str, int]:
    """A C struct of 8-byte fields, numbers or addresses, in order and all 0: to be copied and filled.

    A dictionary packed at the call takes a third of the time of a `ctypes.Structure` of as many fields.
    """
    return dict.fromkeys(names.split(), 0)


class Call:
    """The arguments of one call, and every tensor that they point to, kept alive until the kernel is done.

    Forward and backward have one struct; what a call does not set stays 0, which for an address means "absent".

    Args:
        family: name of the C source.
        layout: the fields of its struct.
        dtype: of its arrays, single or double precision; complex numbers are pairs of real ones.
    """

    def __init__(self, family: str, layout: dict[str, int], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.library = build.library(family, 64 if is_double(dtype) else 32)
        self.arguments = layout.copy()
        self.arguments["threads"] = build.threads()
        self._alive: list[Tensor] = []

    def array(self, name: str, t: Maybe) -> Maybe:
        """Pass the contiguous `t`, converted where it must be; return it as the kernel has it."""
        if t is not None:
            if t.dtype != self.dtype:  # `to` takes longer than to see that it has nothing to do
                t = t.to(self.dtype)
            t = t.contiguous()
            self._alive.append(t)
            self.arguments[name] = t.data_ptr()
        return t

    def output(self, name: str, *shape: int) -> Tensor:
        """A new tensor that the kernel fills."""
        t = torch.empty(shape, dtype=self.dtype)
        self.arguments[name] = t.data_ptr()
        return t

    def run(self, function: ctypes._NamedFuncPointer) -> None:
        """Call the kernel with its struct, which begins with its own size: a kernel of another layout sees that."""
        size = len(self.arguments) + 1
        code = function(struct.pack(f"{size}q", 8 * size, *self.arguments.values()))
        if code != 0:
            raise RuntimeError(f"a C kernel did not run: {_FAILURES.get(code, code)}")


class SequenceCall(Call):
    """A call of a recurrence over axis 1, in the order of time or against it.

    Args:
        shape: `[B, T, …]` of the input.
        cu_seqlens: bounds of the sequences packed along time.
        reverse: the last step is processed first.
    """

    def __init__(
        self,
        family: str,
        layout: dict[str, int],
        dtype: torch.dtype,
        shape: torch.Size,
        cu_seqlens: Tensor | None,
        reverse: bool,
    ) -> None:
        super().__init__(family, layout, dtype)
        self.batch, self.steps = shape[:2]
        self.sequences = self.batch
        self.reverse = reverse
        self._flipped = cu_seqlens if reverse else None  # the sequences, if states must change their order
        arguments = self.arguments
        arguments["steps"] = self.steps
        bounds = mirror(cu_seqlens, self.steps) if reverse else cu_seqlens
        if bounds is not None:
            bounds = bounds.to(torch.int64).contiguous()
            self._alive.append(bounds)
            self.sequences = bounds.shape[0] - 1
            arguments["packed"], arguments["bounds"] = 1, bounds.data_ptr()
        arguments["sequences"] = self.sequences

    def cut(self, chunk_size: int) -> int:
        """Let the kernel keep a state every `chunk_size` steps; return the number of chunks."""
        chunks = -(-self.steps // chunk_size)
        self.arguments["chunk"], self.arguments["chunks"] = chunk_size, chunks
        return chunks

    def over_time(self, name: str, t: Tensor, strides: str | None = None) -> Tensor:
        """Pass `t` `[B, T, …]` with its strides, which several outputs may share; return it as the kernel has it."""
        if t.dtype != self.dtype:
            t = t.to(self.dtype)
        if t.stride(-1) != 1 and t.shape[-1] > 1:
            t = t.contiguous()
        self.place(name, t, strides or name)
        return t

    def place(self, name: str, t: Tensor, strides: str) -> None:
        """Pass `t` `[B, T, …]` as it lies."""
        self._alive.append(t)
        address, batch, time = t.data_ptr(), t.stride(0), t.stride(1)
        if self.reverse:
            address += max(t.shape[1] - 1, 0) * time * t.element_size()
            time = -time
        if t.is_complex():  # kernels count in real numbers
            batch, time = 2 * batch, 2 * time
        arguments = self.arguments
        arguments[name], arguments[f"{strides}_batch"], arguments[f"{strides}_time"] = address, batch, time

    def output_over_time(self, name: str, *shape: int, strides: str = "y") -> Tensor:
        """A new tensor `[B, T, …]` that the kernel fills in processing order."""
        t = torch.empty(self.batch, self.steps, *shape, dtype=self.dtype)
        self.place(name, t, strides)
        return t

    def states(self, name: str, t: Tensor | None) -> None:
        """Pass states `[sequences, …]`."""
        self.array(name, self.in_order(t))

    def in_order(self, states: Maybe) -> Maybe:
        """States from the order of the sequences to that in which they are processed, or back."""
        return flip_sequences(states, self._flipped)
