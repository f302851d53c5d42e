"""Launches of the kernels in dplr_kernels, and of those of gla: which blocks, in which order, with which buffers."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sinuous.kernels.arguments import DPLR
from sinuous.kernels.torch import dplr as plain
from sinuous.kernels.torch.chunked import initial_matrix
from sinuous.kernels.triton.delta_rule import fits
from sinuous.kernels.triton.dplr_kernels import carry, pass_through, sides, solve
from sinuous.kernels.triton.gla import GLACall
from sinuous.kernels.triton.matrix_states import MatrixStatesCall
from sinuous.kernels.triton.packing import on_device

Pair = tuple[Tensor, Tensor]
"""The side that reads the state and the side that is written to it, or their values."""

CHANNELS, STEPS = False, True
"""Meaning of the columns of a matrix that passes through the transitions of a segment."""


def tiles(kernel: object, dtype: torch.dtype, keys: int, values: int) -> dict[str, int]:
    """Blocks of keys and values, how many steps are factors of a product at once, and compile options: the largest that
    tools/aot_table.py finds to stay in registers. A block of `carry` holds all keys."""
    wide = max(16, triton.next_power_of_2(keys))
    if dtype in (torch.bfloat16, torch.float16):
        rows, block_k, block_v, warps = 16, 32, 32, 4 if kernel in (solve, carry) else 8
        if kernel is carry:
            rows, block_v = (64, 32) if keys <= 128 else (32, 16)
    else:
        rows, block_k, block_v, warps = (16, 16, 16, 4) if kernel is sides else (32, 16, 16, 8)
    block_k, block_v = wide if kernel is carry else min(block_k, wide), min(block_v, triton.next_power_of_2(values))
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
    return {"ROWS": rows, "BK": block_k, "BV": max(16, block_v), **options}


class DPLRPrepared(NamedTuple):
    """The results of gla's `prepare` for readers and writers."""

    weights: Tensor
    queries: Tensor
    keys: Tensor
    totals: Tensor

    @classmethod
    def of(cls, decaying: GLACall, reader: Tensor, writer: Tensor) -> DPLRPrepared:
        weights, queries, keys, totals = decaying.prepare(reader, writer)
        assert weights is not None
        assert queries is not None
        return cls(weights, queries, keys, totals)


class DPLRTransitions(NamedTuple):
    """The matrices of a segment behind all its transitions, in the letters of dplr_kernels, and its decay."""

    P: Tensor
    q: Tensor
    k: Tensor
    a: Tensor
    written: Tensor  # b̃
    totals: Tensor
    M: Tensor | None
    N: Tensor | None
    b: Tensor | None


