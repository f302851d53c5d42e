"""Calls of the selective scan in C."""

from __future__ import annotations

import torch
from torch import Tensor

from sinuous.kernels.cpu import build
from sinuous.kernels.cpu.arrays import Timed, bounds, fields, pointer, real, run, whole
from sinuous.kernels.torch.packing import flip_sequences

_FIELDS = fields(
    "sequences steps channels states groups blocks chunk chunks softplus packed threads bounds "
    "u dt z B C dy u_batch u_time dt_batch dt_time z_batch z_time "
    "B_batch B_time B_group C_batch C_time C_group dy_batch dy_time A D bias initial dfinal "
    "y final kept y_batch y_time du ddt dz dB dC dA dD dbias dinitial"
)


class _Call:
    """What forward and backward hand over alike; keeps every tensor alive until the kernel is done."""

    def __init__(
        self,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        dt_softplus: bool,
        reverse: bool,
        chunk_size: int,
    ) -> None:
        self.dtype, self.reverse = real(u), reverse
        self.batch, self.steps, self.channels = u.shape
        self.states, self.groups = A.shape[1], B.shape[2] if B.ndim == 4 else 1
        self.sequences = self.batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.chunks = (self.steps + chunk_size - 1) // chunk_size
        self.library = build.library("selective_scan", 64 if self.dtype == torch.float64 else 32)
        self.blocks = self._blocks()
        self.u, self.dt, self.z = (Timed.of(t, self.dtype, reverse) for t in (u, dt, z))
        self.B, self.C = (Timed.of(t.view(*t.shape[:2], self.groups, self.states), self.dtype, reverse) for t in (B, C))
        self.A, self.D, self.bias = (whole(t, self.dtype) for t in (A, D, dt_bias))
        self.initial = whole(flip_sequences(initial_state, cu_seqlens if reverse else None), self.dtype)
        self.bounds = bounds(cu_seqlens, self.steps, reverse)
        self.arguments = _FIELDS.copy()
        self.arguments.update(
            sequences=self.sequences,
            steps=self.steps,
            channels=self.channels,
            states=self.states,
            groups=self.groups,
            blocks=self.blocks,
            chunk=chunk_size,
            chunks=self.chunks,
            softplus=dt_softplus,
            packed=cu_seqlens is not None,
            threads=build.threads(),
            bounds=pointer(self.bounds),
            u=self.u.pointer,
            u_batch=self.u.batch,
            u_time=self.u.time,
            dt=self.dt.pointer,
            dt_batch=self.dt.batch,
            dt_time=self.dt.time,
            z=self.z.pointer,
            z_batch=self.z.batch,
            z_time=self.z.time,
            B=self.B.pointer,
            B_batch=self.B.batch,
            B_time=self.B.time,
            B_group=self._group_stride(self.B),
            C=self.C.pointer,
            C_batch=self.C.batch,
            C_time=self.C.time,
            C_group=self._group_stride(self.C),
            A=pointer(self.A),
            D=pointer(self.D),
            bias=pointer(self.bias),
            initial=pointer(self.initial),
        )

    @staticmethod
    def _group_stride(t: Timed) -> int:
        return 0 if t.tensor is None else t.tensor.stride(2)

    def _blocks(self) -> int:
        """Blocks of channels per group, from shapes alone: results must not change with the number of threads."""
        per_group, lanes = self.channels // max(self.groups, 1), int(self.library.lanes())
        # Large blocks share the sums over channels; small ones give few long sequences more than one core.
        size: int = next((n for n in (192, 128) if self.sequences * self.channels >= 4 * n), 64)
        blocks = max(1, (per_group + size - 1) // size)
        even = (per_group + blocks - 1) // blocks
        rounded = (even + lanes - 1) // lanes * lanes  # as in the kernel
        return max(1, (per_group + rounded - 1) // max(rounded, 1))

    def timed_output(self, name: str) -> Tensor:
        """An output `[B, T, D]` that the kernel fills in processing order."""
        t = torch.empty(self.batch, self.steps, self.channels, dtype=self.dtype)
        place = Timed.of(t, self.dtype, self.reverse)
        self.arguments[name] = place.pointer
        self.arguments["y_batch"], self.arguments["y_time"] = place.batch, place.time
        return t

    def output(self, name: str, *shape: int) -> Tensor:
        t = torch.empty(shape, dtype=self.dtype)
        self.arguments[name] = t.data_ptr()
        return t


def forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, final_state, chunk_states)`; see sinuous.core.ops.selective_scan."""
    call = _Call(u, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, reverse, chunk_size)
    y = call.timed_output("y")
    final = call.output("final", call.sequences, call.channels, call.states)
    kept = call.output("kept", call.batch, call.chunks, call.channels, call.states)
    run(call.library.forward, call.arguments)
    return y.to(u.dtype), flip_sequences(final, cu_seqlens if reverse else None), kept


def backward(
    grads: tuple[Tensor | None, Tensor | None],
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_states: Tensor,
    dt_softplus: bool,
    reverse: bool,
    chunk_size: int,
) -> list[Tensor | None]:
    """Gradients of u, dt, A, B, C, D, z, dt_bias and initial_state."""
    call = _Call(u, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, reverse, chunk_size)
    dy, dfinal = grads
    given = Timed.of(torch.zeros_like(u) if dy is None else dy, call.dtype, reverse)
    dfinal = whole(flip_sequences(dfinal, cu_seqlens if reverse else None), call.dtype)
    kept = whole(chunk_states, call.dtype)
    call.arguments.update(
        dy=given.pointer, dy_batch=given.batch, dy_time=given.time, dfinal=pointer(dfinal), kept=pointer(kept)
    )
    du, ddt = call.timed_output("du"), call.timed_output("ddt")
    dz = None if z is None else call.timed_output("dz")
    parts = (call.blocks, call.batch, call.steps, call.groups, call.states)
    dB, dC = call.output("dB", *parts), call.output("dC", *parts)
    dA = call.output("dA", call.sequences, call.channels, call.states)
    dD, dbias = (call.output(name, call.sequences, call.channels) for name in ("dD", "dbias"))
    dinitial = call.output("dinitial", call.sequences, call.channels, call.states)
    run(call.library.backward, call.arguments)
    dB, dC = (t[0] if call.blocks == 1 else t.sum(0) for t in (dB, dC))
    dB, dC = (t.flip(1) if reverse else t for t in (dB, dC))
    return [
        du,
        ddt,
        dA.sum(0),
        dB.view(B.shape),
        dC.view(C.shape),
        None if D is None else dD.sum(0),
        dz,
        None if dt_bias is None else dbias.sum(0),
        None if initial_state is None else flip_sequences(dinitial, cu_seqlens if reverse else None),
    ]


def self_test(dtype: torch.dtype) -> str | None:
    """Compile, load and compare one step with its closed form; None if all is well."""
    one, zero = torch.ones(1, 1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype)
    y, state, _ = forward(one, one, zero - 1, one, one, None, None, None, zero[None] + 2, None, False, False, 64)
    wanted = 2 * torch.exp(-one) + 1
    if not (torch.allclose(y, wanted) and torch.allclose(state, wanted)):
        return f"the compiled scan is wrong on this machine (got {y.item():.6g}, wanted {wanted.item():.6g})"
    return None
