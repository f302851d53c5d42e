"""Calls of the recurrence over a grid in C."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sinuous.kernels.arguments import GridScan
from sinuous.kernels.cpu.call import Call, fields
from sinuous.kernels.precision import working_dtype
from sinuous.kernels.torch.grid_scan import add_direct, add_direct_gradients

_FIELDS = fields(
    "batch inner outer inner_step outer_step swapped heads keys values orientations groups threads orientation "
    "q k v source transition mark along across y along_end across_end dy dalong_end dacross_end "
    "dq dk dv dsource dtransition dmark dalong dacross"
)

GROUPS = 4
"""Greatest number of parts of the keys; each has a task and a copy of the gradients of values and gates."""

TASKS = 16
"""Pairs of a sequence and a head from which on no core is without work, and keys are not parted."""


class GridScanCall(Call):
    """The arguments that forward and backward share."""

    def __init__(self, args: GridScan) -> None:
        super().__init__("grid_scan", _FIELDS, working_dtype(args.q.dtype))
        self.scale = args.q.shape[-1] ** -0.5 if args.scale is None else args.scale
        inputs = ("q", "k", "v", "source", "transition", "mark")
        self.args = args._replace(**{name: self.array(name, getattr(args, name)) for name in inputs})
        self.orientations = torch.tensor(args.orientations, dtype=torch.int64)
        self.batch, self.width, self.height, self.heads, self.keys = args.q.shape
        self.values = args.v.shape[-1]
        self.swapped = self.width > self.height
        inner, outer = (self.width, self.height), (self.height, 1)  # of each side its cells, and how far apart they are
        if self.swapped:
            inner, outer = outer, inner
        self.arguments.update(
            inner=inner[0],
            outer=outer[0],
            inner_step=inner[1],
            outer_step=outer[1],
            batch=self.batch,
            swapped=self.swapped,
            heads=self.heads,
            keys=self.keys,
            values=self.values,
            orientations=len(args.orientations),
            orientation=self.orientations.data_ptr(),
        )

    def states(self, name: str, left: Tensor | None, up: Tensor | None) -> None:
        """Pass states on both sides; `name` has a place for `along` or `across`."""
        along, across = (up, left) if self.swapped else (left, up)
        self.array(name.format("along"), along)
        self.array(name.format("across"), across)

    def groups(self) -> int:
        """Parts of the keys, from shapes alone: results must not change with the number of threads."""
        blocks = -(-self.keys // int(self.library.lanes()))
        if self.batch * self.heads >= TASKS:
            return 1
        return -(-blocks // -(-blocks // GROUPS))  # as many as it takes with as few blocks each as `GROUPS` allow

    def side(self, length: int, *shape: int) -> Tensor:
        return torch.empty(self.batch, length, self.heads, len(self.orientations), *shape, dtype=self.dtype)


def forward(args: GridScan) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, right, down)`; see sinuous.core.ops.grid_scan."""
    call = GridScanCall(args)
    call.states("{}", args.left, args.up)
    y = call.output("y", *args.v.shape)
    right, down = y.new_empty(0), y.new_empty(0)
    if args.with_state:
        right, down = (call.side(length, call.keys, call.values) for length in (call.height, call.width))
        call.states("{}_end", right, down)
    call.run(call.library.forward)
    add_direct(y, call.args)
    return y.mul_(call.scale).to(args.v.dtype), right, down


def backward(args: GridScan, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients of q, k, v, source, transition, mark, direct, left and up."""
    call = GridScanCall(args)
    dy = call.array("dy", torch.zeros_like(call.args.v) if grads[0] is None else grads[0] * call.scale)
    # In the backward pass lanes run over keys.
    ends = grads[1:] if args.with_state else ()
    value_first = [None if t is None else t.mT for t in (args.left, args.up, *ends)]
    call.states("{}", *value_first[:2])
    if args.with_state:
        call.states("d{}_end", *value_first[2:])
    sides = ((args.left, call.height), (args.up, call.width))
    dleft, dup = (None if t is None else call.side(length, call.values, call.keys) for t, length in sides)
    call.states("d{}", dleft, dup)
    groups = call.groups()
    call.arguments["groups"] = groups
    dq, dk = call.output("dq", *args.q.shape), call.output("dk", *args.k.shape)
    dv = call.output("dv", groups, *args.v.shape).zero_()
    gates = (("dsource", args.source), ("dtransition", args.transition), ("dmark", args.mark))
    dgates = [call.output(name, groups, *t.shape) for name, t in gates]
    call.run(call.library.backward)
    dv, *dgates = (t[0] if groups == 1 else t.sum(0) for t in (dv, *dgates))
    ddirect = add_direct_gradients(dq, dk, dv, dy, call.args)
    return [dq, dk, dv, *dgates, ddirect, None if dleft is None else dleft.mT, None if dup is None else dup.mT]


def self_test(dtype: torch.dtype) -> str | None:
    """Compile, load and compare two cells with their closed form; None if all is well."""
    one = torch.ones(1, 2, 1, 1, 1, dtype=dtype)
    gate = torch.full((1, 2, 1, 1, 1, 2), 2, dtype=dtype)
    state = torch.full((1, 1, 1, 1, 1, 1), 3, dtype=dtype)
    y, *_ = forward(GridScan(one, one, one, gate, torch.stack([gate, gate], -2), gate, left=state))
    if y.flatten().tolist() != [6, 16]:
        return f"the compiled grid scan is wrong on this machine (got {y.flatten().tolist()}, wanted [6, 16])"
    return None
