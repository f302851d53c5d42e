# mypy: allow-untyped-defs, allow-incomplete-defs
r"""Linear scan, forward and backward: time is cut into chunks so that a small batch fills a GPU too.

Forward, three launches: the state every chunk would reach from zero and the product of its factors; the short
recurrence over chunks, which turns those into the states the chunks start from; and the outputs of each chunk. Where
batch and channels alone fill the device, the last launch walks all chunks by itself. Backward the same with the
adjoint, which runs the other way; the states before each step, which the gradient of a needs, wait in the memory of the
gradient of x until that is known. Each program walks its steps one by one with the states of a block of channels in
registers, so that its loads, which depend on nothing, are issued some steps ahead.

Rows are written out, where other families call `row_of`: with the call some of these loops take more registers.

A complex number is loaded as its two parts, which lie next to each other. In the products of factors over a chunk an
exact zero stops whatever comes, be it NaN, as a reset does.

The equations are in `sinuous.core.ops.linear_scan`; chunks as in Martin and Cundy (arXiv 1709.04057), section 2.2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sinuous.kernels.arguments import LinearScan
from sinuous.kernels.precision import working_dtype
from sinuous.kernels.triton.channel_states import SERIAL_PROGRAMS, boundaries
from sinuous.kernels.triton.complex_product import times
from sinuous.kernels.triton.packing import accumulator, on_device

CHANNELS = 64
"""Channels of a program, two for each thread of its warp. A single warp needs no barrier to read what it wrote."""
AHEAD = tl.constexpr(4)
"""Stages of the software pipeline of a loop over steps."""
OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}


@triton.jit
def read(p, at, there, COMPLEX: tl.constexpr, ACC: tl.constexpr):
    """Real and imaginary part of elements `at`; the latter is 0 of a real tensor."""
    if COMPLEX:
        pair = tl.load(p + at[:, None] * 2 + tl.arange(0, 2)[None, :], mask=there[:, None], other=0).to(ACC)
        re, im = tl.split(pair)
    else:
        re = tl.load(p + at, mask=there, other=0).to(ACC)
        im = tl.zeros_like(re)
    return re, im


@triton.jit
def write(p, at, re, im, there, COMPLEX: tl.constexpr):
    if COMPLEX:
        tl.store(p + at[:, None] * 2 + tl.arange(0, 2)[None, :], tl.join(re, im), mask=there[:, None])
    else:
        tl.store(p + at, re, mask=there)


@triton.jit
def passing(re, im, reset, row, RESETS: tl.constexpr):
    """The state carried over the border before step `row`: 0 if there is a reset."""
    if RESETS:
        keep = tl.load(reset + row) == 0
        re, im = tl.where(keep, re, 0.0), tl.where(keep, im, 0.0)
    return re, im


@triton.jit
def block_of(pid, width, BD: tl.constexpr):
    """Channels of a program, which of them exist, and its number among those with the same channels."""
    blocks = tl.cdiv(width, BD)
    d = (pid % blocks) * BD + tl.arange(0, BD)
    return d, d < width, pid // blocks


@triton.jit(do_not_specialize=["length"])
def chunk_ends(
    x, a, reset, incoming, marks, ends, through, length, width,
    BD: tl.constexpr, CHUNK: tl.constexpr, COMPLEX: tl.constexpr, CONSTANT: tl.constexpr, RESETS: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, ADJOINT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The state after each chunk that starts from zero, to `ends`, and the product of the chunk's factors, to
    `through`, both [B, chunks, D].

    The adjoint runs backwards over the gradient of y, in `x`, and yields the gradient of the state before the chunk.
    Where `marks` names a sequence, the state becomes that sequence's row of `incoming`.
    """
    d, there, chunk = block_of(tl.program_id(0), width, BD)
    chunks = tl.cdiv(length, CHUNK)
    batch, first = (chunk // chunks).to(tl.int64), (chunk % chunks) * CHUNK
    stop = tl.minimum(first + CHUNK, length)
    h_re, h_im = tl.zeros([BD], ACC), tl.zeros([BD], ACC)
    t_re, t_im = tl.zeros([BD], ACC) + 1, tl.zeros([BD], ACC)
    a_re, a_im = h_re, h_im
    if CONSTANT:
        a_re, a_im = read(a, d, there, COMPLEX, ACC)
    for i in tl.range(0, stop - first, num_stages=AHEAD):
        p = stop - 1 - i if ADJOINT else first + i
        if PACKED:
            mark = tl.load(marks + p)
            if mark >= 0:
                h_re, h_im = read(incoming, mark.to(tl.int64) * width + d, there, COMPLEX, ACC)
                t_re, t_im = tl.zeros([BD], ACC), tl.zeros([BD], ACC)
        row = batch * length + (length - 1 - p if REVERSE else p)
        x_re, x_im = read(x, row * width + d, there, COMPLEX, ACC)
        if not CONSTANT:
            a_re, a_im = read(a, row * width + d, there, COMPLEX, ACC)
        if ADJOINT:
            h_re += x_re
            h_im += x_im
        h_re, h_im = times(a_re, a_im, h_re, h_im, COMPLEX, ADJOINT)
        h_re, h_im = passing(h_re, h_im, reset, row, RESETS)
        if not ADJOINT:
            h_re += x_re
            h_im += x_im
        t_re, t_im = times(a_re, a_im, t_re, t_im, COMPLEX, ADJOINT)
        t_re, t_im = passing(t_re, t_im, reset, row, RESETS)
    at = chunk.to(tl.int64) * width + d
    write(ends, at, h_re, h_im, there, COMPLEX)
    write(through, at, t_re, t_im, there, COMPLEX)


@triton.jit(do_not_specialize=["length"])
def carry_chunks(
    carried, through, incoming, marks, length, width,
    BD: tl.constexpr, CHUNK: tl.constexpr, COMPLEX: tl.constexpr,
    PACKED: tl.constexpr, ADJOINT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Replace, in `carried` [B, chunks, D], the state that each chunk reaches from zero by the one before it.

    `incoming` is the state before each sequence; a packed chunk that begins with a sequence (`marks`) starts from that
    sequence's. For the adjoint, states are gradients, and time runs backwards.
    """
    d, there, batch = block_of(tl.program_id(0), width, BD)
    chunks = tl.cdiv(length, CHUNK)
    batch = batch.to(tl.int64)
    h_re, h_im = tl.zeros([BD], ACC), tl.zeros([BD], ACC)
    if not PACKED:
        h_re, h_im = read(incoming, batch * width + d, there, COMPLEX, ACC)
    for i in tl.range(0, chunks, num_stages=AHEAD):
        j = chunks - 1 - i if ADJOINT else i
        if PACKED and not ADJOINT:
            mark = tl.load(marks + j * CHUNK)
            if mark >= 0:
                h_re, h_im = read(incoming, mark.to(tl.int64) * width + d, there, COMPLEX, ACC)
        at = (batch * chunks + j) * width + d
        local_re, local_im = read(carried, at, there, COMPLEX, ACC)
        t_re, t_im = read(through, at, there, COMPLEX, ACC)
        write(carried, at, h_re, h_im, there, COMPLEX)
        h_re, h_im = times(t_re, t_im, h_re, h_im, COMPLEX, False)
        keep = (t_re != 0) | (t_im != 0)
        h_re, h_im = tl.where(keep, h_re, 0.0) + local_re, tl.where(keep, h_im, 0.0) + local_im


@triton.jit(do_not_specialize=["length"])
def outputs(
    x, a, reset, initial, starts, stops, chunk_states, y, final, length, width,
    BD: tl.constexpr, CHUNK: tl.constexpr, COMPLEX: tl.constexpr, CONSTANT: tl.constexpr, RESETS: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, SERIAL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Outputs and final states: of one chunk, from its state, or of all chunks in turn (SERIAL), writing theirs."""
    d, there, rest = block_of(tl.program_id(0), width, BD)
    chunks = tl.cdiv(length, CHUNK)
    if SERIAL:
        batch, first_chunk, last_chunk = rest.to(tl.int64), 0, chunks
    else:
        batch, first_chunk = (rest // chunks).to(tl.int64), rest % chunks
        last_chunk = first_chunk + 1
    h_re, h_im = tl.zeros([BD], ACC), tl.zeros([BD], ACC)
    if SERIAL and not PACKED:
        h_re, h_im = read(initial, batch * width + d, there, COMPLEX, ACC)
    a_re, a_im = h_re, h_im
    if CONSTANT:
        a_re, a_im = read(a, d, there, COMPLEX, ACC)
    for j in range(first_chunk, last_chunk):
        first = j * CHUNK
        here = (batch * chunks + j) * width + d
        if SERIAL:
            if PACKED:
                start = tl.load(starts + first)
                if start >= 0:
                    h_re, h_im = read(initial, start.to(tl.int64) * width + d, there, COMPLEX, ACC)
            write(chunk_states, here, h_re, h_im, there, COMPLEX)
        else:
            h_re, h_im = read(chunk_states, here, there, COMPLEX, ACC)
        for p in tl.range(first, tl.minimum(first + CHUNK, length), num_stages=AHEAD):
            if PACKED:
                start = tl.load(starts + p)
                if start >= 0:
                    h_re, h_im = read(initial, start.to(tl.int64) * width + d, there, COMPLEX, ACC)
            row = batch * length + (length - 1 - p if REVERSE else p)
            x_re, x_im = read(x, row * width + d, there, COMPLEX, ACC)
            if not CONSTANT:
                a_re, a_im = read(a, row * width + d, there, COMPLEX, ACC)
            h_re, h_im = times(a_re, a_im, h_re, h_im, COMPLEX, False)
            h_re, h_im = passing(h_re, h_im, reset, row, RESETS)
            h_re += x_re
            h_im += x_im
            write(y, row * width + d, h_re, h_im, there, COMPLEX)
            if PACKED:
                stop = tl.load(stops + p)
                if stop >= 0:
                    write(final, stop.to(tl.int64) * width + d, h_re, h_im, there, COMPLEX)
    if not PACKED:  # noqa: SIM102 (settled at compile time; Triton would evaluate both sides of an `and`)
        if last_chunk == chunks:
            write(final, batch * width + d, h_re, h_im, there, COMPLEX)


@triton.jit(do_not_specialize=["length"])
def gradients(
    x, a, reset, initial, grad_y, grad_final, starts, stops, chunk_states, carried, dx, da, dinitial, length, width,
    BD: tl.constexpr, CHUNK: tl.constexpr, COMPLEX: tl.constexpr, CONSTANT: tl.constexpr, RESETS: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of all inputs in one chunk; that of a constant a is one partial sum per chunk, `[B, chunks, D]`."""
    d, there, chunk = block_of(tl.program_id(0), width, BD)
    chunks = tl.cdiv(length, CHUNK)
    batch, j = (chunk // chunks).to(tl.int64), chunk % chunks
    first = j * CHUNK
    stop = tl.minimum(first + CHUNK, length)
    here = chunk.to(tl.int64) * width + d
    h_re, h_im = read(chunk_states, here, there, COMPLEX, ACC)
    sum_re, sum_im = tl.zeros([BD], ACC), tl.zeros([BD], ACC)
    a_re, a_im = sum_re, sum_im
    if CONSTANT:
        a_re, a_im = read(a, d, there, COMPLEX, ACC)
    for p in tl.range(first, stop, num_stages=AHEAD):
        if PACKED:
            start = tl.load(starts + p)
            if start >= 0:
                h_re, h_im = read(initial, start.to(tl.int64) * width + d, there, COMPLEX, ACC)
        row = batch * length + (length - 1 - p if REVERSE else p)
        x_re, x_im = read(x, row * width + d, there, COMPLEX, ACC)
        if not CONSTANT:
            a_re, a_im = read(a, row * width + d, there, COMPLEX, ACC)
        write(dx, row * width + d, h_re, h_im, there, COMPLEX)
        h_re, h_im = times(a_re, a_im, h_re, h_im, COMPLEX, False)
        h_re, h_im = passing(h_re, h_im, reset, row, RESETS)
        h_re += x_re
        h_im += x_im
    tl.debug_barrier()
    m_re, m_im = read(carried, here, there, COMPLEX, ACC)
    for i in tl.range(0, stop - first, num_stages=AHEAD):
        p = stop - 1 - i
        if PACKED:
            ending = tl.load(stops + p)
            if ending >= 0:
                m_re, m_im = read(grad_final, ending.to(tl.int64) * width + d, there, COMPLEX, ACC)
        row = batch * length + (length - 1 - p if REVERSE else p)
        g_re, g_im = read(grad_y, row * width + d, there, COMPLEX, ACC)
        before_re, before_im = read(dx, row * width + d, there, COMPLEX, ACC)
        if not CONSTANT:
            a_re, a_im = read(a, row * width + d, there, COMPLEX, ACC)
        m_re += g_re
        m_im += g_im
        write(dx, row * width + d, m_re, m_im, there, COMPLEX)
        da_re, da_im = times(before_re, before_im, m_re, m_im, COMPLEX, True)
        da_re, da_im = passing(da_re, da_im, reset, row, RESETS)
        if CONSTANT:
            sum_re += da_re
            sum_im += da_im
        else:
            write(da, row * width + d, da_re, da_im, there, COMPLEX)
        m_re, m_im = times(a_re, a_im, m_re, m_im, COMPLEX, True)
        m_re, m_im = passing(m_re, m_im, reset, row, RESETS)
        if PACKED:
            start = tl.load(starts + p)
            if start >= 0:
                write(dinitial, start.to(tl.int64) * width + d, m_re, m_im, there, COMPLEX)
    if CONSTANT:
        write(da, here, sum_re, sum_im, there, COMPLEX)
    if not PACKED:  # noqa: SIM102
        if j == 0:
            write(dinitial, batch * width + d, m_re, m_im, there, COMPLEX)


def _real(t: Tensor) -> Tensor:
    """A tensor as kernels take it: contiguous, complex numbers as pairs of real ones."""
    return torch.view_as_real(t.contiguous()) if t.is_complex() else t.contiguous()


class LinearScanCall:
    """The arguments that forward and backward give to their kernels."""

    def __init__(self, args: LinearScan, chunk_size: int) -> None:
        x = args.x
        self.batch, self.length, self.width = x.shape
        self.dtype, self.device = working_dtype(x.dtype), x.device
        count = self.batch if args.cu_seqlens is None else args.cu_seqlens.shape[0] - 1
        self.states = (count, self.width)
        self.chunks, self.blocks = triton.cdiv(self.length, chunk_size), triton.cdiv(self.width, CHANNELS)
        self.x, self.a = _real(x), _real(args.a)
        self.reset = None if args.reset is None else args.reset.contiguous().view(torch.int8)
        self.initial = self.empty(*self.states).zero_() if args.initial_state is None else args.initial_state
        self.initial = self.initial.to(self.dtype).contiguous()
        self.starts: Tensor | None = None
        self.stops: Tensor | None = None
        if args.cu_seqlens is not None:
            self.starts, self.stops, *_ = boundaries(args.cu_seqlens, self.length, chunk_size, args.reverse)
        self.carry: dict[str, Any] = {
            "BD": CHANNELS,
            "CHUNK": chunk_size,
            "COMPLEX": x.is_complex(),
            "PACKED": args.cu_seqlens is not None,
            "ACC": accumulator(x.dtype),
            **OPTIONS,
        }
        flags = {"CONSTANT": args.a.ndim == 1, "RESETS": args.reset is not None, "REVERSE": args.reverse}
        self.steps = {**flags, **self.carry}

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def into_chunks(self, inputs: Tensor, incoming: Tensor, marks: Tensor | None, adjoint: bool) -> Tensor:
        """The state before every chunk, `[B, chunks, D]`, or the gradient of the state after it."""
        carried, through = (self.empty(self.batch, self.chunks, self.width) for _ in range(2))
        chunk_ends[(self.batch * self.chunks * self.blocks,)](
            inputs, self.a, self.reset, _real(incoming), marks, _real(carried), _real(through), self.length, self.width,
            ADJOINT=adjoint, **self.steps,
        )  # fmt: skip
        carry_chunks[(self.batch * self.blocks,)](
            _real(carried), _real(through), _real(incoming), marks, self.length, self.width,
            ADJOINT=adjoint, **self.carry,
        )  # fmt: skip
        return carried


def forward(args: LinearScan, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, final_state, chunk_states)` as `sinuous.core.ops.linear_scan` defines them."""
    x, call = args.x, LinearScanCall(args, chunk_size)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # Sequences without a step end where they begin.
    final = call.initial.clone()
    if x.numel() == 0:
        return y, final, call.empty(call.batch, call.chunks, call.width)
    serial = call.chunks == 1 or call.batch * call.blocks >= SERIAL_PROGRAMS
    with on_device(x):
        if serial:
            chunk_states = call.empty(call.batch, call.chunks, call.width)
        else:
            chunk_states = call.into_chunks(call.x, call.initial, call.starts, adjoint=False)
        outputs[(call.batch * call.blocks * (1 if serial else call.chunks),)](
            call.x, call.a, call.reset, _real(call.initial), call.starts, call.stops, _real(chunk_states),
            _real(y), _real(final), call.length, call.width, SERIAL=serial, **call.steps,
        )  # fmt: skip
    return y, final, chunk_states


def backward(
    args: LinearScan, grads: tuple[Tensor | None, Tensor | None], chunk_states: Tensor, chunk_size: int
) -> list[Tensor | None]:
    """Gradients of x, a and initial_state, given those of y and of the final state."""
    x, call = args.x, LinearScanCall(args, chunk_size)
    grad_y, grad_final = grads
    grad_final = call.empty(*call.states).zero_() if grad_final is None else grad_final.to(call.dtype).contiguous()
    # Sequences without a step end where they begin.
    dinitial = grad_final.clone()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    constant = args.a.ndim == 1
    da = call.empty(call.batch, call.chunks, call.width) if constant else torch.empty_like(dx, dtype=args.a.dtype)
    if x.numel():
        grad_y = _real(torch.zeros_like(x) if grad_y is None else grad_y)
        with on_device(x):
            carried = call.into_chunks(grad_y, grad_final, call.stops, adjoint=True)
            gradients[(call.batch * call.chunks * call.blocks,)](
                call.x, call.a, call.reset, _real(call.initial), grad_y, _real(grad_final), call.starts,
                call.stops, _real(chunk_states.contiguous()), _real(carried), _real(dx), _real(da),
                _real(dinitial), call.length, call.width, **call.steps,
            )  # fmt: skip
    return [dx, da.sum((0, 1)) if constant else da, None if args.initial_state is None else dinitial]
