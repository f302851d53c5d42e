# mypy: allow-untyped-defs, allow-incomplete-defs
r"""Recurrences with N numbers per channel, backward: the adjoint runs the other way, cut into the same chunks.

With g_t the gradient of C_t · h_t, λ_t that of h_t, and for the selective scan, a_t = exp(Δ_t A):

    λ_t = C_t g_t + a_{t+1} λ_{t+1}          (λ_T also gets the gradient of the final state)
    dB_t = Σ_d λ Δ u      dC_t = Σ_d g h_t     du_t = Δ Σ_n λ B + D g     dΔ_t = Σ_n λ (A a h_{t-1} + B u)
    dA = Σ_t λ Δ a h_{t-1}                     dh_0 = a_1 λ_1

For Longhorn, a_t = 1 - Δ_t B_t², they are dΔ_t = Σ_n λ (B u - B² h_{t-1}) and
dB_t = Σ_d (λ Δ u - 2 B (λ Δ h_{t-1} + dΔ Δ²)), since Δ itself depends on |B|².

The states of a chunk are recomputed from its first one, `SUB` steps at a time, into a scratch area that each of at
most some `PROGRAMS` programs owns, so that memory does not grow with B·T·D·N. Sums over channels, chunks and batch are
written as partial sums and added in a fixed order: no atomics, the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sinuous.kernels.arguments import ChannelStates, Longhorn, SelectiveScan
from sinuous.kernels.triton.channel_states import (
    ChannelStatesCall,
    block_of_channels,
    carry_chunks,
    decays_of,
    implicit_step,
    initial_states,
    nothing_passed,
    pass_step,
    rates_of,
    step_size,
    store_passed,
)
from sinuous.kernels.triton.packing import on_device, row_of

LN_2 = tl.constexpr(0.6931471805599453)
SUB = 16
"""Steps whose states are held in scratch at once; it divides the chunk size."""
PROGRAMS = 1024
"""Approximate number of programs that share the chunks, of four warps each: more than fit on a GPU at once. It must not
depend on the device, since it fixes the order of sums."""


@triton.jit(do_not_specialize=["length"])
def adjoint_ends(
    dt, A, B, C, z, dt_bias, norm, grad_y, grad_final, stops, ends, across, length, width,
    GROUPS: tl.constexpr, N: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr,
    SOFTPLUS: tl.constexpr, IMPLICIT: tl.constexpr, BIASED: tl.constexpr, GATED: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The part of each chunk alone in the gradient of the state before it, to `ends` [B, chunks, D, N]; `across`
    as in the forward pass."""
    blocks = GROUPS * tl.cdiv(width // GROUPS, BD)
    chunks = tl.cdiv(length, CHUNK)
    pid = tl.program_id(0)
    d, there, group = block_of_channels(pid % blocks, width, GROUPS, BD)
    chunk = pid // blocks
    batch, first = (chunk // chunks).to(tl.int64), (chunk % chunks) * CHUNK
    stop = tl.minimum(first + CHUNK, length)
    n = tl.arange(0, BN)
    dn, there_dn = d[:, None] * N + n[None, :], there[:, None] & (n < N)[None, :]
    rates = rates_of(A, dn, there_dn, BD, BN, IMPLICIT, ACC)
    bias = tl.zeros([BD], ACC)
    if BIASED:
        bias = tl.load(dt_bias + d, mask=there, other=0).to(ACC)
    m = tl.zeros([BD, BN], ACC)
    passed = nothing_passed(BD, BN, IMPLICIT, ACC)
    for i in range(stop - first):
        p = stop - 1 - i
        if PACKED:
            ending = tl.load(stops + p)
            if ending >= 0:
                m = tl.load(grad_final + ending.to(tl.int64) * width * N + dn, mask=there_dn, other=0)
        row = row_of(p, batch, length, REVERSE)
        raw = tl.load(dt + row * width + d, mask=there, other=0).to(ACC) + bias
        delta = step_size(raw, norm, row, SOFTPLUS, IMPLICIT)
        g = tl.load(grad_y + row * width + d, mask=there, other=0).to(ACC)
        if GATED:
            gate = tl.load(z + row * width + d, mask=there, other=0).to(ACC)
            g *= gate / (1 + tl.exp(-gate))
        b = tl.load(B + (row * GROUPS + group) * N + n, mask=n < N, other=0).to(ACC)
        c = tl.load(C + (row * GROUPS + group) * N + n, mask=n < N, other=0).to(ACC)
        a = decays_of(delta, rates, b, IMPLICIT)
        m = a * (m + g[:, None] * c[None, :])
        passed = pass_step(passed, delta, a, IMPLICIT)
    tl.store(ends + chunk.to(tl.int64) * width * N + dn, m, mask=there_dn)
    store_passed(passed, across, chunk, width, d, there, dn, there_dn, N, IMPLICIT)


@triton.jit(do_not_specialize=["batches", "length", "slots"])
def gradients(
    u, dt, A, B, C, D, z, dt_bias, norm, initial, grad_y, grad_final, starts, stops, chunk_states, carried, scratch,
    du, ddt, dA, dB, dC, dD, dz, dbias, dinitial, batches, length, width, slots,
    GROUPS: tl.constexpr, N: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr, SUB: tl.constexpr,
    SOFTPLUS: tl.constexpr, IMPLICIT: tl.constexpr, BIASED: tl.constexpr, SKIP: tl.constexpr, GATED: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of all inputs. A program takes every `slots`-th chunk of its block of channels.

    Partial sums: dA `[slots, D, N]`, dD and dbias `[slots, D]`, dB and dC `[blocks, B, T, N]`.
    """
    blocks = GROUPS * tl.cdiv(width // GROUPS, BD)
    chunks = tl.cdiv(length, CHUNK)
    pid = tl.program_id(0)
    slot, block = pid // blocks, pid % blocks
    d, there, group = block_of_channels(block, width, GROUPS, BD)
    n = tl.arange(0, BN)
    dn, there_dn = d[:, None] * N + n[None, :], there[:, None] & (n < N)[None, :]
    # States of a sub-chunk, then the state before each sub-chunk. A thread reads back what it wrote itself as long as
    # the compiler lays out loads and stores alike, which tools/aot_table.py checks; where it does not, the barriers
    # order them on NVIDIA (on AMD they do not wait for stores to memory).
    cell = tl.arange(0, BD)[:, None] * BN + n[None, :]
    states = scratch + pid.to(tl.int64) * (SUB + CHUNK // SUB) * BD * BN + cell
    firsts = states + SUB * BD * BN
    rates = rates_of(A, dn, there_dn, BD, BN, IMPLICIT, ACC)
    bias = tl.zeros([BD], ACC)
    if BIASED:
        bias = tl.load(dt_bias + d, mask=there, other=0).to(ACC)
    skip = tl.zeros([BD], ACC)
    if SKIP:
        skip = tl.load(D + d, mask=there, other=0).to(ACC)
    sum_A, sum_D, sum_bias = tl.zeros([BD, BN], ACC), tl.zeros([BD], ACC), tl.zeros([BD], ACC)
    for chunk in range(slot, batches * chunks, slots):
        batch, j = (chunk // chunks).to(tl.int64), chunk % chunks
        chunk_at = (batch * chunks + j) * width * N + dn
        first = j * CHUNK
        stop = tl.minimum(first + CHUNK, length)
        subs = tl.cdiv(stop - first, SUB)
        h = tl.load(chunk_states + chunk_at, mask=there_dn, other=0)
        for p in range(first, first + (subs - 1) * SUB):
            if (p - first) % SUB == 0:
                tl.store(firsts + (p - first) // SUB * BD * BN, h)
            if PACKED:
                start = tl.load(starts + p)
                if start >= 0:
                    h = tl.load(initial + start.to(tl.int64) * width * N + dn, mask=there_dn, other=0)
            row = row_of(p, batch, length, REVERSE)
            raw = tl.load(dt + row * width + d, mask=there, other=0).to(ACC) + bias
            delta = step_size(raw, norm, row, SOFTPLUS, IMPLICIT)
            x = delta * tl.load(u + row * width + d, mask=there, other=0).to(ACC)
            b = tl.load(B + (row * GROUPS + group) * N + n, mask=n < N, other=0).to(ACC)
            h = decays_of(delta, rates, b, IMPLICIT) * h + x[:, None] * b[None, :]
        tl.store(firsts + (subs - 1) * BD * BN, h)
        tl.debug_barrier()
        m = tl.load(carried + chunk_at, mask=there_dn, other=0)
        for s in range(subs):
            sub = subs - 1 - s
            begin = first + sub * SUB
            end = tl.minimum(begin + SUB, stop)
            h = tl.load(firsts + sub * BD * BN)
            for p in range(begin, end):
                if PACKED:
                    start = tl.load(starts + p)
                    if start >= 0:
                        h = tl.load(initial + start.to(tl.int64) * width * N + dn, mask=there_dn, other=0)
                tl.store(states + (p - begin) * BD * BN, h)
                row = row_of(p, batch, length, REVERSE)
                raw = tl.load(dt + row * width + d, mask=there, other=0).to(ACC) + bias
                delta = step_size(raw, norm, row, SOFTPLUS, IMPLICIT)
                x = delta * tl.load(u + row * width + d, mask=there, other=0).to(ACC)
                b = tl.load(B + (row * GROUPS + group) * N + n, mask=n < N, other=0).to(ACC)
                h = decays_of(delta, rates, b, IMPLICIT) * h + x[:, None] * b[None, :]
            tl.debug_barrier()
            for i in range(end - begin):
                p = end - 1 - i
                if PACKED:
                    ending = tl.load(stops + p)
                    if ending >= 0:
                        m = tl.load(grad_final + ending.to(tl.int64) * width * N + dn, mask=there_dn, other=0)
                row = row_of(p, batch, length, REVERSE)
                at = row * width + d
                raw = tl.load(dt + at, mask=there, other=0).to(ACC) + bias
                delta = step_size(raw, norm, row, SOFTPLUS, IMPLICIT)
                u_t = tl.load(u + at, mask=there, other=0).to(ACC)
                b = tl.load(B + (row * GROUPS + group) * N + n, mask=n < N, other=0).to(ACC)
                c = tl.load(C + (row * GROUPS + group) * N + n, mask=n < N, other=0).to(ACC)
                g = tl.load(grad_y + at, mask=there, other=0).to(ACC)
                a = decays_of(delta, rates, b, IMPLICIT)
                before = tl.load(states + (p - begin) * BD * BN)
                decayed = a * before
                h = decayed + (delta * u_t)[:, None] * b[None, :]
                if GATED:
                    gate = tl.load(z + at, mask=there, other=0).to(ACC)
                    sigmoid = 1 / (1 + tl.exp(-gate))
                    ungated = tl.sum(h * c[None, :], 1) + skip * u_t
                    tl.store(dz + at, g * ungated * sigmoid * (1 + gate * (1 - sigmoid)), mask=there)
                    g *= gate * sigmoid
                adjoint = m + g[:, None] * c[None, :]
                into_b = tl.sum(adjoint * b[None, :], 1)
                to_b = adjoint * (delta * u_t)[:, None]
                if IMPLICIT:
                    into_decay = adjoint * before
                    grad_delta = u_t * into_b - tl.sum(into_decay * (b * b)[None, :], 1)
                    to_b -= 2 * b[None, :] * (delta[:, None] * into_decay + (grad_delta * delta * delta)[:, None])
                    _, slope = implicit_step(raw, tl.load(norm + row))
                    grad_delta *= slope
                else:
                    into_log_decay = adjoint * decayed
                    grad_delta = LN_2 * tl.sum(into_log_decay * rates, 1) + u_t * into_b
                    sum_A += into_log_decay * delta[:, None]
                    if SOFTPLUS:
                        grad_delta = tl.where(raw > 20, grad_delta, grad_delta / (1 + tl.exp(-raw)))
                partial = ((block.to(tl.int64) * batches + batch) * length + row - batch * length) * N + n
                tl.store(dB + partial, tl.sum(to_b, 0), mask=n < N)
                tl.store(dC + partial, tl.sum(h * g[:, None], 0), mask=n < N)
                tl.store(du + at, delta * into_b + skip * g, mask=there)
                tl.store(ddt + at, grad_delta, mask=there)
                sum_D += g * u_t
                sum_bias += grad_delta
                m = a * adjoint
                if PACKED:
                    start = tl.load(starts + p)
                    if start >= 0:
                        tl.store(dinitial + start.to(tl.int64) * width * N + dn, m, mask=there_dn)
            tl.debug_barrier()
        if not PACKED:  # noqa: SIM102
            if j == 0:
                tl.store(dinitial + batch * width * N + dn, m, mask=there_dn)
    if not IMPLICIT:
        tl.store(dA + slot.to(tl.int64) * width * N + dn, sum_A, mask=there_dn)
    if SKIP:
        tl.store(dD + slot * width + d, sum_D, mask=there)
    if BIASED:
        tl.store(dbias + slot * width + d, sum_bias, mask=there)


def backward(
    arguments: SelectiveScan | Longhorn,
    grads: tuple[Tensor | None, Tensor | None],
    chunk_states: Tensor,
    chunk_size: int,
) -> list[Tensor | None]:
    """Gradients of u, dt, A, B, C, D, z, dt_bias and initial_state, given those of y and of the final state."""
    args = ChannelStates.of(arguments)
    grad_y, grad_final = grads
    # The states of unpacked chunks are all kept; only a sequence that starts within one needs its initial state.
    initial = initial_states(args)
    grad_final = torch.zeros_like(initial) if grad_final is None else grad_final.to(initial.dtype).contiguous()
    # Sequences without a step end where they begin.
    dinitial = grad_final.clone()
    if args.u.numel() == 0:
        inputs = (args.u, args.dt, args.A, args.B, args.C, args.D, args.z, args.dt_bias)
        zeros = [None if t is None else torch.zeros_like(t) for t in inputs]
        return [*zeros, None if args.initial_state is None else dinitial]
    (batch, chunks, width, state), length = chunk_states.shape, args.u.shape[1]
    call = ChannelStatesCall(args, chunk_size, 256)
    (u, dt, A, B, C, D, z, dt_bias, norm), (starts, stops, _, cut) = call.inputs, call.marks
    grad_y = (torch.zeros_like(args.u) if grad_y is None else grad_y).contiguous()
    shape, steps = call.blocks, call.steps | {"GATED": z is not None}
    slots = max(1, min(batch * chunks, triton.cdiv(PROGRAMS, shape.total)))

    def empty(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=initial.dtype, device=initial.device)

    scratch = empty(slots * shape.total, SUB + chunk_size // SUB, shape.channels * shape.state)
    carried = empty(batch, chunks, width, state)
    across = torch.empty_like(carried) if A is None else empty(batch, chunks, width)
    du, ddt, dz = (None if t is None else torch.empty_like(t) for t in (u, dt, z))
    dA = None if A is None else empty(slots, width, state)
    dB, dC = empty(shape.total, batch, length, state), empty(shape.total, batch, length, state)
    dD, dbias = (None if t is None else empty(slots, width) for t in (D, dt_bias))
    with on_device(initial):
        adjoint_ends[(batch * chunks * shape.total,)](
            dt, A, B, C, z, dt_bias, norm, grad_y, grad_final, stops, carried, across, length, width,
            **call.block, **call.fixed, **steps,
        )  # fmt: skip
        carry_chunks[(batch * triton.cdiv(width, shape.channels),)](
            carried, across, A, grad_final, starts, cut, length, width, ADJOINT=True, **call.block, **call.fixed
        )
        gradients[(slots * shape.total,)](
            *call.inputs, initial, grad_y, grad_final, starts, stops, chunk_states, carried,
            scratch, du, ddt, dA, dB, dC, dD, dz, dbias, dinitial, batch, length, width, slots,
            SUB=SUB, SKIP=D is not None, **call.block, **call.fixed, **steps,
        )  # fmt: skip

    def over_channels(partial: Tensor) -> Tensor:
        return partial.view(call.groups, -1, batch, length, state).sum(1).permute(1, 2, 0, 3).reshape(args.B.shape)

    dA, dD, dbias = (None if t is None else t.sum(0) for t in (dA, dD, dbias))
    parts = [du, ddt, dA, over_channels(dB), over_channels(dC), dD, dz, dbias]
    return [*parts, None if args.initial_state is None else dinitial]
