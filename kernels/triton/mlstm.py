# mypy: allow-untyped-defs, allow-incomplete-defs
"""mLSTM: its gates and its stabiliser, forward and backward, around the kernels over states.

The equations are in `sinuous.core.ops.mlstm` and in `matrix_state_kernels`. With b_t the sum of log f since the start
of a segment and m the stabiliser before it, here

    u_j = log i_j - b_j      μ_t = max(m, max_{j ≤ t} u_j)      m_t = μ_t + b_t

In the backward pass μ_t + log d_t, with the denominator d_t, takes the place of μ_t, and dy that of dy_t / d_t.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sinuous.kernels.arguments import MLSTM
from sinuous.kernels.torch.chunked import LARGEST_ROUNDING, run_sums
from sinuous.kernels.torch.mlstm import states_or_zeros
from sinuous.kernels.triton.matrix_state_kernels import FORGOTTEN, gradient_of_sums, segment_at
from sinuous.kernels.triton.matrix_states import (
    MatrixStatesCall,
    Normaliser,
    State,
    Weights,
    carry,
    carry_adjoint,
    gradients,
    read,
    read_normaliser,
)
from sinuous.kernels.triton.packing import bounds_of, on_device, packed_steps, row_of

LOWEST = tl.constexpr(-1e30)
NOTHING = tl.constexpr(-2e30)
"""Stands for the logarithm of an input gate of 0, below the lowest stabiliser."""


@triton.jit
def log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1 + tl.exp(-tl.abs(x)))


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["length"])
def gates(
    input_gate, forget_gate, initial_m, cu_seqlens, rows, columns, since_start, until_end, floor,
    chunk_m, exact_m, length,
    H: tl.constexpr, BH: tl.constexpr, CHUNK: tl.constexpr, STABILISED: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The weights of all steps, the floor of the denominator e^-m, and m: before each chunk, after each sequence."""
    blocks: tl.constexpr = (H + BH - 1) // BH
    pid = tl.program_id(0)
    h, n = pid % blocks * BH + tl.arange(0, BH), (pid // blocks).to(tl.int64)
    begin, steps, batch = bounds_of(n, cu_seqlens, length, PACKED, REVERSE)
    end = begin + steps
    m = tl.load(initial_m + n * H + h, mask=h < H, other=0).to(tl.float64)
    tl.store(exact_m + n * H + h, m, mask=h < H)
    chunks, first_chunk = tl.cdiv(length, CHUNK), begin // CHUNK
    past_chunk = tl.where(steps > 0, tl.cdiv(end, CHUNK), first_chunk)
    for j in range(first_chunk, past_chunk):
        start, stop = tl.maximum(begin, j * CHUNK), tl.minimum(end, (j + 1) * CHUNK)
        if start == j * CHUNK:
            tl.store(chunk_m + (batch * chunks + j) * H + h, m, mask=h < H)
        p = start + tl.arange(0, CHUNK)
        there = (p < stop)[:, None] & (h < H)[None, :]
        at = row_of(p, batch, length, REVERSE)[:, None] * H + h[None, :]
        log_i = tl.load(input_gate + at, mask=there, other=0).to(tl.float64)
        if not STABILISED:
            log_i = log_sigmoid(log_i)
        log_i = tl.where(there, tl.maximum(log_i, NOTHING), NOTHING)
        log_f = log_sigmoid(tl.load(forget_gate + at, mask=there, other=0).to(tl.float64))
        log_f = tl.where(there, tl.maximum(log_f, FORGOTTEN), 0.0)
        b, total = tl.cumsum(log_f, 0), tl.sum(log_f, 0)
        u = log_i - b
        if STABILISED:
            mu = tl.maximum(tl.maximum(tl.associative_scan(u, 0, _larger), m[None, :]), LOWEST)
            last = tl.max(mu, 0)
            before, m = m, last + total
        else:
            mu, before, last = -b, tl.zeros([BH], tl.float64), -total
        tl.store(rows + at, mu, mask=there)
        tl.store(columns + at, u, mask=there)
        tl.store(since_start + at, tl.exp((before[None, :] - mu).to(ACC)), mask=there)
        tl.store(until_end + at, tl.exp((u - last[None, :]).to(ACC)), mask=there)
        tl.store(floor + at, tl.exp((-mu - b).to(ACC)), mask=there)
        tl.store(exact_m + n * H + h, m, mask=h < H)  # of every chunk: behind the loop it costs registers


@triton.jit(do_not_specialize=["length"])
def gate_gradients(
    input_gate, forget_gate, query_dots, key_dots, ends, own, into_m, table, grad_input, grad_forget,
    segments, steps, length, key_blocks,
    H: tl.constexpr, BH: tl.constexpr, CHUNK: tl.constexpr, STABILISED: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of the gates before their activations.

    Those of the stabilisers are in `into_m`, and go to the input gate where m is the step's `own`, both [B T, H].
    """
    blocks: tl.constexpr = (H + BH - 1) // BH
    pid = tl.program_id(0)
    h, unit = pid % blocks * BH + tl.arange(0, BH), (pid // blocks).to(tl.int64)
    batch, start, stop, _, _, _ = segment_at(unit, table, length, CHUNK, PACKED)
    if start == stop:
        return
    p = start + tl.arange(0, CHUNK)
    there = (p < stop)[:, None] & (h < H)[None, :]
    row = row_of(p, batch, length, REVERSE)
    into_input, into_log_f = gradient_of_sums(
        query_dots, key_dots, ends, row, unit, h, there, h < H, stop, p, segments, steps, key_blocks, H
    )
    at = row[:, None] * H + h[None, :]
    i = tl.load(input_gate + at, mask=there, other=0).to(tl.float64)
    f = tl.load(forget_gate + at, mask=there, other=0).to(tl.float64)
    if STABILISED:
        d = tl.load(into_m + at, mask=there, other=0)
        is_own = tl.load(own + at, mask=there, other=0) != 0
        into_input += tl.where(is_own, d, 0.0)
        into_log_f += tl.where(is_own, 0.0, d)
    else:
        into_input *= 1 / (1 + tl.exp(i))
    reset = f == float("-inf")
    into_forget = into_log_f / (1 + tl.exp(tl.where(reset, 0.0, f)))
    tl.store(grad_input + at, into_input.to(ACC), mask=there)
    tl.store(grad_forget + at, tl.where(reset, 0.0, into_forget).to(ACC), mask=there)


class MLSTMGates:
    """The gates of a call, the results of the kernel `gates`, and the unit of the final C and n: e^m over that of the m
    that is returned, which is rounded."""

    def __init__(self, args: MLSTM, call: MatrixStatesCall, initial_m: Tensor) -> None:
        self.input_gate, self.forget_gate = args.input_gate.contiguous(), args.forget_gate.contiguous()
        self.stabilised = args.input_activation == "exp"
        logs = [torch.empty_like(self.input_gate, dtype=torch.float64) for _ in range(2)]
        since_start, until_end, floor = (torch.empty_like(logs[0], dtype=call.dtype) for _ in range(3))
        self.weights = Weights(logs[0], logs[1], since_start, until_end)
        self.normaliser = Normaliser(floor, args.eps)
        self.chunk_m = call.empty_states(initial_m)
        exact_m = torch.empty_like(initial_m, dtype=torch.float64)
        self.blocks, form = call.over_gates()
        self.form = {**form, "STABILISED": self.stabilised, "ACC": call.sizes["ACC"]}
        with on_device(initial_m):
            gates[(call.sequences * self.blocks,)](
                self.input_gate, self.forget_gate, initial_m, call.bounds, *self.weights, floor,
                self.chunk_m, exact_m, call.length, **self.form,
            )  # fmt: skip
        self.m = exact_m.to(initial_m.dtype)
        rounding = (exact_m - self.m).nan_to_num_(0).clamp_(-LARGEST_ROUNDING, LARGEST_ROUNDING)
        self.unit = rounding.exp_().to(self.m.dtype)

    def stabiliser_gradients(
        self, through_eps: Tensor, into_last: Tensor, cu_seqlens: Tensor | None, reverse: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Where m is the step's own input gate, and the gradients of m at every step, both `[B, T, H]`, and of the
        initial ones `[sequences, H]` through those.

        Args:
            through_eps: gradient of m at every step where it scales ε, `[B, T, H]`.
            into_last: gradient of the last m, `[sequences, H]`.
        """
        own = self.weights.columns >= self.weights.rows
        anew = own | self.forget_gate.isneginf()  # m before the step has no part in m
        if not self.stabilised:
            return own.view(torch.int8), through_eps, into_last
        into_m, anew = (t.flip(1) if reverse else t.clone() for t in (through_eps, anew))
        if cu_seqlens is None:
            into_m[:, -1] += into_last
            into_m = run_sums(into_m.mT, anew.mT).mT
            into_initial = into_m[:, 0].masked_fill(anew[:, 0], 0)
        else:
            length, bounds = into_m.shape[1], cu_seqlens.long()
            sequence, before, after = packed_steps(cu_seqlens, length, reverse)
            into_m += into_last[sequence] * (after == 0)[:, None]
            into_m = run_sums(into_m.mT, (anew | (before == 0)[:, None]).mT).mT
            first = (length - bounds[1:] if reverse else bounds[:-1]).clamp_max(length - 1)
            into_initial = into_m[0].masked_fill(anew[0], 0)[first]
        return own.view(torch.int8), (into_m.flip(1) if reverse else into_m).contiguous(), into_initial


def _of_call(args: MLSTM, chunk_size: int) -> tuple[MLSTM, MatrixStatesCall, tuple[Tensor, ...]]:
    """The arguments in the kernels' layout, their call, and the initial C, n and m."""
    args = args._replace(q=args.q.contiguous(), k=args.k.contiguous(), v=args.v.contiguous())
    call = MatrixStatesCall.of(args.q, args.v, args.cu_seqlens, args.scale, args.reverse, chunk_size)
    return args, call, states_or_zeros(args, args.initial_state)


def forward(args: MLSTM, chunk_size: int) -> tuple[Tensor | None, ...]:
    """`(y, C, n, m, chunk_C, chunk_n, chunk_m)` as `sinuous.core.ops.mlstm` defines them."""
    args, call, (C, n, m) = _of_call(args, chunk_size)
    q, k, v = args.q, args.k, args.v
    if v.numel() == 0:
        final = [t.clone() if args.return_state else None for t in (C, n, m)]
        return torch.empty_like(v), *final, *(call.empty_states(t) for t in (C, n, m))
    made = MLSTMGates(args, call, m)
    (final_C, final_n), chunk_states = carry(call, k, v, made.weights, (C, n))
    y = read(call, q, k, v, made.weights, (C, n), chunk_states, made.normaliser if args.normalize else None)
    assert final_n is not None
    assert chunk_states[1] is not None
    final = [None, None, None]
    if args.return_state:
        final = [final_C * made.unit[..., None, None], final_n * made.unit[..., None], made.m]
    return y, *final, chunk_states[0], chunk_states[1], made.chunk_m


def backward(
    args: MLSTM,
    grads: tuple[Tensor | None, ...],
    chunk_C: Tensor,
    chunk_n: Tensor,
    chunk_m: Tensor,
    chunk_size: int,
) -> list[Tensor | None]:
    """Gradients of q, k, v, input_gate, forget_gate, initial_C, initial_n and initial_m."""
    args, call, (C, n, m) = _of_call(args, chunk_size)
    q, k, v = args.q, args.k, args.v
    dy = torch.zeros_like(v) if grads[0] is None else grads[0].contiguous()
    dC, dn, dm = states_or_zeros(args, grads[1:] if args.return_state else (None, None, None))
    if v.numel() == 0:
        zeros = [torch.zeros_like(t) for t in (q, k, v, args.input_gate, args.forget_gate)]
        pairs = zip(args.initial_state, (dC, dn, dm), strict=True)
        return [*zeros, *(None if t is None else gradient for t, gradient in pairs)]
    made = MLSTMGates(args, call, m)
    dfinal = (dC * made.unit[..., None, None], dn * made.unit[..., None])
    initial, chunk_states = (C, n), (chunk_C, chunk_n)
    weights, weight, extra = made.weights, made.weights.since_start, torch.zeros_like(made.weights.since_start)
    through_eps = torch.zeros_like(weights.rows)
    if args.normalize:
        summed, denominator, inner = read_normaliser(call, q, k, v, dy, weights, initial, chunk_states, made.normaliser)
        # Bounded, since the difference of two infinities is none.
        weights = weights._replace(rows=weights.rows + denominator.double().log().clamp(max=1e30))
        weight = weight / denominator
        through_eps = (inner / denominator / denominator).double() * -args.eps  # the gradient of m in ε e^m
        extra = torch.where(summed.abs() > made.normaliser.floor, -summed.sign() * inner / denominator, extra)
    before, after = carry_adjoint(call, q, dy, extra, weight, weights, dfinal)
    d = gradients(call, q, k, v, dy, extra, weight, weights, initial, chunk_states, dfinal, after)
    into_last = dm - d.last_ends[:, : call.sequences].sum(0)
    own, into_m, into_initial = made.stabiliser_gradients(through_eps, into_last, args.cu_seqlens, args.reverse)
    dinput_gate, dforget_gate = torch.empty_like(made.input_gate), torch.empty_like(made.forget_gate)
    with on_device(q):
        gate_gradients[(call.segments * made.blocks,)](
            made.input_gate, made.forget_gate, d.query_dots, d.key_dots, d.ends, own, into_m,
            call.table, dinput_gate, dforget_gate, call.segments, call.steps, call.length, d.ends.shape[0],
            **made.form,
        )  # fmt: skip
    dinitial = (*before, _initial_m_gradient(made, initial, before, dm, into_initial, args.cu_seqlens))
    return [
        d.q, d.k, d.v, dinput_gate, dforget_gate,
        *(None if t is None else gradient for t, gradient in zip(args.initial_state, dinitial, strict=True)),
    ]  # fmt: skip


def _initial_m_gradient(
    made: MLSTMGates, initial: State, before: State, dm: Tensor, into_initial: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    """Gradient of the initial m, through the initial C and n and the stabilisers that are made of it; `dm` for
    sequences without a step."""
    if not made.stabilised:
        return dm
    total = into_initial.to(dm.dtype)
    for state, gradient in zip(initial, before, strict=True):
        assert state is not None
        assert gradient is not None
        total = total + (state * gradient).flatten(2).sum(-1)
    return total if cu_seqlens is None else torch.where((cu_seqlens.diff() == 0)[:, None], dm, total)
