# mypy: allow-untyped-defs, allow-incomplete-defs
r"""Delta rule: the kernels of a state that is corrected by what it holds.

The n factors of a step are rows of their own, in the order of processing: the decay of a step lies on its first row and
its query on the last, so that `FACTORS` only says which rows read. Time is cut into segments of rows as in
`matrix_state_kernels`. Within one, with S the state before it, E_tj the decay from row j to row t, L its strict lower
part of K Kᵀ ⊙ E and since, until the decays from the start and until the end,

    r = v - since · K S - L diag(β) r           the error at each row
    y = scale · ((Q Kᵀ ⊙ E) diag(β) r + since · Q S)
    S ← since_c S + (until · K)ᵀ diag(β) r

The triangular system and its adjoint are solved with one strictly lower triangular matrix, for β = 0 as well,

    X = L (1 + diag(β) L)⁻¹        (1 + L diag(β))⁻¹ = 1 - X diag(β)        (1 + diag(β) L)⁻¹ = 1 - diag(β) X

With P = scale · Q Kᵀ ⊙ E and Λ the gradient of the state after the segment, the backward pass is

    dU = Pᵀ dy + until · K Λ        λ = dU - Xᵀ diag(β) dU        dv = β λ        dβ = λ · r
    Λ ← since_c Λ + scale · (since · Q)ᵀ dy - (since · K)ᵀ dv
    dq = scale · ((dy Uᵀ ⊙ E) K + since · dy Sᵀ)                                U = diag(β) r
    dk = scale · (dy Uᵀ ⊙ E)ᵀ Q - (F + Fᵀ) K - since · dv Sᵀ + until · U Λᵀ      F = strict lower part of dv Uᵀ ⊙ E

Forward are launched `prepare`, `carry` and `read`; backward `prepare`, `carry` again from the chunk states, all at
once, `carry_adjoint`, and `sides` for queries and for keys. Nothing is added up atomically.

Source: Yang et al. (arXiv 2406.06484), section 3, and (arXiv 2412.06464), section 3; in this form with X, our own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sinuous.kernels.triton.matrix_state_kernels import products, segment_at
from sinuous.kernels.triton.packing import bounds_of, row_of


@triton.jit
def readers(p, row, there, FACTORS: tl.constexpr):
    """The steps of rows, and which rows read: the last of each step."""
    return row // FACTORS, there & (p % FACTORS == FACTORS - 1)


@triton.jit
def chosen(row, column, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    return (i[:, None, None, None] == row) & (i[None, None, :, None] == column)


@triton.jit
def block_of(M, row, column, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """One of COUNT × COUNT blocks of M."""
    blocks = tl.reshape(M, [COUNT, SIZE, COUNT, SIZE])
    return tl.sum(tl.sum(tl.where(chosen(row, column, COUNT), blocks, 0.0), 2), 0)


@triton.jit
def part_of(x, part, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """One of COUNT parts of a vector."""
    return tl.sum(tl.where(tl.arange(0, COUNT)[:, None] == part, tl.reshape(x, [COUNT, SIZE]), 0.0), 0)


@triton.jit
def joint(
    X, L, beta, first, COUNT: tl.constexpr, SIZE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """X₂₁ = (1 - X₂₂ β₂) L₂₁ (1 - β₁ X₁₁) of the blocks `first` and `first` + 1, in its place among zeros."""
    Y = block_of(L, first + 1, first, COUNT, SIZE)
    right = part_of(beta, first, COUNT, SIZE)[:, None] * block_of(X, first, first, COUNT, SIZE)
    left = block_of(X, first + 1, first + 1, COUNT, SIZE) * part_of(beta, first + 1, COUNT, SIZE)[None, :]
    Y -= tl.dot(Y, right, input_precision=PRECISION, out_dtype=ACC)
    Y -= tl.dot(left, Y, input_precision=PRECISION, out_dtype=ACC)
    placed = tl.where(chosen(first + 1, first, COUNT), Y[None, :, None, :], 0.0)
    return tl.reshape(placed, [COUNT * SIZE, COUNT * SIZE])


@triton.jit
def resolvent(L, beta, CHUNK: tl.constexpr, LEVELS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """X = L (1 + diag(beta) L)⁻¹ of a strictly lower triangular L: by rows in blocks of 16, which are then joined."""
    BLOCKS: tl.constexpr = CHUNK // 16
    i, block = tl.arange(0, 16), tl.arange(0, BLOCKS)
    on_diagonal = block[:, None, None, None] == block[None, None, :, None]
    D = tl.sum(tl.where(on_diagonal, tl.reshape(L, [BLOCKS, 16, BLOCKS, 16]), 0.0), 2)
    scaled = D * tl.reshape(beta, [BLOCKS, 16])[:, None, :]
    for j in range(15):
        done = tl.sum(tl.where(i[None, :, None] == j, D, 0.0), 1)
        column = tl.sum(tl.where(i[None, None, :] == j, scaled, 0.0), 2)
        D -= column[:, :, None] * done[:, None, :]
    X = tl.reshape(tl.where(on_diagonal, D[:, :, None, :], 0.0), [CHUNK, CHUNK])
    for level in tl.static_range(LEVELS):
        for first in tl.static_range(0, CHUNK >> (4 + level), 2):
            X += joint(X, L, beta, first, CHUNK >> (4 + level), 16 << level, ACC, PRECISION)
    return X


@triton.jit(do_not_specialize=["length"])
def prepare(
    q, k, beta, logs, table, weights, inverse, length,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr,
    FACTORS: tl.constexpr, SCALE: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P [B, steps, H, CHUNK] and X [B, rows, H, CHUNK] of a segment."""
    pid = tl.program_id(0)
    h, unit = pid % H, pid // H
    batch, start, stop, _, _, _ = segment_at(unit, table, length, CHUNK, PACKED)
    if start == stop:
        return
    i = tl.arange(0, CHUNK)
    p = start + i
    there, row = p < stop, row_of(p, batch, length, REVERSE)
    step, reads = readers(p, row, there, FACTORS)
    scores, similarity = tl.zeros([CHUNK, CHUNK], ACC), tl.zeros([CHUNK, CHUNK], ACC)
    at, at_step = row * H + h, step * H + h
    for k_block in range(0, K, BK):
        c = k_block + tl.arange(0, BK)
        a = tl.load(k + at[:, None] * K + c[None, :], mask=there[:, None] & (c < K)[None, :], other=0).to(DOT)
        b = tl.load(k + at[None, :] * K + c[:, None], mask=(c < K)[:, None] & there[None, :], other=0).to(DOT)
        similarity = tl.dot(a, b, similarity, input_precision=PRECISION, out_dtype=ACC)
        a = tl.load(q + at_step[:, None] * K + c[None, :], mask=reads[:, None] & (c < K)[None, :], other=0).to(DOT)
        scores = tl.dot(a, b, scores, input_precision=PRECISION, out_dtype=ACC)
    log = tl.load(logs + at, mask=there, other=0)
    lower = i[:, None] >= i[None, :]
    E = products(log[:, None], log[None, :], there[:, None] & there[None, :] & lower, ACC)
    tl.store(weights + at_step[:, None] * CHUNK + i[None, :], scores * E * SCALE, mask=reads[:, None])
    strength = tl.load(beta + at, mask=there, other=0).to(ACC)
    L = tl.where(i[:, None] > i[None, :], similarity * E, 0.0)
    X = resolvent(L, strength, CHUNK, LEVELS, ACC, PRECISION)
    tl.store(inverse + at[:, None] * CHUNK + i[None, :], X, mask=there[:, None])


