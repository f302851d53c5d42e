# mypy: allow-untyped-defs, allow-incomplete-defs
"""Kernels of the recurrent cells: the walks over time, forward and back, and the memories between them.

A program of a walk takes one head and a block of sequences through all their steps; packed sequences are rows of a
block as others are, each with its own first step, and stand still when they are done. State and adjoint stay in
registers, and so do the weights where they fit (`BK == BD`), and then a step's inputs are loaded one step ahead; else
the weights are read at every step, `BK` rows at a time, from the cache.

The equations are in `sinuous.core.ops.slstm`; the persistent program per head is that of FlashRNN (arXiv 2412.07752).
"""

from __future__ import annotations

import triton
import triton.language as tl

from sinuous.kernels.triton.packing import row_of

CELLS = {"slstm": 0, "lstm": 1, "gru": 2}
LEAST = tl.constexpr(-1e30)
"""Lower bound of a stabiliser, in units of which e^-inf is 0 and not NaN."""


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    e = tl.exp(-2 * tl.abs(x))
    t = (1 - e) / (1 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def exponential_gates(p_i, p_f, n, m):
    """Both gates in units of e^m, m itself, the logarithm carried over, and which of the two attains m, if not the
    bound."""
    carried = tl.minimum(p_f, 0.0) - tl.log(1 + tl.exp(-tl.abs(p_f))) + m
    wins = (n == 0) | (p_i >= carried)
    highest = tl.where(wins, p_i, carried)
    bounded = highest < LEAST
    highest = tl.where(bounded, LEAST, highest)
    i, f = tl.exp(p_i - highest), tl.exp(tl.where(carried > highest, 0.0, carried - highest))
    return i, f, highest, carried, wins & (bounded == 0), (wins == 0) & (bounded == 0)


@triton.jit
def remember(p_i, p_f, p_z, c, n, m, CELL: tl.constexpr):
    """c, n and m after a step."""
    if CELL == 0:
        i, f, m, _, _, _ = exponential_gates(p_i, p_f, n, m)
        c, n = f * c + i * tanh(p_z), f * n + i
    elif CELL == 1:
        c = sigmoid(p_f) * c + sigmoid(p_i) * tanh(p_z)
    return c, n, m


@triton.jit
def output(p_i, p_f, p_z, p_o, y, c, n, CELL: tl.constexpr):
    """y after a step, from that before it and the memories after it."""
    if CELL == 0:
        y = tl.where(n == 0, 0.0, sigmoid(p_o) * c / n)
    elif CELL == 1:
        y = sigmoid(p_o) * tanh(c)
    else:
        u = sigmoid(p_f)
        y = u * y + (1 - u) * tanh(p_z + sigmoid(p_i) * p_o)
    return y


@triton.jit
def sequences_of(n, count, cu_seqlens, length, PACKED: tl.constexpr, REVERSE: tl.constexpr):
    """First step of sequences `n` in processing order, their number of steps (0 beyond `count`), and the batch row."""
    first, steps, batch = n * 0, n * 0 + length, n
    if PACKED:
        left = tl.load(cu_seqlens + n, mask=n < count, other=0).to(tl.int32)
        right = tl.load(cu_seqlens + n + 1, mask=n < count, other=0).to(tl.int32)
        first, steps, batch = (length - right if REVERSE else left), right - left, n * 0
    return first, tl.where(n < count, steps, 0), batch


@triton.jit
def have(t, steps):
    """Column of booleans: whether each sequence has a step `t`."""
    t += steps * 0
    return ((t >= 0) & (t < steps))[:, None]


@triton.jit
def four(at, stride, mask):
    """One tile of each gate."""
    return (
        tl.load(at, mask=mask, other=0),
        tl.load(at + stride, mask=mask, other=0),
        tl.load(at + 2 * stride, mask=mask, other=0),
        tl.load(at + 3 * stride, mask=mask, other=0),
    )


@triton.jit
def part(t, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`COLUMNS` columns of a tile from column `first` on."""
    columns = tl.zeros([ROWS, 1], tl.int32) + (first + tl.arange(0, COLUMNS))[None, :]
    return tl.gather(t, columns, axis=1)


@triton.jit(do_not_specialize=["length", "count"])
def walk(
    gates, into_gates, bias, y_0, c_0, n_0, m_0, cu_seqlens, hidden, y_1, c_1, n_1, m_1, chunk_y, chunk_c, chunk_n,
    chunk_m, length, count,
    H: tl.constexpr, D: tl.constexpr, BB: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, CHUNK: tl.constexpr,
    CELL: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of all steps, the states before each chunk and the one after each sequence."""
    h, n = tl.program_id(0) % H, (tl.program_id(0) // H) * BB + tl.arange(0, BB)
    d, k = tl.arange(0, BD), tl.arange(0, BK)
    width, square = H * D, H * D * D
    chunks = tl.cdiv(length, CHUNK)
    first, steps, batch = sequences_of(n, count, cu_seqlens, length, PACKED, REVERSE)
    unit = h * D + d[None, :]
    at = n.to(tl.int64)[:, None] * width + unit
    existing = (n < count)[:, None] & (d < D)[None, :]
    y, c = tl.load(y_0 + at, mask=existing, other=0), tl.load(c_0 + at, mask=existing, other=0)
    norm, m = tl.load(n_0 + at, mask=existing, other=0), tl.load(m_0 + at, mask=existing, other=0)
    weight = into_gates + h * D * D + k[:, None] * D + d[None, :]
    there = (k < D)[:, None] & (d < D)[None, :]
    if BK == BD:
        w_i, w_f, w_z, w_o = four(weight, square, there)
    if BK == BD:
        row = row_of(first, batch, length, REVERSE)[:, None]
        x_i, x_f, x_z, x_o = four(gates + row * 4 * width + unit, width, existing & have(0, steps))
    for t in range(0, tl.max(steps)):
        live = existing & have(t, steps)
        step = first + t
        due = t % CHUNK
        if PACKED:
            due = tl.min(tl.where(t < steps, step % CHUNK, CHUNK), 0)
        if due == 0:  # at few steps, since stores want the state in another layout
            slot = (batch.to(tl.int64) * chunks + step // CHUNK)[:, None] * width + unit
            keep = live & (step % CHUNK == 0)[:, None]
            tl.store(chunk_y + slot, y, mask=keep)
            tl.store(chunk_c + slot, c, mask=keep)
            tl.store(chunk_n + slot, norm, mask=keep)
            tl.store(chunk_m + slot, m, mask=keep)
        if BK != BD:
            row = row_of(step, batch, length, REVERSE)[:, None]
            x_i, x_f, x_z, x_o = four(gates + row * 4 * width + unit, width, live)
        b_i, b_f, b_z, b_o = four(bias + unit, width, (d < D)[None, :])
        p_i, p_f, p_z, p_o = x_i.to(ACC) + b_i, x_f.to(ACC) + b_f, x_z.to(ACC) + b_z, x_o.to(ACC) + b_o
        if BK == BD:
            row = row_of(step + 1, batch, length, REVERSE)[:, None]
            x_i, x_f, x_z, x_o = four(gates + row * 4 * width + unit, width, existing & have(t + 1, steps))
        if BK == BD:
            p_i = tl.dot(y, w_i, p_i, input_precision=PRECISION, out_dtype=ACC)
            p_f = tl.dot(y, w_f, p_f, input_precision=PRECISION, out_dtype=ACC)
            p_z = tl.dot(y, w_z, p_z, input_precision=PRECISION, out_dtype=ACC)
            p_o = tl.dot(y, w_o, p_o, input_precision=PRECISION, out_dtype=ACC)
        else:
            for g in range(0, 4):
                total = tl.zeros_like(p_i)
                for e in range(0, D, BK):
                    w = tl.load(weight + g * square + e * D, mask=(e + k < D)[:, None] & (d < D)[None, :], other=0)
                    total = tl.dot(part(y, e, BB, BK), w, total, input_precision=PRECISION, out_dtype=ACC)
                p_i, p_f = p_i + tl.where(g == 0, total, 0.0), p_f + tl.where(g == 1, total, 0.0)
                p_z, p_o = p_z + tl.where(g == 2, total, 0.0), p_o + tl.where(g == 3, total, 0.0)
        c_t, n_t, m_t = remember(p_i, p_f, p_z, c, norm, m, CELL)
        y = tl.where(live, output(p_i, p_f, p_z, p_o, y, c_t, n_t, CELL), y)
        c, norm, m = tl.where(live, c_t, c), tl.where(live, n_t, norm), tl.where(live, m_t, m)
        row = row_of(step, batch, length, REVERSE)[:, None]
        tl.store(hidden + row * width + unit, y, mask=live)
    tl.store(y_1 + at, y, mask=existing)
    tl.store(c_1 + at, c, mask=existing)
    tl.store(n_1 + at, norm, mask=existing)
    tl.store(m_1 + at, m, mask=existing)


@triton.jit(do_not_specialize=["length"])
def memories(
    p, c_0, n_0, m_0, chunk_c, chunk_n, chunk_m, sequence_of, steps_before, c_before, n_before, m_before, length,
    WIDTH: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr, CELL: tl.constexpr, PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """c, n and m before each step of a chunk, from its pre-activations and the state before it."""
    blocks, chunks = tl.cdiv(WIDTH, BD), tl.cdiv(length, CHUNK)
    chunk = tl.program_id(0) // blocks
    d = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    there, first = d < WIDTH, (chunk % chunks) * CHUNK
    at = chunk.to(tl.int64) * WIDTH + d
    c = tl.load(chunk_c + at, mask=there, other=0)
    n, m = c, c
    if CELL == 0:
        n, m = tl.load(chunk_n + at, mask=there, other=0), tl.load(chunk_m + at, mask=there, other=0)
    for step in range(first, tl.minimum(first + CHUNK, length)):
        if PACKED:
            begins = tl.where(there, tl.load(steps_before + step), 1) == 0
            start = tl.load(sequence_of + step).to(tl.int64) * WIDTH + d
            c = tl.where(begins, tl.load(c_0 + start, mask=begins, other=0), c)
            if CELL == 0:
                n = tl.where(begins, tl.load(n_0 + start, mask=begins, other=0), n)
                m = tl.where(begins, tl.load(m_0 + start, mask=begins, other=0), m)
        row = row_of(step, chunk // chunks, length, REVERSE)
        tl.store(c_before + row * WIDTH + d, c, mask=there)
        if CELL == 0:
            tl.store(n_before + row * WIDTH + d, n, mask=there)
            tl.store(m_before + row * WIDTH + d, m, mask=there)
        p_i, p_f, p_z, _ = four(p + row * 4 * WIDTH + d, WIDTH, there)
        c, n, m = remember(p_i, p_f, p_z, c, n, m, CELL)


@triton.jit
def values_at(
    p, dy, before, c_before, n_before, m_before, row, unit, width, live, CELL: tl.constexpr
):  # fmt: skip
    """The terms of a step's gradients: pre-activations, the gradient of its output, and the state before it."""
    here = row * width + unit
    p_i, p_f, p_z, p_o = four(p + row * 4 * width + unit, width, live)
    g = tl.load(dy + here, mask=live, other=0)
    if CELL == 0:
        c, n = tl.load(c_before + here, mask=live, other=0), tl.load(n_before + here, mask=live, other=0)
        m = tl.load(m_before + here, mask=live, other=0)
    elif CELL == 1:
        c = tl.load(c_before + here, mask=live, other=0)
        n, m = c, c
    else:
        c = tl.load(before + here, mask=live, other=0)
        n, m = c, c
    return p_i, p_f, p_z, p_o, g, c, n, m


@triton.jit(do_not_specialize=["length", "count"])
def walk_back(
    p, R, before, c_before, n_before, m_before, dy, dy_1, dc_1, dn_1, dm_1, cu_seqlens, dgates, dy_0, dc_0, dn_0, dm_0,
    length, count,
    H: tl.constexpr, D: tl.constexpr, BB: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, CELL: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the gates of all steps, and of the state before each sequence."""
    h, sequence = tl.program_id(0) % H, (tl.program_id(0) // H) * BB + tl.arange(0, BB)
    d, k = tl.arange(0, BD), tl.arange(0, BK)
    width, square = H * D, H * D * D
    first, steps, batch = sequences_of(sequence, count, cu_seqlens, length, PACKED, REVERSE)
    unit = h * D + d[None, :]
    at = sequence.to(tl.int64)[:, None] * width + unit
    existing = (sequence < count)[:, None] & (d < D)[None, :]
    l_y, l_c = tl.load(dy_1 + at, mask=existing, other=0), tl.load(dc_1 + at, mask=existing, other=0)
    l_n, l_m = tl.load(dn_1 + at, mask=existing, other=0), tl.load(dm_1 + at, mask=existing, other=0)
    weight = R + h * D * D + k[:, None] * D + d[None, :]
    there = (k < D)[:, None] & (d < D)[None, :]
    if BK == BD:
        w_i, w_f, w_z, w_o = four(weight, square, there)
    longest = tl.max(steps)
    if BK == BD:
        row = row_of(first + longest - 1, batch, length, REVERSE)[:, None]
        p_i, p_f, p_z, p_o, g_y, c, n, m = values_at(
            p, dy, before, c_before, n_before, m_before, row, unit, width, existing & have(longest - 1, steps), CELL
        )
    for back in range(0, longest):
        t = longest - 1 - back
        live = existing & have(t, steps)
        if BK != BD:
            row = row_of(first + t, batch, length, REVERSE)[:, None]
            p_i, p_f, p_z, p_o, g_y, c, n, m = values_at(
                p, dy, before, c_before, n_before, m_before, row, unit, width, live, CELL
            )
        g_y = tl.where(live, l_y + g_y.to(ACC), 0.0)
        g_c, g_n, g_m = tl.where(live, l_c, 0.0), tl.where(live, l_n, 0.0), tl.where(live, l_m, 0.0)
        direct = tl.zeros_like(g_y)
        if CELL == 0:
            i, f, highest, carried, input_wins, carried_wins = exponential_gates(p_i, p_f, n, m)
            z, o = tanh(p_z), sigmoid(p_o)
            n_t = f * n + i
            inverse = tl.where(n_t == 0, 0.0, 1 / n_t)
            ratio = (f * c + i * z) * inverse
            dp_o = g_y * ratio * o * (1 - o)
            g_c += g_y * o * inverse
            g_n -= g_y * o * inverse * ratio
            dp_z = g_c * i * (1 - z * z)
            # Of the three terms that meet in the gradient of m, that of the gate that attains the maximum cancels.
            log_i, log_f = (g_c * z + g_n) * i, tl.where(carried > highest, 0.0, (g_c * c + g_n * n) * f)
            dp_i = tl.where(input_wins, g_m - log_f, log_i)
            g_m = tl.where(carried_wins, g_m - log_i, log_f)
            dp_f = g_m * sigmoid(-p_f)
            g_c, g_n = g_c * f, g_n * f
        elif CELL == 1:
            i, f, z, o = sigmoid(p_i), sigmoid(p_f), tanh(p_z), sigmoid(p_o)
            out = tanh(f * c + i * z)
            dp_o = g_y * out * o * (1 - o)
            g_c += g_y * o * (1 - out * out)
            dp_i, dp_f, dp_z = g_c * z * i * (1 - i), g_c * c * f * (1 - f), g_c * i * (1 - z * z)
            g_c = g_c * f
        else:
            i, f = sigmoid(p_i), sigmoid(p_f)
            z = tanh(p_z + i * p_o)
            dp_z = g_y * (1 - f) * (1 - z * z)
            dp_i, dp_o = dp_z * p_o * i * (1 - i), dp_z * i
            dp_f = g_y * (c - z) * f * (1 - f)
            direct = g_y * f
        x = dgates + row_of(first + t, batch, length, REVERSE)[:, None] * 4 * width + unit
        tl.store(x, dp_i, mask=live)
        tl.store(x + width, dp_f, mask=live)
        tl.store(x + 2 * width, dp_z, mask=live)
        tl.store(x + 3 * width, dp_o, mask=live)
        if BK == BD:
            row = row_of(first + t - 1, batch, length, REVERSE)[:, None]
            p_i, p_f, p_z, p_o, g_y, c, n, m = values_at(
                p, dy, before, c_before, n_before, m_before, row, unit, width, existing & have(t - 1, steps), CELL
            )
        if BK == BD:
            direct = tl.dot(dp_i, w_i, direct, input_precision=PRECISION, out_dtype=ACC)
            direct = tl.dot(dp_f, w_f, direct, input_precision=PRECISION, out_dtype=ACC)
            direct = tl.dot(dp_z, w_z, direct, input_precision=PRECISION, out_dtype=ACC)
            direct = tl.dot(dp_o, w_o, direct, input_precision=PRECISION, out_dtype=ACC)
        else:
            parts: tl.constexpr = (D + BK - 1) // BK
            for n in range(0, 4 * parts):
                g, e = n // parts, (n % parts) * BK
                inner = (e + k < D)[:, None] & (d < D)[None, :]
                w = tl.load(weight + g * square + e * D, mask=inner, other=0)
                dp = tl.where(g == 0, dp_i, tl.where(g == 1, dp_f, tl.where(g == 2, dp_z, dp_o)))
                direct = tl.dot(part(dp, e, BB, BK), w, direct, input_precision=PRECISION, out_dtype=ACC)
        l_y, l_c = tl.where(live, direct, l_y), tl.where(live, g_c, l_c)
        l_n, l_m = tl.where(live, g_n, l_n), tl.where(live, g_m, l_m)
    tl.store(dy_0 + at, l_y, mask=existing)
    tl.store(dc_0 + at, l_c, mask=existing)
    tl.store(dn_0 + at, l_n, mask=existing)
    tl.store(dm_0 + at, l_m, mask=existing)
