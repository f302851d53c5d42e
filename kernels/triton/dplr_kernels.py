# mypy: allow-untyped-defs, allow-incomplete-defs
r"""DPLR: the kernels of a state that decays per channel and is corrected by what it holds.

Time is cut into segments as in `matrix_state_kernels`. With S the state before one, u what the rank-one parts write,
and A the weights with which q and a reach k and b through the channels and their decays, exact for any decay as in
`gla_kernels`, where q sees its own step and a neither that nor its decay,

    u = A_ab u + A_ak v + ã S        y = A_qb u + A_qk v + q̃ S        S ← e^G S + k̃ᵀ v + b̃ᵀ u

in which q̃ and ã are decayed since the start, k̃ and b̃ until the end. With X = -A_ab (1 - A_ab)⁻¹, which is to say
(1 - A_ab)⁻¹ = 1 - X, all of it can be done before anything is known of S:

    M = (1 - X) A_ak        â = (1 - X) ã         P = A_qk + A_qb M        q̂ = q̃ + A_qb â
    N = A_qb (1 - X)        b̂ = (1 - X)ᵀ b̃        k̂ = k̃ + A_akᵀ b̂

    u = M v + â S           y = P v + q̂ S         S ← e^G S + k̂ᵀ v + b̃ᵀ (â S)

They are the weights and keys behind all transitions between two steps, and no larger than those transitions. The
backward pass is the same, mirrored. With Λ the gradient of the state after the segment and λ that of u,

    λ = Nᵀ dy + b̂ Λ         dv = Pᵀ dy + k̂ Λ      Λ ← e^G Λ + q̂ᵀ dy + âᵀ (b̃ Λ)

after which q, k, a, b and the decays get their gradients as in gla: from pairs of steps, dA_qk = dy vᵀ, dA_qb = dy uᵀ,
dA_ak = λ vᵀ and dA_ab = λ uᵀ, level by level, and from S and Λ.

Forward are launched gla's `sum_gates` and `prepare`, `solve`, `pass_through`, `carry` and gla's `read`; backward those,
with `read` for dv, u and λ, and gla's `outer` and `sides`, once for q and k and once for a and b. Nothing is added up
atomically.

Source: the WY form of Yang et al. (arXiv 2406.06484), section 3; with decays per channel by levels, our own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sinuous.kernels.triton.delta_rule_kernels import resolvent
from sinuous.kernels.triton.gla_kernels import decay, decay_since_start, ends_at, slot_of
from sinuous.kernels.triton.matrix_state_kernels import FORGOTTEN, segment_at
from sinuous.kernels.triton.packing import bounds_of, row_of


@triton.jit(do_not_specialize=["length"])
def solve(
    weights, table, solution, length,
    H: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X [B, T, H, CHUNK] of a segment, from A_ab."""
    STRIDE: tl.constexpr = -H * CHUNK if REVERSE else H * CHUNK
    pid = tl.program_id(0)
    h, unit = pid % H, pid // H
    batch, start, stop, _, _, _ = segment_at(unit, table, length, CHUNK, PACKED)
    if start == stop:
        return
    i = tl.arange(0, CHUNK)
    at = (row_of(start, batch, length, REVERSE) * H + h) * CHUNK + i[:, None] * STRIDE + i[None, :]
    there = (start + i < stop)[:, None]
    L = -tl.load(weights + at, mask=there, other=0).to(ACC)
    X = resolvent(L, tl.full([CHUNK], 1.0, ACC), CHUNK, LEVELS, ACC, PRECISION)
    tl.store(solution + at, X, mask=there)


