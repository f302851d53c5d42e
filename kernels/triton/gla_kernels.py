# mypy: allow-untyped-defs, allow-incomplete-defs
r"""GLA: the kernels of a recurrence whose state decays by one factor per channel.

Time is cut into segments as in `matrix_state_kernels`. With g the logarithms of the decays, a step j reaches a later
step t of its segment through the channels d with the weights

    A_tj = scale · Σ_d q_td k_jd exp(Σ_{j < u ≤ t} g_ud)                        u < t where a bonus is given

which are a product of two matrices only after the exponential is taken apart at a step between j and t. At level l the
segment is cut into blocks of 2^l steps, and the exponential apart at the boundary of blocks 2i and 2i + 1, for j in the
earlier and t in the later of the two: every pair of steps meets at one level, that of the highest bit in which their
numbers differ. Both factors are at most 1, so that nothing overflows and whatever the decays are, weights are exact to
rounding. With E_l the decays between each step and its boundary,

    X_l = E_l ⊙ (q in later blocks, k in earlier ones)          A = Σ_l X_l X_lᵀ, of each product the pairs of its level

and with dA_tj = scale · dy_t · v_j, written on both sides of the diagonal, and M_l the 0/1 matrix of the steps between
each step and its boundary,

    Z_l = E_l ⊙ (dA on the pairs of the level) X_l
    dq = Σ_l Z_l in later blocks          dk = Σ_l Z_l in earlier ones          dg = Σ_l M_lᵀ (X_l ⊙ Z_l / E_l)

where nothing cancels either: the gradient of a decay holds only pairs that it lies between.

Forward launches `sum_gates`, `prepare`, `carry` and `read`, backward `sum_gates`, `prepare`, `carry`, `read` for the
values, `outer` and `sides`. Where values decay, (q, k) and (dy, v) change places and S is transposed: Σ y · dy is the
same, so that an output is what was a gradient of queries, and so on. Nothing is added up atomically.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sinuous.kernels.triton.matrix_state_kernels import FORGOTTEN, segment_at
from sinuous.kernels.triton.packing import bounds_of, row_of


@triton.jit
def slot_of(
    batch, start, sequence, length, sequences, CHUNK: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr
):
    """The slot of a segment in tensors with one entry per segment, numbered by its chunk and sequence."""
    if PACKED:
        return start // CHUNK + (sequences - 1 - sequence if REVERSE else sequence)
    return batch * tl.cdiv(length, CHUNK) + start // CHUNK


@triton.jit
def ends_at(level, i, count, AHEAD: tl.constexpr):
    """The steps between which E_l decays, first excluded: from a step to the boundary that follows its block, if that
    is the earlier of the two, else from the boundary to the step's readout. All within the `count` steps there are."""
    block, last = i >> level, count - 1
    later = (block & 1) == 1
    boundary = tl.minimum(((block + tl.where(later, 0, 1)) << level) - 1, last)
    step = tl.minimum(i, last)
    readout = tl.maximum(step - 1 if AHEAD else step, boundary)
    return tl.where(later, boundary, step), tl.where(later, readout, boundary)


@triton.jit
def decay(sums, begin, end, c, K: tl.constexpr, STRIDE: tl.constexpr, ACROSS: tl.constexpr, TWO: tl.constexpr):
    """exp of the logarithms after step `begin` up to step `end`, `[steps, channels]`, or turned with ACROSS. What is
    left of two large sums is small, so that they come in two parts."""
    if ACROSS:
        from_, to, there = begin[None, :] * STRIDE + c[:, None], end[None, :] * STRIDE + c[:, None], (c < K)[:, None]
    else:
        from_, to, there = begin[:, None] * STRIDE + c[None, :], end[:, None] * STRIDE + c[None, :], (c < K)[None, :]
    difference = tl.load(sums + to, mask=there, other=0) - tl.load(sums + from_, mask=there, other=0)
    if TWO:
        difference += tl.load(sums + to + K, mask=there, other=0) - tl.load(sums + from_ + K, mask=there, other=0)
    return tl.exp(difference)


