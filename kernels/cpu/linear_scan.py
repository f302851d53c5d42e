"""Calls of the linear scan in C."""

from __future__ import annotations

import torch
from torch import Tensor

from sinuous.kernels.arguments import LinearScan
from sinuous.kernels.cpu.call import SequenceCall, fields
from sinuous.kernels.precision import working_dtype

_FIELDS = fields(
    "sequences steps channels blocks chunk chunks packed complex constant threads bounds x a dy reset "
    "x_batch x_time a_batch a_time dy_batch dy_time reset_batch reset_time initial dfinal "
    "y final chunk_states y_batch y_time dx da dinitial"
)


class LinearScanCall(SequenceCall):
    """The arguments that forward and backward share."""

    def __init__(self, args: LinearScan, chunk_size: int) -> None:
        x, a, dtype = args.x, args.a, working_dtype(args.x.dtype)
        super().__init__("linear_scan", _FIELDS, dtype, x.shape, args.cu_seqlens, args.reverse)
        self.width, self.constant = x.shape[2], a.ndim == 1
        self.chunks = self.cut(chunk_size)
        channels = self.width * (2 if dtype.is_complex else 1)
        self.over_time("x", x)
        self.over_time("a", a.expand(x.shape[0], 1, -1) if self.constant else a)
        if args.reset is not None:
            self.place("reset", args.reset, "reset")
        self.states("initial", args.initial_state)
        self.arguments.update(
            channels=channels,
            blocks=-(-channels // int(self.library.block())),
            complex=dtype.is_complex,
            constant=self.constant,
        )


def forward(args: LinearScan, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, final_state, chunk_states)`; see sinuous.core.ops.linear_scan."""
    call = LinearScanCall(args, chunk_size)
    y, final = call.output_over_time("y", call.width), call.output("final", call.sequences, call.width)
    chunk_states = call.output("chunk_states", call.batch, call.chunks, call.width)
    call.run(call.library.forward)
    return y.to(args.x.dtype), call.in_order(final), chunk_states


def backward(
    args: LinearScan, grads: tuple[Tensor | None, Tensor | None], chunk_states: Tensor, chunk_size: int
) -> list[Tensor | None]:
    """Gradients of x, a and initial_state."""
    call = LinearScanCall(args, chunk_size)
    call.over_time("dy", torch.zeros_like(args.x) if grads[0] is None else grads[0])
    call.states("dfinal", grads[1])
    call.array("chunk_states", chunk_states)
    dx = call.output_over_time("dx", call.width)
    da = call.output("da", call.sequences, call.width) if call.constant else call.output_over_time("da", call.width)
    dinitial = call.output("dinitial", call.sequences, call.width)
    call.run(call.library.backward)
    return [
        dx,
        da.sum(0) if call.constant else da,
        None if args.initial_state is None else call.in_order(dinitial),
    ]


def self_test(dtype: torch.dtype) -> str | None:
    """Compile, load and compare one step, real and complex, with its closed form; None if all is well."""
    for kind, factor in ((dtype, 3), (torch.promote_types(dtype, torch.complex64), 3j)):
        one = torch.ones(1, 1, 1, dtype=kind)
        y, state, _ = forward(LinearScan(one, factor * one, initial_state=2 * one[0]), chunk_size=64)
        if y.item() != 1 + 2 * factor or state.item() != 1 + 2 * factor:
            return f"the compiled linear scan is wrong on this machine (got {y.item()}, wanted {1 + 2 * factor})"
    return None