@triton.jit(do_not_specialize=["length"])
def carry(
    k, v, beta, inverse, since_start, until_end, initial, chunk_states, cu_seqlens, table,
    states, residual, final, length,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, CHUNK: tl.constexpr,
    SPAN: tl.constexpr, AGAIN: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """r of all segments of a sequence, the state before each chunk and the one at the end.

    AGAIN: of SPAN rows, from the state before them in `chunk_states`. A block holds all keys, since a row needs their
    sum.
    """
    v_blocks: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    v_block, h, unit = pid % v_blocks, pid // v_blocks % H, (pid // (v_blocks * H)).to(tl.int64)
    c, v_at, i = tl.arange(0, BK), v_block * BV + tl.arange(0, BV), tl.arange(0, CHUNK)
    if AGAIN:
        batch, begin, end, first, _, _ = segment_at(unit, table, length, SPAN, PACKED)
        if begin == end:
            return
        state = chunk_states + ((batch * tl.cdiv(length, SPAN) + begin // SPAN) * H + h) * K * V
        if first >= 0:
            state = initial + (first * H + h) * K * V
        steps = end - begin
    else:
        begin, steps, batch = bounds_of(unit, cu_seqlens, length, PACKED, REVERSE)
        end = begin + steps
        state = initial + (unit * H + h) * K * V
    cv, there_cv = c[:, None] * V + v_at[None, :], (c < K)[:, None] & (v_at < V)[None, :]
    S = tl.load(state + cv, mask=there_cv, other=0)
    chunks, first_chunk = tl.cdiv(length, CHUNK), begin // CHUNK
    past_chunk = tl.where(steps > 0, tl.cdiv(end, CHUNK), first_chunk)
    for j in range(first_chunk, past_chunk):
        start, stop = tl.maximum(begin, j * CHUNK), tl.minimum(end, (j + 1) * CHUNK)
        if states is not None:  # noqa: SIM102 (settled at compile time)
            if start == j * CHUNK:
                tl.store(states + ((batch * chunks + j) * H + h) * K * V + cv, S, mask=there_cv)
        p = start + i
        there, row = p < stop, row_of(p, batch, length, REVERSE)
        at = row * H + h
        there_v = there[:, None] & (v_at < V)[None, :]
        strength = tl.load(beta + at, mask=there, other=0).to(ACC)
        since = tl.load(since_start + at, mask=there, other=0)
        a = tl.load(k + at[:, None] * K + c[None, :], mask=there[:, None] & (c < K)[None, :], other=0).to(DOT)
        r = tl.load(v + at[:, None] * V + v_at[None, :], mask=there_v, other=0).to(ACC)
        r -= since[:, None] * tl.dot(a, S.to(DOT), input_precision=PRECISION, out_dtype=ACC)
        X = tl.load(inverse + at[:, None] * CHUNK + i[None, :], mask=there[:, None], other=0).to(DOT)
        r -= tl.dot(X, (strength[:, None] * r).to(DOT), input_precision=PRECISION, out_dtype=ACC)
        tl.store(residual + at[:, None] * V + v_at[None, :], r, mask=there_v)
        b = tl.load(k + at[None, :] * K + c[:, None], mask=(c < K)[:, None] & there[None, :], other=0).to(ACC)
        b *= tl.load(until_end + at, mask=there, other=0)[None, :]
        total = tl.load(since_start + row_of(stop - 1, batch, length, REVERSE) * H + h)
        S = tl.dot(
            b.to(DOT), (strength[:, None] * r).to(DOT), total * S, input_precision=PRECISION, out_dtype=ACC
        )  # fmt: skip
    if final is not None:
        tl.store(final + (unit * H + h) * K * V + cv, S, mask=there_cv)


@triton.jit(do_not_specialize=["length"])
def read(
    q, beta, weights, residual, since_start, states, edges, table, y, length,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, CHUNK: tl.constexpr,
    FACTORS: tl.constexpr, SCALE: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of a segment, P diag(β) r + scale · since · Q S."""
    v_blocks: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    v_block, h, unit = pid % v_blocks, pid // v_blocks % H, pid // (v_blocks * H)
    batch, start, stop, first, _, _ = segment_at(unit, table, length, CHUNK, PACKED)
    if start == stop:
        return
    v_at, i = v_block * BV + tl.arange(0, BV), tl.arange(0, CHUNK)
    p = start + i
    there, row = p < stop, row_of(p, batch, length, REVERSE)
    step, reads = readers(p, row, there, FACTORS)
    at, at_step = row * H + h, step * H + h
    state = states + ((batch * tl.cdiv(length, CHUNK) + start // CHUNK) * H + h) * K * V
    if first >= 0:
        state = edges + (first * H + h) * K * V
    result = tl.zeros([CHUNK, BV], ACC)
    for k_block in range(0, K, BK):
        c = k_block + tl.arange(0, BK)
        a = tl.load(q + at_step[:, None] * K + c[None, :], mask=reads[:, None] & (c < K)[None, :], other=0).to(DOT)
        S = tl.load(state + c[:, None] * V + v_at[None, :], mask=(c < K)[:, None] & (v_at < V)[None, :], other=0)
        result = tl.dot(a, S.to(DOT), result, input_precision=PRECISION, out_dtype=ACC)
    result *= SCALE * tl.load(since_start + at, mask=there, other=0)[:, None]
    there_v = (v_at < V)[None, :]
    P = tl.load(weights + at_step[:, None] * CHUNK + i[None, :], mask=reads[:, None], other=0).to(DOT)
    U = tl.load(residual + at[:, None] * V + v_at[None, :], mask=there[:, None] & there_v, other=0).to(ACC)
    U *= tl.load(beta + at, mask=there, other=0).to(ACC)[:, None]
    result = tl.dot(P, U.to(DOT), result, input_precision=PRECISION, out_dtype=ACC)
    tl.store(y + at_step[:, None] * V + v_at[None, :], result, mask=reads[:, None] & there_v)


@triton.jit(do_not_specialize=["length"])
def carry_adjoint(
    q, k, beta, dy, weights, inverse, since_start, until_end, last_gradient, cu_seqlens,
    adjoint_states, through, dv, first_gradient, length,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, CHUNK: tl.constexpr,
    FACTORS: tl.constexpr, SCALE: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """λ (`through`) and dv of all segments of a sequence, last to first, Λ after each chunk and before the sequence."""
    v_blocks: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    v_block, h, n = pid % v_blocks, pid // v_blocks % H, (pid // (v_blocks * H)).to(tl.int64)
    c, v_at, i = tl.arange(0, BK), v_block * BV + tl.arange(0, BV), tl.arange(0, CHUNK)
    begin, steps, batch = bounds_of(n, cu_seqlens, length, PACKED, REVERSE)
    end = begin + steps
    cv, there_cv = c[:, None] * V + v_at[None, :], (c < K)[:, None] & (v_at < V)[None, :]
    A = tl.load(last_gradient + (n * H + h) * K * V + cv, mask=there_cv, other=0)
    chunks, first_chunk = tl.cdiv(length, CHUNK), begin // CHUNK
    past_chunk = tl.where(steps > 0, tl.cdiv(end, CHUNK), first_chunk)
    for back in range(first_chunk, past_chunk):
        j = first_chunk + past_chunk - 1 - back
        start, stop = tl.maximum(begin, j * CHUNK), tl.minimum(end, (j + 1) * CHUNK)
        if stop < end:
            tl.store(adjoint_states + ((batch * chunks + j) * H + h) * K * V + cv, A, mask=there_cv)
        p = start + i
        there, row = p < stop, row_of(p, batch, length, REVERSE)
        step, reads = readers(p, row, there, FACTORS)
        at, at_step = row * H + h, step * H + h
        there_v = there[:, None] & (v_at < V)[None, :]
        strength = tl.load(beta + at, mask=there, other=0).to(ACC)[:, None]
        since = tl.load(since_start + at, mask=there, other=0)
        until = tl.load(until_end + at, mask=there, other=0)
        # Loaded the other way round rather than transposed, here and below: Hopper's compiler has mistaken those.
        a = tl.load(k + at[:, None] * K + c[None, :], mask=there[:, None] & (c < K)[None, :], other=0).to(DOT)
        d = until[:, None] * tl.dot(a, A.to(DOT), input_precision=PRECISION, out_dtype=ACC)
        g = tl.load(
            dy + at_step[:, None] * V + v_at[None, :], mask=reads[:, None] & (v_at < V)[None, :], other=0
        ).to(DOT)  # fmt: skip
        P = tl.load(weights + at_step[None, :] * CHUNK + i[:, None], mask=reads[None, :], other=0).to(DOT)
        d = tl.dot(P, g, d, input_precision=PRECISION, out_dtype=ACC)
        X = tl.load(inverse + at[None, :] * CHUNK + i[:, None], mask=there[None, :], other=0).to(DOT)
        d -= tl.dot(X, (strength * d).to(DOT), input_precision=PRECISION, out_dtype=ACC)
        tl.store(through + at[:, None] * V + v_at[None, :], d, mask=there_v)
        d *= strength
        tl.store(dv + at[:, None] * V + v_at[None, :], d, mask=there_v)
        b = tl.load(q + at_step[None, :] * K + c[:, None], mask=(c < K)[:, None] & reads[None, :], other=0).to(ACC)
        b *= SCALE * since[None, :]
        total = tl.load(since_start + row_of(stop - 1, batch, length, REVERSE) * H + h)
        A = tl.dot(b.to(DOT), g, total * A, input_precision=PRECISION, out_dtype=ACC)
        b = tl.load(k + at[None, :] * K + c[:, None], mask=(c < K)[:, None] & there[None, :], other=0).to(ACC)
        b *= -since[None, :]
        A = tl.dot(b.to(DOT), d.to(DOT), A, input_precision=PRECISION, out_dtype=ACC)
    tl.store(first_gradient + (n * H + h) * K * V + cv, A, mask=there_cv)


@triton.jit(do_not_specialize=["length"])
def sides(
    q, k, beta, dy, residual, through, logs, since_start, until_end, states, edges, adjoint_states, adjoint_edges,
    table, dq, dk_rows, dk, dbeta, dots, ends, segments, rows, length,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, CHUNK: tl.constexpr,
    FACTORS: tl.constexpr, SCALE: tl.constexpr, KEYS: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients in a segment: dq, dβ and the part of dk where keys read (`dk_rows`); or with KEYS the part where they
    are read, and dk. Per block of K, `dots` [blocks, B, rows, H] is the inner product of each reader, or of each key
    that is read, with its gradient, and `ends` [blocks, segments, H] the gradient of a factor of the state after the
    segment."""
    k_blocks: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0)
    k_block, h, unit = pid % k_blocks, pid // k_blocks % H, (pid // (k_blocks * H)).to(tl.int64)
    batch, start, stop, first, last, _ = segment_at(unit, table, length, CHUNK, PACKED)
    if start == stop:
        return
    c, i = k_block * BK + tl.arange(0, BK), tl.arange(0, CHUNK)
    p = start + i
    there, row = p < stop, row_of(p, batch, length, REVERSE)
    step, reads = readers(p, row, there, FACTORS)
    at, at_step = row * H + h, step * H + h
    chunk = ((batch * tl.cdiv(length, CHUNK) + start // CHUNK) * H + h) * K * V
    state, adjoint = states + chunk, adjoint_states + chunk
    if first >= 0:
        state = edges + (first * H + h) * K * V
    if last >= 0:
        adjoint = adjoint_edges + (last * H + h) * K * V
    strength = tl.load(beta + at, mask=there, other=0).to(ACC)
    by_queries, by_keys = tl.zeros([CHUNK, CHUNK], ACC), tl.zeros([CHUNK, CHUNK], ACC)
    queries, keys, common = tl.zeros([CHUNK, BK], ACC), tl.zeros([CHUNK, BK], ACC), tl.zeros([BK], ACC)
    into_beta = tl.zeros([CHUNK], ACC)
    for v_block in range(0, V, BV):
        v = v_block + tl.arange(0, BV)
        ys, there_ys = at_step[:, None] * V + v[None, :], reads[:, None] & (v < V)[None, :]
        xs, there_xs = at[:, None] * V + v[None, :], there[:, None] & (v < V)[None, :]
        yT, there_yT = at_step[None, :] * V + v[:, None], (v < V)[:, None] & reads[None, :]
        xT, there_xT = at[None, :] * V + v[:, None], (v < V)[:, None] & there[None, :]
        vk, there_vk = c[None, :] * V + v[:, None], (v < V)[:, None] & (c < K)[None, :]
        S = tl.load(state + vk, mask=there_vk, other=0)
        r = tl.load(residual + xs, mask=there_xs, other=0).to(ACC)
        if KEYS:
            U = (r * strength[:, None]).to(DOT)
            g = tl.load(dy + yT, mask=there_yT, other=0).to(DOT)
            by_queries = tl.dot(U, g, by_queries, input_precision=PRECISION, out_dtype=ACC)
            d = tl.load(through + xT, mask=there_xT, other=0).to(DOT)
            by_keys = tl.dot(U, d, by_keys, input_precision=PRECISION, out_dtype=ACC)
            L = tl.load(adjoint + vk, mask=there_vk, other=0)
            keys = tl.dot(U, L.to(DOT), keys, input_precision=PRECISION, out_dtype=ACC)
            common += tl.sum(S * L, 0)
        else:
            U = (tl.load(residual + xT, mask=there_xT, other=0).to(ACC) * strength[None, :]).to(DOT)
            g = tl.load(dy + ys, mask=there_ys, other=0).to(DOT)
            by_queries = tl.dot(g, U, by_queries, input_precision=PRECISION, out_dtype=ACC)
            queries = tl.dot(g, S.to(DOT), queries, input_precision=PRECISION, out_dtype=ACC)
            d = tl.load(through + xs, mask=there_xs, other=0)
            into_beta += tl.sum(d.to(ACC) * r, 1)
            by_keys = tl.dot(d.to(DOT), U, by_keys, input_precision=PRECISION, out_dtype=ACC)
            keys = tl.dot(d.to(DOT), S.to(DOT), keys, input_precision=PRECISION, out_dtype=ACC)
    log = tl.load(logs + at, mask=there, other=0)
    both = there[:, None] & there[None, :]
    at_k, there_k = at[:, None] * K + c[None, :], there[:, None] & (c < K)[None, :]
    at_q, there_q = at_step[:, None] * K + c[None, :], reads[:, None] & (c < K)[None, :]
    key = tl.load(k + at_k, mask=there_k, other=0).to(ACC)
    query = tl.load(q + at_q, mask=there_q, other=0).to(ACC)
    if KEYS:
        E = products(log[None, :], log[:, None], both & (i[None, :] >= i[:, None]), ACC)
        by_keys = tl.where(i[None, :] > i[:, None], by_keys * E, 0.0) * -strength[None, :]
        keys *= tl.load(until_end + at, mask=there, other=0)[:, None]
        total = tl.load(since_start + row_of(stop - 1, batch, length, REVERSE) * H + h)
        tl.store(ends + (k_block * segments + unit) * H + h, total * tl.sum(common) + tl.sum(key * keys))
        by_queries *= E * SCALE
        keys = tl.dot(by_queries.to(DOT), query.to(DOT), keys, input_precision=PRECISION, out_dtype=ACC)
        keys = tl.dot(by_keys.to(DOT), key.to(DOT), keys, input_precision=PRECISION, out_dtype=ACC)
        dot = tl.sum(key * keys, 1)
        tl.store(dk + at_k, keys + tl.load(dk_rows + at_k, mask=there_k, other=0), mask=there_k)
    else:
        E = products(log[:, None], log[None, :], both & (i[:, None] >= i[None, :]), ACC)
        by_keys = tl.where(i[:, None] > i[None, :], by_keys * E, 0.0) * -strength[:, None]
        since = tl.load(since_start + at, mask=there, other=0)[:, None]
        queries *= SCALE * since
        by_queries *= E * SCALE
        queries = tl.dot(by_queries.to(DOT), key.to(DOT), queries, input_precision=PRECISION, out_dtype=ACC)
        keys *= -strength[:, None] * since
        keys = tl.dot(by_keys.to(DOT), key.to(DOT), keys, input_precision=PRECISION, out_dtype=ACC)
        dot = tl.sum(query * queries + key * keys, 1)
        tl.store(dq + at_q, queries, mask=there_q)
        tl.store(dk_rows + at_k, keys, mask=there_k)
        if k_block == 0:
            tl.store(dbeta + at, into_beta, mask=there)
    tl.store(dots + (k_block.to(tl.int64) * rows) * H + at, dot, mask=there)
