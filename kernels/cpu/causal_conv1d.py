"""Calls of the causal convolution in C."""

from __future__ import annotations

import torch
from torch import Tensor

from sinuous.kernels.cpu import build
from sinuous.kernels.cpu.arrays import Timed, bounds, fields, pointer, real, run, whole
from sinuous.kernels.torch.packing import flip_sequences

_BLOCK = 64
"""Channels per task, as in the C source."""


_FIELDS = fields(
    "sequences steps channels width blocks silu packed threads bounds x dy x_batch x_time dy_batch dy_time "
    "weight bias initial dfinal y final y_batch y_time dx dweight dbias dinitial"
)


class _Call:
    """What forward and backward hand over alike; keeps every tensor alive until the kernel is done."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        silu: bool,
        reverse: bool,
    ) -> None:
        self.dtype, self.reverse = real(x), reverse
        self.shape = x.shape
        self.width = weight.shape[1]
        self.sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.library = build.library("causal_conv1d", 64 if self.dtype == torch.float64 else 32)
        self.x = Timed.of(x, self.dtype, reverse)
        self.weight, self.bias = whole(weight.T, self.dtype), whole(bias, self.dtype)
        self.initial = whole(flip_sequences(initial_state, cu_seqlens if reverse else None), self.dtype)
        self.bounds = bounds(cu_seqlens, x.shape[1], reverse)
        self.arguments = _FIELDS.copy()
        self.arguments.update(
            sequences=self.sequences,
            steps=x.shape[1],
            channels=x.shape[2],
            width=self.width,
            blocks=(x.shape[2] + _BLOCK - 1) // _BLOCK,
            silu=silu,
            packed=cu_seqlens is not None,
            threads=build.threads(),
            bounds=pointer(self.bounds),
            x=self.x.pointer,
            x_batch=self.x.batch,
            x_time=self.x.time,
            weight=pointer(self.weight),
            bias=pointer(self.bias),
            initial=pointer(self.initial),
        )

    def timed_output(self, name: str) -> Tensor:
        """An output `[B, T, D]` that the kernel fills in processing order."""
        t = torch.empty(self.shape, dtype=self.dtype)
        place = Timed.of(t, self.dtype, self.reverse)
        self.arguments[name] = place.pointer
        self.arguments["y_batch"], self.arguments["y_time"] = place.batch, place.time
        return t

    def output(self, name: str, rows: int) -> Tensor:
        t = torch.empty(self.sequences, rows, self.shape[2], dtype=self.dtype)
        self.arguments[name] = t.data_ptr()
        return t


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """`(y, final_state)`; see sinuous.core.ops.causal_conv1d."""
    call = _Call(x, weight, bias, initial_state, cu_seqlens, silu, reverse)
    y, final = call.timed_output("y"), call.output("final", call.width - 1)
    run(call.library.forward, call.arguments)
    return y.to(x.dtype), flip_sequences(final, cu_seqlens if reverse else None).to(x.dtype)


def backward(
    grads: tuple[Tensor | None, Tensor | None],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    reverse: bool,
) -> list[Tensor | None]:
    """Gradients of x, weight, bias and initial_state; the values before the activation are recomputed."""
    call = _Call(x, weight, bias, initial_state, cu_seqlens, silu, reverse)
    dy, dfinal = grads
    given = Timed.of(torch.zeros_like(x) if dy is None else dy, call.dtype, reverse)
    dfinal = whole(flip_sequences(dfinal, cu_seqlens if reverse else None), call.dtype)
    call.arguments.update(dy=given.pointer, dy_batch=given.batch, dy_time=given.time, dfinal=pointer(dfinal))
    dx = call.timed_output("dx")
    dweight, dbias, dinitial = (
        call.output(name, rows) for name, rows in (("dweight", call.width), ("dbias", 1), ("dinitial", call.width - 1))
    )
    run(call.library.backward, call.arguments)
    return [
        dx,
        dweight.sum(0).T,
        None if bias is None else dbias.sum((0, 1)),
        None if initial_state is None else flip_sequences(dinitial, cu_seqlens if reverse else None),
    ]


def self_test(dtype: torch.dtype) -> str | None:
    """Compile, load and compare one step with its closed form; None if all is well."""
    one = torch.ones(1, 1, 1, dtype=dtype)
    y, state = forward(2 * one, torch.tensor([[3.0, 5.0]], dtype=dtype), None, one, None, False, False)
    if y.item() != 13 or state.item() != 2:
        return f"the compiled convolution is wrong on this machine (got {y.item():.6g}, wanted 13)"
    return None
