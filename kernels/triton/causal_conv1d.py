# mypy: allow-untyped-defs, allow-incomplete-defs
r"""Depthwise causal convolution, forward and backward, over tiles of steps × channels.

The backward pass is two sweeps: the gradient of the filtered input, with the filter's own, and then that of the
input, which reads the former up to W-1 steps later. Sums over time are written as one partial sum per tile and added in
a fixed order.

The equation is in `sinuous.core.ops.causal_conv1d`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sinuous.kernels.arguments import CausalConv1d
from sinuous.kernels.precision import working_dtype
from sinuous.kernels.triton.packing import accumulator, bounds_of, on_device, packed_steps, row_of

STEPS, CHANNELS = 32, 64
"""Steps and channels of a tile."""
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


@triton.jit
def input_at(
    x, initial, p, position, sequence, batch, there, d, length, width,
    W: tl.constexpr, STATEFUL: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The inputs [BT, BD] of processing steps `p`, which are number `position` of their `sequence`; a negative
    position, down to 1-W, is a row of the initial state."""
    row = row_of(p, batch, length, REVERSE)
    inputs = tl.load(x + row[:, None] * width + d[None, :], mask=(position >= 0)[:, None] & there, other=0).to(ACC)
    if STATEFUL:
        row = sequence.to(tl.int64) * (W - 1) + (W - 1 + position)
        earlier = (position < 0)[:, None] & there
        inputs += tl.load(initial + row[:, None] * width + d[None, :], mask=earlier, other=0).to(ACC)
    return inputs