@triton.jit(do_not_specialize=["length"])
def pass_through(
    solution, across, x, y, inner, outer, table, length,
    H: tl.constexpr, WIDTH: tl.constexpr, BK: tl.constexpr, CHUNK: tl.constexpr,
    TURNED: tl.constexpr, WEIGHTS: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns of inner = (1 - X) x and outer = y + across · inner, of a segment; TURNED, of Xᵀ and acrossᵀ. The columns
    are WIDTH channels, or where they are WEIGHTS the steps of the segment, which TURNED turns as well."""
    STRIDE: tl.constexpr = -H if REVERSE else H
    blocks: tl.constexpr = (WIDTH + BK - 1) // BK
    pid = tl.program_id(0)
    block, h, unit = pid % blocks, pid // blocks % H, pid // (blocks * H)
    batch, start, stop, _, _, _ = segment_at(unit, table, length, CHUNK, PACKED)
    if start == stop:
        return
    c, i, count = block * BK + tl.arange(0, BK), tl.arange(0, CHUNK), stop - start
    head = row_of(start, batch, length, REVERSE) * H + h
    if TURNED:
        square, there_square = i[None, :] * (STRIDE * CHUNK) + i[:, None], (i < count)[None, :]
    else:
        square, there_square = i[:, None] * (STRIDE * CHUNK) + i[None, :], (i < count)[:, None]
    if TURNED and WEIGHTS:
        at, there = c[None, :] * (STRIDE * WIDTH) + i[:, None], (c < count)[None, :]
    else:
        at, there = i[:, None] * (STRIDE * WIDTH) + c[None, :], (i < count)[:, None] & (c < WIDTH)[None, :]
    at += head * WIDTH
    square += head * CHUNK
    columns = tl.load(x + at, mask=there, other=0)
    X = tl.load(solution + square, mask=there_square, other=0).to(DOT)
    passed = columns.to(ACC) - tl.dot(X, columns.to(DOT), input_precision=PRECISION, out_dtype=ACC)
    if inner is not None:
        tl.store(inner + at, passed, mask=there)
    if outer is not None:
        A = tl.load(across + square, mask=there_square, other=0).to(DOT)
        result = tl.load(y + at, mask=there, other=0).to(ACC)
        result = tl.dot(A, passed.to(DOT), result, input_precision=PRECISION, out_dtype=ACC)
        tl.store(outer + at, result, mask=there)


@triton.jit(do_not_specialize=["length", "sequences"])
def carry(
    left, right, onto, reads, totals, edge, cu_seqlens, chunk_states, other, length, sequences,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, ADJOINT: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S ← diag(totals) S + leftᵀ right + ontoᵀ (reads S) over the segments of a sequence, from `edge` to `other`.

    `chunk_states` is as in gla. A block holds all keys, since readers need their sum, and takes ROWS steps at once.
    """
    STEP: tl.constexpr = -H if REVERSE else H
    v_blocks: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    v_block, h, n = pid % v_blocks, pid // v_blocks % H, (pid // (v_blocks * H)).to(tl.int64)
    c, v, i = tl.arange(0, BK), v_block * BV + tl.arange(0, BV), tl.arange(0, ROWS)
    begin, steps, batch = bounds_of(n, cu_seqlens, length, PACKED, REVERSE)
    end = begin + steps
    cv, there_cv = c[:, None] * V + v[None, :], (c < K)[:, None] & (v < V)[None, :]
    S = tl.load(edge + (n * H + h) * K * V + cv, mask=there_cv, other=0)
    chunks, first_chunk = tl.cdiv(length, CHUNK), begin // CHUNK
    past_chunk = tl.where(steps > 0, tl.cdiv(end, CHUNK), first_chunk)
    for j in range(first_chunk, past_chunk):
        chunk = first_chunk + past_chunk - 1 - j if ADJOINT else j
        start, stop = tl.maximum(begin, chunk * CHUNK), tl.minimum(end, (chunk + 1) * CHUNK)
        whole = stop < end if ADJOINT else start == chunk * CHUNK
        if whole:
            tl.store(chunk_states + ((batch * chunks + chunk) * H + h) * K * V + cv, S, mask=there_cv)
        head = row_of(start, batch, length, REVERSE) * H + h
        place = slot_of(batch, start, n, length, sequences, CHUNK, PACKED, REVERSE)
        after = tl.load(totals + (place * H + h) * K + c, mask=c < K, other=0)[:, None] * S
        for part in range(0, CHUNK, ROWS):
            at, there = head + (part + i) * STEP, start + part + i < stop
            down, there_down = at[:, None] * K + c[None, :], there[:, None] & (c < K)[None, :]
            along, there_along = at[None, :] * K + c[:, None], (c < K)[:, None] & there[None, :]
            a = tl.load(reads + down, mask=there_down, other=0).to(DOT)
            u = tl.dot(a, S.to(DOT), input_precision=PRECISION, out_dtype=ACC)
            b = tl.load(onto + along, mask=there_along, other=0).to(DOT)
            after = tl.dot(b, u.to(DOT), after, input_precision=PRECISION, out_dtype=ACC)
            a = tl.load(left + along, mask=there_along, other=0).to(DOT)
            b = tl.load(right + at[:, None] * V + v[None, :], mask=there[:, None] & (v < V)[None, :], other=0)
            after = tl.dot(a, b.to(DOT), after, input_precision=PRECISION, out_dtype=ACC)
        S = after
    tl.store(other + (n * H + h) * K * V + cv, S, mask=there_cv)


@triton.jit
def mixed(of_later, of_earlier, at, there, later, ACC: tl.constexpr):
    """Rows of two matrices: those of later blocks of the first, and of earlier ones of the second."""
    rows = tl.load(of_later + at, mask=there & later, other=0).to(ACC)
    return rows + tl.load(of_earlier + at, mask=there & ~later, other=0).to(ACC)


@triton.jit
def levelled(
    sums, log_decay, level, i, count, c, K: tl.constexpr, STRIDE: tl.constexpr, TWO: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """E_l of steps that read ahead of their own decay, or are written; and that decay, 1 but in later blocks."""
    begin, end = ends_at(level, i, count, True)
    E = decay(sums, begin, end, c, K, STRIDE * (2 if TWO else 1), False, TWO)
    there = ((i >> level & 1) == 1) & (i < count)
    g = tl.load(log_decay + i[:, None] * STRIDE + c[None, :], mask=there[:, None] & (c < K)[None, :], other=0).to(ACC)
    return E, tl.exp(tl.where(g < FORGOTTEN, FORGOTTEN, g))


@triton.jit(do_not_specialize=["length", "levels"])
def sides(
    reader, writer, other_reader, other_writer, log_decay, left, right, sums, pairs, later_pairs, earlier_pairs,
    states, edges, adjoint_states, adjoint_edges, table, of_readers, of_writers, gates, of_gates, length, levels,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, SCALE: tl.constexpr, AHEAD: tl.constexpr, TWO: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of q and k, which meet as `pairs` of dy and v do, or AHEAD of a and b, as λ and u do; and the part of
    theirs in that of log_decay, to which AHEAD adds `gates`, that of the others.

    At a level, each step is a reader in later blocks and a writer in earlier ones. Readers meet the other writers as
    `later_pairs` do, writers the other readers as `earlier_pairs`.
    """
    STRIDE: tl.constexpr = -H * K if REVERSE else H * K
    PARTS: tl.constexpr = 2 if TWO else 1
    k_blocks: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0)
    k_block, h, unit = pid % k_blocks, pid // k_blocks % H, pid // (k_blocks * H)
    batch, start, stop, first, last, _ = segment_at(unit, table, length, CHUNK, PACKED)
    if start == stop:
        return
    c, i, count = k_block * BK + tl.arange(0, BK), tl.arange(0, CHUNK), stop - start
    t, s = i[:, None], i[None, :]
    there, head = i < count, row_of(start, batch, length, REVERSE) * H + h
    chunk = ((batch * tl.cdiv(length, CHUNK) + start // CHUNK) * H + h) * K * V
    state, adjoint = states + chunk, adjoint_states + chunk
    if first >= 0:
        state = edges + (first * H + h) * K * V
    if last >= 0:
        adjoint = adjoint_edges + (last * H + h) * K * V
    reads, writes, whole = tl.zeros([CHUNK, BK], ACC), tl.zeros([CHUNK, BK], ACC), tl.zeros([BK], ACC)
    for v_block in range(0, V, BV):
        v = v_block + tl.arange(0, BV)
        vc, there_vc = c[None, :] * V + v[:, None], (v < V)[:, None] & (c < K)[None, :]
        at, there_v = t * (STRIDE // K * V) + v[None, :], there[:, None] & (v < V)[None, :]
        S, L = tl.load(state + vc, mask=there_vc, other=0), tl.load(adjoint + vc, mask=there_vc, other=0)
        x = tl.load(left + head * V + at, mask=there_v, other=0).to(DOT)
        reads = tl.dot(x, S.to(DOT), reads, input_precision=PRECISION, out_dtype=ACC)
        x = tl.load(right + head * V + at, mask=there_v, other=0).to(DOT)
        writes = tl.dot(x, L.to(DOT), writes, input_precision=PRECISION, out_dtype=ACC)
        whole += tl.sum(S * L, 0)
    at, there_k, there = t * STRIDE + c[None, :], there[:, None] & (c < K)[None, :], there[:, None]
    reader, writer, other_reader, other_writer = (
        reader + head * K, writer + head * K, other_reader + head * K, other_writer + head * K
    )  # fmt: skip
    pairs, later_pairs, earlier_pairs = pairs + head * CHUNK, later_pairs + head * CHUNK, earlier_pairs + head * CHUNK
    sums, log_decay = sums + head * (K * PARTS), log_decay + head * K
    reads *= SCALE * decay_since_start(sums, i, count, c, K, STRIDE * PARTS, AHEAD)
    writes *= decay(sums, tl.minimum(i, count - 1), i * 0 + count - 1, c, K, STRIDE * PARTS, False, TWO)
    x, y = tl.load(reader + at, mask=there_k, other=0).to(ACC), tl.load(writer + at, mask=there_k, other=0).to(ACC)
    before, after = tl.where(s < t, 1.0, 0.0).to(DOT), tl.where(s > t, 1.0, 0.0).to(DOT)
    dg = tl.zeros([CHUNK, BK], ACC)
    if not AHEAD:
        dg = x * reads + (tl.exp(tl.load(sums + (count - 1) * (STRIDE * PARTS) + c, mask=c < K, other=0)) * whole)
    dg = tl.dot(after, (x * reads).to(DOT), dg, input_precision=PRECISION, out_dtype=ACC)
    dg = tl.dot(before, (y * writes).to(DOT), dg, input_precision=PRECISION, out_dtype=ACC)
    diagonal = t * (STRIDE // K * CHUNK + 1)
    if AHEAD:
        weight = tl.load(earlier_pairs + diagonal, mask=there, other=0).to(ACC)
        writes += weight * tl.load(other_reader + at, mask=there_k, other=0).to(ACC)
    else:
        weight = tl.load(pairs + diagonal, mask=there, other=0).to(ACC)
        writes += weight * x
        reads += weight * y
        weight = tl.load(later_pairs + diagonal, mask=there, other=0).to(ACC)
        reads += weight * tl.load(other_writer + at, mask=there_k, other=0).to(ACC)
    # Values that are the same at every level are loaded at each: held over the loop, they take more registers than
    # there are.
    for level in tl.range(levels, disable_licm=True):
        Z = tl.zeros([CHUNK, BK], ACC)
        for part in range(0, CHUNK, ROWS):
            j = part + tl.arange(0, ROWS)
            at_j, there_j = j[:, None] * STRIDE + c[None, :], (j < count)[:, None] & (c < K)[None, :]
            pair, met = t * (STRIDE // K * CHUNK) + j[None, :], ((i >> level) ^ 1)[:, None] == (j >> level)[None, :]
            later_i, later_j = ((i >> level & 1) == 1)[:, None], ((j >> level & 1) == 1)[:, None]
            until, by_own_step = levelled(sums, log_decay, level, j, count, c, K, STRIDE, TWO, ACC)
            mine = mixed(reader, writer, at_j, there_j, later_j, ACC) * until
            theirs = mixed(other_reader, other_writer, at_j, there_j, later_j, ACC) * until
            if AHEAD:
                theirs *= by_own_step
            else:
                mine *= by_own_step
            A = tl.where(met, mixed(later_pairs, earlier_pairs, pair, there, later_i, ACC), 0.0).to(DOT)
            Z = tl.dot(A, theirs.to(DOT), Z, input_precision=PRECISION, out_dtype=ACC)
            A = tl.where(met, tl.load(pairs + pair, mask=there, other=0), 0.0).to(DOT)
            Z = tl.dot(A, mine.to(DOT), Z, input_precision=PRECISION, out_dtype=ACC)
        later = ((i >> level & 1) == 1)[:, None]
        E, to_own = levelled(sums, log_decay, level, i, count, c, K, STRIDE, TWO, ACC)
        Z *= E
        if not AHEAD:
            Z *= to_own
        reads += tl.where(later, Z, 0.0)
        writes += tl.where(later, 0.0, Z)
        Z *= mixed(reader, writer, at, there_k, later, ACC)
        if not AHEAD:
            dg += tl.where(later, Z, 0.0)
        begin, end = ends_at(level, i, count, True)
        lies = tl.where((begin[None, :] < t) & (t <= end[None, :]), 1.0, 0.0).to(DOT)
        dg = tl.dot(lies, Z.to(DOT), dg, input_precision=PRECISION, out_dtype=ACC)
    tl.store(of_readers + head * K + at, reads, mask=there_k)
    tl.store(of_writers + head * K + at, writes, mask=there_k)
    if AHEAD:
        dg += tl.load(gates + head * K + at, mask=there_k, other=0)
    tl.store(of_gates + head * K + at, dg, mask=there_k)
