# mypy: allow-untyped-defs, allow-incomplete-defs
r"""Recurrences with N numbers per channel, forward: time is cut into chunks so that a small batch fills a GPU too.

    h_t = a_t ⊙ h_{t-1} + (Δ_t u_t) B_t          h ∈ R^{D×N}
    y_t = C_t · h_t + D ⊙ u_t,   and y_t ⊙ silu(z_t) where a gate z is given

Step sizes and decays are those of the selective scan, Δ = softplus(dt) or dt itself and a = exp(Δ A), or where
IMPLICIT those of Longhorn, Δ = β / (1 + β |B|²) with β = sigmoid(dt) and a = 1 - Δ B².

Three launches: the state every chunk would reach from zero; the short recurrence over chunks, which turns those into
the states the chunks start from; and within each chunk, from that state, the outputs. Each walks its steps one by one
with the state of a block of channels in registers. Where batch and channels alone fill the device, the last launch
walks all chunks by itself and the first two, which would compute every decay a second time, are left out.

Mamba (arXiv 2312.00752), section 3.3.1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sinuous.kernels.precision import working_dtype
from sinuous.kernels.triton.packing import accumulator, on_device, packed_steps, row_of

LOG2_E = tl.constexpr(1.4426950408889634)

SERIAL_PROGRAMS = 2048
"""Number of programs from which on time is not split: some fifteen for each multiprocessor of a large GPU."""


class Blocks(NamedTuple):
    """The shares of channels among programs; a block lies within one group of B and C.

    Attributes:
        channels: channels of a block, a power of two.
        state: N rounded up to a power of two.
        warps: warps of a program.
        total: blocks in all groups together.
    """

    channels: int
    state: int
    warps: int
    total: int

    @property
    def options(self) -> dict[str, int]:
        """Compile options; Triton 3.10 no longer fuses multiplications with additions unless asked."""
        return {"num_warps": self.warps, "enable_fp_fusion": True}


def blocks(width: int, groups: int, state: int, per_warp: int) -> Blocks:
    """Share `width` channels in `groups` among programs; a warp holds `per_warp` elements of the state in registers."""
    padded = triton.next_power_of_2(state)
    channels = max(1, min(64, 1024 // padded, triton.next_power_of_2(width // groups)))
    warps = min(8, max(1, channels * padded // per_warp))
    return Blocks(channels, padded, warps, groups * triton.cdiv(width // groups, channels))


@triton.jit
def block_of_channels(block, width, groups: tl.constexpr, BD: tl.constexpr):
    """Channels of a block, which of them exist, and the group they read B and C from."""
    group_width = width // groups
    per_group = tl.cdiv(group_width, BD)
    inside = (block % per_group) * BD + tl.arange(0, BD)
    group = block // per_group
    return group * group_width + inside, inside < group_width, group


@triton.jit
def implicit_step(raw, norm):
    """β / (1 + β norm) with β = sigmoid(raw), and its derivative by raw."""
    e = tl.exp(-tl.abs(raw))
    numerator = tl.where(raw < 0, e, 1.0)
    inverse = 1 / (1 + e + numerator * norm)
    return numerator * inverse, e * inverse * inverse


@triton.jit
def step_size(raw, norm, row, SOFTPLUS: tl.constexpr, IMPLICIT: tl.constexpr):
    """Step size Δ: of the implicit step; or softplus(raw), the identity above 20 as in torch; or raw itself."""
    if IMPLICIT:
        raw, _ = implicit_step(raw, tl.load(norm + row))
    elif SOFTPLUS:
        # log1p(e): the quotient takes out the rounding of 1 + e, which would eat step sizes of 1e-3.
        e = tl.exp(-tl.abs(raw))
        one_plus = 1 + e
        log1p = tl.where(one_plus == 1, e, tl.log(one_plus) * (e / tl.where(one_plus == 1, 1, one_plus - 1)))
        raw = tl.where(raw > 20, raw, tl.maximum(raw, 0) + log1p)
    return raw


@triton.jit
def decays_of(delta, rates, b, IMPLICIT: tl.constexpr):
    """a of one step, `[BD, BN]`."""
    a = delta[:, None]
    if IMPLICIT:
        a = 1 - a * (b * b)[None, :]
    else:
        a = tl.exp2(a * rates)
    return a


@triton.jit
def rates_of(A, dn, there_dn, BD: tl.constexpr, BN: tl.constexpr, IMPLICIT: tl.constexpr, ACC: tl.constexpr):
    """A in the units of exp2."""
    rates = tl.zeros([BD, BN], ACC)
    if not IMPLICIT:
        rates = tl.load(A + dn, mask=there_dn, other=0).to(ACC) * LOG2_E
    return rates


@triton.jit
def nothing_passed(BD: tl.constexpr, BN: tl.constexpr, IMPLICIT: tl.constexpr, ACC: tl.constexpr):
    """The effect of no steps on a state: Σ Δ = 0, or a product of decays of 1."""
    passed = tl.zeros([BD], ACC)
    if IMPLICIT:
        passed = tl.full([BD, BN], 1, ACC)
    return passed


@triton.jit
def pass_step(passed, delta, a, IMPLICIT: tl.constexpr):
    if IMPLICIT:
        passed *= a
    else:
        passed += delta
    return passed


@triton.jit
def store_passed(passed, across, chunk, width, d, there, dn, there_dn, N: tl.constexpr, IMPLICIT: tl.constexpr):
    if IMPLICIT:
        tl.store(across + chunk.to(tl.int64) * width * N + dn, passed, mask=there_dn)
    else:
        tl.store(across + chunk.to(tl.int64) * width + d, passed, mask=there)


@triton.jit(do_not_specialize=["length"])
def chunk_ends(
    u, dt, A, B, dt_bias, norm, initial, starts, ends, across, length, width,
    GROUPS: tl.constexpr, N: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr,
    SOFTPLUS: tl.constexpr, IMPLICIT: tl.constexpr, BIASED: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The state each chunk reaches from zero, to `ends` [B, chunks, D, N], and its effect on the one before it, to
    `across`: Σ Δ [B, chunks, D], or where IMPLICIT the product of decays [B, chunks, D, N]."""
    blocks = GROUPS * tl.cdiv(width // GROUPS, BD)
    chunks = tl.cdiv(length, CHUNK)
    pid = tl.program_id(0)
    d, there, group = block_of_channels(pid % blocks, width, GROUPS, BD)
    chunk = pid // blocks
    batch, first = (chunk // chunks).to(tl.int64), (chunk % chunks) * CHUNK
    n = tl.arange(0, BN)
    dn, there_dn = d[:, None] * N + n[None, :], there[:, None] & (n < N)[None, :]
    rates = rates_of(A, dn, there_dn, BD, BN, IMPLICIT, ACC)
    bias = tl.zeros([BD], ACC)
    if BIASED:
        bias = tl.load(dt_bias + d, mask=there, other=0).to(ACC)
    h = tl.zeros([BD, BN], ACC)
    passed = nothing_passed(BD, BN, IMPLICIT, ACC)
    for p in range(first, tl.minimum(first + CHUNK, length)):
        if PACKED:
            start = tl.load(starts + p)
            if start >= 0:
                h = tl.load(initial + start.to(tl.int64) * width * N + dn, mask=there_dn, other=0)
        row = row_of(p, batch, length, REVERSE)
        raw = tl.load(dt + row * width + d, mask=there, other=0).to(ACC) + bias
        delta = step_size(raw, norm, row, SOFTPLUS, IMPLICIT)
        x = delta * tl.load(u + row * width + d, mask=there, other=0).to(ACC)
        b = tl.load(B + (row * GROUPS + group) * N + n, mask=n < N, other=0).to(ACC)
        a = decays_of(delta, rates, b, IMPLICIT)
        h = a * h + x[:, None] * b[None, :]
        passed = pass_step(passed, delta, a, IMPLICIT)
    tl.store(ends + chunk.to(tl.int64) * width * N + dn, h, mask=there_dn)
    store_passed(passed, across, chunk, width, d, there, dn, there_dn, N, IMPLICIT)


@triton.jit(do_not_specialize=["length"])
def carry_chunks(
    carried, across, A, incoming, starts, cut, length, width,
    N: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr,
    IMPLICIT: tl.constexpr, PACKED: tl.constexpr, ADJOINT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Replace, in `carried` [B, chunks, D, N], the state that each chunk reaches from zero by the one before it.

    The adjoint runs from the last chunk to the first, and has there the gradient of the state after the chunk.
    `incoming` is the state before each sequence; a packed chunk that is `cut` by a boundary lets no state through, and
    one that begins with a sequence starts from that sequence's initial state.
    """
    blocks = tl.cdiv(width, BD)
    chunks = tl.cdiv(length, CHUNK)
    pid = tl.program_id(0)
    d = (pid % blocks) * BD + tl.arange(0, BD)
    n = tl.arange(0, BN)
    batch = (pid // blocks).to(tl.int64)
    dn, there = d[:, None] * N + n[None, :], (d < width)[:, None] & (n < N)[None, :]
    rates = rates_of(A, dn, there, BD, BN, IMPLICIT, ACC)
    h = tl.zeros([BD, BN], ACC)
    if not PACKED:
        h = tl.load(incoming + batch * width * N + dn, mask=there, other=0)
    for i in range(chunks):
        j = chunks - 1 - i if ADJOINT else i
        if PACKED and not ADJOINT:
            start = tl.load(starts + j * CHUNK)
            if start >= 0:
                h = tl.load(incoming + start.to(tl.int64) * width * N + dn, mask=there, other=0)
        chunk = batch * chunks + j
        here = carried + chunk * width * N + dn
        local = tl.load(here, mask=there, other=0)
        tl.store(here, h, mask=there)
        if IMPLICIT:
            through = tl.load(across + chunk * width * N + dn, mask=there, other=0) * h
        else:
            delta = tl.load(across + chunk * width + d, mask=d < width, other=0)
            through = tl.exp2(delta[:, None] * rates) * h
        if PACKED:
            through = tl.where(tl.load(cut + j) != 0, 0.0, through)
        h = through + local


@triton.jit(do_not_specialize=["length"])
def outputs(
    u, dt, A, B, C, D, z, dt_bias, norm, initial, starts, stops, chunk_states, y, final, length, width,
    GROUPS: tl.constexpr, N: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr,
    SOFTPLUS: tl.constexpr, IMPLICIT: tl.constexpr, BIASED: tl.constexpr, SKIP: tl.constexpr, GATED: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, SERIAL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Outputs and final states: of one chunk, from its state, or of all chunks in turn (SERIAL), writing theirs."""
    blocks = GROUPS * tl.cdiv(width // GROUPS, BD)
    chunks = tl.cdiv(length, CHUNK)
    pid = tl.program_id(0)
    d, there, group = block_of_channels(pid % blocks, width, GROUPS, BD)
    if SERIAL:
        batch, first_chunk, last_chunk = (pid // blocks).to(tl.int64), 0, chunks
    else:
        batch, first_chunk = (pid // blocks // chunks).to(tl.int64), (pid // blocks) % chunks
        last_chunk = first_chunk + 1
    n = tl.arange(0, BN)
    dn, there_dn = d[:, None] * N + n[None, :], there[:, None] & (n < N)[None, :]
    rates = rates_of(A, dn, there_dn, BD, BN, IMPLICIT, ACC)
    bias = tl.zeros([BD], ACC)
    if BIASED:
        bias = tl.load(dt_bias + d, mask=there, other=0).to(ACC)
    skip = tl.zeros([BD], ACC)
    if SKIP:
        skip = tl.load(D + d, mask=there, other=0).to(ACC)
    h = tl.zeros([BD, BN], ACC)
    if SERIAL and not PACKED:
        h = tl.load(initial + batch * width * N + dn, mask=there_dn, other=0)
    for j in range(first_chunk, last_chunk):
        first = j * CHUNK
        here = chunk_states + (batch * chunks + j) * width * N + dn
        if not SERIAL:
            h = tl.load(here, mask=there_dn, other=0)
        for p in range(first, tl.minimum(first + CHUNK, length)):
            if PACKED:
                start = tl.load(starts + p)
                if start >= 0:
                    h = tl.load(initial + start.to(tl.int64) * width * N + dn, mask=there_dn, other=0)
            if SERIAL:  # noqa: SIM102 (settled at compile time; Triton would evaluate both sides of an `and`)
                if p == first:
                    tl.store(here, h, mask=there_dn)
            row = row_of(p, batch, length, REVERSE)
            raw = tl.load(dt + row * width + d, mask=there, other=0).to(ACC) + bias
            delta = step_size(raw, norm, row, SOFTPLUS, IMPLICIT)
            u_t = tl.load(u + row * width + d, mask=there, other=0).to(ACC)
            b = tl.load(B + (row * GROUPS + group) * N + n, mask=n < N, other=0).to(ACC)
            c = tl.load(C + (row * GROUPS + group) * N + n, mask=n < N, other=0).to(ACC)
            h = decays_of(delta, rates, b, IMPLICIT) * h + (delta * u_t)[:, None] * b[None, :]
            y_t = tl.sum(h * c[None, :], 1) + skip * u_t
            if GATED:
                gate = tl.load(z + row * width + d, mask=there, other=0).to(ACC)
                y_t *= gate / (1 + tl.exp(-gate))
            tl.store(y + row * width + d, y_t, mask=there)
            if PACKED:
                stop = tl.load(stops + p)
                if stop >= 0:
                    tl.store(final + stop.to(tl.int64) * width * N + dn, h, mask=there_dn)
    if not PACKED:  # noqa: SIM102
        if last_chunk == chunks:
            tl.store(final + batch * width * N + dn, h, mask=there_dn)


class Boundaries(NamedTuple):
    """The sequence that starts (or stops) at each step in processing order, or -1; and for each chunk, whether one
    does."""

    starts: Tensor
    stops: Tensor
    chunk_starts: Tensor
    chunk_stops: Tensor


def boundaries(cu_seqlens: Tensor, length: int, chunk_size: int, reverse: bool) -> Boundaries:
    steps = packed_steps(cu_seqlens, length, reverse)
    starts = torch.where(steps.before == 0, steps.sequence, -1)
    stops = torch.where(steps.after == 0, steps.sequence, -1)
    padding = -length % chunk_size

    def any_in_chunk(marks: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(marks, (0, padding), value=-1)
        return (padded.view(-1, chunk_size) >= 0).any(1).to(torch.int32)

    return Boundaries(starts, stops, any_in_chunk(starts), any_in_chunk(stops))


def forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, final_state, chunk_states)`; without A the step is Longhorn's."""
    batch, length, width = u.shape
    state = B.shape[-1]
    dtype = working_dtype(u.dtype)
    chunks = triton.cdiv(length, chunk_size)
    count = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_state is None:
        initial = torch.zeros(count, width, state, dtype=dtype, device=u.device)
    else:
        initial = initial_state.to(dtype).contiguous()
    # Sequences without a step end where they begin.
    final = initial.clone()
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    chunk_states = torch.empty(batch, chunks, width, state, dtype=dtype, device=u.device)
    if u.numel() == 0:
        return y, final, chunk_states
    groups = B.shape[2] if B.ndim == 4 else 1
    u, dt, B, C = (t.contiguous() for t in (u, dt, B, C))
    A, D, z, dt_bias = (None if t is None else t.contiguous() for t in (A, D, z, dt_bias))
    norm = B.to(dtype).square().sum(-1) if A is None else None
    marks = None if cu_seqlens is None else boundaries(cu_seqlens, length, chunk_size, reverse)
    shape = blocks(width, groups, state, 512)
    block = {"N": state, "BD": shape.channels, "BN": shape.state, "CHUNK": chunk_size, **shape.options}
    fixed = {"IMPLICIT": A is None, "PACKED": marks is not None, "ACC": accumulator(u.dtype)}
    steps = {"GROUPS": groups, "SOFTPLUS": dt_softplus, "BIASED": dt_bias is not None, "REVERSE": reverse}
    starts, stops, cut = (None, None, None) if marks is None else (marks.starts, marks.stops, marks.chunk_starts)
    serial = chunks == 1 or batch * shape.total >= SERIAL_PROGRAMS
    with on_device(u):
        if not serial:
            shape_across = chunk_states.shape if A is None else chunk_states.shape[:3]
            across = torch.empty(shape_across, dtype=dtype, device=u.device)
            # Products of decays are as large as the state: twice the warps, and it stays in registers.
            warps = blocks(width, groups, state, 512 if A is not None else 256).options
            chunk_ends[(batch * chunks * shape.total,)](
                u, dt, A, B, dt_bias, norm, initial, starts, chunk_states, across, length, width,
                **{**block, **warps}, **fixed, **steps,
            )  # fmt: skip
            carry_chunks[(batch * triton.cdiv(width, shape.channels),)](
                chunk_states, across, A, initial, starts, cut, length, width, ADJOINT=False, **block, **fixed
            )
        outputs[(batch * shape.total * (1 if serial else chunks),)](
            u, dt, A, B, C, D, z, dt_bias, norm, initial, starts, stops, chunk_states, y, final, length, width,
            SKIP=D is not None, GATED=z is not None, SERIAL=serial, **block, **fixed, **steps,
        )  # fmt: skip
    return y, final, chunk_states
