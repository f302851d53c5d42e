"""Launches of the kernels in delta_rule_kernels: which blocks, in which order, with which buffers.

The factors of a step become rows of a longer sequence, `[B, T n, H, …]`, in the order in which they are processed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from sinuous.kernels.arguments import DeltaRule
from sinuous.kernels.torch import delta_rule as plain
from sinuous.kernels.torch.chunked import initial_matrix
from sinuous.kernels.triton.delta_rule_kernels import carry, carry_adjoint, prepare, read, sides
from sinuous.kernels.triton.matrix_states import MatrixStatesCall, segments
from sinuous.kernels.triton.packing import on_device
from sinuous.kernels.triton.ssd import decay_gradient, over_time, weights_of


def fits(q: Tensor) -> bool:
    """Whether the keys fit the registers of a program; else the plain form runs, whose chunk states are the same."""
    return q.shape[-1] <= (256 if q.dtype in (torch.bfloat16, torch.float16) else 128)


def tiles(kernel: object, dtype: torch.dtype, keys: int, values: int) -> dict[str, int]:
    """Rows of a segment, blocks of keys and values, and compile options: the largest that tools/aot_table.py finds to
    stay in registers. The kernels that carry states hold all keys at once."""
    half, carries = dtype in (torch.bfloat16, torch.float16), kernel in (carry, carry_adjoint)
    rows, block_k, block_v, warps, stages = 64, 64, 64, 4, 2
    if kernel is sides:
        block_k, block_v, warps, stages = 32, 16, 8, 1
    elif carries:
        block_v = 32
        if kernel is carry_adjoint and keys > 64:
            block_v, stages = 16, 1
    if not half:
        rows, block_k, block_v, warps = 32, 16 if kernel is sides else 32, 16, 8
        stages = 2 if kernel is carry_adjoint and keys <= 64 else 1
    elif keys > 128:
        rows, block_v = 32, 16 if carries else block_v
    wide = max(16, triton.next_power_of_2(keys))
    block_k, block_v = wide if carries else min(block_k, wide), min(block_v, triton.next_power_of_2(values))
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return {"CHUNK": rows, "BK": block_k, "BV": max(16, block_v), **options}


class DeltaRuleCall:
    """A call with its factors as rows, and the launches that it is made of."""

    def __init__(self, args: DeltaRule, chunk_size: int) -> None:
        self.product, self.reverse = args.k.ndim == 5, args.reverse
        self.factors = args.k.shape[2] if self.product else 1
        self.q, self.k, self.v, self.beta = args.q.contiguous(), *map(self.as_rows, (args.k, args.v, args.beta))
        bounds = None if args.cu_seqlens is None else args.cu_seqlens * self.factors
        rows = tiles(prepare, args.q.dtype, args.q.shape[-1], args.v.shape[-1])["CHUNK"]
        self.call = MatrixStatesCall.of(self.q, self.v, bounds, args.scale, args.reverse, rows)
        self.span = chunk_size * self.factors
        log_decay = args.log_decay if self.factors == 1 else self._on_first_rows(args.log_decay)
        self.log_decay = over_time(log_decay, self.v)
        self.initial = self.state(args.initial_state)

    def as_rows(self, t: Tensor) -> Tensor:
        if self.product:
            t = (t.flip(2) if self.reverse else t).flatten(1, 2)
        return t.contiguous()

    def as_factors(self, t: Tensor) -> Tensor:
        if self.product:
            t = t.unflatten(1, (-1, self.factors))
        return t.flip(2) if self.product and self.reverse else t

    def _on_first_rows(self, log_decay: Tensor | None) -> Tensor | None:
        if log_decay is None:
            return None
        rows = log_decay.new_zeros(*log_decay.shape[:2], self.factors, log_decay.shape[2])
        rows[:, :, 0] = log_decay
        return self.as_rows(rows)

    def state(self, state: Tensor | None) -> Tensor:
        """A state per sequence; zeros for None."""
        (matrix,) = initial_matrix(self.q, self.v, state, self.call.bounds)
        return matrix

    def empty_output(self) -> Tensor:
        return self.v.new_empty(*self.q.shape[:3], self.call.values)

    def _over(self, kernel: Any) -> tuple[int, int, dict[str, Any]]:
        """Blocks of keys, blocks of values, and compile-time arguments, of a kernel."""
        call = self.call
        block = tiles(kernel, call.input_dtype, call.keys, call.values)
        levels = (call.form["CHUNK"] // 16).bit_length() - 1
        return call.over(kernel, block, FACTORS=self.factors, SPAN=self.span, LEVELS=levels)

    def prepare(self) -> None:
        """Decays, and the matrices P and X of all segments."""
        call, (_, _, sizes) = self.call, self._over(prepare)
        self.decays = weights_of(call, self.log_decay)
        per_row = (call.heads, call.form["CHUNK"])
        self.weights = self.q.new_empty(*self.q.shape[:2], *per_row, dtype=call.factor_dtype)
        self.inverse = self.k.new_empty(*self.k.shape[:2], *per_row, dtype=call.factor_dtype)
        with on_device(self.q):
            prepare[(call.heads * call.segments,)](
                self.q, self.k, self.beta, self.decays.rows, call.table, self.weights, self.inverse, call.length,
                **sizes,
            )  # fmt: skip

    def carry(self) -> tuple[Tensor, Tensor]:
        """The state after each sequence, and the states that the op keeps."""
        call, final, states = self.call, torch.empty_like(self.initial), self.call.empty_states(self.initial)
        self._carry(call.sequences, None, None, states, final)
        self.states = states
        return final, states[:, :: self.span // call.form["CHUNK"]]

    def carry_again(self, chunk_states: Tensor) -> None:
        """Compute again what `carry` left, from the states that the op kept."""
        call = self.call
        spans, table = call.batch * triton.cdiv(call.length, self.span), call.table
        whole = self.span == call.form["CHUNK"]
        if call.bounds is not None and not whole:
            table = segments(call.bounds, call.length, self.span, self.reverse)
        if table is not None:
            spans = table.shape[0]
        states = None if whole else call.empty_states(self.initial)
        self._carry(spans, chunk_states, table, states, None)
        self.states = chunk_states if states is None else states

    def _carry(
        self,
        spans: int,
        chunk_states: Tensor | None,
        table: Tensor | None,
        states: Tensor | None,
        final: Tensor | None,
    ) -> None:
        call, (_, value_blocks, sizes) = self.call, self._over(carry)
        self.residual = torch.empty_like(self.v, dtype=call.factor_dtype)
        with on_device(self.q):
            carry[(spans * call.heads * value_blocks,)](
                self.k, self.v, self.beta, self.inverse, self.decays.since_start, self.decays.until_end,
                self.initial, chunk_states, call.bounds, table, states, self.residual, final, call.length,
                AGAIN=final is None, **sizes,
            )  # fmt: skip

    def read(self) -> Tensor:
        """The outputs."""
        call, (_, value_blocks, sizes), y = self.call, self._over(read), self.empty_output()
        with on_device(self.q):
            read[(value_blocks * call.heads * call.segments,)](
                self.q, self.beta, self.weights, self.residual, self.decays.since_start, self.states, self.initial,
                call.table, y, call.length, **sizes,
            )  # fmt: skip
        return y

    def gradients(self, dy: Tensor, dfinal: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of q, k, v, beta, log_decay and the initial state, of rows, after `prepare` and `carry_again`."""
        call, after, dinitial = self.call, self.call.empty_states(dfinal), torch.empty_like(dfinal)
        through, dv = torch.empty_like(self.residual), torch.empty_like(self.v)
        _, value_blocks, sizes = self._over(carry_adjoint)
        with on_device(self.q):
            carry_adjoint[(call.sequences * call.heads * value_blocks,)](
                self.q, self.k, self.beta, dy, self.weights, self.inverse, self.decays.since_start,
                self.decays.until_end, dfinal, call.bounds, after, through, dv, dinitial, call.length, **sizes,
            )  # fmt: skip
        key_blocks, _, sizes = self._over(sides)
        dq, dk, dk_rows = torch.empty_like(self.q), torch.empty_like(self.k), torch.empty_like(self.k, dtype=call.dtype)
        dbeta = torch.empty_like(self.beta, dtype=call.dtype)
        dots = self.k.new_empty(2, key_blocks, *self.beta.shape, dtype=call.dtype)
        ends = self.k.new_zeros(key_blocks, call.segments, call.heads, dtype=call.dtype)
        with on_device(self.q):
            for keys in (False, True):
                sides[(key_blocks * call.heads * call.segments,)](
                    self.q, self.k, self.beta, dy, self.residual, through, self.decays.rows, self.decays.since_start,
                    self.decays.until_end, self.states, self.initial, after, dfinal, call.table,
                    dq, dk_rows, dk, dbeta, dots[int(keys)], ends, call.segments, call.steps, call.length,
                    KEYS=keys, **sizes,
                )  # fmt: skip
        return dq, dk, dv, dbeta, decay_gradient(call, self.log_decay, dots[0], dots[1], ends), dinitial


