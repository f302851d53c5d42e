# mypy: allow-untyped-defs, allow-incomplete-defs
r"""Recurrences whose state is a matrix per head, decayed by one factor per step: the kernels that they share.

Time is cut into chunks, and a packed chunk at every boundary of a sequence, into *segments*. Within one, with
columns u, rows μ (logarithms), weights and a decay that a family derives from its gates,

    E_tj = exp(u_j - μ_t) for j ≤ t, else 0
    y_t  = scale · (Σ_j E_tj (q_t · k_j) v_j + since_t Sᵀ q_t)        S the state before the segment
    S    ← since_c S + Σ_j until_j k_j v_jᵀ                           c the last step

Four launches, forward two and backward three: `carry_states` walks the segments of a sequence, first to last for the
states and last to first for their gradients Λ; `read_states` and `side_gradients` then take all segments at once. With
dP_tj = dy_t · v_j they are each other's mirror images, q and k, v and dy, S and Λ changing places:

    dv_j = scale Σ_t E_tj (q_t · k_j) dy_t + until_j Λᵀ k_j
    dq_t = scale (Σ_j E_tj dP_tj k_j + since_t S dy_t)
    dk_j = scale Σ_t E_tj dP_tj q_t + until_j Λ v_j

and the gradients of the gates follow from Σ q·dq and Σ k·dk, step by step. A second state n, which is S for v = 1,
rides along where the family has a normaliser. Nothing is added up atomically.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sinuous.kernels.triton.packing import bounds_of, row_of

FORGOTTEN = tl.constexpr(-1e5)
"""Stands for the logarithm of a decay of 0: its exponential is 0 in every precision, and sums are exact to 1e-9."""


@triton.jit
def segment_at(i, table, length, CHUNK: tl.constexpr, PACKED: tl.constexpr):
    """Batch row, first step and step after the last of segment `i`; the sequences that begin and end with it, or -1;
    and the sequence that it lies in."""
    chunks = tl.cdiv(length, CHUNK)
    batch, j = i // chunks, i % chunks
    start = j * CHUNK
    stop = tl.minimum(start + CHUNK, length)
    first, last, sequence = tl.where(j == 0, batch, -1), tl.where(j == chunks - 1, batch, -1), batch
    if PACKED:
        start, stop, sequence = tl.load(table + i * 5), tl.load(table + i * 5 + 1), tl.load(table + i * 5 + 4)
        first, last, batch = tl.load(table + i * 5 + 2), tl.load(table + i * 5 + 3), i * 0
    return batch.to(tl.int64), start, stop, first.to(tl.int64), last.to(tl.int64), sequence.to(tl.int64)


@triton.jit
def products(rows, columns, reaches, ACC: tl.constexpr):
    """exp(columns - rows) where one step reaches the other, else 0. Sums of logarithms come in float64: what is left of
    two large ones is small, so that they are subtracted in two parts."""
    if tl.float64 == ACC:
        difference = columns - rows
    else:
        row, column = rows.to(tl.float32), columns.to(tl.float32)
        difference = column - row
        difference += (columns - column.to(tl.float64)).to(tl.float32) - (rows - row.to(tl.float64)).to(tl.float32)
    return tl.exp(tl.where(reaches, difference, float("-inf")))


@triton.jit(do_not_specialize=["length"])
def carry_states(
    left, right, extra, weight, decay, initial, initial_vector, cu_seqlens,
    chunk_states, chunk_vectors, final, final_vector, length,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    CHUNK: tl.constexpr, SCALE: tl.constexpr, VECTOR: tl.constexpr, ADJOINT: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S ← decay_c S + Σ_t weight_t left_t right_tᵀ over the segments of a sequence; n has `extra` in place of right.

    Forward, `chunk_states` [B, chunks, H, K, V] gets the state before each chunk; the adjoint runs from the last
    segment to the first and writes the gradient of the state after each chunk, where no sequence ends.
    """
    v_blocks: tl.constexpr = (V + BV - 1) // BV
    k_blocks: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0)
    v_block, k_block = pid % v_blocks, pid // v_blocks % k_blocks
    h, n = pid // (v_blocks * k_blocks) % H, (pid // (v_blocks * k_blocks * H)).to(tl.int64)
    k, v, i = k_block * BK + tl.arange(0, BK), v_block * BV + tl.arange(0, BV), tl.arange(0, CHUNK)
    begin, steps, batch = bounds_of(n, cu_seqlens, length, PACKED, REVERSE)
    end = begin + steps
    kv, there_kv = k[:, None] * V + v[None, :], (k < K)[:, None] & (v < V)[None, :]
    S = tl.load(initial + (n * H + h) * K * V + kv, mask=there_kv, other=0)
    vector = tl.zeros([BK], ACC)
    if VECTOR:
        vector = tl.load(initial_vector + (n * H + h) * K + k, mask=k < K, other=0)
    chunks, first_chunk = tl.cdiv(length, CHUNK), begin // CHUNK
    past_chunk = tl.where(steps > 0, tl.cdiv(end, CHUNK), first_chunk)
    for c in range(first_chunk, past_chunk):
        j = first_chunk + past_chunk - 1 - c if ADJOINT else c
        start, stop = tl.maximum(begin, j * CHUNK), tl.minimum(end, (j + 1) * CHUNK)
        whole = stop < end if ADJOINT else start == j * CHUNK
        here = (batch * chunks + j) * H + h
        if whole:
            tl.store(chunk_states + here * K * V + kv, S, mask=there_kv)
            if VECTOR:  # noqa: SIM102 (settled at compile time)
                if v_block == 0:
                    tl.store(chunk_vectors + here * K + k, vector, mask=k < K)
        p = start + i
        there, row = p < stop, row_of(p, batch, length, REVERSE)
        w = tl.load(weight + row * H + h, mask=there, other=0).to(ACC)
        if ADJOINT:
            w *= SCALE
        a = tl.load(
            left + (row * (H // R) + h // R)[None, :] * K + k[:, None], mask=(k < K)[:, None] & there[None, :], other=0
        ).to(ACC) * w[None, :]  # fmt: skip
        b = tl.load(
            right + (row * H + h)[:, None] * V + v[None, :], mask=there[:, None] & (v < V)[None, :], other=0
        ).to(DOT)  # fmt: skip
        total = tl.load(decay + row_of(stop - 1, batch, length, REVERSE) * H + h).to(ACC)
        S = tl.dot(a.to(DOT), b, total * S, input_precision=PRECISION, out_dtype=ACC)
        if VECTOR:
            if ADJOINT:
                a *= tl.load(extra + row * H + h, mask=there, other=0)[None, :]
            vector = total * vector + tl.sum(a, 1)
    tl.store(final + (n * H + h) * K * V + kv, S, mask=there_kv)
    if VECTOR:  # noqa: SIM102
        if v_block == 0:
            tl.store(final_vector + (n * H + h) * K + k, vector, mask=k < K)


@triton.jit(do_not_specialize=["length"])
def read_states(
    left, other, right, rows, columns, weight, floor, grad, states, vectors, edges, edge_vectors, table,
    out, normaliser, denominator, inner, steps, length,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    CHUNK: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr, KEYS: tl.constexpr,
    NORMALIZE: tl.constexpr, GRADIENT: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of a segment, or with KEYS the gradients of its values: SCALE (left otherᵀ ⊙ E) right + weight · left S.

    With a normaliser (NORMALIZE) the outputs are divided by the denominator; for the GRADIENT, it is written together
    with the normaliser and each block's part of grad · numerator, `[blocks of V, B, T, H]`.
    """
    v_blocks: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    v_block, h, unit = pid % v_blocks, pid // v_blocks % H, pid // (v_blocks * H)
    batch, start, stop, first, last, _ = segment_at(unit, table, length, CHUNK, PACKED)
    if start == stop:
        return
    v, i = v_block * BV + tl.arange(0, BV), tl.arange(0, CHUNK)
    p = start + i
    there, row = p < stop, row_of(p, batch, length, REVERSE)
    there_v = there[:, None] & (v < V)[None, :]
    edge = last if KEYS else first
    chunk = batch * tl.cdiv(length, CHUNK) + start // CHUNK
    state, vector = states + (chunk * H + h) * K * V, vectors
    if NORMALIZE:
        vector = vectors + (chunk * H + h) * K
    if edge >= 0:
        state = edges + (edge * H + h) * K * V
        if NORMALIZE:
            vector = edge_vectors + (edge * H + h) * K
    scores, through, into_vector = tl.zeros([CHUNK, CHUNK], ACC), tl.zeros([CHUNK, BV], ACC), tl.zeros([CHUNK], ACC)
    at = (row * (H // R) + h // R) * K
    for k_block in range(0, K, BK):
        k = k_block + tl.arange(0, BK)
        a = tl.load(left + at[:, None] + k[None, :], mask=there[:, None] & (k < K)[None, :], other=0).to(DOT)
        b = tl.load(other + at[None, :] + k[:, None], mask=(k < K)[:, None] & there[None, :], other=0).to(DOT)
        S = tl.load(state + k[:, None] * V + v[None, :], mask=(k < K)[:, None] & (v < V)[None, :], other=0)
        scores = tl.dot(a, b, scores, input_precision=PRECISION, out_dtype=ACC)
        through = tl.dot(a, S.to(DOT), through, input_precision=PRECISION, out_dtype=ACC)
        if NORMALIZE:
            into_vector += tl.sum(a.to(ACC) * tl.load(vector + k, mask=k < K, other=0)[None, :], 1)
    row_log = tl.load(rows + row * H + h, mask=there, other=0)
    column_log = tl.load(columns + row * H + h, mask=there, other=0)
    both = there[:, None] & there[None, :]
    if KEYS:
        E = products(row_log[None, :], column_log[:, None], both & (i[None, :] >= i[:, None]), ACC)
    else:
        E = products(row_log[:, None], column_log[None, :], both & (i[None, :] <= i[:, None]), ACC)
    scores *= SCALE * E
    w = tl.load(weight + row * H + h, mask=there, other=0).to(ACC)
    if not KEYS:
        w *= SCALE
    c = tl.load(right + (row * H + h)[:, None] * V + v[None, :], mask=there_v, other=0).to(DOT)
    result = tl.dot(scores.to(DOT), c, through * w[:, None], input_precision=PRECISION, out_dtype=ACC)
    if NORMALIZE:
        summed = tl.sum(scores, 1) + into_vector * w
        divisor = tl.maximum(tl.abs(summed), tl.load(floor + row * H + h, mask=there, other=1)) + EPS
        if GRADIENT:
            g = tl.load(grad + (row * H + h)[:, None] * V + v[None, :], mask=there_v, other=0).to(ACC)
            tl.store(inner + v_block.to(tl.int64) * steps * H + row * H + h, tl.sum(g * result, 1), mask=there)
            if v_block == 0:
                tl.store(normaliser + row * H + h, summed, mask=there)
                tl.store(denominator + row * H + h, divisor, mask=there)
        else:
            result /= divisor[:, None]
    if not GRADIENT:
        tl.store(out + (row * H + h)[:, None] * V + v[None, :], result, mask=there_v)


@triton.jit(do_not_specialize=["length"])
def side_gradients(
    mine, theirs, left, right, rows, columns, weight, decay, extra,
    states, vectors, edges, edge_vectors, adjoint_states, adjoint_vectors, adjoint_edges, adjoint_edge_vectors, table,
    grad, dots, ends, last_ends, segments, steps, length,
    H: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, CHUNK: tl.constexpr, SCALE: tl.constexpr, KEYS: tl.constexpr,
    VECTOR: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries of a segment, or with KEYS of its keys, summed over a part of the heads of their group.

    `mine` is q, `theirs` k, `left` dy and `right` v, and the other way round for keys. Per block of K are written, to
    be added up: `grad` [PARTS, B, T, G, K], or the sum itself if there is one part; `dots` [blocks, B, T, H], the inner
    product of mine and its gradient; for keys `ends` [blocks, segments, H], the gradient of a factor of the whole state
    after the segment, and `last_ends`, as large, that after the last segment of each sequence.
    """
    k_blocks: tl.constexpr = (K + BK - 1) // BK
    G: tl.constexpr = H // R
    PER: tl.constexpr = (R + PARTS - 1) // PARTS
    pid = tl.program_id(0)
    k_block, g = pid % k_blocks, pid // k_blocks % G
    part, unit = pid // (k_blocks * G) % PARTS, pid // (k_blocks * G * PARTS)
    batch, start, stop, first, last, _ = segment_at(unit, table, length, CHUNK, PACKED)
    if start == stop:
        return
    k, i = k_block * BK + tl.arange(0, BK), tl.arange(0, CHUNK)
    p = start + i
    there, row = p < stop, row_of(p, batch, length, REVERSE)
    there_k = there[:, None] & (k < K)[None, :]
    both = there[:, None] & there[None, :]
    chunk = batch * tl.cdiv(length, CHUNK) + start // CHUNK
    block = k_block.to(tl.int64)
    total_gradient = tl.zeros([CHUNK, BK], ACC)
    for r in range(part * PER, tl.minimum(part * PER + PER, R)):
        h = g * R + r
        state, vector = states + (chunk * H + h) * K * V, vectors
        adjoint, adjoint_vector = adjoint_states + (chunk * H + h) * K * V, adjoint_vectors
        if VECTOR:
            vector, adjoint_vector = vectors + (chunk * H + h) * K, adjoint_vectors + (chunk * H + h) * K
        if first >= 0:
            state = edges + (first * H + h) * K * V
            if VECTOR:
                vector = edge_vectors + (first * H + h) * K
        if last >= 0:
            adjoint = adjoint_edges + (last * H + h) * K * V
            if VECTOR:
                adjoint_vector = adjoint_edge_vectors + (last * H + h) * K
        weights, through, common = tl.zeros([CHUNK, CHUNK], ACC), tl.zeros([CHUNK, BK], ACC), tl.zeros([BK], ACC)
        at = (row * H + h) * V
        for v_block in range(0, V, BV):
            v = v_block + tl.arange(0, BV)
            a = tl.load(left + at[:, None] + v[None, :], mask=there[:, None] & (v < V)[None, :], other=0).to(DOT)
            b = tl.load(right + at[None, :] + v[:, None], mask=(v < V)[:, None] & there[None, :], other=0).to(DOT)
            vk, there_vk = k[None, :] * V + v[:, None], (v < V)[:, None] & (k < K)[None, :]
            if KEYS:
                S = tl.load(adjoint + vk, mask=there_vk, other=0)
                common += tl.sum(S * tl.load(state + vk, mask=there_vk, other=0), 0)
            else:
                S = tl.load(state + vk, mask=there_vk, other=0)
            weights = tl.dot(a, b, weights, input_precision=PRECISION, out_dtype=ACC)
            through = tl.dot(a, S.to(DOT), through, input_precision=PRECISION, out_dtype=ACC)
        at_h = row * H + h
        w = tl.load(weight + at_h, mask=there, other=0).to(ACC)
        if VECTOR:
            normal = tl.load(extra + at_h, mask=there, other=0)
            if KEYS:
                n = tl.load(adjoint_vector + k, mask=k < K, other=0)
                common += n * tl.load(vector + k, mask=k < K, other=0)
                weights += normal[None, :]
                through += n[None, :]
            else:
                weights += normal[:, None]
                through += normal[:, None] * tl.load(vector + k, mask=k < K, other=0)[None, :]
        row_log = tl.load(rows + at_h, mask=there, other=0)
        column_log = tl.load(columns + at_h, mask=there, other=0)
        side = tl.load(mine + (row * G + g)[:, None] * K + k[None, :], mask=there_k, other=0).to(ACC)
        if KEYS:
            through *= w[:, None]
            E = products(row_log[None, :], column_log[:, None], both & (i[None, :] >= i[:, None]), ACC)
            total = tl.load(decay + row_of(stop - 1, batch, length, REVERSE) * H + h).to(ACC)
            end = total * tl.sum(common) + tl.sum(side * through)
            tl.store(ends + (block * segments + unit) * H + h, end)
            if VECTOR:  # noqa: SIM102 (settled at compile time)
                if last >= 0:
                    tl.store(last_ends + (block * segments + last) * H + h, end)
        else:
            through *= (w * SCALE)[:, None]
            E = products(row_log[:, None], column_log[None, :], both & (i[None, :] <= i[:, None]), ACC)
        c = tl.load(theirs + (row * G + g)[:, None] * K + k[None, :], mask=there_k, other=0).to(DOT)
        weights *= SCALE * E
        gradient = tl.dot(weights.to(DOT), c, through, input_precision=PRECISION, out_dtype=ACC)
        tl.store(dots + block * steps * H + at_h, tl.sum(side * gradient, 1), mask=there)
        total_gradient += gradient
    place = part.to(tl.int64) * steps * G + row * G + g
    tl.store(grad + place[:, None] * K + k[None, :], total_gradient, mask=there_k)


@triton.jit
def gradient_of_sums(
    query_dots, key_dots, ends, row, unit, h, there, heads, stop, p, segments, steps, blocks,
    H: tl.constexpr,
):  # fmt: skip
    """Gradients of a segment's columns u, `[CHUNK, BH]`, and of the logarithms of its decays, without what m adds."""
    from_queries, from_keys = tl.zeros(there.shape, tl.float64), tl.zeros(there.shape, tl.float64)
    end = tl.zeros(heads.shape, tl.float64)
    at = row[:, None] * H + h[None, :]
    for block in range(blocks):
        from_queries += tl.load(query_dots + block * steps * H + at, mask=there, other=0).to(tl.float64)
        from_keys += tl.load(key_dots + block * steps * H + at, mask=there, other=0).to(tl.float64)
        end += tl.load(ends + (block * segments + unit) * H + h, mask=heads, other=0).to(tl.float64)
    into_sums = from_queries - from_keys
    into_sums += tl.where((p == stop - 1)[:, None], end[None, :], 0.0)
    return from_keys, tl.cumsum(into_sums, 0, reverse=True)
