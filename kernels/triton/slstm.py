"""Launches of the kernels in slstm_kernels: which blocks, with which buffers.

The backward pass knows all outputs: the pre-activations of all steps are one matrix product, a pass without products
makes the memories before each step again, and the gradient of R is one product of what the last pass leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from sinuous.kernels.precision import working_dtype
from sinuous.kernels.torch import slstm as plain
from sinuous.kernels.triton.matrix_states import arithmetic
from sinuous.kernels.triton.packing import on_device, packed_steps
from sinuous.kernels.triton.slstm_kernels import CELLS, memories, walk, walk_back

SEQUENCES = 16
"""Sequences of a program: the fewest rows of a matrix product."""
CHANNELS = 64
"""Channels of a program of the pass without products."""
REMEMBERED = {"slstm": "cnm", "lstm": "c", "gru": ""}
"""Parts of a cell's state besides y that its gradients need."""
TILES: dict[int, tuple[int, int, int]] = {16: (16, 4, 1), 32: (32, 4, 1), 64: (32, 4, 3), 128: (16, 8, 2)}
"""Rows of the weights that are read at a time, warps, and stages of that reading, by the width of a head. These
spill on no target of docs/benchmarks/aot.md; no choice for heads of 256 does not."""
WIDEST_MASKED = 32
"""Ragged heads up to here are masked. Wider ones are padded to a whole tile: masks make them spill at some widths."""
WIDEST_DOUBLE = 32


def fits(gates: Tensor) -> bool:
    """Whether a head fits the registers of a program; else the plain form runs, whose chunk states are the same."""
    return gates.shape[4] <= (WIDEST_DOUBLE if gates.dtype == torch.float64 else max(TILES))