@triton.jit
def decay_since_start(sums, i, count, c, K: tl.constexpr, STRIDE: tl.constexpr, AHEAD: tl.constexpr):
    """exp of the logarithms up to the readout of each step."""
    step = tl.minimum(i, count - 1) - (1 if AHEAD else 0)
    at, there = step[:, None] * STRIDE + c[None, :], (step >= 0)[:, None] & (c < K)[None, :]
    return tl.exp(tl.load(sums + at, mask=there, other=0))


@triton.jit(do_not_specialize=["length"])
def sum_gates(
    log_decay, table, sums, length,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, CHUNK: tl.constexpr, TWO: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The sum of log_decay since the start of the segment, [B, T, H, 1, K], or as the sum of TWO, [B, T, H, 2, K]."""
    k_blocks: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0)
    k_block, h, unit = pid % k_blocks, pid // k_blocks % H, pid // (k_blocks * H)
    batch, start, stop, _, _, _ = segment_at(unit, table, length, CHUNK, PACKED)
    if start == stop:
        return
    c, p = k_block * BK + tl.arange(0, BK), start + tl.arange(0, CHUNK)
    there = (p < stop)[:, None] & (c < K)[None, :]
    head = (row_of(p, batch, length, REVERSE) * H + h)[:, None] * K
    g = tl.load(log_decay + head + c[None, :], mask=there, other=0).to(tl.float64)
    summed = tl.cumsum(tl.where(g < FORGOTTEN, FORGOTTEN, g), 0)
    if TWO:
        first = summed.to(tl.float32)
        tl.store(sums + 2 * head + c[None, :], first, mask=there)
        tl.store(sums + 2 * head + K + c[None, :], summed - first.to(tl.float64), mask=there)
    else:
        tl.store(sums + head + c[None, :], summed, mask=there)


@triton.jit(do_not_specialize=["length", "sequences", "levels"])
def prepare(
    q, k, sums, bonus, table, weights, queries, keys, totals, length, sequences, levels,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, CHUNK: tl.constexpr,
    SCALE: tl.constexpr, QUERIES: tl.constexpr, BONUS: tl.constexpr, TWO: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A [B, T, H, CHUNK] of a segment, scale · q times its decay since the start, k times its decay until the end, and
    the decay over all of it [segments, H, K]. Without QUERIES, only the last two."""
    STRIDE: tl.constexpr = -H * K if REVERSE else H * K
    PARTS: tl.constexpr = 2 if TWO else 1
    pid = tl.program_id(0)
    h, unit = pid % H, pid // H
    batch, start, stop, _, _, sequence = segment_at(unit, table, length, CHUNK, PACKED)
    if start == stop:
        return
    i, count = tl.arange(0, CHUNK), stop - start
    there, head = i < count, row_of(start, batch, length, REVERSE) * H + h
    place = slot_of(batch, start, sequence, length, sequences, CHUNK, PACKED, REVERSE)
    k, sums, keys = k + head * K, sums + head * (K * PARTS), keys + head * K
    if QUERIES:
        q, queries = q + head * K, queries + head * K
    scores, on_diagonal = tl.zeros([CHUNK, CHUNK], ACC), tl.zeros([CHUNK], ACC)
    for k_block in range(0, K, BK):
        c = k_block + tl.arange(0, BK)
        at, there_k = i[:, None] * STRIDE + c[None, :], there[:, None] & (c < K)[None, :]
        key = tl.load(k + at, mask=there_k, other=0).to(ACC)
        until_end = decay(sums, tl.minimum(i, count - 1), i * 0 + count - 1, c, K, STRIDE * PARTS, False, TWO)
        tl.store(keys + at, key * until_end, mask=there_k)
        total = tl.exp(tl.load(sums + (count - 1) * (STRIDE * PARTS) + c, mask=c < K, other=0))
        tl.store(totals + (place * H + h) * K + c, total, mask=c < K)
        if QUERIES:
            query = tl.load(q + at, mask=there_k, other=0).to(ACC)
            since_start = decay_since_start(sums, i, count, c, K, STRIDE * PARTS, BONUS)
            tl.store(queries + at, query * SCALE * since_start, mask=there_k)
            pair = query * key
            if BONUS:
                pair *= tl.load(bonus + h * K + c, mask=c < K, other=0).to(ACC)[None, :]
            on_diagonal += tl.sum(pair, 1)
            # Loaded again the other way round: compilers for Hopper have mistaken the transpose of what they computed.
            at_across = i[None, :] * STRIDE + c[:, None]
            key_across = tl.load(k + at_across, mask=(c < K)[:, None] & there[None, :], other=0).to(ACC)
            for level in range(levels):
                begin, end = ends_at(level, i, count, BONUS)
                left = query * decay(sums, begin, end, c, K, STRIDE * PARTS, False, TWO)
                right = key_across * decay(sums, begin, end, c, K, STRIDE * PARTS, True, TWO)
                products = tl.dot(left.to(DOT), right.to(DOT), input_precision=PRECISION, out_dtype=ACC)
                block = i >> level
                partner = tl.where((block & 1) == 1, block - 1, -1)
                scores += tl.where(partner[:, None] == block[None, :], products, 0.0)
    if QUERIES:
        scores = tl.where(i[:, None] == i[None, :], on_diagonal[:, None], scores) * SCALE
        at_weights = head * CHUNK + i[:, None] * (STRIDE // K * CHUNK) + i[None, :]
        tl.store(weights + at_weights, scores, mask=there[:, None])


@triton.jit(do_not_specialize=["length", "sequences"])
def carry(
    left, right, totals, edge, cu_seqlens, chunk_states, other, length, sequences,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, CHUNK: tl.constexpr,
    ADJOINT: tl.constexpr, TRANSPOSED: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S ← diag(totals) S + leftᵀ right over the segments of a sequence, from `edge` to `other`.

    Forward, `chunk_states` [B, chunks, H, K, V] gets the state before each chunk; the adjoint runs from the last
    segment to the first and writes the gradient of the state after each chunk, where no sequence ends.
    """
    v_blocks: tl.constexpr = (V + BV - 1) // BV
    k_blocks: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0)
    v_block, k_block = pid % v_blocks, pid // v_blocks % k_blocks
    h, n = pid // (v_blocks * k_blocks) % H, (pid // (v_blocks * k_blocks * H)).to(tl.int64)
    c, v, i = k_block * BK + tl.arange(0, BK), v_block * BV + tl.arange(0, BV), tl.arange(0, CHUNK)
    begin, steps, batch = bounds_of(n, cu_seqlens, length, PACKED, REVERSE)
    end, step = begin + steps, -i if REVERSE else i
    cv = v[None, :] * K + c[:, None] if TRANSPOSED else c[:, None] * V + v[None, :]
    there_cv = (c < K)[:, None] & (v < V)[None, :]
    S = tl.load(edge + (n * H + h) * K * V + cv, mask=there_cv, other=0)
    chunks, first_chunk = tl.cdiv(length, CHUNK), begin // CHUNK
    past_chunk = tl.where(steps > 0, tl.cdiv(end, CHUNK), first_chunk)
    for j in range(first_chunk, past_chunk):
        chunk = first_chunk + past_chunk - 1 - j if ADJOINT else j
        start, stop = tl.maximum(begin, chunk * CHUNK), tl.minimum(end, (chunk + 1) * CHUNK)
        whole = stop < end if ADJOINT else start == chunk * CHUNK
        if whole:
            tl.store(chunk_states + ((batch * chunks + chunk) * H + h) * K * V + cv, S, mask=there_cv)
        there, head = start + i < stop, row_of(start, batch, length, REVERSE) * H + h
        at_a, at_b = step[None, :] * (H * K) + c[:, None], step[:, None] * (H * V) + v[None, :]
        a = tl.load(left + head * K + at_a, mask=(c < K)[:, None] & there[None, :], other=0).to(DOT)
        b = tl.load(right + head * V + at_b, mask=there[:, None] & (v < V)[None, :], other=0).to(DOT)
        place = slot_of(batch, start, n, length, sequences, CHUNK, PACKED, REVERSE)
        total = tl.load(totals + (place * H + h) * K + c, mask=c < K, other=0)
        S = tl.dot(a, b, total[:, None] * S, input_precision=PRECISION, out_dtype=ACC)
    tl.store(other + (n * H + h) * K * V + cv, S, mask=there_cv)


@triton.jit(do_not_specialize=["length"])
def read(
    weights, left, right, states, edges, table, out, length,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, CHUNK: tl.constexpr,
    KEYS: tl.constexpr, TRANSPOSED: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of a segment, A right + left S, or with KEYS the gradients of its values, Aᵀ right + left Λ."""
    v_blocks: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    v_block, h, unit = pid % v_blocks, pid // v_blocks % H, pid // (v_blocks * H)
    batch, start, stop, first, last, _ = segment_at(unit, table, length, CHUNK, PACKED)
    if start == stop:
        return
    v, i = v_block * BV + tl.arange(0, BV), tl.arange(0, CHUNK)
    there, step = start + i < stop, -i if REVERSE else i
    head = row_of(start, batch, length, REVERSE) * H + h
    there_v = there[:, None] & (v < V)[None, :]
    edge = last if KEYS else first
    state = states + ((batch * tl.cdiv(length, CHUNK) + start // CHUNK) * H + h) * K * V
    if edge >= 0:
        state = edges + (edge * H + h) * K * V
    if KEYS:
        A = tl.load(weights + head * CHUNK + step[None, :] * (H * CHUNK) + i[:, None], mask=there[None, :], other=0)
    else:
        A = tl.load(weights + head * CHUNK + step[:, None] * (H * CHUNK) + i[None, :], mask=there[:, None], other=0)
    at_v = step[:, None] * (H * V) + v[None, :]
    b = tl.load(right + head * V + at_v, mask=there_v, other=0)
    result = tl.dot(A.to(DOT), b.to(DOT), input_precision=PRECISION, out_dtype=ACC)
    for k_block in range(0, K, BK):
        c = k_block + tl.arange(0, BK)
        cv = v[None, :] * K + c[:, None] if TRANSPOSED else c[:, None] * V + v[None, :]
        at_k = step[:, None] * (H * K) + c[None, :]
        a = tl.load(left + head * K + at_k, mask=there[:, None] & (c < K)[None, :], other=0)
        S = tl.load(state + cv, mask=(c < K)[:, None] & (v < V)[None, :], other=0)
        result = tl.dot(a.to(DOT), S.to(DOT), result, input_precision=PRECISION, out_dtype=ACC)
    tl.store(out + head * V + at_v, result, mask=there_v)


@triton.jit(do_not_specialize=["length"])
def outer(
    left, right, table, pairs, length,
    H: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, CHUNK: tl.constexpr, SCALE: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dA [B, T, H, CHUNK] of a segment: scale · left_t · right_j for t ≥ j, and the same for j and t."""
    STRIDE: tl.constexpr = -H if REVERSE else H
    pid = tl.program_id(0)
    h, unit = pid % H, pid // H
    batch, start, stop, _, _, _ = segment_at(unit, table, length, CHUNK, PACKED)
    if start == stop:
        return
    i = tl.arange(0, CHUNK)
    there, head = start + i < stop, row_of(start, batch, length, REVERSE) * H + h
    left, right = left + head * V, right + head * V
    lower, upper = tl.zeros([CHUNK, CHUNK], ACC), tl.zeros([CHUNK, CHUNK], ACC)
    for v_block in range(0, V, BV):
        v = v_block + tl.arange(0, BV)
        down, there_down = i[:, None] * (STRIDE * V) + v[None, :], there[:, None] & (v < V)[None, :]
        across, there_across = i[None, :] * (STRIDE * V) + v[:, None], (v < V)[:, None] & there[None, :]
        a = tl.load(left + down, mask=there_down, other=0).to(DOT)
        b = tl.load(right + across, mask=there_across, other=0).to(DOT)
        lower = tl.dot(a, b, lower, input_precision=PRECISION, out_dtype=ACC)
        a = tl.load(right + down, mask=there_down, other=0).to(DOT)
        b = tl.load(left + across, mask=there_across, other=0).to(DOT)
        upper = tl.dot(a, b, upper, input_precision=PRECISION, out_dtype=ACC)
    both = tl.where(i[:, None] >= i[None, :], lower, upper) * SCALE
    tl.store(pairs + head * CHUNK + i[:, None] * (STRIDE * CHUNK) + i[None, :], both, mask=there[:, None])


@triton.jit(do_not_specialize=["length", "levels"])
def sides(
    q, k, left, right, sums, bonus, pairs, states, edges, adjoint_states, adjoint_edges, table,
    of_queries, of_keys, of_gates, of_bonus, length, levels,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, CHUNK: tl.constexpr,
    SCALE: tl.constexpr, GRADIENT: tl.constexpr, BONUS: tl.constexpr, TWO: tl.constexpr,
    TRANSPOSED: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries, keys and, if `of_gates` is given, log_decay of a segment, and its part of that of the
    bonus, [segments, H, K]; `left` is dy and `right` v. Without GRADIENT only that of the queries, which does not
    depend on them and is an output where values decay."""
    STRIDE: tl.constexpr = -H * K if REVERSE else H * K
    PARTS: tl.constexpr = 2 if TWO else 1
    k_blocks: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0)
    k_block, h, unit = pid % k_blocks, pid // k_blocks % H, (pid // (k_blocks * H)).to(tl.int64)
    batch, start, stop, first, last, _ = segment_at(unit, table, length, CHUNK, PACKED)
    if start == stop:
        return
    c, i, count = k_block * BK + tl.arange(0, BK), tl.arange(0, CHUNK), stop - start
    t, u = i[:, None], i[None, :]
    there, head = i < count, row_of(start, batch, length, REVERSE) * H + h
    chunk = ((batch * tl.cdiv(length, CHUNK) + start // CHUNK) * H + h) * K * V
    state, adjoint = states + chunk, adjoint_states
    if first >= 0:
        state = edges + (first * H + h) * K * V
    if GRADIENT:
        adjoint = adjoint_states + chunk
        if last >= 0:
            adjoint = adjoint_edges + (last * H + h) * K * V
    from_state, to_state, whole = tl.zeros([CHUNK, BK], ACC), tl.zeros([CHUNK, BK], ACC), tl.zeros([BK], ACC)
    for v_block in range(0, V, BV):
        v = v_block + tl.arange(0, BV)
        vc = v[:, None] * K + c[None, :] if TRANSPOSED else c[None, :] * V + v[:, None]
        there_vc = (v < V)[:, None] & (c < K)[None, :]
        at, there_v = i[:, None] * (STRIDE // K * V) + v[None, :], there[:, None] & (v < V)[None, :]
        S = tl.load(state + vc, mask=there_vc, other=0)
        a = tl.load(left + head * V + at, mask=there_v, other=0).to(DOT)
        from_state = tl.dot(a, S.to(DOT), from_state, input_precision=PRECISION, out_dtype=ACC)
        if GRADIENT:
            L = tl.load(adjoint + vc, mask=there_vc, other=0)
            a = tl.load(right + head * V + at, mask=there_v, other=0).to(DOT)
            to_state = tl.dot(a, L.to(DOT), to_state, input_precision=PRECISION, out_dtype=ACC)
            whole += tl.sum(S * L, 0)
    at, there_k = i[:, None] * STRIDE + c[None, :], there[:, None] & (c < K)[None, :]
    k, sums, pairs = k + head * K, sums + head * (K * PARTS), pairs + head * CHUNK
    dq = from_state * SCALE * decay_since_start(sums, i, count, c, K, STRIDE * PARTS, BONUS)
    dk, dg = to_state, from_state
    if GRADIENT:
        dk = to_state * decay(sums, tl.minimum(i, count - 1), i * 0 + count - 1, c, K, STRIDE * PARTS, False, TWO)
    if of_gates is not None:
        key = tl.load(k + at, mask=there_k, other=0).to(ACC)
        query = tl.load(q + head * K + at, mask=there_k, other=0).to(ACC)
        seeing = tl.where(u > t if BONUS else u >= t, 1.0, 0.0).to(DOT)
        dg = tl.dot(seeing, (query * dq).to(DOT), input_precision=PRECISION, out_dtype=ACC)
        dg += tl.dot(tl.where(u < t, 1.0, 0.0).to(DOT), (key * dk).to(DOT), input_precision=PRECISION, out_dtype=ACC)
        dg += (tl.exp(tl.load(sums + (count - 1) * (STRIDE * PARTS) + c, mask=c < K, other=0)) * whole)[None, :]
    # Values that are the same at every level are computed again at each, and queries and keys loaded again; the barrier
    # keeps compilers from loading them ahead of the loop. Held through it, they take more registers than there are.
    for level in tl.range(levels, disable_licm=True):
        tl.debug_barrier()
        begin, end = ends_at(level, i, count, BONUS)
        E = decay(sums, begin, end, c, K, STRIDE * PARTS, False, TWO)
        block = i >> level
        later = ((block & 1) == 1)[:, None]
        side = tl.load(k + at, mask=there_k, other=0).to(ACC)
        if GRADIENT:
            side = tl.where(later, tl.load(q + head * K + at, mask=there_k, other=0).to(ACC), side)
        met = ((block ^ 1)[:, None] == block[None, :]) & there[:, None] & there[None, :]
        dA = tl.load(pairs + t * (STRIDE // K * CHUNK) + u, mask=met, other=0).to(DOT)
        Z = E * tl.dot(dA, (side * E).to(DOT), input_precision=PRECISION, out_dtype=ACC)
        dq += tl.where(later, Z, 0.0)
        if GRADIENT:
            dk += tl.where(later, 0.0, Z)
        if of_gates is not None:
            lies = tl.where((begin[None, :] < t) & (t <= end[None, :]), 1.0, 0.0).to(DOT)
            dg += tl.dot(lies, (side * Z).to(DOT), input_precision=PRECISION, out_dtype=ACC)
    key = tl.load(k + at, mask=there_k, other=0).to(ACC)
    query = tl.load(q + head * K + at, mask=there_k, other=0).to(ACC) if GRADIENT else tl.zeros([CHUNK, BK], ACC)
    on_diagonal = tl.load(pairs + i * (STRIDE // K * CHUNK + 1), mask=there, other=0).to(ACC)[:, None]
    if BONUS:
        if GRADIENT:
            tl.store(of_bonus + (unit * H + h) * K + c, tl.sum(on_diagonal * query * key, 0), mask=c < K)
        on_diagonal = on_diagonal * tl.load(bonus + h * K + c, mask=c < K, other=0).to(ACC)[None, :]
    if of_queries is not None:
        tl.store(of_queries + head * K + at, dq + on_diagonal * key, mask=there_k)
    if GRADIENT:
        tl.store(of_keys + head * K + at, dk + on_diagonal * query, mask=there_k)
    if of_gates is not None:
        tl.store(of_gates + head * K + at, dg, mask=there_k)
