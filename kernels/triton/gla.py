"""Launches of the kernels in gla_kernels: which blocks, in which order, with which buffers.

Where values decay, the kernels are told that v is k, k is v, q is dy and dy is q.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sinuous.kernels.arguments import GLA
from sinuous.kernels.torch.chunked import initial_matrix
from sinuous.kernels.triton.gla_kernels import carry, outer, prepare, read, sides, sum_gates
from sinuous.kernels.triton.matrix_states import MatrixStatesCall
from sinuous.kernels.triton.packing import on_device


def tiles(kernel: object, dtype: torch.dtype, keys: int, values: int) -> dict[str, int]:
    """Blocks of keys and values, and compile options: the largest that tools/aot_table.py finds to stay in registers.
    Triton 3.10 no longer fuses multiplications and additions unless asked.
    """
    if dtype == torch.float64:
        block_k, block_v, warps, stages = 16, 16, 8, 1
    elif dtype == torch.float32:
        block_k, block_v, warps, stages = {
            prepare: (16, 16, 8, 1),
            sides: (16, 32, 4, 1),
            read: (16, 32, 8, 2),
            sum_gates: (32, 32, 4, 1),
        }.get(kernel, (32, 32, 8, 2))
    else:
        block_k, block_v, warps, stages = {
            prepare: (32, 32, 8, 1),
            sides: (32, 32, 8, 1),
            read: (32, 64, 4, 2),
            sum_gates: (32, 32, 4, 1),
        }.get(kernel, (64, 64, 4, 2))
    block_k, block_v = min(block_k, triton.next_power_of_2(keys)), min(block_v, triton.next_power_of_2(values))
    blocks = {"BK": max(16, block_k), "BV": max(16, block_v)}
    return {**blocks, "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


class GLAPrepared(NamedTuple):
    """The results of `prepare`; of keys alone there are no weights and queries."""

    weights: Tensor | None
    queries: Tensor | None
    keys: Tensor
    totals: Tensor


class GLACall:
    """One call, its gates, and the launches that it is made of; K are the channels that decay, V the others."""

    def __init__(self, call: MatrixStatesCall, log_decay: Tensor, bonus: Tensor | None, transposed: bool) -> None:
        self.call, self.log_decay = call, log_decay.contiguous()
        self.bonus = None if bonus is None else bonus.contiguous()
        # Factors of products, in their type; the interpreter multiplies bfloat16 in single precision.
        half = call.input_dtype != torch.float64 and call.sizes["DOT"] != call.sizes["ACC"]
        self.factor = call.input_dtype if half else call.dtype
        two = call.dtype != torch.float64
        self.sizes = {**call.sizes, "BONUS": bonus is not None, "TRANSPOSED": transposed, "TWO": two}
        *steps, keys = log_decay.shape
        self.sums = torch.empty(*steps, 1 + two, keys, dtype=call.dtype, device=log_decay.device)
        # Passed when run, so that their loop is not unrolled, which takes more registers than there are.
        self.levels = call.form["CHUNK"].bit_length() - 1
        if log_decay.numel():
            key_blocks, _, sizes = self._over(sum_gates)
            with on_device(log_decay):
                sum_gates[(key_blocks * call.heads * call.segments,)](
                    self.log_decay, call.table, self.sums, call.length, **sizes
                )

    def _over(self, kernel: Any) -> tuple[int, int, dict[str, Any]]:
        """Blocks of keys, blocks of values, and compile-time arguments, of a kernel."""
        call = self.call
        return call.over(kernel, tiles(kernel, call.input_dtype, call.keys, call.values), **self.sizes)

    def prepare(self, q: Tensor | None, k: Tensor) -> GLAPrepared:
        call = self.call
        scaled_keys = torch.empty_like(k, dtype=self.factor)
        totals = torch.empty(call.segments, call.heads, call.keys, dtype=call.dtype, device=k.device)
        weights = scaled_queries = None
        if q is not None:
            scaled_queries = torch.empty_like(q, dtype=self.factor)
            weights = torch.empty(*q.shape[:3], call.form["CHUNK"], dtype=self.factor, device=q.device)
        _, _, sizes = self._over(prepare)
        with on_device(k):
            prepare[(call.heads * call.segments,)](
                q, k, self.sums, self.bonus, call.table, weights, scaled_queries, scaled_keys, totals,
                call.length, call.sequences, self.levels, QUERIES=q is not None, **sizes,
            )  # fmt: skip
        return GLAPrepared(weights, scaled_queries, scaled_keys, totals)

    def carry(
        self, left: Tensor, right: Tensor, totals: Tensor, edge: Tensor, *, adjoint: bool
    ) -> tuple[Tensor, Tensor]:
        """The state after each sequence and before each chunk, or its gradient before the one and after the other."""
        call, (key_blocks, value_blocks, sizes) = self.call, self._over(carry)
        other, chunk_states = torch.empty_like(edge), call.empty_states(edge)
        with on_device(left):
            carry[(call.sequences * call.heads * key_blocks * value_blocks,)](
                left, right, totals, edge, call.bounds, chunk_states, other, call.length, call.sequences,
                ADJOINT=adjoint, **sizes,
            )  # fmt: skip
        return other, chunk_states

    def read(
        self,
        weights: Tensor | None,
        left: Tensor | None,
        right: Tensor,
        chunk_states: Tensor,
        edge: Tensor,
        *,
        keys: bool,
    ) -> Tensor:
        """Outputs, or the gradients of the values."""
        call, out, (_, value_blocks, sizes) = self.call, torch.empty_like(right), self._over(read)
        with on_device(right):
            read[(value_blocks * call.heads * call.segments,)](
                weights, left, right, chunk_states, edge, call.table, out, call.length, KEYS=keys, **sizes
            )
        return out

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """dA of dy and v."""
        call, (_, _, sizes) = self.call, self._over(outer)
        pairs = torch.empty(*left.shape[:3], call.form["CHUNK"], dtype=self.factor, device=left.device)
        with on_device(left):
            outer[(call.heads * call.segments,)](left, right, call.table, pairs, call.length, **sizes)
        return pairs

    def outputs_of_sides(self, q: Tensor, k: Tensor, v: Tensor, chunk_states: Tensor, initial: Tensor) -> Tensor:
        """Outputs where values decay."""
        call, y, (key_blocks, _, sizes) = self.call, torch.empty_like(v), self._over(sides)
        with on_device(q):
            sides[(key_blocks * call.heads * call.segments,)](
                None, v, q, k, self.sums, None, self.outer(q, k), chunk_states, initial, None, None, call.table,
                y, None, None, None, call.length, self.levels, GRADIENT=False, **sizes,
            )  # fmt: skip
        return y

    def forward(self, q: Tensor, k: Tensor, v: Tensor, initial: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs, final states and those before each chunk, where keys decay."""
        prepared = self.prepare(q, k)
        final, chunk_states = self.carry(prepared.keys, v, prepared.totals, initial, adjoint=False)
        return self.read(prepared.weights, prepared.queries, v, chunk_states, initial, keys=False), final, chunk_states

    def adjoint(self, prepared: GLAPrepared, dy: Tensor, dfinal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the states before each sequence and after each chunk, and of the values."""
        assert prepared.queries is not None
        dinitial, after = self.carry(prepared.queries, dy, prepared.totals, dfinal, adjoint=True)
        return dinitial, after, self.read(prepared.weights, prepared.keys, dy, after, dfinal, keys=True)

    def sides(
        self,
        q: Tensor,
        k: Tensor,
        dy: Tensor,
        v: Tensor,
        states: tuple[Tensor, Tensor],
        adjoint: tuple[Tensor, Tensor],
        dq: Tensor | None,
        dk: Tensor,
        gates: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of log_decay, unless without `gates`, and bonus, and in `dq` and `dk` of queries and keys."""
        call, (key_blocks, _, sizes) = self.call, self._over(sides)
        dlog_decay = torch.empty_like(self.log_decay, dtype=call.dtype) if gates else None
        dbonus: Tensor | None = None
        if self.bonus is not None:
            dbonus = torch.zeros(call.segments, call.heads, call.keys, dtype=call.dtype, device=k.device)
        with on_device(k):
            sides[(key_blocks * call.heads * call.segments,)](
                q, k, dy, v, self.sums, self.bonus, self.outer(dy, v), *states, *adjoint, call.table,
                dq, dk, dlog_decay, dbonus, call.length, self.levels, GRADIENT=True, **sizes,
            )  # fmt: skip
        return dlog_decay, None if dbonus is None else dbonus.sum(0)


def _of_call(args: GLA, chunk_size: int) -> tuple[GLA, GLACall, Tensor]:
    """The arguments in the kernels' layout, their call, and its initial state."""
    args = args._replace(q=args.q.contiguous(), k=args.k.contiguous(), v=args.v.contiguous())
    scale = args.q.shape[-1] ** -0.5 if args.scale is None else args.scale
    decaying, other = (args.v, args.k) if args.on_values else (args.k, args.v)
    call = MatrixStatesCall.of(decaying, other, args.cu_seqlens, scale, args.reverse, chunk_size)
    (initial,) = initial_matrix(args.q, args.v, args.initial_state, args.cu_seqlens)
    return args, GLACall(call, args.log_decay, args.bonus, args.on_values), initial


def forward(args: GLA, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, final_state, chunk_states)` as `sinuous.core.ops.gla` defines them."""
    args, made, initial = _of_call(args, chunk_size)
    q, k, v = args.q, args.k, args.v
    if v.numel() == 0:
        return torch.empty_like(v), initial.clone(), made.call.empty_states(initial)
    if args.on_values:
        prepared = made.prepare(None, v)
        final, chunk_states = made.carry(prepared.keys, k, prepared.totals, initial, adjoint=False)
        return made.outputs_of_sides(q, k, v, chunk_states, initial), final, chunk_states
    return made.forward(q, k, v, initial)


def backward(
    args: GLA, grads: tuple[Tensor | None, Tensor | None], chunk_states: Tensor, chunk_size: int
) -> list[Tensor | None]:
    """Gradients of q, k, v, log_decay, bonus and initial_state."""
    args, made, initial = _of_call(args, chunk_size)
    q, k, v = args.q, args.k, args.v
    dy = torch.zeros_like(v) if grads[0] is None else grads[0].contiguous()
    dfinal = torch.zeros_like(initial) if grads[1] is None else grads[1].to(initial.dtype).contiguous()
    if v.numel() == 0:
        zeros = [None if t is None else torch.zeros_like(t) for t in (q, k, v, args.log_decay, args.bonus)]
        return [*zeros, None if args.initial_state is None else dfinal]
    queries, keys, dout, values = (dy, v, q, k) if args.on_values else (q, k, dy, v)
    prepared = made.prepare(queries, keys)
    dinitial, after, dvalues = made.adjoint(prepared, dout, dfinal)
    states, adjoint = (chunk_states, initial), (after, dfinal)
    dkeys, dqueries = torch.empty_like(keys), None if args.on_values else torch.empty_like(q)
    dlog_decay, dbonus = made.sides(queries, keys, dout, values, states, adjoint, dqueries, dkeys)
    if args.on_values:
        dqueries = made.read(prepared.weights, prepared.queries, values, *states, keys=False)
    dk, dv = (dvalues, dkeys) if args.on_values else (dkeys, dvalues)
    return [dqueries, dk, dv, dlog_decay, dbonus, None if args.initial_state is None else dinitial]
