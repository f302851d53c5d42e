# mypy: allow-untyped-defs, allow-incomplete-defs
"""Scalar-decay linear recurrence (SSD): its decays, forward and backward, around the kernels over states.

The equations are in `sinuous.core.ops.ssd` and in `matrix_state_kernels`, here with u = μ = -Σ log_decay.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sinuous.kernels.arguments import SSD
from sinuous.kernels.torch.chunked import initial_matrix
from sinuous.kernels.triton.matrix_state_kernels import FORGOTTEN, gradient_of_sums, segment_at
from sinuous.kernels.triton.matrix_states import MatrixStatesCall, Weights, carry, carry_adjoint, gradients, read
from sinuous.kernels.triton.packing import on_device, row_of


@triton.jit(do_not_specialize=["length"])
def decays(
    log_decay, table, logs, since_start, until_end, length, stride_b, stride_t, stride_h,
    H: tl.constexpr, BH: tl.constexpr, CHUNK: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Minus the sum of log_decay since the start of the segment, the decay since then, and until the segment's end."""
    blocks: tl.constexpr = (H + BH - 1) // BH
    pid = tl.program_id(0)
    h, unit = pid % blocks * BH + tl.arange(0, BH), pid // blocks
    batch, start, stop, _, _, _ = segment_at(unit, table, length, CHUNK, PACKED)
    if start == stop:
        return
    p = start + tl.arange(0, CHUNK)
    there = (p < stop)[:, None] & (h < H)[None, :]
    row = row_of(p, batch, length, REVERSE)
    place = batch * stride_b + (row - batch * length)[:, None] * stride_t + h[None, :] * stride_h
    g = tl.maximum(tl.load(log_decay + place, mask=there, other=0).to(tl.float64), FORGOTTEN)
    sums = tl.cumsum(g, 0)
    at = row[:, None] * H + h[None, :]
    tl.store(logs + at, -sums, mask=there)
    tl.store(since_start + at, tl.exp(sums.to(ACC)), mask=there)
    tl.store(until_end + at, tl.exp((tl.sum(g, 0)[None, :] - sums).to(ACC)), mask=there)


@triton.jit(do_not_specialize=["length"])
def decay_gradients(
    log_decay, query_dots, key_dots, ends, table, grad, segments, steps, length, key_blocks,
    stride_b, stride_t, stride_h,
    H: tl.constexpr, BH: tl.constexpr, CHUNK: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Gradient of log_decay at every step."""
    blocks: tl.constexpr = (H + BH - 1) // BH
    pid = tl.program_id(0)
    h, unit = pid % blocks * BH + tl.arange(0, BH), (pid // blocks).to(tl.int64)
    batch, start, stop, _, _, _ = segment_at(unit, table, length, CHUNK, PACKED)
    if start == stop:
        return
    p = start + tl.arange(0, CHUNK)
    there = (p < stop)[:, None] & (h < H)[None, :]
    row = row_of(p, batch, length, REVERSE)
    _, into_logs = gradient_of_sums(
        query_dots, key_dots, ends, row, unit, h, there, h < H, stop, p, segments, steps, key_blocks, H
    )
    place = batch * stride_b + (row - batch * length)[:, None] * stride_t + h[None, :] * stride_h
    reset = tl.load(log_decay + place, mask=there, other=0).to(tl.float32) == float("-inf")
    tl.store(grad + row[:, None] * H + h[None, :], tl.where(reset, 0.0, into_logs), mask=there)


def weights_of(call: MatrixStatesCall, log_decay: Tensor) -> Weights:
    """Products of `log_decay`, `[B, T, H]` with any strides."""
    logs = torch.empty(log_decay.shape, dtype=torch.float64, device=log_decay.device)
    since_start, until_end = (torch.empty_like(logs, dtype=call.dtype) for _ in range(2))
    blocks, form = call.over_gates()
    with on_device(log_decay):
        decays[(call.segments * blocks,)](
            log_decay, call.table, logs, since_start, until_end, call.length, *log_decay.stride(),
            ACC=call.sizes["ACC"], **form,
        )  # fmt: skip
    return Weights(logs, logs, since_start, until_end)


def decay_gradient(
    call: MatrixStatesCall, log_decay: Tensor, query_dots: Tensor, key_dots: Tensor, ends: Tensor
) -> Tensor:
    """Gradient of `log_decay`, `[B, T, H]` with any strides, of what `side_gradients` writes."""
    grad = torch.empty(log_decay.shape, dtype=call.dtype, device=log_decay.device)
    blocks, form = call.over_gates()
    with on_device(log_decay):
        decay_gradients[(call.segments * blocks,)](
            log_decay, query_dots, key_dots, ends, call.table, grad,
            call.segments, call.steps, call.length, ends.shape[0], *log_decay.stride(), **form,
        )  # fmt: skip
    return grad


def over_time(log_decay: Tensor | None, v: Tensor) -> Tensor:
    """`log_decay` as `[B, T, H]`, without a copy."""
    return (v.new_zeros(1) if log_decay is None else log_decay).expand(v.shape[:3])


def _of_call(args: SSD, chunk_size: int) -> tuple[SSD, MatrixStatesCall, Tensor]:
    """The arguments in the kernels' layout, their call, and its initial state."""
    args = args._replace(q=args.q.contiguous(), k=args.k.contiguous(), v=args.v.contiguous())
    call = MatrixStatesCall.of(args.q, args.v, args.cu_seqlens, args.scale, args.reverse, chunk_size)
    (initial,) = initial_matrix(args.q, args.v, args.initial_state, args.cu_seqlens)
    return args, call, initial


def forward(args: SSD, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, final_state, chunk_states)` as `sinuous.core.ops.ssd` defines them."""
    args, call, initial = _of_call(args, chunk_size)
    q, k, v = args.q, args.k, args.v
    if v.numel() == 0:
        return torch.empty_like(v), initial.clone(), call.empty_states(initial)
    weights = weights_of(call, over_time(args.log_decay, v))
    (final, _), chunk_states = carry(call, k, v, weights, (initial, None))
    return read(call, q, k, v, weights, (initial, None), chunk_states, None), final, chunk_states[0]


def backward(
    args: SSD, grads: tuple[Tensor | None, Tensor | None], chunk_states: Tensor, chunk_size: int
) -> list[Tensor | None]:
    """Gradients of q, k, v, log_decay and initial_state."""
    args, call, initial = _of_call(args, chunk_size)
    q, k, v, log_decay = args.q, args.k, args.v, args.log_decay
    dy = torch.zeros_like(v) if grads[0] is None else grads[0].contiguous()
    dfinal = torch.zeros_like(initial) if grads[1] is None else grads[1].to(call.dtype).contiguous()
    if v.numel() == 0:
        zeros = [None if t is None else torch.zeros_like(t) for t in (q, k, v, log_decay)]
        return [*zeros, None if args.initial_state is None else dfinal]
    stepwise = over_time(log_decay, v)
    weights = weights_of(call, stepwise)
    before, after = carry_adjoint(call, q, dy, None, weights.since_start, weights, (dfinal, None))
    d = gradients(
        call, q, k, v, dy, None, weights.since_start, weights,
        (initial, None), (chunk_states, None), (dfinal, None), after,
    )  # fmt: skip
    dlog_decay = None
    if log_decay is not None:
        dlog_decay = decay_gradient(call, stepwise, d.query_dots, d.key_dots, d.ends)
        dlog_decay = dlog_decay.sum((0, 1)) if log_decay.ndim == 1 else dlog_decay
    return [d.q, d.k, d.v, dlog_decay, None if args.initial_state is None else before[0]]