def forward(args: DeltaRule, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, final_state, chunk_states)`; see sinuous.core.ops.delta_rule."""
    if not fits(args.q):
        return plain.forward(args, chunk_size)
    rows = DeltaRuleCall(args, chunk_size)
    if args.v.numel() == 0:
        return rows.empty_output(), rows.initial.clone(), rows.call.empty_states(rows.initial)
    rows.prepare()
    final, chunk_states = rows.carry()
    return rows.read(), final, chunk_states


def backward(
    args: DeltaRule, grads: tuple[Tensor | None, Tensor | None], chunk_states: Tensor, chunk_size: int
) -> list[Tensor | None]:
    """Gradients of q, k, v, beta, log_decay and initial_state."""
    if not fits(args.q):
        return plain.backward(args, grads, chunk_states, chunk_size)
    rows = DeltaRuleCall(args, chunk_size)
    dfinal = rows.state(grads[1])
    if args.v.numel() == 0:
        inputs = (args.q, args.k, args.v, args.beta, args.log_decay)
        zeros = [None if t is None else torch.zeros_like(t) for t in inputs]
        return [*zeros, None if args.initial_state is None else dfinal]
    rows.prepare()
    rows.carry_again(chunk_states.contiguous())
    dy = rows.empty_output().zero_() if grads[0] is None else grads[0].contiguous()
    dq, dk, dv, dbeta, drows, dinitial = rows.gradients(dy, dfinal)
    dk, dv, dbeta = (rows.as_factors(t) for t in (dk, dv, dbeta))
    dlog_decay = None
    if args.log_decay is not None:
        dlog_decay = rows.as_factors(drows)[:, :, 0] if rows.product else drows
    return [dq, dk, dv, dbeta, dlog_decay, None if args.initial_state is None else dinitial]