def _tiles(units: int) -> dict[str, Any]:
    wide = max(min(TILES), triton.next_power_of_2(units))
    rows, warps, stages = TILES[wide]
    return {"BD": wide, "BK": rows, "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def _missing(gates: Tensor) -> int:
    """Units that a head lacks of the tile it is computed in. With gates, weights and state of 0 they stay 0."""
    units = gates.shape[4]
    return 0 if units <= WIDEST_MASKED else triton.next_power_of_2(units) - units


def _padded(tensors: Sequence[Tensor | None], missing: int) -> list[Any]:
    return [None if t is None else F.pad(t, (0, missing)) for t in tensors]


class SLSTMCall:
    """The arguments that forward and backward give to their kernels."""

    def __init__(
        self, gates: Tensor, R: Tensor, bias: Tensor, initial: Sequence[Tensor | None], cu_seqlens: Tensor | None,
        cell: str, reverse: bool,
    ) -> None:  # fmt: skip
        self.batch, self.length, _, self.heads, self.units = gates.shape
        self.width, self.dtype, self.device = self.heads * self.units, working_dtype(gates.dtype), gates.device
        self.bounds = None if cu_seqlens is None else cu_seqlens.contiguous()
        self.count = self.batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.gates = gates.contiguous()
        self.R, self.bias = R.to(self.dtype).contiguous(), bias.to(self.dtype).contiguous()
        self.initial = [self.state(t) for t in initial]
        self.form: dict[str, Any] = {"CELL": CELLS[cell], "PACKED": cu_seqlens is not None, "REVERSE": reverse}
        self.programs = (triton.cdiv(self.count, SEQUENCES) * self.heads,)

    def products(self) -> dict[str, Any]:
        """Compile-time arguments of the kernels with matrix products."""
        numbers = arithmetic(self.gates.dtype)
        # Half precision carries no more digits than one rounded product.
        rounded = self.gates.dtype in (torch.float16, torch.bfloat16) and numbers["PRECISION"] != "ieee"
        precision = "tf32" if rounded else numbers["PRECISION"]
        sizes = {"H": self.heads, "D": self.units, "BB": SEQUENCES, **_tiles(self.units)}
        return {**self.form, **sizes, "ACC": numbers["ACC"], "PRECISION": precision}

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def states(self) -> list[Tensor]:
        return [self.empty(self.count, self.heads, self.units) for _ in range(4)]

    def state(self, t: Tensor | None) -> Tensor:
        if t is None:
            return torch.zeros(self.count, self.heads, self.units, dtype=self.dtype, device=self.device)
        return t.to(self.dtype).contiguous()


def forward(
    gates: Tensor,
    R: Tensor,
    bias: Tensor,
    initial_y: Tensor | None,
    initial_c: Tensor | None,
    initial_n: Tensor | None,
    initial_m: Tensor | None,
    cu_seqlens: Tensor | None,
    cell: str,
    reverse: bool,
    chunk_size: int,
) -> tuple[Tensor, ...]:
    """`(y, final states, hidden, chunk states)`; see sinuous.core.ops.slstm."""
    initial = (initial_y, initial_c, initial_n, initial_m)
    if not fits(gates):
        return plain.forward(gates, R, bias, *initial, cu_seqlens, cell, reverse, chunk_size)
    if missing := _missing(gates):
        x, b, y, c, n, m = _padded((gates, bias, *initial), missing)
        weights = F.pad(R, (0, missing, 0, missing))
        outputs = forward(x, weights, b, y, c, n, m, cu_seqlens, cell, reverse, chunk_size)
        return tuple(t[..., :-missing].contiguous() for t in outputs)
    call = SLSTMCall(gates, R, bias, initial, cu_seqlens, cell, reverse)
    hidden, final = call.empty(call.batch, call.length, call.heads, call.units), call.states()
    chunks = triton.cdiv(call.length, chunk_size)
    chunk_states = [call.empty(call.batch, chunks, call.heads, call.units) for _ in range(4)]
    if call.count * call.width:
        with on_device(gates):
            walk[call.programs](
                call.gates, call.R.transpose(2, 3).contiguous(), call.bias, *call.initial, call.bounds, hidden, *final,
                *chunk_states, call.length, call.count, CHUNK=chunk_size, **call.products(),
            )  # fmt: skip
    return hidden.to(gates.dtype, copy=True), *final, hidden, *chunk_states


def backward(
    grads: Sequence[Tensor | None],
    gates: Tensor,
    R: Tensor,
    bias: Tensor,
    initial_y: Tensor | None,
    initial_c: Tensor | None,
    initial_n: Tensor | None,
    initial_m: Tensor | None,
    cu_seqlens: Tensor | None,
    hidden: Tensor,
    chunk_y: Tensor,
    chunk_c: Tensor,
    chunk_n: Tensor,
    chunk_m: Tensor,
    cell: str,
    reverse: bool,
    chunk_size: int,
) -> list[Tensor | None]:
    """Gradients of gates, R, bias and the four initial states."""
    initial, chunk_states = (initial_y, initial_c, initial_n, initial_m), (chunk_y, chunk_c, chunk_n, chunk_m)
    if not fits(gates):
        return plain.backward(
            grads, gates, R, bias, *initial, cu_seqlens, hidden, *chunk_states, cell, reverse, chunk_size
        )
    if missing := _missing(gates):
        grads = _padded(grads, missing)
        x, b, y, c, n, m = _padded((gates, bias, *initial), missing)
        ys, of_y, of_c, of_n, of_m = _padded((hidden, *chunk_states), missing)
        weights = F.pad(R, (0, missing, 0, missing))
        gradients = backward(
            grads, x, weights, b, y, c, n, m, cu_seqlens, ys, of_y, of_c, of_n, of_m, cell, reverse, chunk_size
        )
        gradients = [None if t is None else t[..., :-missing].contiguous() for t in gradients]
        assert gradients[1] is not None
        return [gradients[0], gradients[1][..., :-missing, :].contiguous(), *gradients[2:]]
    call = SLSTMCall(gates, R, bias, initial, cu_seqlens, cell, reverse)
    dfinal, dinitial = [call.state(t) for t in grads[1:]], call.states()
    before = plain.outputs_before(hidden, initial_y, cu_seqlens, reverse)
    dgates = call.empty(*gates.shape)
    if call.count * call.width:
        dy = torch.zeros_like(hidden) if grads[0] is None else grads[0].contiguous()
        products = torch.einsum("bthe,ghde->btghd", before, call.R).add_(call.bias)
        p = torch.add(products, call.gates, out=call.empty(*gates.shape))  # which need not lie as the products do
        passed = [torch.empty_like(hidden) if name in REMEMBERED[cell] else None for name in "cnm"]
        with on_device(gates):
            if cell != "gru":
                table = (None, None) if cu_seqlens is None else packed_steps(cu_seqlens, call.length, reverse)[:2]
                chunks = call.batch * triton.cdiv(call.length, chunk_size)
                memories[(chunks * triton.cdiv(call.width, CHANNELS),)](
                    p, *call.initial[1:], *(t.contiguous() for t in chunk_states[1:]), *table, *passed, call.length,
                    WIDTH=call.width, BD=CHANNELS, CHUNK=chunk_size, num_warps=2, enable_fp_fusion=True, **call.form,
                )  # fmt: skip
            walk_back[call.programs](
                p, call.R, before, *passed, dy, *dfinal, call.bounds, dgates, *dinitial, call.length, call.count,
                **call.products(),
            )  # fmt: skip
    dR = torch.einsum("btghd,bthe->ghde", dgates, before)
    states = [None if t is None else d for t, d in zip(initial, dinitial, strict=True)]
    return [dgates, dR, dgates.sum((0, 1)), *states]
