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

from sinuous.kernels.arguments import SLSTM
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


def _with_whole_tiles(args: SLSTM, missing: int) -> SLSTM:
    gates, bias, y, c, n, m = _padded((args.gates, args.bias, *args.initial_state), missing)
    R = F.pad(args.R, (0, missing, 0, missing))
    return args._replace(gates=gates, R=R, bias=bias, initial_y=y, initial_c=c, initial_n=n, initial_m=m)


class SLSTMCall:
    """The arguments that forward and backward give to their kernels."""

    def __init__(self, args: SLSTM) -> None:
        self.batch, self.length, _, self.heads, self.units = args.gates.shape
        self.width, self.device = self.heads * self.units, args.gates.device
        self.dtype = working_dtype(args.gates.dtype)
        self.bounds = None if args.cu_seqlens is None else args.cu_seqlens.contiguous()
        self.count = self.batch if self.bounds is None else self.bounds.shape[0] - 1
        self.gates = args.gates.contiguous()
        self.R, self.bias = args.R.to(self.dtype).contiguous(), args.bias.to(self.dtype).contiguous()
        self.initial = [self.state(t) for t in args.initial_state]
        self.form: dict[str, Any] = {
            "CELL": CELLS[args.cell], "PACKED": self.bounds is not None, "REVERSE": args.reverse,
        }  # fmt: skip
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


def forward(args: SLSTM, chunk_size: int) -> tuple[Tensor, ...]:
    """`(y, final states, hidden, chunk states)`; see sinuous.core.ops.slstm."""
    if not fits(args.gates):
        return plain.forward(args, chunk_size)
    if missing := _missing(args.gates):
        outputs = forward(_with_whole_tiles(args, missing), chunk_size)
        return tuple(t[..., :-missing].contiguous() for t in outputs)
    call = SLSTMCall(args)
    hidden, final = call.empty(call.batch, call.length, call.heads, call.units), call.states()
    chunks = triton.cdiv(call.length, chunk_size)
    chunk_states = [call.empty(call.batch, chunks, call.heads, call.units) for _ in range(4)]
    if call.count * call.width:
        with on_device(call.gates):
            walk[call.programs](
                call.gates, call.R.transpose(2, 3).contiguous(), call.bias, *call.initial, call.bounds, hidden, *final,
                *chunk_states, call.length, call.count, CHUNK=chunk_size, **call.products(),
            )  # fmt: skip
    return hidden.to(call.gates.dtype, copy=True), *final, hidden, *chunk_states


def backward(
    args: SLSTM,
    grads: Sequence[Tensor | None],
    hidden: Tensor,
    chunk_y: Tensor,
    chunk_c: Tensor,
    chunk_n: Tensor,
    chunk_m: Tensor,
    chunk_size: int,
) -> list[Tensor | None]:
    """Gradients of gates, R, bias and the four initial states."""
    saved = (hidden, chunk_y, chunk_c, chunk_n, chunk_m)
    if not fits(args.gates):
        return plain.backward(args, grads, *saved, chunk_size)
    if missing := _missing(args.gates):
        args, grads = _with_whole_tiles(args, missing), _padded(grads, missing)
        hidden, chunk_y, chunk_c, chunk_n, chunk_m = _padded(saved, missing)
        gradients = backward(args, grads, hidden, chunk_y, chunk_c, chunk_n, chunk_m, chunk_size)
        gradients = [None if t is None else t[..., :-missing].contiguous() for t in gradients]
        assert gradients[1] is not None
        return [gradients[0], gradients[1][..., :-missing, :].contiguous(), *gradients[2:]]
    call = SLSTMCall(args)
    dfinal, dinitial = [call.state(t) for t in grads[1:]], call.states()
    before = plain.outputs_before(args, hidden)
    dgates = call.empty(*call.gates.shape)
    if call.count * call.width:
        dy = torch.zeros_like(hidden) if grads[0] is None else grads[0].contiguous()
        products = torch.einsum("bthe,ghde->btghd", before, call.R).add_(call.bias)
        p = torch.add(products, call.gates, out=call.empty(*call.gates.shape))  # which need not lie as the products do
        passed = [torch.empty_like(hidden) if name in REMEMBERED[args.cell] else None for name in "cnm"]
        with on_device(call.gates):
            if args.cell != "gru":
                bounds = call.bounds
                table = (None, None) if bounds is None else packed_steps(bounds, call.length, args.reverse)[:2]
                chunks = call.batch * triton.cdiv(call.length, chunk_size)
                memories[(chunks * triton.cdiv(call.width, CHANNELS),)](
                    p, *call.initial[1:], *(t.contiguous() for t in saved[2:]), *table, *passed, call.length,
                    WIDTH=call.width, BD=CHANNELS, CHUNK=chunk_size, num_warps=2, enable_fp_fusion=True, **call.form,
                )  # fmt: skip
            walk_back[call.programs](
                p, call.R, before, *passed, dy, *dfinal, call.bounds, dgates, *dinitial, call.length, call.count,
                **call.products(),
            )  # fmt: skip
    dR = torch.einsum("btghd,bthe->ghde", dgates, before)
    states = [None if t is None else d for t, d in zip(args.initial_state, dinitial, strict=True)]
    return [dgates, dR, dgates.sum((0, 1)), *states]
