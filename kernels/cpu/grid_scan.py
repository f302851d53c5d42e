"""Calls of the recurrence over a grid in C."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        source: Tensor,
        transition: Tensor,
        mark: Tensor,
        orientations: Sequence[int],
        scale: float | None,
    ) -> None:
        super().__init__("grid_scan", _FIELDS, working_dtype(q.dtype))
        self.scale = q.shape[-1] ** -0.5 if scale is None else scale
        self.q, self.k, self.v = (self.array(name, t) for name, t in (("q", q), ("k", k), ("v", v)))
        self.source, self.transition, self.mark = (
            self.array(name, t) for name, t in (("source", source), ("transition", transition), ("mark", mark))
        )
        self.orientations = torch.tensor(orientations, dtype=torch.int64)
        self.batch, self.width, self.height, self.heads, self.keys = q.shape
        self.values = v.shape[-1]
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
            orientations=len(orientations),
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


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    source: Tensor,
    transition: Tensor,
    mark: Tensor,
    direct: Tensor | None,
    left: Tensor | None,
    up: Tensor | None,
    orientations: Sequence[int],
    scale: float | None,
    with_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, right, down)`; see sinuous.core.ops.grid_scan."""
    call = GridScanCall(q, k, v, source, transition, mark, orientations, scale)
    call.states("{}", left, up)
    y = call.output("y", *v.shape)
    right, down = y.new_empty(0), y.new_empty(0)
    if with_state:
        right, down = (call.side(length, call.keys, call.values) for length in (call.height, call.width))
        call.states("{}_end", right, down)
    call.run(call.library.forward)
    add_direct(y, call.q, call.k, call.v, direct)
    return y.mul_(call.scale).to(v.dtype), right, down


def backward(
    grads: Sequence[Tensor | None],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    source: Tensor,
    transition: Tensor,
    mark: Tensor,
    direct: Tensor | None,
    left: Tensor | None,
    up: Tensor | None,
    orientations: Sequence[int],
    scale: float | None,
    with_state: bool,
) -> list[Tensor | None]:
    """Gradients of q, k, v, source, transition, mark, direct, left and up."""
    call = GridScanCall(q, k, v, source, transition, mark, orientations, scale)
    dy = call.array("dy", torch.zeros_like(call.v) if grads[0] is None else grads[0] * call.scale)
    # In the backward pass lanes run over keys.
    value_first = [None if t is None else t.mT for t in (left, up, *(grads[1:] if with_state else ()))]
    call.states("{}", *value_first[:2])
    if with_state:
        call.states("d{}_end", *value_first[2:])
    sides = ((left, call.height), (up, call.width))
    dleft, dup = (None if t is None else call.side(length, call.values, call.keys) for t, length in sides)
    call.states("d{}", dleft, dup)
    groups = call.groups()
    call.arguments["groups"] = groups
    dq, dk, dv = call.output("dq", *q.shape), call.output("dk", *k.shape), call.output("dv", groups, *v.shape)
    dv.zero_()
    gates = (("dsource", source), ("dtransition", transition), ("dmark", mark))
    dgates = [call.output(name, groups, *t.shape) for name, t in gates]
    call.run(call.library.backward)
    dv, *dgates = (t[0] if groups == 1 else t.sum(0) for t in (dv, *dgates))
    ddirect = add_direct_gradients(dq, dk, dv, dy, call.q, call.k, call.v, direct)
    return [dq, dk, dv, *dgates, ddirect, None if dleft is None else dleft.mT, None if dup is None else dup.mT]


def self_test(dtype: torch.dtype) -> str | None:
    """Compile, load and compare two cells with their closed form; None if all is well."""
    one = torch.ones(1, 2, 1, 1, 1, dtype=dtype)
    gate = torch.full((1, 2, 1, 1, 1, 2), 2, dtype=dtype)
    state = torch.full((1, 1, 1, 1, 1, 1), 3, dtype=dtype)
    y, *_ = forward(one, one, one, gate, torch.stack([gate, gate], -2), gate, None, state, None, [0], None, False)
    if y.flatten().tolist() != [6, 16]:
        return f"the compiled grid scan is wrong on this machine (got {y.flatten().tolist()}, wanted [6, 16])"
    return None
