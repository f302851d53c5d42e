"""Calls of the recurrent cells in C."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.kernels.arguments import SLSTM
from sinuous.kernels.cpu.call import SequenceCall, fields
from sinuous.kernels.precision import working_dtype
from sinuous.kernels.torch.slstm import outputs_before

_STATES = "ycnm"
_CELLS = {"slstm": 0, "lstm": 1, "gru": 2}


def _four(name: str) -> str:
    return " ".join(f"{name}_{part}" for part in _STATES)


_FIELDS = fields(
    "sequences steps heads width padded rows blocks chunk chunks packed cell threads bounds "
    "gates dy gates_batch gates_time gates_gate gates_head dy_batch dy_time dy_head "
    f"into_gates from_gates bias {_four('initial')} {_four('dfinal')} "
    f"hidden {_four('chunk')} {_four('final')} dgates {_four('dinitial')} "
    "hidden_batch hidden_time dgates_batch dgates_time"
)


class SLSTMCall(SequenceCall):
    """The arguments that forward and backward share."""

    def __init__(self, args: SLSTM, chunk_size: int) -> None:
        gates, bounds = args.gates, args.cu_seqlens
        super().__init__("slstm", _FIELDS, working_dtype(gates.dtype), gates.shape, bounds, args.reverse)
        self.heads, self.width = gates.shape[3:]
        lanes = int(self.library.lanes())
        self.padded = -(-self.width // lanes) * lanes
        self.chunks = self.cut(chunk_size)
        rows = self._rows(bounds)
        strides = self.over_time("gates", gates).stride()
        self.R = self._pad(args.R.transpose(0, 1), 2)
        self.array("into_gates", self.R.permute(0, 3, 1, 2))
        self.array("bias", self._pad(args.bias.transpose(0, 1), 1))
        self.four_states("initial", args.initial_state)
        self.arguments.update(
            heads=self.heads,
            width=self.width,
            padded=self.padded,
            rows=rows,
            blocks=-(-self.sequences // rows),
            cell=_CELLS[args.cell],
            gates_gate=strides[2],
            gates_head=strides[3],
        )

    def _rows(self, cu_seqlens: Tensor | None) -> int:
        """Sequences of a task, from shapes alone: results must not change with the number of threads."""
        # Rows share what is read of R; with too few tasks some cores would have none.
        if cu_seqlens is not None:
            return 1
        tasks, most = self.sequences * self.heads, int(self.library.rows())
        return most if tasks >= 8 * most else 2 if tasks >= 8 else 1

    def _pad(self, t: Tensor, axes: int) -> Tensor:
        """Zeros at the ends of the last axes, up to whole vectors."""
        return F.pad(t.to(self.dtype), (0, self.padded - self.width) * axes).contiguous()

    def four_states(self, name: str, tensors: Sequence[Tensor | None]) -> None:
        """Pass y, c, n and m, each `[sequences, H, D]`."""
        for part, t in zip(_STATES, tensors, strict=True):
            self.states(f"{name}_{part}", t)

    def output_states(self, name: str, *rows: int) -> list[Tensor]:
        return [self.output(f"{name}_{part}", *rows, self.heads, self.width) for part in _STATES]


def forward(args: SLSTM, chunk_size: int) -> tuple[Tensor, ...]:
    """`(y, final states, hidden, chunk states)`; see sinuous.core.ops.slstm."""
    call = SLSTMCall(args, chunk_size)
    hidden = call.output_over_time("hidden", call.heads, call.width, strides="hidden")
    final = call.output_states("final", call.sequences)
    chunk_states = call.output_states("chunk", call.batch, call.chunks)
    call.run(call.library.forward)
    return hidden.to(args.gates.dtype, copy=True), *(call.in_order(t) for t in final), hidden, *chunk_states


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
    call = SLSTMCall(args, chunk_size)
    dy, *dfinal = grads
    dy = call.over_time("dy", torch.zeros_like(hidden) if dy is None else dy)
    call.arguments["dy_head"] = dy.stride(2)
    call.array("from_gates", call.R)
    call.four_states("dfinal", dfinal)
    hidden = hidden.contiguous()
    call.place("hidden", hidden, "hidden")
    for part, t in zip(_STATES, (chunk_y, chunk_c, chunk_n, chunk_m), strict=True):
        call.array(f"chunk_{part}", t)
    dgates = call.output_over_time("dgates", *args.gates.shape[2:], strides="dgates")
    dinitial = call.output_states("dinitial", call.sequences)
    call.run(call.library.backward)
    dR = _recurrent_gradient(dgates, outputs_before(args, hidden))
    states = [None if t is None else call.in_order(d) for t, d in zip(args.initial_state, dinitial, strict=True)]
    return [dgates, dR, dgates.sum((0, 1)), *states]


def _recurrent_gradient(dgates: Tensor, before: Tensor) -> Tensor:
    """Gradient of R: one product over batch and time per gate and head, which reads both where they lie."""
    dgates, before = dgates.flatten(0, 1), before.flatten(0, 1)
    heads, width = before.shape[1:]
    dR = dgates.new_empty(4, heads, width, width)
    for g in range(4):
        for h in range(heads):
            torch.mm(dgates[:, g, h].T, before[:, h], out=dR[g, h])
    return dR


def self_test(dtype: torch.dtype) -> str | None:
    """Compile, load and compare one step from rest with its closed form; None if all is well."""
    gates, one = torch.tensor([0.5, -1, 0.3, 0.2], dtype=dtype).view(1, 1, 4, 1, 1), torch.ones(1, 1, 1, dtype=dtype)
    R, bias = torch.zeros(4, 1, 1, 1, dtype=dtype) + 0.25, torch.zeros(4, 1, 1, dtype=dtype)
    y, *_ = forward(SLSTM(gates, R, bias, initial_y=one), chunk_size=32)
    exact = (gates[0, 0, 3] + 0.25).sigmoid() * (gates[0, 0, 2] + 0.25).tanh()
    if not torch.allclose(y, exact):
        return f"the compiled sLSTM is wrong on this machine (got {y.item():.6g}, wanted {exact.item():.6g})"
    return None
