# mypy: allow-untyped-defs, allow-incomplete-defs
"""additive_decay: the kernels of the softmax over time, which make of keys what gla takes.

With z_t = log Σ_{s≤t} exp k_s per channel, a step has the share exp(k_t - z_t) in the softmax and leaves exp(z_{t-1} -
z_t) of the others; z is in float64, since only differences of long sums are used of it. Channels of all heads lie side
by side, D of them. `carry_sums` goes through the chunks of each sequence, `share_out` through the steps of each segment
from the z that `carry_sums` left there. No logarithm is below LOWEST, so that no difference is one of infinities.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sinuous.kernels.torch import chunked
from sinuous.kernels.triton.gla_kernels import slot_of
from sinuous.kernels.triton.linear_scan import AHEAD
from sinuous.kernels.triton.matrix_state_kernels import segment_at
from sinuous.kernels.triton.packing import bounds_of, row_of

LOWEST = tl.constexpr(chunked.LOWEST)


@triton.jit
def floored(t):
    """`t` in float64, and not below LOWEST; NaN stays."""
    wide = t.to(tl.float64)
    return tl.where(wide < LOWEST, LOWEST, wide)


@triton.jit
def unfloored(z):
    return tl.where(z == LOWEST, -float("inf"), z)


@triton.jit
def log_add(a, b):
    top = tl.maximum(a, b)
    return top + tl.log(tl.exp(a - top) + tl.exp(b - top))


@triton.jit(do_not_specialize=["length", "sequences"])
def carry_sums(
    k, edge, cu_seqlens, starts, chunk_z, last, length, sequences,
    D: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """z before each segment [segments, D], before each chunk [B, chunks, D] where no sequence starts between, and after
    each sequence [sequences, D]; `edge` is z before each sequence."""
    blocks: tl.constexpr = (D + BD - 1) // BD
    pid = tl.program_id(0)
    d, n = pid % blocks * BD + tl.arange(0, BD), (pid // blocks).to(tl.int64)
    i, there = tl.arange(0, CHUNK), d < D
    begin, steps, batch = bounds_of(n, cu_seqlens, length, PACKED, REVERSE)
    end = begin + steps
    z = floored(tl.load(edge + n * D + d, mask=there, other=0))
    chunks, first_chunk = tl.cdiv(length, CHUNK), begin // CHUNK
    past_chunk = tl.where(steps > 0, tl.cdiv(end, CHUNK), first_chunk)
    for chunk in range(first_chunk, past_chunk):
        start, stop = tl.maximum(begin, chunk * CHUNK), tl.minimum(end, (chunk + 1) * CHUNK)
        if start == chunk * CHUNK:
            tl.store(chunk_z + (batch * chunks + chunk) * D + d, unfloored(z), mask=there)
        place = slot_of(batch, start, n, length, sequences, CHUNK, PACKED, REVERSE)
        tl.store(starts + place * D + d, z, mask=there)
        row = row_of(start + i, batch, length, REVERSE)
        those = (start + i < stop)[:, None] & there[None, :]
        logs = floored(tl.load(k + row[:, None] * D + d[None, :], mask=those, other=-float("inf")))
        top = tl.maximum(tl.max(logs, 0), z)
        z = top + tl.log(tl.sum(tl.exp(logs - top[None, :]), 0) + tl.exp(z - top))
    tl.store(last + n * D + d, unfloored(z), mask=there)


@triton.jit(do_not_specialize=["length", "sequences"])
def share_out(
    k, factor, starts, table, weights, shares, log_decay, length, sequences,
    D: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The share of each step, times its factor if there is one, and z_{t-1} - z_t, 0 where there is nothing to forget;
    the share itself if asked for."""
    blocks: tl.constexpr = (D + BD - 1) // BD
    pid = tl.program_id(0)
    d, unit = pid % blocks * BD + tl.arange(0, BD), pid // blocks
    batch, start, stop, _, _, sequence = segment_at(unit, table, length, CHUNK, PACKED)
    if start == stop:
        return
    there = d < D
    place = slot_of(batch, start, sequence, length, sequences, CHUNK, PACKED, REVERSE)
    z = tl.load(starts + place * D + d, mask=there, other=0)
    for p in tl.range(start, stop, num_stages=AHEAD):
        at = row_of(p, batch, length, REVERSE) * D + d
        log = floored(tl.load(k + at, mask=there, other=0))
        total = log_add(z, log)
        share = tl.where(log == LOWEST, 0, tl.exp(log - total)).to(ACC)
        tl.store(log_decay + at, tl.where(z == LOWEST, 0, z - total), mask=there)
        z = total
        if shares is not None:
            tl.store(shares + at, share, mask=there)
        if factor is not None:
            share *= tl.load(factor + at, mask=there, other=0).to(ACC)
        tl.store(weights + at, share, mask=there)
