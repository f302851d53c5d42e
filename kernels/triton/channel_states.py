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

from sinuous.kernels.arguments import ChannelStates, Longhorn, SelectiveScan
from sinuous.kernels.precision import working_dtype
from sinuous.kernels.torch.packing import sequence_count
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

    starts: Tensor | None
    stops: Tensor | None
    chunk_starts: Tensor | None
    chunk_stops: Tensor | None


NOWHERE = Boundaries(None, None, None, None)


def boundaries(cu_seqlens: Tensor, length: int, chunk_size: int, reverse: bool) -> Boundaries:
    steps = packed_steps(cu_seqlens, length, reverse)
    starts = torch.where(steps.before == 0, steps.sequence, -1)
    stops = torch.where(steps.after == 0, steps.sequence, -1)
    padding = -length % chunk_size

    def any_in_chunk(marks: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(marks, (0, padding), value=-1)
        return (padded.view(-1, chunk_size) >= 0).any(1).to(torch.int32)

    return Boundaries(starts, stops, any_in_chunk(starts), any_in_chunk(stops))


def initial_states(args: ChannelStates) -> Tensor:
    """States before the first step, `[sequences, D, N]`, contiguous; zeros where none are given."""
    dtype = working_dtype(args.u.dtype)
    if args.initial_state is not None:
        return args.initial_state.to(dtype).contiguous()
    sequences = sequence_count(args.u, args.cu_seqlens)
    return args.u.new_zeros(sequences, args.u.shape[2], args.B.shape[-1], dtype=dtype)


class ChannelStatesCall:
    """What the launches of forward and backward share, for inputs that have a step.

    Attributes:
        inputs: the contiguous arguments u, dt, A, B, C, D, z, dt_bias and, for Longhorn, |B|².
        marks: boundaries of packed sequences.
        groups: how many groups of channels read a B and C of their own.
        blocks: the shares of channels among programs.
        block, fixed, steps: options of launches; all take `fixed`, and those that walk single steps take `steps`.
    """

    def __init__(self, args: ChannelStates, chunk_size: int, per_warp: int) -> None:
        (_, length, width), state = args.u.shape, args.B.shape[-1]
        norm = args.B.to(working_dtype(args.u.dtype)).square().sum(-1) if args.A is None else None
        inputs = (args.u, args.dt, args.A, args.B, args.C, args.D, args.z, args.dt_bias, norm)
        self.inputs = [None if t is None else t.contiguous() for t in inputs]
        bounds = args.cu_seqlens
        self.marks = NOWHERE if bounds is None else boundaries(bounds, length, chunk_size, args.reverse)
        self.groups = args.B.shape[2] if args.B.ndim == 4 else 1
        self.blocks = blocks(width, self.groups, state, per_warp)
        channels, padded, *_ = self.blocks
        self.block = {"N": state, "BD": channels, "BN": padded, "CHUNK": chunk_size, **self.blocks.options}
        self.fixed = {"IMPLICIT": args.A is None, "PACKED": bounds is not None, "ACC": accumulator(args.u.dtype)}
        self.steps = {"GROUPS": self.groups, "SOFTPLUS": args.dt_softplus}
        self.steps |= {"BIASED": args.dt_bias is not None, "REVERSE": args.reverse}


def forward(arguments: SelectiveScan | Longhorn, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, final_state, chunk_states)`."""
    args = ChannelStates.of(arguments)
    (batch, length, width), chunks = args.u.shape, triton.cdiv(args.u.shape[1], chunk_size)
    initial = initial_states(args)
    # Sequences without a step end where they begin.
    final = initial.clone()
    y = torch.empty(args.u.shape, dtype=args.u.dtype, device=args.u.device)
    chunk_states = initial.new_empty(batch, chunks, *initial.shape[1:])
    if y.numel() == 0:
        return y, final, chunk_states
    call = ChannelStatesCall(args, chunk_size, 512)
    (u, dt, A, B, *_, dt_bias, norm), (starts, stops, cut, _) = call.inputs, call.marks
    total = call.blocks.total
    serial = chunks == 1 or batch * total >= SERIAL_PROGRAMS
    with on_device(y):
        if not serial:
            across = initial.new_empty(chunk_states.shape if A is None else chunk_states.shape[:3])
            # Products of decays are as large as the state: twice the warps, and it stays in registers.
            warps = blocks(width, call.groups, initial.shape[-1], 512 if A is not None else 256).options
            chunk_ends[(batch * chunks * total,)](
                u, dt, A, B, dt_bias, norm, initial, starts, chunk_states, across, length, width,
                **{**call.block, **warps}, **call.fixed, **call.steps,
            )  # fmt: skip
            carry_chunks[(batch * triton.cdiv(width, call.blocks.channels),)](
                chunk_states, across, A, initial, starts, cut, length, width, ADJOINT=False, **call.block, **call.fixed
            )
        outputs[(batch * total * (1 if serial else chunks),)](
            *call.inputs, initial, starts, stops, chunk_states, y, final, length, width,
            SKIP=args.D is not None, GATED=args.z is not None, SERIAL=serial, **call.block, **call.fixed, **call.steps,
        )  # fmt: skip
    return y, final, chunk_states