class DPLRCall:
    """One call, and the launches that it is made of."""

    def __init__(self, args: DPLR, chunk_size: int) -> None:
        self.q, self.k, self.v, self.a, self.b = (t.contiguous() for t in (args.q, args.k, args.v, args.a, args.b))
        self.call = MatrixStatesCall.of(self.q, self.v, args.cu_seqlens, args.scale, args.reverse, chunk_size)
        self.queries = GLACall(self.call, args.log_decay, None, transposed=False)
        # a reads ahead of the decay of its own step, and before that step writes.
        self.readers = copy.copy(self.queries)
        self.readers.bonus = self.q.new_zeros(self.q.shape[2:], dtype=self.call.dtype)
        self.readers.sizes = {**self.queries.sizes, "BONUS": True, "SCALE": 1.0}
        self.initial = self.state(args.initial_state)

    def state(self, state: Tensor | None) -> Tensor:
        """A state per sequence; zeros for None."""
        (matrix,) = initial_matrix(self.q, self.v, state, self.call.bounds)
        return matrix

    def _over(self, kernel: Any, **more: Any) -> tuple[int, int, dict[str, Any]]:
        """Blocks of keys, blocks of values, and compile-time arguments, of a kernel."""
        call = self.call
        block = tiles(kernel, call.input_dtype, call.keys, call.values)
        levels = (call.form["CHUNK"] // 16).bit_length() - 1
        return call.over(kernel, block, **{**self.queries.sizes, "LEVELS": levels, **more})

    def through(self, *, gradient: bool) -> DPLRTransitions:
        """Everything within segments; M, N and b̂ only for the gradient."""
        qk, qb = (DPLRPrepared.of(self.queries, self.q, t) for t in (self.k, self.b))
        ak, ab = (DPLRPrepared.of(self.readers, self.a, t) for t in (self.k, self.b))
        solution, call = torch.empty_like(ab.weights), self.call
        _, _, sizes = self._over(solve)
        with on_device(self.q):
            solve[(call.heads * call.segments,)](ab.weights, call.table, solution, call.length, **sizes)
        M = N = b = None
        if gradient:
            M, N, b = torch.empty_like(ak.weights), torch.empty_like(qb.weights), torch.empty_like(ab.keys)
            self._pass(solution, None, qb.weights, None, N, None, STEPS, turned=True)
        P, q, k, a = (torch.empty_like(t) for t in (qk.weights, qk.queries, qk.keys, ab.queries))
        self._pass(solution, qb.weights, ak.weights, qk.weights, M, P, STEPS)
        self._pass(solution, qb.weights, ab.queries, qk.queries, a, q, CHANNELS)
        self._pass(solution, ak.weights, ab.keys, qk.keys, b, k, CHANNELS, turned=True)
        return DPLRTransitions(P, q, k, a, ab.keys, qk.totals, M, N, b)

    def _pass(
        self,
        solution: Tensor,
        across: Tensor | None,
        x: Tensor,
        y: Tensor | None,
        inner: Tensor | None,
        outer: Tensor | None,
        columns: bool,
        turned: bool = False,
    ) -> None:
        call, width = self.call, x.shape[-1]
        _, _, sizes = self._over(pass_through, WIDTH=width, TURNED=turned, WEIGHTS=columns == STEPS)
        with on_device(x):
            pass_through[(triton.cdiv(width, sizes["BK"]) * call.heads * call.segments,)](
                solution, across, x, y, inner, outer, call.table, call.length, **sizes
            )

    def carry(
        self, left: Tensor, right: Tensor, onto: Tensor, reads: Tensor, totals: Tensor, edge: Tensor, *, adjoint: bool
    ) -> tuple[Tensor, Tensor]:
        """The state after each sequence and before each chunk, or its gradient before the one and after the other."""
        call, (_, value_blocks, sizes) = self.call, self._over(carry)
        other, chunk_states = torch.empty_like(edge), call.empty_states(edge)
        with on_device(left):
            carry[(call.sequences * call.heads * value_blocks,)](
                left, right, onto, reads, totals, edge, call.bounds, chunk_states, other, call.length, call.sequences,
                ADJOINT=adjoint, **sizes,
            )  # fmt: skip
        return other, chunk_states

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        made = self.through(gradient=False)
        final, chunk_states = self.carry(made.k, self.v, made.written, made.a, made.totals, self.initial, adjoint=False)
        return self.queries.read(made.P, made.q, self.v, chunk_states, self.initial, keys=False), final, chunk_states

    def gradients(self, dy: Tensor, dfinal: Tensor, chunk_states: Tensor) -> list[Tensor]:
        """Gradients of q, k, v, log_decay, a, b and the initial state."""
        made = self.through(gradient=True)
        dinitial, after = self.carry(made.q, dy, made.a, made.written, made.totals, dfinal, adjoint=True)
        states, adjoint, read = (chunk_states, self.initial), (after, dfinal), self.queries.read
        dv = read(made.P, made.k, dy, *adjoint, keys=True)
        # In the type of factors, which is another than that of v where bfloat16 is interpreted.
        factor = self.queries.factor
        u = read(made.M, made.a, self.v.to(factor), *states, keys=False)
        through = read(made.N, made.b, dy.to(factor), *adjoint, keys=True)
        qk, qb = self.queries.outer(dy, self.v), self.queries.outer(dy, u)
        ak, ab = self.readers.outer(through, self.v), self.readers.outer(through, u)
        keys, low_rank = (self.q, self.k), (self.a, self.b)
        edges = (*states, *adjoint)
        dq, dk, dlog_decay = self._sides(self.queries, keys, low_rank, (dy, self.v), (qk, qb, ak), edges, None)
        da, db, dlog_decay = self._sides(self.readers, low_rank, keys, (through, u), (ab, ak, qb), edges, dlog_decay)
        return [dq, dk, dv, dlog_decay, da, db, dinitial]

    def _sides(
        self,
        of: GLACall,
        sides_of: Pair,
        others: Pair,
        values: Pair,
        pairs: tuple[Tensor, Tensor, Tensor],
        edges: tuple[Tensor, Tensor, Tensor, Tensor],
        gates: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of a pair of sides, and with the others' part in `gates`, of log_decay."""
        call, (reader, writer) = self.call, sides_of
        of_reader, of_writer = torch.empty_like(reader), torch.empty_like(writer)
        of_gates = torch.empty_like(of.log_decay, dtype=call.dtype)
        key_blocks, _, sizes = self._over(sides, AHEAD=gates is not None, SCALE=of.sizes["SCALE"])
        with on_device(reader):
            sides[(key_blocks * call.heads * call.segments,)](
                reader, writer, *others, of.log_decay, *values, of.sums, *pairs, *edges, call.table,
                of_reader, of_writer, gates, of_gates, call.length, of.levels, **sizes,
            )  # fmt: skip
        return of_reader, of_writer, of_gates


def forward(args: DPLR, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, final_state, chunk_states)`; see sinuous.core.ops.dplr."""
    if not fits(args.q):
        return plain.forward(args, chunk_size)
    made = DPLRCall(args, chunk_size)
    if args.v.numel() == 0:
        return torch.empty_like(args.v), made.initial.clone(), made.call.empty_states(made.initial)
    return made.forward()


def backward(
    args: DPLR, grads: tuple[Tensor | None, Tensor | None], chunk_states: Tensor, chunk_size: int
) -> list[Tensor | None]:
    """Gradients of q, k, v, log_decay, a, b and initial_state."""
    if not fits(args.q):
        return plain.backward(args, grads, chunk_states, chunk_size)
    made = DPLRCall(args, chunk_size)
    dfinal = made.state(grads[1])
    if args.v.numel() == 0:
        zeros = [torch.zeros_like(t) for t in (args.q, args.k, args.v, args.log_decay, args.a, args.b)]
        return [*zeros, None if args.initial_state is None else dfinal]
    dy = torch.zeros_like(made.v) if grads[0] is None else grads[0].contiguous()
    *dinputs, dinitial = made.gradients(dy, dfinal, chunk_states.contiguous())
    return [*dinputs, None if args.initial_state is None else dinitial]
