# mypy: allow-untyped-defs, allow-incomplete-defs
r"""Kernels of diagonal linear systems: the state of a block of channels in registers, one step after the other.

    x_t = λ ⊙ x_{t-1} + b u_t        y_t = <r, x_t> + D u_t            over M complex numbers as pairs, r = 2 conj(C)

Time is cut into chunks, so that a small batch fills a device too. As λ is constant, a chunk of c steps takes the state
before it to λ^c times that state, and needs no product of its own. The adjoint

    m̂_t = m_t + r g_t        m_{t-1} = conj(λ) ⊙ m̂_t        du_t = <b, m̂_t> + D g_t        db = Σ_t u_t m̂_t

is the same recurrence backwards. The other two, dr = Σ_t g_t x_t and dλ, come from a walk forwards that also carries
s_t = ∂x_t/∂λ = λ s_{t-1} + x_{t-1}, from 0 in every chunk, whose end has the gradient m:

    dλ = Σ_t g_t conj(s_t) r + conj(s_c) m_c

so that no state but those at the edges of chunks is ever stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sinuous.kernels.triton.complex_product import times
from sinuous.kernels.triton.packing import row_of


@triton.jit
def read(at, there):
    return tl.load(at, mask=there, other=0), tl.load(at + 1, mask=there, other=0)


@triton.jit
def write(at, re, im, there):
    tl.store(at, re, mask=there)
    tl.store(at + 1, im, mask=there)


@triton.jit
def channels_of(block, width, M: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr):
    """Channels of a block and which of them exist; where their pairs lie in `[D, M, 2]` and which of them exist."""
    d, m = block * BD + tl.arange(0, BD), tl.arange(0, BM)
    there = d < width
    return d, there, (d[:, None] * M + m[None, :]) * 2, there[:, None] & (m < M)[None, :]


@triton.jit(do_not_specialize=["length"])
def chunk_ends(
    x, factor, into, incoming, marks, ends, length, width,
    M: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, CHUNK: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, ADJOINT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The state each chunk reaches from zero, to `ends` [B, chunks, D, M, 2]; with ADJOINT from its last step to its
    first.

    `marks` has the sequence whose `incoming` state is the one before a step, or -1.
    """
    blocks, chunks = tl.cdiv(width, BD), tl.cdiv(length, CHUNK)
    d, there, dm, there_dm = channels_of(tl.program_id(0) % blocks, width, M, BD, BM)
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    first = (chunk % chunks).to(tl.int32) * CHUNK
    stop = tl.minimum(first + CHUNK, length)
    f_re, f_im = read(factor + dm, there_dm)
    b_re, b_im = read(into + dm, there_dm)
    h_re, h_im = tl.zeros([BD, BM], ACC), tl.zeros([BD, BM], ACC)
    for i in range(0, stop - first):
        p = stop - 1 - i if ADJOINT else first + i
        if PACKED:
            mark = tl.load(marks + p)
            if mark >= 0:
                h_re, h_im = read(incoming + mark.to(tl.int64) * width * M * 2 + dm, there_dm)
        row = row_of(p, chunk // chunks, length, REVERSE)
        x_t = tl.load(x + row * width + d, mask=there, other=0).to(ACC)[:, None]
        h_re, h_im = times(f_re, f_im, h_re, h_im)
        h_re += b_re * x_t
        h_im += b_im * x_t
    write(ends + chunk * width * M * 2 + dm, h_re, h_im, there_dm)


@triton.jit(do_not_specialize=["length"])
def carry_chunks(
    carried, across, across_last, incoming, cut, length, width,
    M: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, CHUNK: tl.constexpr,
    PACKED: tl.constexpr, ADJOINT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Replace, in `carried`, the state that each chunk reaches from zero by the one before it. λ^c is `across` a chunk,
    and `across_last` for the last, which may be shorter. A packed chunk that is `cut` by a boundary lets no state
    through."""
    blocks, chunks = tl.cdiv(width, BD), tl.cdiv(length, CHUNK)
    _, _, dm, there = channels_of(tl.program_id(0) % blocks, width, M, BD, BM)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    a_re, a_im = read(across + dm, there)
    l_re, l_im = read(across_last + dm, there)
    h_re, h_im = tl.zeros([BD, BM], ACC), tl.zeros([BD, BM], ACC)
    if not PACKED:
        h_re, h_im = read(incoming + batch * width * M * 2 + dm, there)
    for i in range(0, chunks):
        j = chunks - 1 - i if ADJOINT else i
        here = carried + (batch * chunks + j) * width * M * 2 + dm
        local_re, local_im = read(here, there)
        write(here, h_re, h_im, there)
        last = j == chunks - 1
        h_re, h_im = times(tl.where(last, l_re, a_re), tl.where(last, l_im, a_im), h_re, h_im)
        if PACKED:
            whole = tl.load(cut + j) == 0
            h_re, h_im = tl.where(whole, h_re, 0.0), tl.where(whole, h_im, 0.0)
        h_re += local_re
        h_im += local_im


@triton.jit(do_not_specialize=["length"])
def outputs(
    u, factor, into, readout, D, initial, starts, stops, carried, y, final, length, width,
    M: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, CHUNK: tl.constexpr, SKIP: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, SERIAL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Outputs and final states: of one chunk, from its state, or of all of time (SERIAL)."""
    blocks, chunks = tl.cdiv(width, BD), tl.cdiv(length, CHUNK)
    d, there, dm, there_dm = channels_of(tl.program_id(0) % blocks, width, M, BD, BM)
    place = (tl.program_id(0) // blocks).to(tl.int64)
    if SERIAL:
        batch, first, stop = place, 0, length
    else:
        batch, first = place // chunks, (place % chunks).to(tl.int32) * CHUNK
        stop = tl.minimum(first + CHUNK, length)
    f_re, f_im = read(factor + dm, there_dm)
    b_re, b_im = read(into + dm, there_dm)
    r_re, r_im = read(readout + dm, there_dm)
    skip = tl.zeros([BD], ACC)
    if SKIP:
        skip = tl.load(D + d, mask=there, other=0)
    h_re, h_im = tl.zeros([BD, BM], ACC), tl.zeros([BD, BM], ACC)
    if not SERIAL:
        h_re, h_im = read(carried + place * width * M * 2 + dm, there_dm)
    elif not PACKED:
        h_re, h_im = read(initial + batch * width * M * 2 + dm, there_dm)
    for p in range(first, stop):
        if PACKED:
            start = tl.load(starts + p)
            if start >= 0:
                h_re, h_im = read(initial + start.to(tl.int64) * width * M * 2 + dm, there_dm)
        row = row_of(p, batch, length, REVERSE)
        u_t = tl.load(u + row * width + d, mask=there, other=0).to(ACC)
        h_re, h_im = times(f_re, f_im, h_re, h_im)
        h_re += b_re * u_t[:, None]
        h_im += b_im * u_t[:, None]
        tl.store(y + row * width + d, tl.sum(r_re * h_re + r_im * h_im, 1) + skip * u_t, mask=there)
        if PACKED:
            end = tl.load(stops + p)
            if end >= 0:
                write(final + end.to(tl.int64) * width * M * 2 + dm, h_re, h_im, there_dm)
    if not PACKED:  # noqa: SIM102 (settled at compile time; Triton would evaluate both sides of an `and`)
        if stop == length:
            write(final + batch * width * M * 2 + dm, h_re, h_im, there_dm)


@triton.jit(do_not_specialize=["batches", "length", "slots"])
def forward_sums(
    u, factor, into, readout, grad_y, initial, grad_final, starts, stops, states, adjoints, dfactor, dreadout,
    batches, length, width, slots,
    M: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, CHUNK: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dλ and dr, partial sums `[slots, D, M, 2]` of every `slots`-th chunk, from the `states` before chunks and the
    gradients of those after them, `adjoints`."""
    blocks, chunks = tl.cdiv(width, BD), tl.cdiv(length, CHUNK)
    d, there, dm, there_dm = channels_of(tl.program_id(0) % blocks, width, M, BD, BM)
    slot = tl.program_id(0) // blocks
    f_re, f_im = read(factor + dm, there_dm)
    b_re, b_im = read(into + dm, there_dm)
    through_re, through_im = tl.zeros([BD, BM], ACC), tl.zeros([BD, BM], ACC)
    seen_re, seen_im = tl.zeros([BD, BM], ACC), tl.zeros([BD, BM], ACC)
    last_re, last_im = tl.zeros([BD, BM], ACC), tl.zeros([BD, BM], ACC)
    for chunk in range(slot, batches * chunks, slots):
        batch, j = (chunk // chunks).to(tl.int64), chunk % chunks
        at = (batch * chunks + j) * width * M * 2 + dm
        first = j * CHUNK
        h_re, h_im = read(states + at, there_dm)
        s_re, s_im = tl.zeros([BD, BM], ACC), tl.zeros([BD, BM], ACC)
        for p in range(first, tl.minimum(first + CHUNK, length)):
            if PACKED:
                start = tl.load(starts + p)
                if start >= 0:
                    h_re, h_im = read(initial + start.to(tl.int64) * width * M * 2 + dm, there_dm)
            row = row_of(p, batch, length, REVERSE)
            u_t = tl.load(u + row * width + d, mask=there, other=0).to(ACC)[:, None]
            g_t = tl.load(grad_y + row * width + d, mask=there, other=0).to(ACC)[:, None]
            s_re, s_im = times(f_re, f_im, s_re, s_im)
            s_re += h_re
            s_im += h_im
            h_re, h_im = times(f_re, f_im, h_re, h_im)
            h_re += b_re * u_t
            h_im += b_im * u_t
            seen_re += g_t * h_re
            seen_im += g_t * h_im
            through_re += g_t * s_re
            through_im += g_t * s_im
            if PACKED:
                end = tl.load(stops + p)
                if end >= 0:
                    m_re, m_im = read(grad_final + end.to(tl.int64) * width * M * 2 + dm, there_dm)
                    re, im = times(s_re, s_im, m_re, m_im, CONJUGATED=True)
                    last_re += re
                    last_im += im
                    s_re, s_im = tl.zeros([BD, BM], ACC), tl.zeros([BD, BM], ACC)
        m_re, m_im = read(adjoints + at, there_dm)
        if PACKED:  # what comes from behind a boundary is another sequence's
            inside = tl.load(stops + tl.minimum(first + CHUNK, length) - 1) < 0
            m_re, m_im = tl.where(inside, m_re, 0.0), tl.where(inside, m_im, 0.0)
        re, im = times(s_re, s_im, m_re, m_im, CONJUGATED=True)
        last_re += re
        last_im += im
    r_re, r_im = read(readout + dm, there_dm)
    re, im = times(through_re, through_im, r_re, r_im, CONJUGATED=True)
    mine = slot.to(tl.int64) * width * M * 2 + dm
    write(dfactor + mine, re + last_re, im + last_im, there_dm)
    write(dreadout + mine, seen_re, seen_im, there_dm)


@triton.jit(do_not_specialize=["batches", "length", "slots"])
def adjoint_sums(
    u, factor, into, readout, D, grad_y, grad_final, starts, stops, adjoints, du, dinto, dD, dinitial,
    batches, length, width, slots,
    M: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, CHUNK: tl.constexpr, SKIP: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """du, the gradients of initial states, and partial sums of db `[slots, D, M, 2]` and dD `[slots, D]`."""
    blocks, chunks = tl.cdiv(width, BD), tl.cdiv(length, CHUNK)
    d, there, dm, there_dm = channels_of(tl.program_id(0) % blocks, width, M, BD, BM)
    slot = tl.program_id(0) // blocks
    f_re, f_im = read(factor + dm, there_dm)
    b_re, b_im = read(into + dm, there_dm)
    r_re, r_im = read(readout + dm, there_dm)
    skip, sum_D = tl.zeros([BD], ACC), tl.zeros([BD], ACC)
    if SKIP:
        skip = tl.load(D + d, mask=there, other=0)
    sum_re, sum_im = tl.zeros([BD, BM], ACC), tl.zeros([BD, BM], ACC)
    for chunk in range(slot, batches * chunks, slots):
        batch, j = (chunk // chunks).to(tl.int64), chunk % chunks
        first = j * CHUNK
        stop = tl.minimum(first + CHUNK, length)
        m_re, m_im = read(adjoints + (batch * chunks + j) * width * M * 2 + dm, there_dm)
        for i in range(0, stop - first):
            p = stop - 1 - i
            if PACKED:
                end = tl.load(stops + p)
                if end >= 0:
                    m_re, m_im = read(grad_final + end.to(tl.int64) * width * M * 2 + dm, there_dm)
            at = row_of(p, batch, length, REVERSE) * width + d
            u_t = tl.load(u + at, mask=there, other=0).to(ACC)
            g_t = tl.load(grad_y + at, mask=there, other=0).to(ACC)
            m_re += r_re * g_t[:, None]
            m_im += r_im * g_t[:, None]
            tl.store(du + at, tl.sum(b_re * m_re + b_im * m_im, 1) + skip * g_t, mask=there)
            sum_re += m_re * u_t[:, None]
            sum_im += m_im * u_t[:, None]
            sum_D += g_t * u_t
            m_re, m_im = times(f_re, f_im, m_re, m_im, CONJUGATED=True)
            if PACKED:
                start = tl.load(starts + p)
                if start >= 0:
                    write(dinitial + start.to(tl.int64) * width * M * 2 + dm, m_re, m_im, there_dm)
        if not PACKED:  # noqa: SIM102
            if j == 0:
                write(dinitial + batch * width * M * 2 + dm, m_re, m_im, there_dm)
    write(dinto + slot.to(tl.int64) * width * M * 2 + dm, sum_re, sum_im, there_dm)
    if SKIP:
        tl.store(dD + slot.to(tl.int64) * width + d, sum_D, mask=there)
