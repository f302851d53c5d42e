"""Calls of the C kernels with N numbers per channel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sinuous.kernels.cpu import build
from sinuous.kernels.cpu.arrays import Timed, bounds, fields, pointer, real, run, whole
from sinuous.kernels.torch.packing import Maybe, flip_sequences

_FIELDS = fields(
    "sequences steps channels states groups blocks chunk chunks softplus packed threads bounds "
    "u dt z norm B C dy u_batch u_time dt_batch dt_time z_batch z_time norm_batch norm_time "
    "B_batch B_time B_group C_batch C_time C_group dy_batch dy_time A D bias initial dfinal "
    "y final kept y_batch y_time du ddt dz dB dC dnorm dA dD dbias dinitial"
)


class Gradients(NamedTuple):
    """In the kernel's precision; None where the argument is. B and C are `[B, T, G, N]`."""

    u: Tensor
    dt: Tensor
    A: Tensor | None
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    norm: Tensor | None
    initial_state: Tensor | None


class Call:
    """What forward and backward hand over alike; keeps every tensor alive until the kernel is done.

    Args:
        family: name of the source.
        A: `[D, N]`, if the family has it.
        norm: |B|² `[B, T]`, if the family's step sizes depend on it.
        dt_softplus: for a family that has a choice.
    """

    def __init__(
        self,
        family: str,
        u: Tensor,
        dt: Tensor,
        A: Tensor | None,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        norm: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        dt_softplus: bool,
        reverse: bool,
        chunk_size: int,
    ) -> None:
        self.dtype, self.reverse, self.like, self.cu_seqlens = real(u), reverse, u, cu_seqlens
        self.batch, self.steps, self.channels = u.shape
        self.states, self.groups = B.shape[-1], B.shape[2] if B.ndim == 4 else 1
        self.sequences = self.batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.chunks = (self.steps + chunk_size - 1) // chunk_size
        self.library = build.library(family, 64 if self.dtype == torch.float64 else 32)
        self.blocks = self._blocks()
        self.u, self.dt, self.z, self.norm = (Timed.of(t, self.dtype, reverse) for t in (u, dt, z, norm))
        self.B, self.C = (Timed.of(t.view(*t.shape[:2], self.groups, self.states), self.dtype, reverse) for t in (B, C))
        self.A, self.D, self.bias = (whole(t, self.dtype) for t in (A, D, dt_bias))
        self.initial = whole(self._in_given_order(initial_state), self.dtype)
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
            norm=self.norm.pointer,
            norm_batch=self.norm.batch,
            norm_time=self.norm.time,
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

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """`(y, final_state, chunk_states)`."""
        y = self.timed_output("y")
        final = self.output("final", self.sequences, self.channels, self.states)
        kept = self.output("kept", self.batch, self.chunks, self.channels, self.states)
        run(self.library.forward, self.arguments)
        return y.to(self.like.dtype), self._in_given_order(final), kept

    def backward(self, grads: tuple[Tensor | None, Tensor | None], chunk_states: Tensor) -> Gradients:
        dy, dfinal = grads
        given = Timed.of(torch.zeros_like(self.like) if dy is None else dy, self.dtype, self.reverse)
        dfinal = whole(self._in_given_order(dfinal), self.dtype)
        kept = whole(chunk_states, self.dtype)
        self.arguments.update(
            dy=given.pointer, dy_batch=given.batch, dy_time=given.time, dfinal=pointer(dfinal), kept=pointer(kept)
        )
        du, ddt = self.timed_output("du"), self.timed_output("ddt")
        dz = None if self.z.tensor is None else self.timed_output("dz")
        parts = (self.blocks, self.batch, self.steps)
        dB, dC = (self.output(name, *parts, self.groups, self.states) for name in ("dB", "dC"))
        dnorm = None if self.norm.tensor is None else self.output("dnorm", *parts)
        dA = None if self.A is None else self.output("dA", self.sequences, self.channels, self.states)
        dD, dbias = (self.output(name, self.sequences, self.channels) for name in ("dD", "dbias"))
        dinitial = self.output("dinitial", self.sequences, self.channels, self.states)
        run(self.library.backward, self.arguments)
        return Gradients(
            du,
            ddt,
            None if dA is None else dA.sum(0),
            self._over_blocks(dB),
            self._over_blocks(dC),
            None if self.D is None else dD.sum(0),
            dz,
            None if self.bias is None else dbias.sum(0),
            None if dnorm is None else self._over_blocks(dnorm),
            None if self.initial is None else self._in_given_order(dinitial),
        )

    def _in_given_order(self, states: Maybe) -> Maybe:
        return flip_sequences(states, self.cu_seqlens if self.reverse else None)

    def _over_blocks(self, t: Tensor) -> Tensor:
        t = t[0] if self.blocks == 1 else t.sum(0)
        return t.flip(1) if self.reverse else t
