"""Calls of the recurrent cells in C."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.kernels.cpu import build
from sinuous.kernels.cpu.arrays import Timed, bounds, fields, pointer, real, run, whole
from sinuous.kernels.torch.packing import flip_sequences
from sinuous.kernels.torch.slstm import outputs_before

_STATES = "ycnm"
_CELLS = {"slstm": 0, "lstm": 1, "gru": 2}


def _of_states(name: str) -> str:
    return " ".join(f"{name}_{part}" for part in _STATES)


_FIELDS = fields(
    "sequences steps heads width padded rows blocks chunk chunks packed cell threads bounds "
    "gates dy gates_batch gates_time gates_gate gates_head dy_batch dy_time dy_head "
    f"into_gates from_gates bias {_of_states('initial')} {_of_states('dfinal')} "
    f"hidden {_of_states('kept')} {_of_states('final')} dgates {_of_states('dinitial')} "
    "hidden_batch hidden_time dgates_batch dgates_time"
)


class _Call:
    """What forward and backward hand over alike; keeps every tensor alive until the kernel is done."""

    def __init__(
        self,
        gates: Tensor,
        R: Tensor,
        bias: Tensor,
        initial: Sequence[Tensor | None],
        cu_seqlens: Tensor | None,
        cell: str,
        reverse: bool,
        chunk_size: int,
    ) -> None:
        self.dtype, self.reverse, self.backwards = real(gates), reverse, cu_seqlens if reverse else None
        self.batch, self.steps, _, self.heads, self.width = gates.shape
        self.sequences = self.batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.chunks = -(-self.steps // chunk_size)
        self.library = build.library("slstm", 64 if self.dtype == torch.float64 else 32)
        lanes = int(self.library.lanes())
        self.padded = -(-self.width // lanes) * lanes
        rows = self._rows(cu_seqlens)
        self.gates = Timed.of(gates, self.dtype, reverse)
        assert self.gates.tensor is not None
        self.R, self.bias = self._pad(R.transpose(0, 1), 2), self._pad(bias.transpose(0, 1), 1)
        self.initial = [self.states(t) for t in initial]
        self.bounds = bounds(cu_seqlens, self.steps, reverse)
        self.arguments = _FIELDS.copy()
        self.arguments.update(
            sequences=self.sequences,
            steps=self.steps,
            heads=self.heads,
            width=self.width,
            padded=self.padded,
            rows=rows,
            blocks=-(-self.sequences // rows),
            chunk=chunk_size,
            chunks=self.chunks,
            packed=cu_seqlens is not None,
            cell=_CELLS[cell],
            threads=build.threads(),
            bounds=pointer(self.bounds),
            gates=self.gates.pointer,
            gates_batch=self.gates.batch,
            gates_time=self.gates.time,
            gates_gate=self.gates.tensor.stride(2),
            gates_head=self.gates.tensor.stride(3),
            bias=pointer(self.bias),
        )
        self.into_gates = self.R.permute(0, 3, 1, 2).contiguous()
        self.arguments["into_gates"] = pointer(self.into_gates)
        self.give("initial", self.initial)

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

    def states(self, t: Tensor | None) -> Tensor | None:
        """States `[sequences, H, D]` in processing order."""
        return whole(flip_sequences(t, self.backwards), self.dtype)

    def give(self, name: str, tensors: Sequence[Tensor | None]) -> None:
        self.arguments.update({f"{name}_{part}": pointer(t) for part, t in zip(_STATES, tensors, strict=True)})

    def states_output(self, name: str, *rows: int) -> list[Tensor]:
        found = [torch.empty(*rows, self.heads, self.width, dtype=self.dtype) for _ in _STATES]
        self.give(name, found)
        return found

    def timed(self, name: str, t: Tensor) -> None:
        """Give a contiguous tensor `[B, T, …]` of the kernel's own."""
        place = Timed.of(t, self.dtype, self.reverse)
        self.arguments.update({name: place.pointer, f"{name}_batch": place.batch, f"{name}_time": place.time})


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
    given = (initial_y, initial_c, initial_n, initial_m)
    call = _Call(gates, R, bias, given, cu_seqlens, cell, reverse, chunk_size)
    hidden = torch.empty(call.batch, call.steps, call.heads, call.width, dtype=call.dtype)
    call.timed("hidden", hidden)
    final = call.states_output("final", call.sequences)
    kept = call.states_output("kept", call.batch, call.chunks)
    run(call.library.forward, call.arguments)
    return hidden.to(gates.dtype, copy=True), *(flip_sequences(t, call.backwards) for t in final), hidden, *kept


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
    given = (initial_y, initial_c, initial_n, initial_m)
    call = _Call(gates, R, bias, given, cu_seqlens, cell, reverse, chunk_size)
    given_dy = torch.zeros_like(hidden) if grads[0] is None else grads[0]
    dy, dfinal = Timed.of(given_dy, call.dtype, reverse), [call.states(t) for t in grads[1:]]
    assert dy.tensor is not None
    call.arguments.update(
        dy=dy.pointer, dy_batch=dy.batch, dy_time=dy.time, dy_head=dy.tensor.stride(2), from_gates=pointer(call.R)
    )
    call.give("dfinal", dfinal)
    hidden, kept = hidden.contiguous(), [t.contiguous() for t in (chunk_y, chunk_c, chunk_n, chunk_m)]
    call.timed("hidden", hidden)
    call.give("kept", kept)
    dgates = torch.empty(gates.shape, dtype=call.dtype)
    call.timed("dgates", dgates)
    dinitial = call.states_output("dinitial", call.sequences)
    run(call.library.backward, call.arguments)
    dR = _of_weights(dgates, outputs_before(hidden, initial_y, cu_seqlens, reverse))
    states = [None if t is None else flip_sequences(d, call.backwards) for t, d in zip(given, dinitial, strict=True)]
    return [dgates, dR, dgates.sum((0, 1)), *states]


def _of_weights(dgates: Tensor, before: Tensor) -> Tensor:
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
    y, *_ = forward(gates, R, bias, one, None, None, None, None, "slstm", False, 32)
    wanted = (gates[0, 0, 3] + 0.25).sigmoid() * (gates[0, 0, 2] + 0.25).tanh()
    if not torch.allclose(y, wanted):
        return f"the compiled sLSTM is wrong on this machine (got {y.item():.6g}, wanted {wanted.item():.6g})"
    return None
