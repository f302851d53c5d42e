"""Calls of the causal convolution in C."""

from __future__ import annotations

import torch
from torch import Tensor

from sinuous.kernels.arguments import CausalConv1d
from sinuous.kernels.cpu.call import SequenceCall, fields
from sinuous.kernels.precision import working_dtype

_BLOCK = 64
"""Channels per task, as in the C source."""

_FIELDS = fields(
    "sequences steps channels width blocks silu packed threads bounds x dy x_batch x_time dy_batch dy_time "
    "weight bias initial dfinal y final y_batch y_time dx dweight dbias dinitial"
)


class CausalConv1dCall(SequenceCall):
    """The arguments that forward and backward share."""

    def __init__(self, args: CausalConv1d) -> None:
        dtype = working_dtype(args.x.dtype)
        super().__init__("causal_conv1d", _FIELDS, dtype, args.x.shape, args.cu_seqlens, args.reverse)
        self.channels, self.width = args.weight.shape
        self.over_time("x", args.x)
        self.array("weight", args.weight.T)
        self.array("bias", args.bias)
        self.states("initial", args.initial_state)
        self.arguments.update(
            channels=self.channels, width=self.width, blocks=-(-self.channels // _BLOCK), silu=args.silu
        )


def forward(args: CausalConv1d) -> tuple[Tensor, Tensor]:
    """`(y, final_state)`; see sinuous.core.ops.causal_conv1d."""
    call = CausalConv1dCall(args)
    y = call.output_over_time("y", call.channels)
    final = call.output("final", call.sequences, call.width - 1, call.channels)
    call.run(call.library.forward)
    return y.to(args.x.dtype), call.in_order(final).to(args.x.dtype)


def backward(args: CausalConv1d, grads: tuple[Tensor | None, Tensor | None]) -> list[Tensor | None]:
    """Gradients of x, weight, bias and initial_state; the values before the activation are recomputed."""
    call = CausalConv1dCall(args)
    dy, dfinal = grads
    call.over_time("dy", torch.zeros_like(args.x) if dy is None else dy)
    call.states("dfinal", dfinal)
    dx = call.output_over_time("dx", call.channels)
    dweight, dbias, dinitial = (
        call.output(name, call.sequences, rows, call.channels)
        for name, rows in (("dweight", call.width), ("dbias", 1), ("dinitial", call.width - 1))
    )
    call.run(call.library.backward)
    return [
        dx,
        dweight.sum(0).T,
        None if args.bias is None else dbias.sum((0, 1)),
        None if args.initial_state is None else call.in_order(dinitial),
    ]


def self_test(dtype: torch.dtype) -> str | None:
    """Compile, load and compare one step with its closed form; None if all is well."""
    one = torch.ones(1, 1, 1, dtype=dtype)
    y, state = forward(CausalConv1d(2 * one, torch.tensor([[3.0, 5.0]], dtype=dtype), initial_state=one))
    if y.item() != 13 or state.item() != 2:
        return f"the compiled convolution is wrong on this machine (got {y.item():.6g}, wanted 13)"
    return None
