"""Calls of the linear scan in C."""

from __future__ import annotations

import torch
from torch import Tensor

from sinuous.kernels.cpu import build
from sinuous.kernels.cpu.arrays import Timed, bounds, fields, pointer, run, whole
from sinuous.kernels.torch.packing import flip_sequences

_FIELDS = fields(
    "sequences steps channels blocks chunk chunks packed complex constant threads bounds x a dy reset "
    "x_batch x_time a_batch a_time dy_batch dy_time reset_batch reset_time initial dfinal "
    "y final kept y_batch y_time dx da dinitial"
)


def _as_real(t: Tensor) -> Tensor:
    """A tensor of complex channels as one of twice as many real ones, without a copy."""
    return torch.view_as_real(t if t.shape[-1] < 2 or t.stride(-1) == 1 else t.contiguous()).flatten(-2)


class _Call:
    """What forward and backward hand over alike; keeps every tensor alive until the kernel is done."""

    def __init__(
        self,
        x: Tensor,
        a: Tensor,
        reset: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        reverse: bool,
        chunk_size: int,
    ) -> None:
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        self.real = self.dtype.to_real()
        self.reverse, self.backwards = reverse, cu_seqlens if reverse else None
        self.batch, self.steps, self.width = x.shape
        self.sequences = self.batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.chunks = (self.steps + chunk_size - 1) // chunk_size
        self.library = build.library("linear_scan", 32 if self.real == torch.float32 else 64)
        self.x = self.timed(x)
        self.constant = a.ndim == 1
        self.a = self.timed(a[None, None] if self.constant else a)
        self.reset = Timed.of(None if reset is None else reset[..., None], torch.bool, reverse)
        self.initial = self.states(initial_state)
        self.bounds = bounds(cu_seqlens, self.steps, reverse)
        channels = self.width * (2 if self.dtype.is_complex else 1)
        self.arguments = _FIELDS.copy()
        self.arguments.update(
            sequences=self.sequences,
            steps=self.steps,
            channels=channels,
            blocks=-(-channels // int(self.library.block())),
            chunk=chunk_size,
            chunks=self.chunks,
            packed=cu_seqlens is not None,
            complex=self.dtype.is_complex,
            constant=self.constant,
            threads=build.threads(),
            bounds=pointer(self.bounds),
            x=self.x.pointer,
            x_batch=self.x.batch,
            x_time=self.x.time,
            a=self.a.pointer,
            a_batch=0 if self.constant else self.a.batch,
            a_time=self.a.time,
            reset=self.reset.pointer,
            reset_batch=self.reset.batch,
            reset_time=self.reset.time,
            initial=pointer(self.initial),
        )

    def timed(self, t: Tensor) -> Timed:
        """A tensor `[B, T, D]` for the kernel, complex numbers as pairs of real ones."""
        if not self.dtype.is_complex:
            return Timed.of(t, self.real, self.reverse)
        return Timed.of(_as_real(t.to(self.dtype)), self.real, self.reverse)

    def states(self, t: Tensor | None) -> Tensor | None:
        """States `[sequences, D]` in processing order."""
        return whole(flip_sequences(t, self.backwards), self.dtype)

    def timed_output(self, name: str) -> Tensor:
        """An output `[B, T, D]` that the kernel fills in processing order."""
        t = torch.empty(self.batch, self.steps, self.width, dtype=self.dtype)
        place = self.timed(t)
        self.arguments[name] = place.pointer
        self.arguments["y_batch"], self.arguments["y_time"] = place.batch, place.time
        return t

    def output(self, name: str, *rows: int) -> Tensor:
        t = torch.empty(*rows, self.width, dtype=self.dtype)
        self.arguments[name] = t.data_ptr()
        return t


def forward(
    x: Tensor,
    a: Tensor,
    reset: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, final_state, chunk_states)`; see sinuous.core.ops.linear_scan."""
    call = _Call(x, a, reset, initial_state, cu_seqlens, reverse, chunk_size)
    y, final = call.timed_output("y"), call.output("final", call.sequences)
    kept = call.output("kept", call.batch, call.chunks)
    run(call.library.forward, call.arguments)
    return y.to(x.dtype), flip_sequences(final, call.backwards), kept


def backward(
    grads: tuple[Tensor | None, Tensor | None],
    x: Tensor,
    a: Tensor,
    reset: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_states: Tensor,
    reverse: bool,
    chunk_size: int,
) -> list[Tensor | None]:
    """Gradients of x, a and initial_state."""
    call = _Call(x, a, reset, initial_state, cu_seqlens, reverse, chunk_size)
    dy, dfinal = call.timed(torch.zeros_like(x) if grads[0] is None else grads[0]), call.states(grads[1])
    kept = whole(chunk_states, call.dtype)
    call.arguments.update(dy=dy.pointer, dy_batch=dy.batch, dy_time=dy.time, dfinal=pointer(dfinal), kept=pointer(kept))
    dx = call.timed_output("dx")
    da = call.output("da", call.sequences) if call.constant else call.timed_output("da")
    dinitial = call.output("dinitial", call.sequences)
    run(call.library.backward, call.arguments)
    return [
        dx,
        da.sum(0) if call.constant else da,
        None if initial_state is None else flip_sequences(dinitial, call.backwards),
    ]


def self_test(dtype: torch.dtype) -> str | None:
    """Compile, load and compare one step, real and complex, with its closed form; None if all is well."""
    for kind, factor in ((dtype, 3), (torch.promote_types(dtype, torch.complex64), 3j)):
        one = torch.ones(1, 1, 1, dtype=kind)
        y, state, _ = forward(one, factor * one, None, 2 * one[0], None, False, 64)
        if y.item() != 1 + 2 * factor or state.item() != 1 + 2 * factor:
            return f"the compiled linear scan is wrong on this machine (got {y.item()}, wanted {1 + 2 * factor})"
    return None
