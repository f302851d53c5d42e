"""Launches of the kernels in matrix_state_kernels: which blocks, in which order, with which buffers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sinuous.kernels.precision import working_dtype
from sinuous.kernels.triton import INTERPRETED
from sinuous.kernels.triton.matrix_state_kernels import carry_states, read_states, side_gradients
from sinuous.kernels.triton.packing import accumulator, on_device

DOT = {torch.float16: tl.float16, torch.bfloat16: tl.float32 if INTERPRETED else tl.bfloat16}
"""dtype of the factors of a matrix product by the dtype of the input. The interpreter holds bfloat16 as integers and
multiplies those."""

PROGRAMS = 512
"""Heads that share queries and keys are shared among programs until there are about as many as this. It must not depend
on the device, since it fixes the order of sums."""

HEADS = 16
"""Heads that a program of a kernel over gates takes."""


def arithmetic(dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time arguments for the arithmetic with inputs of `dtype`. NVIDIA's tensor cores round float32 to ten bits
    unless told to take three products; AMD's compute it as it is."""
    precision = "ieee" if torch.version.hip is not None or dtype == torch.float64 else "tf32x3"
    wide = accumulator(dtype)
    return {"ACC": wide, "DOT": DOT.get(dtype, wide), "PRECISION": precision}


