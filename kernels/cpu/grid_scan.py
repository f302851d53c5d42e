"""Calls of the recurrence over a grid in C."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sinuous.kernels.cpu import build
from sinuous.kernels.cpu.arrays import fields, pointer, real, run, whole
from sinuous.kernels.torch.grid_scan import add_direct, add_direct_gradients

_FIELDS = fields(
    "batch inner outer inner_step outer_step swapped heads keys values orientations groups threads orientation "
    "q k v source transition mark along across y along_end across_end dy dalong_end dacross_end "
    "dq dk dv dsource dtransition dmark dalong dacross"
)

GROUPS = 4
"""Most parts of the keys that have tasks, and copies of the gradients of values and gates, of their own."""

TASKS = 16
"""As many pairs of a sequence and a head leave no core without work: keys are not parted then."""


class _Call:
    """What forward and backward hand over alike; keeps every tensor alive until the kernel is done."""

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
        self.dtype = real(q)
        self.library = build.library("grid_scan", 64 if self.dtype == torch.float64 else 32)
        self.scale = q.shape[-1] ** -0.5 if scale is None else scale
        self.q, self.k, self.v, self.source, self.transition, self.mark = (
            self.array(t) for t in (q, k, v, source, transition, mark)
        )
        self.orientations = torch.tensor(orientations, dtype=torch.int64)
        self.batch, self.width, self.height, self.heads, self.keys = q.shape
        self.values = v.shape[-1]
        self.swapped = self.width > self.height
        inner, outer = (self.width, self.height), (self.height, 1)  # of each side its cells, and how far apart they are
        if self.swapped:
            inner, outer = outer, inner
        self.arguments = _FIELDS.copy()
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
            threads=build.threads(),
            orientation=self.orientations.data_ptr(),
        )
        self.give(q=self.q, k=self.k, v=self.v, source=self.source, transition=self.transition, mark=self.mark)

    def array(self, t: Tensor) -> Tensor:
        return t.to(self.dtype).contiguous()

    def give(self, **tensors: Tensor | None) -> None:
        self.arguments.update({name: pointer(t) for name, t in tensors.items()})

    def states(self, name: str, left: Tensor | None, up: Tensor | None) -> None:
        """Hand over states on both sides; `name` has a place for `along` or `across`."""
        along, across = (up, left) if self.swapped else (left, up)
        self.give(**{name.format("along"): along, name.format("across"): across})

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
    call = _Call(q, k, v, source, transition, mark, orientations, scale)
    left, up = (whole(t, call.dtype) for t in (left, up))
    call.states("{}", left, up)
    y = torch.empty(v.shape, dtype=call.dtype)
    call.give(y=y)
    right, down = y.new_empty(0), y.new_empty(0)
    if with_state:
        right, down = (call.side(length, call.keys, call.values) for length in (call.height, call.width))
        call.states("{}_end", right, down)
    run(call.library.forward, call.arguments)
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
    call = _Call(q, k, v, source, transition, mark, orientations, scale)
    dy = torch.zeros_like(call.v) if grads[0] is None else (grads[0] * call.scale).to(call.dtype).contiguous()
    # In the backward pass lanes run over keys.
    turned = [None if t is None else whole(t.mT, call.dtype) for t in (left, up, *(grads[1:] if with_state else ()))]
    call.states("{}", *turned[:2])
    if with_state:
        call.states("d{}_end", *turned[2:])
    sides = ((left, call.height), (up, call.width))
    dleft, dup = (None if t is None else call.side(length, call.values, call.keys) for t, length in sides)
    call.states("d{}", dleft, dup)
    groups = call.groups()
    call.arguments["groups"] = groups
    dq, dk = torch.empty_like(call.q), torch.empty_like(call.k)
    dv = torch.zeros(groups, *v.shape, dtype=call.dtype)
    dgates = [torch.empty(groups, *t.shape, dtype=call.dtype) for t in (source, transition, mark)]
    call.give(dy=dy, dq=dq, dk=dk, dv=dv, dsource=dgates[0], dtransition=dgates[1], dmark=dgates[2])
    run(call.library.backward, call.arguments)
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
