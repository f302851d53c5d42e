"""The recurrence over a grid in blocks of plain torch.

States and values pass a block in a few matrix products with its map (`grid_blocks`), and blocks on an anti-diagonal
pass together. A small grid without boundary states is a single block: the maps of all orientations, which are then
weights between nodes only, are summed and one attention passes them.

Sequences, heads and orientations are walks of their own. As many go together as fill a processor: a few on a CPU, where
the tensors of a diagonal should stay in the cache. Large intermediate results have memory that is used again and again,
since a CPU takes longer to map fresh pages than to fill them.

Maps are made again for the backward pass, and states on the edges between blocks with them; time and memory are linear
in the number of cells.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sinuous.kernels.arguments import GridScan
from sinuous.kernels.precision import working_dtype
from sinuous.kernels.torch.differentiation import autograd_inside_an_op
from sinuous.kernels.torch.grid_blocks import Blocks, block_maps, cut_edges, uncut_edges
from sinuous.kernels.torch.orientations import unwalked, walked

SIDE = {"cpu": 4, "other": 8}
"""Largest side of a block, by type of device. With it the work on states per cell grows (4 · SIDE · K · V), while the
memory for states (2 K V / SIDE) and the number of steps in sequence fall."""

WHOLE = {"cpu": 576, "other": 1024}
"""Greatest number of cells of a grid that is a single block; the number of weights between its nodes is the square."""

ELEMENTS = {"cpu": 1 << 20, "other": 1 << 25}
"""Approximate number of elements held at once for the walks that go together, by type of device."""


def _of_device(sizes: dict[str, int], t: Tensor) -> int:
    return sizes.get(t.device.type, sizes["other"])


class Workspace:
    """Memory for large intermediate results by name, made once and used again."""

    def __init__(self, like: Tensor) -> None:
        self.like, self.made = like, dict[str, Tensor]()

    def __call__(self, name: str, *shape: int) -> Tensor:
        size, memory = math.prod(shape), self.made.get(name)
        if memory is None or memory.numel() < size:
            memory = self.made[name] = self.like.new_empty(size)
        return memory[:size].view(shape)


def _pass(space: Workspace, W: Tensor, C: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes `[rows, n, D]` and states on the edges coming in, `[rows, e, K, V]`, to outputs and states going out."""
    rows, e, keys, values = C.shape
    product = space("product", rows, q.shape[1], e, keys)
    torch.mul(W[:, e:, :e, None], q[:, :, None], out=product)
    y = torch.bmm(product.flatten(2), C.flatten(1, 2))
    y.baddbmm_(torch.bmm(q, k.mT).mul_(W[:, e:, e:]), v)
    out = torch.bmm(W[:, :e, :e], C.flatten(2), out=space("out", rows, e, keys * values))
    torch.mul(W[:, :e, e:].mT[..., None], k[:, :, None], out=product)
    out.view(rows, e * keys, values).baddbmm_(product.flatten(2).mT, v)
    return y, out.view_as(C)


