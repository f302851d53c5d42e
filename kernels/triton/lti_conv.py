"""Launches of the kernels in lti_conv_kernels for diagonal systems; those with a low rank run in plain torch, whose
matrix products and transforms a GPU does well.

The discretisation, in double precision, is that of every form, and autograd's: kernels see λ, b and r of every channel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sinuous.kernels.arguments import LTIConv
from sinuous.kernels.precision import working_dtype
from sinuous.kernels.torch import lti_conv as plain
from sinuous.kernels.torch.differentiation import autograd_inside_an_op
from sinuous.kernels.torch.discretization import conj, discretize, plus_one, times
from sinuous.kernels.torch.lti_operators import with_leaves
from sinuous.kernels.triton.channel_states import SERIAL_PROGRAMS, Boundaries, blocks, boundaries
from sinuous.kernels.triton.lti_conv_kernels import adjoint_sums, carry_chunks, chunk_ends, forward_sums, outputs
from sinuous.kernels.triton.packing import accumulator, on_device

CHUNK = 64
PROGRAMS = 2048
"""Approximate number of programs that share the chunks of a pass that sums over them. It must not depend on the device,
since it fixes the order of sums."""


class DiagonalSystem(NamedTuple):
    """λ, b and r = 2 conj(C), `[D, M, 2]`, in double precision."""

    factor: Tensor
    into: Tensor
    readout: Tensor

    @classmethod
    def of(cls, args: LTIConv) -> DiagonalSystem:
        factor, into, _, _ = discretize(args.dt, args.A, args.B, None, args.discretization)
        return cls(factor, into.expand_as(factor), (2 * conj(args.C.double())).expand_as(factor))


class LTIConvCall:
    """The arguments that forward and backward give to their kernels."""

    def __init__(self, args: LTIConv, exact: DiagonalSystem) -> None:
        u, D = args.u, args.D
        self.batch, self.length, self.width = u.shape
        self.modes = exact.factor.shape[1]
        self.dtype, self.device, self.exact = working_dtype(u.dtype), u.device, exact
        self.count = self.batch if args.cu_seqlens is None else args.cu_seqlens.shape[0] - 1
        self.chunks = triton.cdiv(self.length, CHUNK)
        self.u = u.contiguous()
        self.factor, self.into, self.readout = (t.to(self.dtype).contiguous() for t in exact)
        self.D = None if D is None else D.to(self.dtype).contiguous()
        self.initial = self.states(args.initial_state)
        self.marks: Boundaries | None = None
        if args.cu_seqlens is not None:
            self.marks = boundaries(args.cu_seqlens, self.length, CHUNK, args.reverse)
        self.form = {"PACKED": args.cu_seqlens is not None, "ACC": accumulator(u.dtype)}
        self.reverse = args.reverse

    @property
    def bounds(self) -> tuple[Tensor | None, Tensor | None]:
        """The sequence that starts at a step, and the one that stops there."""
        return (None, None) if self.marks is None else (self.marks.starts, self.marks.stops)

    def blocks(self, per_warp: int) -> tuple[int, dict[str, Any]]:
        """The number of blocks of channels, and their compile-time arguments."""
        shape = blocks(self.width, 1, self.modes, per_warp)
        sizes = {"M": self.modes, "BD": shape.channels, "BM": shape.state, "CHUNK": CHUNK}
        return shape.total, {**sizes, **self.form, **shape.options}

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def states(self, states: Tensor | None) -> Tensor:
        """States `[sequences, D, M, 2]` as kernels take them; zeros for None."""
        if states is None:
            return self.empty(self.count, self.width, self.modes, 2).zero_()
        return states.to(self.dtype).contiguous()

    def across(self, steps: int, adjoint: bool) -> Tensor:
        """λ^steps, or its conjugate, by squaring: pow() on a GPU may make a NaN of a factor that is 0."""
        square, power = self.exact.factor, plus_one(torch.zeros_like(self.exact.factor))
        while steps:
            power = times(power, square) if steps & 1 else power
            square, steps = times(square, square), steps >> 1
        return (conj(power) if adjoint else power).to(self.dtype).contiguous()

    def into_chunks(self, inputs: Tensor, incoming: Tensor, adjoint: bool) -> Tensor:
        """The state before every chunk, `[B, chunks, D, M, 2]`, or the gradient of the state after it."""
        carried = self.empty(self.batch, self.chunks, self.width, self.modes, 2)
        factor, into, marks, cut = self.factor, self.into, None, None
        if adjoint:
            factor = conj(factor)
            into = times(factor, self.readout)
        if self.marks is not None:
            marks, _, cut, _ = self.marks
            if adjoint:
                _, marks, _, cut = self.marks
        total, block = self.blocks(256)
        chunk_ends[(self.batch * self.chunks * total,)](
            inputs, factor, into, incoming, marks, carried, self.length, self.width,
            REVERSE=self.reverse, ADJOINT=adjoint, **block,
        )  # fmt: skip
        last = self.length - (self.chunks - 1) * CHUNK
        carry_chunks[(self.batch * total,)](
            carried, self.across(CHUNK, adjoint), self.across(last, adjoint), incoming, cut, self.length, self.width,
            ADJOINT=adjoint, **block,
        )  # fmt: skip
        return carried


def forward(args: LTIConv) -> tuple[Tensor, Tensor]:
    """`(y, final_state)`; see sinuous.core.ops.lti_conv."""
    if args.P is not None:
        return plain.forward(args)
    u, call = args.u, LTIConvCall(args, DiagonalSystem.of(args))
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    # Sequences without a step end where they begin.
    final = call.initial.clone()
    if u.numel():
        total, block = call.blocks(256)
        serial = call.chunks == 1 or call.batch * total >= SERIAL_PROGRAMS
        with on_device(u):
            carried = None if serial else call.into_chunks(call.u, call.initial, adjoint=False)
            outputs[(call.batch * total * (1 if serial else call.chunks),)](
                call.u, call.factor, call.into, call.readout, call.D, call.initial, *call.bounds, carried, y, final,
                call.length, call.width, SKIP=args.D is not None, REVERSE=args.reverse, SERIAL=serial, **block,
            )  # fmt: skip
    return y, final


def backward(args: LTIConv, grads: tuple[Tensor | None, Tensor | None]) -> list[Tensor | None]:
    """Gradients of u, dt, A, B, C, P, D and initial_state."""
    if args.P is not None:
        return plain.backward(args, grads)
    with autograd_inside_an_op():
        args, leaves = with_leaves(args, ("dt", "A", "B", "C"))
        system = DiagonalSystem.of(args)
    exact = DiagonalSystem(*(t.detach() for t in system))
    call = LTIConvCall(args, exact)
    grad_y = torch.zeros_like(call.u) if grads[0] is None else grads[0].contiguous()
    grad_final = call.states(grads[1])
    # Sequences without a step end where they begin.
    dinitial, du = grad_final.clone(), torch.empty_like(call.u)
    total, block = call.blocks(128)
    slots = max(1, min(call.batch * call.chunks, triton.cdiv(PROGRAMS, total)))
    dfactor, dinto, dreadout = (call.empty(slots, call.width, call.modes, 2) for _ in range(3))
    dD = None if args.D is None else call.empty(slots, call.width)
    if args.u.numel():
        inputs = (call.u, call.factor, call.into, call.readout)
        sizes = (call.batch, call.length, call.width, slots)
        with on_device(args.u):
            states = call.into_chunks(call.u, call.initial, adjoint=False)
            adjoints = call.into_chunks(grad_y, grad_final, adjoint=True)
            forward_sums[(slots * total,)](
                *inputs, grad_y, call.initial, grad_final, *call.bounds, states, adjoints, dfactor, dreadout, *sizes,
                REVERSE=args.reverse, **block,
            )  # fmt: skip
            adjoint_sums[(slots * total,)](
                *inputs, call.D, grad_y, grad_final, *call.bounds, adjoints, du, dinto, dD, dinitial, *sizes,
                SKIP=args.D is not None, REVERSE=args.reverse, **block,
            )  # fmt: skip
        sums = [t.sum(0, dtype=torch.float64) for t in (dfactor, dinto, dreadout)]
    else:
        sums = [torch.zeros_like(t) for t in exact]
    with autograd_inside_an_op():
        of_leaves = torch.autograd.grad(tuple(system), list(leaves.values()), sums)
    grad_D = None if dD is None else dD.sum(0) if args.u.numel() else torch.zeros_like(dD[0])
    return [du, *of_leaves, None, grad_D, None if args.initial_state is None else dinitial]