@triton.jit
def pre_activation(
    x, weight, bias, initial, p, position, sequence, batch, there, d, length, width,
    W: tl.constexpr, BIASED: tl.constexpr, STATEFUL: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The filtered input [BT, BD] at processing steps `p`."""
    total = tl.zeros(there.shape, ACC)
    if BIASED:
        total += tl.load(bias + d, mask=d < width, other=0).to(ACC)[None, :]
    for j in tl.static_range(W):
        value = input_at(
            x, initial, p - (W - 1 - j), position - (W - 1 - j), sequence, batch, there, d, length, width,
            W, STATEFUL, REVERSE, ACC,
        )  # fmt: skip
        total += tl.load(weight + d * W + j, mask=d < width, other=0).to(ACC)[None, :] * value
    return total


@triton.jit(do_not_specialize=["length"])
def convolve(
    x, weight, bias, initial, sequences, before, y, length, width,
    W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, SILU: tl.constexpr, BIASED: tl.constexpr,
    STATEFUL: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Outputs of a tile."""
    blocks, tiles = tl.cdiv(width, BD), tl.cdiv(length, BT)
    pid = tl.program_id(0)
    d = (pid % blocks) * BD + tl.arange(0, BD)
    p = (pid // blocks) % tiles * BT + tl.arange(0, BT)
    batch = (pid // blocks // tiles).to(tl.int64)
    position, sequence = p, tl.zeros([BT], tl.int64) + batch
    if PACKED:
        position = tl.load(before + p, mask=p < length, other=0)
        sequence = tl.load(sequences + p, mask=p < length, other=0).to(tl.int64)
    there = (p < length)[:, None] & (d < width)[None, :]
    pre = pre_activation(
        x, weight, bias, initial, p, position, sequence, batch, there, d, length, width,
        W, BIASED, STATEFUL, REVERSE, ACC,
    )  # fmt: skip
    if SILU:
        pre = pre / (1 + tl.exp(-pre))
    row = row_of(p, batch, length, REVERSE)
    tl.store(y + row[:, None] * width + d[None, :], pre, mask=there)


@triton.jit(do_not_specialize=["length"])
def tails(
    x, initial, cu_seqlens, final, length, width,
    W: tl.constexpr, BW: tl.constexpr, BD: tl.constexpr,
    STATEFUL: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The last W-1 inputs of a sequence, those of its initial state included."""
    blocks = tl.cdiv(width, BD)
    pid = tl.program_id(0)
    d = (pid % blocks) * BD + tl.arange(0, BD)
    i = tl.arange(0, BW)
    n = (pid // blocks).to(tl.int64)
    first, steps, batch = bounds_of(n, cu_seqlens, length, PACKED, REVERSE)
    position = steps - (W - 1) + i
    there = (i < W - 1)[:, None] & (d < width)[None, :]
    value = input_at(
        x, initial, first + position, position, tl.zeros([BW], tl.int64) + n, batch, there, d, length, width,
        W, STATEFUL, REVERSE, ACC,
    )  # fmt: skip
    tl.store(final + (n * (W - 1) + i)[:, None] * width + d[None, :], value, mask=there)


@triton.jit(do_not_specialize=["length"])
def filter_gradients(
    x, weight, bias, initial, sequences, before, grad_y, grad_pre, dweight, dbias, length, width,
    W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, SILU: tl.constexpr, BIASED: tl.constexpr,
    STATEFUL: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile's gradients of the filtered input, and its partial sums of those of the filter [tiles, W, D] and the bias
    [tiles, D]."""
    blocks, tiles = tl.cdiv(width, BD), tl.cdiv(length, BT)
    pid = tl.program_id(0)
    d = (pid % blocks) * BD + tl.arange(0, BD)
    p = (pid // blocks) % tiles * BT + tl.arange(0, BT)
    tile = (pid // blocks).to(tl.int64)
    batch = tile // tiles
    position, sequence = p, tl.zeros([BT], tl.int64) + batch
    if PACKED:
        position = tl.load(before + p, mask=p < length, other=0)
        sequence = tl.load(sequences + p, mask=p < length, other=0).to(tl.int64)
    there = (p < length)[:, None] & (d < width)[None, :]
    row = row_of(p, batch, length, REVERSE)
    at = row[:, None] * width + d[None, :]
    g = tl.load(grad_y + at, mask=there, other=0).to(ACC)
    if SILU:
        pre = pre_activation(
            x, weight, bias, initial, p, position, sequence, batch, there, d, length, width,
            W, BIASED, STATEFUL, REVERSE, ACC,
        )  # fmt: skip
        sigmoid = 1 / (1 + tl.exp(-pre))
        g *= sigmoid * (1 + pre * (1 - sigmoid))
        tl.store(grad_pre + at, g, mask=there)
    if BIASED:
        tl.store(dbias + tile * width + d, tl.sum(g, 0), mask=d < width)
    for j in tl.static_range(W):
        value = input_at(
            x, initial, p - (W - 1 - j), position - (W - 1 - j), sequence, batch, there, d, length, width,
            W, STATEFUL, REVERSE, ACC,
        )  # fmt: skip
        tl.store(dweight + (tile * W + j) * width + d, tl.sum(g * value, 0), mask=d < width)


@triton.jit(do_not_specialize=["length"])
def input_gradients(
    weight, sequences, afterwards, grad_pre, grad_final, dx, length, width,
    W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile's inputs: an input is read by W steps and by the final state if fewer than W-1 follow it."""
    blocks, tiles = tl.cdiv(width, BD), tl.cdiv(length, BT)
    pid = tl.program_id(0)
    d = (pid % blocks) * BD + tl.arange(0, BD)
    p = (pid // blocks) % tiles * BT + tl.arange(0, BT)
    batch = (pid // blocks // tiles).to(tl.int64)
    after, sequence = length - 1 - p, tl.zeros([BT], tl.int64) + batch
    if PACKED:
        after = tl.load(afterwards + p, mask=p < length, other=0)
        sequence = tl.load(sequences + p, mask=p < length, other=0).to(tl.int64)
    there = (p < length)[:, None] & (d < width)[None, :]
    state_row = sequence * (W - 1) + (W - 2 - after)
    total = tl.load(
        grad_final + state_row[:, None] * width + d[None, :], mask=(after < W - 1)[:, None] & there, other=0
    ).to(ACC)  # fmt: skip
    for k in tl.static_range(W):
        row = row_of(p + k, batch, length, REVERSE)
        mask = (after >= k)[:, None] & there
        g = tl.load(grad_pre + row[:, None] * width + d[None, :], mask=mask, other=0).to(ACC)
        total += tl.load(weight + d * W + (W - 1 - k), mask=d < width, other=0).to(ACC)[None, :] * g
    row = row_of(p, batch, length, REVERSE)
    tl.store(dx + row[:, None] * width + d[None, :], total, mask=there)


@triton.jit(do_not_specialize=["length"])
def initial_state_gradients(
    weight, cu_seqlens, grad_pre, grad_final, dinitial, length, width,
    W: tl.constexpr, BW: tl.constexpr, BD: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradient of a sequence's initial state: from its first W-1 steps, and from the final state of a shorter one."""
    blocks = tl.cdiv(width, BD)
    pid = tl.program_id(0)
    d = (pid % blocks) * BD + tl.arange(0, BD)
    i = tl.arange(0, BW)
    n = (pid // blocks).to(tl.int64)
    first, steps, batch = bounds_of(n, cu_seqlens, length, PACKED, REVERSE)
    there = (i < W - 1)[:, None] & (d < width)[None, :]
    steps_of = tl.where(d < width, steps, 0)
    state_row = n * (W - 1) + i
    total = tl.load(
        grad_final + (state_row - steps)[:, None] * width + d[None, :], mask=(i >= steps)[:, None] & there, other=0
    ).to(ACC)  # fmt: skip
    for q in tl.static_range(W - 1):
        row = row_of(first + q, batch, length, REVERSE)
        g = tl.load(grad_pre + row * width + d, mask=steps_of > q, other=0).to(ACC)
        tap = tl.load(weight + d[None, :] * W + (i - q)[:, None], mask=(i >= q)[:, None] & there, other=0)
        total += tap.to(ACC) * g[None, :]
    tl.store(dinitial + state_row[:, None] * width + d[None, :], total, mask=there)


def _contiguous(args: CausalConv1d) -> CausalConv1d:
    return CausalConv1d._make(t.contiguous() if isinstance(t, Tensor) else t for t in args)


def _launch(args: CausalConv1d) -> tuple[dict[str, Any], int, int]:
    """Options of every launch, and how many sequences and blocks of channels there are."""
    x, bounds = args.x, args.cu_seqlens
    options = {"W": args.weight.shape[1], "BD": CHANNELS, "PACKED": bounds is not None, "REVERSE": args.reverse}
    sequences = x.shape[0] if bounds is None else bounds.shape[0] - 1
    return options | {"ACC": accumulator(x.dtype), **OPTIONS}, sequences, triton.cdiv(x.shape[2], CHANNELS)


def forward(args: CausalConv1d) -> tuple[Tensor, Tensor]:
    """`(y, final_state)` as `sinuous.core.ops.causal_conv1d` defines them."""
    args = _contiguous(args)
    x, weight, bias, initial, bounds = args.x, args.weight, args.bias, args.initial_state, args.cu_seqlens
    (batch, length, width), taps = x.shape, weight.shape[1]
    options, sequences, channel_blocks = _launch(args)
    options["STATEFUL"] = initial is not None
    y, final = torch.empty_like(x), x.new_empty(sequences, taps - 1, width)
    with on_device(x):
        if y.numel():
            sequence, before, _ = (None,) * 3 if bounds is None else packed_steps(bounds, length, args.reverse)
            convolve[(batch * triton.cdiv(length, STEPS) * channel_blocks,)](
                x, weight, bias, initial, sequence, before, y, length, width,
                BT=STEPS, SILU=args.silu, BIASED=bias is not None, **options,
            )  # fmt: skip
        if final.numel():
            tails[(sequences * channel_blocks,)](
                x, initial, bounds, final, length, width, BW=triton.next_power_of_2(taps - 1), **options
            )
    return y, final


def backward(args: CausalConv1d, grads: tuple[Tensor | None, Tensor | None]) -> list[Tensor | None]:
    """Gradients of x, weight, bias and initial_state, given those of y and of the final state."""
    args = _contiguous(args)
    x, weight, bias, initial, bounds = args.x, args.weight, args.bias, args.initial_state, args.cu_seqlens
    (batch, length, width), taps = x.shape, weight.shape[1]
    options, sequences, channel_blocks = _launch(args)
    grad_y = torch.zeros_like(x) if grads[0] is None else grads[0].contiguous()
    grad_final = x.new_zeros(sequences, taps - 1, width) if grads[1] is None else grads[1].contiguous()
    tiles = batch * triton.cdiv(length, STEPS)

    def empty(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=working_dtype(x.dtype), device=x.device)

    dx, dinitial = torch.empty_like(x), None if initial is None else torch.empty_like(initial)
    grad_pre = empty(*x.shape) if args.silu else grad_y
    dweight, dbias = empty(tiles, taps, width), None if bias is None else empty(tiles, width)
    with on_device(x):
        if dx.numel():
            sequence, before, after = (None,) * 3 if bounds is None else packed_steps(bounds, length, args.reverse)
            filter_gradients[(tiles * channel_blocks,)](
                x, weight, bias, initial, sequence, before, grad_y, grad_pre, dweight, dbias, length, width,
                BT=STEPS, SILU=args.silu, BIASED=bias is not None, STATEFUL=initial is not None, **options,
            )  # fmt: skip
            input_gradients[(tiles * channel_blocks,)](
                weight, sequence, after, grad_pre, grad_final, dx, length, width, BT=STEPS, **options
            )
        if dinitial is not None and dinitial.numel():
            initial_state_gradients[(sequences * channel_blocks,)](
                weight, bounds, grad_pre, grad_final, dinitial, length, width,
                BW=triton.next_power_of_2(taps - 1), **options,
            )  # fmt: skip
    return [dx, dweight.sum(0).T, None if dbias is None else dbias.sum(0), dinitial]
