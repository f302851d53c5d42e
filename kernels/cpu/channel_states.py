"""Calls of the C kernels with N numbers per channel."""

from __future__ import annotations

import torch
from torch import Tensor

from sinuous.kernels.arguments import ChannelStates, Longhorn, SelectiveScan
from sinuous.kernels.cpu.call import SequenceCall, fields
from sinuous.kernels.precision import working_dtype

_FIELDS = fields(
    "sequences steps channels states groups blocks chunk chunks softplus packed threads bounds "
    "u dt z norm B C dy u_batch u_time dt_batch dt_time z_batch z_time norm_batch norm_time "
    "B_batch B_time B_group C_batch C_time C_group dy_batch dy_time A D bias initial dfinal "
    "y final chunk_states y_batch y_time du ddt dz dB dC dnorm dA dD dbias dinitial"
)


class ChannelStatesCall(SequenceCall):
    """The arguments that forward and backward share, and the two calls."""

    def __init__(self, arguments: SelectiveScan | Longhorn, chunk_size: int) -> None:
        self.args = args = ChannelStates.of(arguments)
        family = "longhorn" if args.A is None else "selective_scan"
        super().__init__(family, _FIELDS, working_dtype(args.u.dtype), args.u.shape, args.cu_seqlens, args.reverse)
        self.channels, self.state_size = args.u.shape[2], args.B.shape[-1]
        self.groups = args.B.shape[2] if args.B.ndim == 4 else 1
        self.blocks = self._blocks()
        self.chunks = self.cut(chunk_size)
        self.over_time("u", args.u)
        self.over_time("dt", args.dt)
        if args.z is not None:
            self.over_time("z", args.z)
        for name, t in (("B", args.B), ("C", args.C)):
            by_group = self.over_time(name, t if t.ndim == 4 else t.unsqueeze(2))
            self.arguments[name + "_group"] = by_group.stride(2)
        if args.A is None:
            self.over_time("norm", args.B.to(self.dtype).square().sum(-1))
        self.array("A", args.A)
        self.array("D", args.D)
        self.array("bias", args.dt_bias)
        self.states("initial", args.initial_state)
        self.arguments.update(
            channels=self.channels,
            states=self.state_size,
            groups=self.groups,
            blocks=self.blocks,
            softplus=args.dt_softplus,
        )

    def _blocks(self) -> int:
        """Blocks of channels per group, from shapes alone: results must not change with the number of threads."""
        per_group, lanes = self.channels // max(self.groups, 1), int(self.library.lanes())
        # Large blocks share the sums over channels; small ones give few long sequences more than one core.
        size: int = next((n for n in (192, 128) if self.sequences * self.channels >= 4 * n), 64)
        blocks = max(1, (per_group + size - 1) // size)
        even = (per_group + blocks - 1) // blocks
        rounded = (even + lanes - 1) // lanes * lanes  # as in the kernel
        return max(1, (per_group + rounded - 1) // max(rounded, 1))

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """`(y, final_state, chunk_states)`."""
        y = self.output_over_time("y", self.channels)
        final = self.output("final", self.sequences, self.channels, self.state_size)
        chunk_states = self.output("chunk_states", self.batch, self.chunks, self.channels, self.state_size)
        self.run(self.library.forward)
        return y.to(self.args.u.dtype), self.in_order(final), chunk_states

    def backward(self, grads: tuple[Tensor | None, Tensor | None], chunk_states: Tensor) -> list[Tensor | None]:
        """Gradients of u, dt, A, B, C, D, z, dt_bias and initial_state."""
        args, (dy, dfinal) = self.args, grads
        self.over_time("dy", torch.zeros_like(args.u) if dy is None else dy)
        self.states("dfinal", dfinal)
        self.array("chunk_states", chunk_states)
        du, ddt = (self.output_over_time(name, self.channels) for name in ("du", "ddt"))
        dz = None if args.z is None else self.output_over_time("dz", self.channels)
        parts = (self.blocks, self.batch, self.steps)
        dB, dC = (self.output(name, *parts, self.groups, self.state_size) for name in ("dB", "dC"))
        dnorm = self.output("dnorm", *parts) if args.A is None else None
        dA = None if args.A is None else self.output("dA", self.sequences, self.channels, self.state_size)
        dD, dbias = (self.output(name, self.sequences, self.channels) for name in ("dD", "dbias"))
        dinitial = self.output("dinitial", self.sequences, self.channels, self.state_size)
        self.run(self.library.backward)
        dB, dC = (self._over_blocks(t).view(args.B.shape) for t in (dB, dC))
        return [
            du,
            ddt,
            None if dA is None else dA.sum(0),
            dB if dnorm is None else dB + 2 * args.B.to(self.dtype) * self._over_blocks(dnorm)[..., None],
            dC,
            None if args.D is None else dD.sum(0),
            dz,
            None if args.dt_bias is None else dbias.sum(0),
            None if args.initial_state is None else self.in_order(dinitial),
        ]

    def _over_blocks(self, t: Tensor) -> Tensor:
        t = t[0] if self.blocks == 1 else t.sum(0)
        return t.flip(1) if self.reverse else t