def _pass_back(
    space: Workspace, W: Tensor, C: Tensor, q: Tensor, k: Tensor, v: Tensor, dy: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of W, C, q, k and v."""
    rows, e, keys, values = C.shape
    weights, marks, source = W[:, e:, e:], W[:, e:, :e, None], W[:, :e, e:].mT[..., None]
    dW = torch.empty_like(W)
    scores, inside = torch.bmm(q, k.mT), torch.bmm(dy, v.mT)
    dW[:, e:, e:] = scores * inside
    met, product = (space(name, rows, q.shape[1], e, keys) for name in ("met", "product"))
    torch.bmm(dy, C.flatten(1, 2).mT, out=met.flatten(2))
    dW[:, e:, :e] = torch.mul(met, q[:, :, None], out=product).sum(-1)
    dq = torch.mul(met, marks, out=product).sum(2)
    torch.bmm(v, dout.flatten(1, 2).mT, out=met.flatten(2))
    dW[:, :e, e:] = torch.mul(met, k[:, :, None], out=product).sum(-1).mT
    dk = torch.mul(met, source, out=product).sum(2)
    inside.mul_(weights)
    dq.baddbmm_(inside, k)
    dk.baddbmm_(inside.mT, q)
    torch.mul(source, k[:, :, None], out=product)
    dv = torch.bmm(product.flatten(2), dout.flatten(1, 2)).baddbmm_(scores.mul_(weights).mT, dy)
    dW[:, :e, :e] = torch.bmm(dout.flatten(2), C.flatten(2).mT)
    torch.mul(marks, q[:, :, None], out=product)
    dC = torch.bmm(W[:, :e, :e].mT, dout.flatten(2), out=space("out", rows, e, keys * values))
    dC.view(rows, e * keys, values).baddbmm_(product.flatten(2).mT, dy)
    return dW, dC.view_as(C), dq, dk, dv


class GridGradients(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    gates: tuple[Tensor, ...]
    left: Tensor | None = None
    up: Tensor | None = None


def _gates(args: GridScan) -> tuple[Tensor, Tensor, Tensor]:
    return args.source, args.transition, args.mark


def _weights(source: Tensor, transition: Tensor, mark: Tensor, orientations: Sequence[int]) -> Tensor:
    """Weights between all nodes, of all orientations together, `[B, H, XY, XY]`, y running fastest."""
    gates = [walked(t, orientations, 1, 2, 4).movedim((2, 3), (0, 1)) for t in (source, transition, mark)]
    width, height = source.shape[1:3]
    edges = width + height
    maps = block_maps(*gates)[..., edges:, edges:]  # [B, O, H, YX, YX]
    cells = maps.unflatten(-1, (height, width)).unflatten(-3, (height, width))
    back = [
        part.flip([a for a, bit in ((-1, 1), (-3, 1), (-2, 2), (-4, 2)) if o & bit])
        for part, o in zip(cells.unbind(1), orientations, strict=True)
    ]
    total = sum(back[1:], back[0]).transpose(-1, -2).transpose(-3, -4)
    weights: Tensor = total.flatten(-4, -3).flatten(-2, -1)
    return weights


def _flat(t: Tensor) -> Tensor:
    """`[B, X, Y, H, D]` to `[B, H, XY, D]`."""
    return t.flatten(1, 2).transpose(1, 2)


def _whole_forward(g: GridScan) -> Tensor:
    W = _weights(*_gates(g), g.orientations)
    cells = (W * (_flat(g.q) @ _flat(g.k).mT)) @ _flat(g.v)
    y: Tensor = cells.transpose(1, 2).unflatten(1, g.v.shape[1:3])
    return y


def _with_gates(
    function: Callable[..., Tensor], gates: tuple[Tensor, ...]
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
    """Value of a function of the gates, and a function from the gradient of the value to those of the gates."""
    with autograd_inside_an_op():
        leaves = tuple(t.detach().requires_grad_() for t in gates)
        result = function(*leaves)

    def pull(gradient: Tensor) -> tuple[Tensor, ...]:
        with autograd_inside_an_op():
            return torch.autograd.grad(result, leaves, gradient)

    return result.detach(), pull


def _whole_backward(g: GridScan, dy: Tensor) -> GridGradients:
    W, pull = _with_gates(functools.partial(_weights, orientations=g.orientations), _gates(g))
    q, k, v, dy = _flat(g.q), _flat(g.k), _flat(g.v), _flat(dy)
    scores, inside = q @ k.mT, dy @ v.mT
    dgates = pull(scores * inside)
    dv = (W * scores).mT @ dy
    inside *= W
    dq, dk = inside @ k, inside.mT @ q
    dq, dk, dv = (t.transpose(1, 2).unflatten(1, g.v.shape[1:3]) for t in (dq, dk, dv))
    return GridGradients(dq, dk, dv, dgates)


class GridWalk:
    """A part of a batch cut into blocks, with orientations and heads as rows: N = B · O · H."""

    def __init__(self, g: GridScan, space: Workspace) -> None:
        self.g, self.space = g, space
        self.batch, self.width, self.height, self.heads = g.q.shape[:4]
        side = _of_device(SIDE, g.q)
        nx, ny = max(1, -(-self.width // side)), max(1, -(-self.height // side))
        self.blocks = Blocks(nx, -(-self.width // nx), ny, -(-self.height // ny))
        self.q, self.k, self.v = (self.nodes(t) for t in (g.q, g.k, g.v))

    def nodes(self, t: Tensor) -> Tensor:
        rows = walked(t, self.g.orientations, 1, 2).movedim(4, 2).flatten(0, 2)
        return self.blocks.nodes(rows)

    def from_nodes(self, t: Tensor) -> Tensor:
        rows = self.blocks.uncut(t, self.width, self.height)
        rows = rows.unflatten(0, (self.batch, len(self.g.orientations), self.heads)).movedim(2, 4)
        return unwalked(rows, self.g.orientations, 1, 2)

    def edges(self, left: Tensor | None, up: Tensor | None) -> tuple[Tensor, Tensor]:
        """States by blocks or zeros: `[ny, N, cy, K, V]` from the last y to the first, and `[nx, N, cx, K, V]`."""
        b, o = self.blocks, self.g.orientations
        state = (self.batch * len(o) * self.heads, self.g.q.shape[-1], self.g.v.shape[-1])
        if left is None:
            left = self.q.new_zeros(b.ny, state[0], b.cy, *state[1:])
        else:
            left = cut_edges(walked(left, o, None, 1, 3).movedim(3, 2).flatten(0, 2), b.ny, b.cy).flip(0)
        if up is None:
            up = self.q.new_zeros(b.nx, state[0], b.cx, *state[1:])
        else:
            up = cut_edges(walked(up, o, 1, None, 3).movedim(3, 2).flatten(0, 2), b.nx, b.cx)
        return left, up

    def from_edges(self, left: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        rows = (self.batch, len(self.g.orientations), self.heads)
        left = uncut_edges(left.flip(0), self.height).unflatten(0, rows).movedim(2, 3)
        up = uncut_edges(up, self.width).unflatten(0, rows).movedim(2, 3)
        o = self.g.orientations
        return unwalked(left, o, None, 1, 3), unwalked(up, o, 1, None, 3)

    def maps(self, *gates: Tensor) -> Tensor:
        turned = (walked(t, self.g.orientations, 1, 2, 4).movedim(4, 2).flatten(0, 2) for t in gates)
        return self.blocks.maps(*turned)

    def joined(self, name: str, up: Tensor, left: Tensor) -> Tensor:
        """States by blocks on both edges, `[blocks, N, side, K, V]`, as one `[rows, e, K, V]`."""
        blocks, rows, _, keys, values = up.shape
        to = self.space(name, blocks, rows, self.blocks.cx + self.blocks.cy, keys, values)
        return torch.cat([up, left], 2, out=to).flatten(0, 1)

    def forward(self, W: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs of the nodes and the states after the last blocks; the space may keep those into each diagonal."""
        b, ys = self.blocks, []
        left, up = self.edges(self.g.left, self.g.up)
        diagonals = zip(b.diagonals(), *(b.by_diagonal(t) for t in (W, self.q, self.k, self.v)), strict=True)
        for n, ((i, j), *inputs) in enumerate(diagonals):
            C = self.joined(f"into diagonal {n}" if keep else "C", up[i], left[j])
            y, out = _pass(self.space, inputs[0].flatten(0, 1), C, *(t.flatten(0, 1) for t in inputs[1:]))
            ys.append(y.unflatten(0, inputs[0].shape[:2]))
            down, right = out.unflatten(0, inputs[0].shape[:2]).split((b.cx, b.cy), 2)
            up[i], left[j] = down, right
        return b.from_diagonals(ys), left, up

    def backward(self, dy: Tensor, dright: Tensor | None, ddown: Tensor | None) -> GridGradients:
        g, b = self.g, self.blocks
        W, pull = _with_gates(self.maps, _gates(g))
        self.forward(W, True)
        left, up = self.edges(dright, ddown)
        diagonals = zip(
            b.diagonals(), *(b.by_diagonal(t) for t in (W, self.q, self.k, self.v, self.nodes(dy))), strict=True
        )
        gradients = []
        for n, ((i, j), *inputs) in reversed(list(enumerate(diagonals))):
            dout = self.joined("dout", up[i], left[j])
            C = self.space(f"into diagonal {n}", *dout.shape)
            W, q, k, v, dy = (t.flatten(0, 1) for t in inputs)
            dW, dC, *rest = _pass_back(self.space, W, C, q, k, v, dy, dout)
            gradients.append([t.unflatten(0, inputs[0].shape[:2]) for t in (dW, *rest)])
            up[i], left[j] = dC.unflatten(0, inputs[0].shape[:2]).split((b.cx, b.cy), 2)
        dW, *rest = (b.from_diagonals(t[::-1]) for t in zip(*gradients, strict=True))
        dq, dk, dv = map(self.from_nodes, rest)
        edges = (None, None) if g.left is None and g.up is None else self.from_edges(left, up)
        return GridGradients(dq, dk, dv, pull(dW), *edges)


def _is_whole(args: GridScan) -> bool:
    with_states = args.with_state or args.left is not None or args.up is not None
    return not with_states and args.q.shape[1] * args.q.shape[2] <= _of_device(WHOLE, args.q)


class GridPart(NamedTuple):
    """Walks that go together."""

    batch: slice
    heads: slice
    orientations: slice

    def of(self, args: GridScan) -> GridScan:
        """The arguments of these walks, in the precision of the states; `direct`, which is added at the end, is not."""
        dtype = working_dtype(args.q.dtype)
        q, k, v = (self.cells(t).to(dtype) for t in (args.q, args.k, args.v))
        source, transition, mark = (self.gates(t).to(dtype) for t in _gates(args))
        left, up = (None if t is None else self.states(t).to(dtype) for t in (args.left, args.up))
        walks = args._replace(q=q, k=k, v=v, source=source, transition=transition, mark=mark, left=left, up=up)
        return walks._replace(orientations=args.orientations[self.orientations])

    def cells(self, t: Tensor) -> Tensor:
        """This part of a tensor that orientations share, `[B, X, Y, H, …]`."""
        return t[self.batch, :, :, self.heads]

    def gates(self, t: Tensor) -> Tensor:
        """This part of a tensor in which each orientation has its own, `[B, X, Y, H, O, …]`."""
        return t[self.batch, :, :, self.heads, self.orientations]

    def states(self, t: Tensor) -> Tensor:
        """This part of the states on a side, `[B, side, H, O, …]`."""
        return t[self.batch, :, self.heads, self.orientations]


def _parts(args: GridScan) -> Iterator[GridPart]:
    """Walks in parts of about `ELEMENTS`: orientations stay together longest, then heads."""
    batch, width, height, heads, keys = args.q.shape
    cells, side = width * height, _of_device(SIDE, args.q)
    per_cell = cells if _is_whole(args) else 2 * keys * args.v.shape[-1] // side + 4 * side * side
    sizes = [batch, heads, len(args.orientations)]
    most = _of_device(ELEMENTS, args.q) // max(1, cells * per_cell)
    steps = []
    for n, size in enumerate(sizes):
        steps.append(min(size, max(1, most // max(1, math.prod(sizes[n + 1 :])))))
    ranges = ([slice(a, a + step) for a in range(0, size, step)] for size, step in zip(sizes, steps, strict=True))
    for part in itertools.product(*ranges):
        yield GridPart(*part)


def _boundary(args: GridScan, length: int, states: Tensor | None) -> Tensor:
    """A copy of the states on one side of the grid, or zeros, to be overwritten."""
    dtype = working_dtype(args.q.dtype)
    if states is not None:
        return states.to(dtype, copy=True)
    batch, *_, heads, keys = args.q.shape
    return args.q.new_zeros(batch, length, heads, len(args.orientations), keys, args.v.shape[-1], dtype=dtype)


def add_direct(y: Tensor, args: GridScan) -> None:
    """Add D (q · k) v to y, in its precision."""
    if args.direct is not None:
        match = (args.q.to(y.dtype) * args.k.to(y.dtype)).sum(-1).mul_(args.direct)
        y.addcmul_(match[..., None], args.v.to(y.dtype))


def add_direct_gradients(dq: Tensor, dk: Tensor, dv: Tensor, dy: Tensor, args: GridScan) -> Tensor | None:
    """Add the part through the direct gate to the gradients of q, k and v; return the gradient of the gate."""
    if args.direct is None:
        return None
    q, k, v, gate = (t.to(dy.dtype) for t in (args.q, args.k, args.v, args.direct))
    match, dmatch = (q * k).sum(-1), (dy * v).sum(-1)
    ddirect = match * dmatch
    dv.addcmul_(match.mul_(gate)[..., None], dy)
    dq.addcmul_(dmatch.mul_(gate)[..., None], k)
    dk.addcmul_(dmatch[..., None], q)
    return ddirect


def forward(args: GridScan) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, right, down)`; see sinuous.core.ops.grid_scan."""
    q, v = args.q, args.v
    y = torch.zeros(v.shape, dtype=working_dtype(q.dtype), device=v.device)
    right, down = y.new_empty(0), y.new_empty(0)
    if args.with_state:
        right, down = _boundary(args, q.shape[2], args.left), _boundary(args, q.shape[1], args.up)
    if 0 in q.shape[:4]:  # no cells: the states pass as they are
        return y.to(v.dtype), right, down
    whole, space = _is_whole(args), Workspace(y)
    for part in _parts(args):
        g = part.of(args)
        if whole:
            part.cells(y).add_(_whole_forward(g))
            continue
        walk = GridWalk(g, space)
        nodes, *edges = walk.forward(walk.maps(*_gates(g)), False)
        part.cells(y).add_(walk.from_nodes(nodes))
        if args.with_state:
            for t, states in zip((right, down), walk.from_edges(*edges), strict=True):
                part.states(t).copy_(states)
    add_direct(y, args)
    return y.mul_(q.shape[-1] ** -0.5 if args.scale is None else args.scale).to(v.dtype), right, down


def backward(args: GridScan, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients of q, k, v, source, transition, mark, direct, left and up."""
    dtype, direct = working_dtype(args.q.dtype), args.direct
    scale = args.q.shape[-1] ** -0.5 if args.scale is None else args.scale
    dy, dright, ddown = grads if args.with_state else (grads[0], None, None)
    dright, ddown = (None if t is None else t.to(dtype, copy=True) for t in (dright, ddown))
    dq, dk, dv, *dgates = (
        torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (args.q, args.k, args.v, *_gates(args))
    )
    dy = torch.zeros_like(dv) if dy is None else dy.to(dtype) * scale
    dleft, dup = (
        None if t is None else torch.zeros(t.shape, dtype=dtype, device=t.device) if d is None else d
        for t, d in ((args.left, dright), (args.up, ddown))
    )
    if 0 in args.q.shape[:4]:  # no cells: the states pass as they are
        return [dq, dk, dv, *dgates, None if direct is None else torch.zeros_like(direct), dleft, dup]
    whole, space = _is_whole(args), Workspace(dv)
    for part in _parts(args):
        g = part.of(args)
        if whole:
            d = _whole_backward(g, part.cells(dy))
        else:
            ends = (None if t is None else part.states(t) for t in (dright, ddown))
            d = GridWalk(g, space).backward(part.cells(dy), *ends)
        for t, gradient in zip((dq, dk, dv), (d.q, d.k, d.v), strict=True):
            part.cells(t).add_(gradient)
        for t, gradient in zip(dgates, d.gates, strict=True):
            part.gates(t).copy_(gradient)
        for side, dstates in ((dleft, d.left), (dup, d.up)):
            if side is not None and dstates is not None:
                part.states(side).copy_(dstates)
    return [dq, dk, dv, *dgates, add_direct_gradients(dq, dk, dv, dy, args), dleft, dup]