def tiles(kernel: object, dtype: torch.dtype, keys: int, values: int, shared: bool) -> dict[str, int]:
    """Blocks of keys and values, and compile options: the largest that tools/aot_table.py finds to stay in registers.
    Triton 3.10 no longer fuses multiplications and additions unless asked.

    Args:
        shared: whether several heads share their queries and keys.
    """
    block_k, block_v, warps, stages = 64, 64, 4, 2
    if kernel is read_states and keys > 64:
        warps = 8
    if dtype == torch.float64:
        block_k, block_v, warps, stages = 16, 16, 8, 1
    elif dtype == torch.float32 and kernel is side_gradients:
        block_k, block_v, warps, stages = (16, 16, 8, 2) if shared else (32, 32, 8, 1)
    elif dtype == torch.float32:
        block_k, block_v, warps = 16 if kernel is read_states else 32, 32, 8
    block_k, block_v = min(block_k, triton.next_power_of_2(keys)), min(block_v, triton.next_power_of_2(values))
    blocks = {"BK": max(16, block_k), "BV": max(16, block_v)}
    return {**blocks, "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def segments(cu_seqlens: Tensor, length: int, chunk_size: int, reverse: bool) -> Tensor:
    """`[chunks + sequences, 5]` in processing order, without waiting for the device: first step, step after the last,
    the sequence that begins with it and the one that ends with it, -1 for none, and its sequence. Some are empty."""
    bounds = cu_seqlens.to(torch.int32)
    count = bounds.shape[0] - 1
    if reverse:
        bounds = length - bounds.flip(0)
    grid = torch.arange(0, length, chunk_size, dtype=torch.int32, device=bounds.device)
    cuts = torch.cat([grid, bounds]).sort().values
    start, stop = cuts[:-1].contiguous(), cuts[1:]
    sequence = torch.searchsorted(bounds[1:].contiguous(), start, right=True, out_int32=True).clamp(max=count - 1)
    name = count - 1 - sequence if reverse else sequence
    first = torch.where((stop > start) & (start == bounds[sequence]), name, -1)
    last = torch.where((stop > start) & (stop == bounds[sequence + 1]), name, -1)
    return torch.stack([start, stop, first, last, name], 1).contiguous()


class MatrixStatesCall(NamedTuple):
    """The sizes and compile-time arguments that all launches of a call share.

    Attributes:
        table: the segments of packed input.
        segments: their number, packed or not.
        bounds: cu_seqlens.
        form: compile-time arguments of every kernel.
        sizes: those of the kernels over states, besides; blocks and compile options are added by `launch`.
    """

    batch: int
    length: int
    sequences: int
    heads: int
    groups: int
    keys: int
    values: int
    dtype: torch.dtype
    table: Tensor | None
    segments: int
    bounds: Tensor | None
    form: dict[str, Any]
    sizes: dict[str, Any]
    input_dtype: torch.dtype

    @classmethod
    def of(
        cls, q: Tensor, v: Tensor, cu_seqlens: Tensor | None, scale: float | None, reverse: bool, chunk_size: int
    ) -> MatrixStatesCall:
        batch, length, heads, values = v.shape
        groups, keys = q.shape[2:]
        table = None if cu_seqlens is None else segments(cu_seqlens, length, chunk_size, reverse)
        count = batch * triton.cdiv(length, chunk_size) if table is None else table.shape[0]
        form = {"H": heads, "CHUNK": chunk_size, "PACKED": table is not None, "REVERSE": reverse}
        sizes = {"R": heads // groups, "K": keys, "V": values, "SCALE": keys**-0.5 if scale is None else scale}
        return cls(
            batch, length, batch if cu_seqlens is None else cu_seqlens.shape[0] - 1, heads, groups, keys, values,
            working_dtype(q.dtype), table, count, None if cu_seqlens is None else cu_seqlens.contiguous(), form,
            {**form, **sizes, **arithmetic(q.dtype)}, q.dtype,
        )  # fmt: skip

    @property
    def steps(self) -> int:
        return self.batch * self.length

    @property
    def factor_dtype(self) -> torch.dtype:
        """dtype of the factors of products that one kernel leaves for another. The interpreter multiplies bfloat16 in
        single precision, and would truncate it here."""
        return self.dtype if self.sizes["DOT"] == self.sizes["ACC"] else self.input_dtype

    def over_states(self, kernel: object) -> tuple[int, int, dict[str, Any]]:
        """Blocks of keys, blocks of values, and compile-time arguments, of a kernel over states."""
        block = tiles(kernel, self.input_dtype, self.keys, self.values, self.heads != self.groups)
        counts = triton.cdiv(self.keys, block["BK"]), triton.cdiv(self.values, block["BV"])
        return *counts, {**self.sizes, **block}

    def over(self, kernel: Any, block: dict[str, int], **more: Any) -> tuple[int, int, dict[str, Any]]:
        """Blocks of keys, blocks of values, and the compile-time arguments that a kernel takes.

        Args:
            block: sizes of blocks and compile options.
            more: arguments that the family has besides those of every kernel.
        """
        options = {name: block[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
        sizes = {**self.sizes, **block, **more}
        counts = triton.cdiv(self.keys, block["BK"]), triton.cdiv(self.values, block["BV"])
        return *counts, {name: size for name, size in sizes.items() if name in kernel.arg_names} | options

    def over_gates(self) -> tuple[tuple[int, int], dict[str, Any]]:
        """Blocks of heads, and compile-time arguments, of a kernel over gates."""
        block = min(HEADS, triton.next_power_of_2(self.heads))
        return triton.cdiv(self.heads, block), {**self.form, "BH": block, "num_warps": 4, "enable_fp_fusion": True}

    def empty_states(self, like: Tensor) -> Tensor:
        """One state per chunk, `[B, chunks, …]`."""
        chunks = triton.cdiv(self.length, self.form["CHUNK"])
        return torch.empty(self.batch, chunks, *like.shape[1:], dtype=like.dtype, device=like.device)


class Weights(NamedTuple):
    """A family's gates as kernels read them, each `[B, T, H]`: μ and u in float64, and since_start and until_end."""

    rows: Tensor
    columns: Tensor
    since_start: Tensor
    until_end: Tensor


State = tuple[Tensor, Tensor | None]
"""S, and n where there is one, per sequence or per chunk."""


def carry(call: MatrixStatesCall, left: Tensor, right: Tensor, weights: Weights, initial: State) -> tuple[State, State]:
    """The state after each sequence, and before each chunk."""
    return _carry(call, left, right, None, weights.until_end, weights.since_start, initial, adjoint=False)


def carry_adjoint(
    call: MatrixStatesCall, q: Tensor, dy: Tensor, extra: Tensor | None, weight: Tensor, weights: Weights, final: State
) -> tuple[State, State]:
    """The gradient of the state before each sequence, and after each chunk."""
    return _carry(call, q, dy, extra, weight, weights.since_start, final, adjoint=True)


def _carry(
    call: MatrixStatesCall,
    left: Tensor,
    right: Tensor,
    extra: Tensor | None,
    weight: Tensor,
    decay: Tensor,
    edge: State,
    *,
    adjoint: bool,
) -> tuple[State, State]:
    (state, vector), (key_blocks, value_blocks, sizes) = edge, call.over_states(carry_states)
    other, chunk_states = torch.empty_like(state), call.empty_states(state)
    other_vector, chunk_vectors = (
        (None, None) if vector is None else (torch.empty_like(vector), call.empty_states(vector))
    )
    with on_device(left):
        carry_states[(call.sequences * call.heads * key_blocks * value_blocks,)](
            left, right, extra, weight, decay, state, vector, call.bounds, chunk_states, chunk_vectors, other,
            other_vector, call.length, VECTOR=vector is not None, ADJOINT=adjoint, **sizes,
        )  # fmt: skip
    return (other, other_vector), (chunk_states, chunk_vectors)


class Normaliser(NamedTuple):
    """The floor of the denominator, `[B, T, H]`, and the eps that is added to it."""

    floor: Tensor
    eps: float


def read(
    call: MatrixStatesCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Weights,
    initial: State,
    chunk_states: State,
    normaliser: Normaliser | None,
) -> Tensor:
    """The outputs."""
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    floor, eps = normaliser or (None, 0.0)
    _, value_blocks, sizes = call.over_states(read_states)
    with on_device(q):
        read_states[(value_blocks * call.heads * call.segments,)](
            q, k, v, weights.rows, weights.columns, weights.since_start, floor, None, *chunk_states, *initial,
            call.table, y, None, None, None, call.steps, call.length,
            EPS=eps, KEYS=False, NORMALIZE=floor is not None, GRADIENT=False, **sizes,
        )  # fmt: skip
    return y


def read_normaliser(
    call: MatrixStatesCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dy: Tensor,
    weights: Weights,
    initial: State,
    chunk_states: State,
    normaliser: Normaliser,
) -> tuple[Tensor, Tensor, Tensor]:
    """scale · n · q, the denominator made of it, and dy · numerator, each `[B, T, H]`."""
    shape = (call.batch, call.length, call.heads)
    summed, denominator = (torch.empty(shape, dtype=call.dtype, device=q.device) for _ in range(2))
    _, value_blocks, sizes = call.over_states(read_states)
    inner = torch.empty(value_blocks, *shape, dtype=call.dtype, device=q.device)
    with on_device(q):
        read_states[(value_blocks * call.heads * call.segments,)](
            q, k, v, weights.rows, weights.columns, weights.since_start, normaliser.floor, dy, *chunk_states, *initial,
            call.table, None, summed, denominator, inner, call.steps, call.length,
            EPS=normaliser.eps, KEYS=False, NORMALIZE=True, GRADIENT=True, **sizes,
        )  # fmt: skip
    return summed, denominator, inner.sum(0)


class MatrixStatesGradients(NamedTuple):
    """Gradients of q, k and v, and the sums of which those of the gates are made; see `side_gradients`."""

    q: Tensor
    k: Tensor
    v: Tensor
    query_dots: Tensor
    key_dots: Tensor
    ends: Tensor
    last_ends: Tensor


def gradients(
    call: MatrixStatesCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dy: Tensor,
    extra: Tensor | None,
    weight: Tensor,
    weights: Weights,
    initial: State,
    chunk_states: State,
    final_gradient: State,
    chunk_gradients: State,
) -> MatrixStatesGradients:
    """Gradients of q, k and v, given those of the states.

    Args:
        extra: the gradient of the normaliser, for E ⊙ … as scaled in `weights.rows`.
        weight: since_start in the scale of `weights.rows`.
    """
    _, value_blocks, sizes = call.over_states(read_states)
    key_blocks, _, side_sizes = call.over_states(side_gradients)
    parts = max(1, min(call.heads // call.groups, PROGRAMS // (key_blocks * call.groups * call.segments)))
    per_step = (key_blocks, call.batch, call.length, call.heads)
    ends = torch.zeros(2, key_blocks, call.segments, call.heads, dtype=call.dtype, device=q.device)
    dv = torch.empty_like(v)
    grads, dots = [], []
    with on_device(q):
        read_states[(value_blocks * call.heads * call.segments,)](
            k, q, dy, weights.rows, weights.columns, weights.until_end, None, None, *chunk_gradients, *final_gradient,
            call.table, dv, None, None, None, call.steps, call.length,
            EPS=0.0, KEYS=True, NORMALIZE=False, GRADIENT=False, **sizes,
        )  # fmt: skip
        for keys in (False, True):
            grad = torch.empty(parts, *q.shape, dtype=q.dtype if parts == 1 else call.dtype, device=q.device)
            dot = torch.empty(per_step, dtype=call.dtype, device=q.device)
            sides = (k, q, v, dy) if keys else (q, k, dy, v)
            side_gradients[(key_blocks * call.groups * parts * call.segments,)](
                *sides, weights.rows, weights.columns, weights.until_end if keys else weight, weights.since_start,
                extra, *chunk_states, *initial, *chunk_gradients, *final_gradient, call.table,
                grad, dot, *ends, call.segments, call.steps, call.length,
                PARTS=parts, KEYS=keys, VECTOR=extra is not None, **side_sizes,
            )  # fmt: skip
            grads.append(grad.view(q.shape) if parts == 1 else grad.sum(0))
            dots.append(dot)
    (dq, dk), (query_dots, key_dots), (sums, last_sums) = grads, dots, ends
    return MatrixStatesGradients(dq, dk, dv, query_dots, key_dots, sums, last_sums)
