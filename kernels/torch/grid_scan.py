"""The recurrence over a grid in blocks of plain torch.

States and values pass a block in a few matrix products with its map (`grid_blocks`), and blocks on an anti-diagonal
pass together. A small grid without boundary states is a single block: the maps of all orientations, which are then
weights between nodes only, are summed and one attention passes them.

Maps are made again for the backward pass, and states on the edges between blocks with them; time and memory are linear
in the number of cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sinuous.kernels.torch.chunked import working_dtype
from sinuous.kernels.torch.differentiation import autograd_inside_an_op
from sinuous.kernels.torch.grid_blocks import Blocks, block_maps, cut_edges, uncut_edges
from sinuous.kernels.torch.orientations import unwalked, walked

SIDE = 8
"""Largest side of a block. Work on states per cell grows with it (4 · SIDE · K · V), and the steps in sequence fall."""

WHOLE = 1024
"""Most cells of a grid that is a single block: its weights between nodes are the square of it."""

ELEMENTS = 1 << 26
"""About how many elements are held at once; rows of a batch that need more pass one after another."""


def _pass(W: Tensor, C: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes `[…, n, D]` and states on the edges coming in, `[…, e, K, V]`, to outputs and states going out."""
    e, keys, values = C.shape[-3:]
    weights = W[..., e:, e:] * (q @ k.mT)
    queries = (W[..., e:, :e, None] * q[..., None, :]).flatten(-2)
    y = weights @ v + queries @ C.flatten(-3, -2)
    sources = (W[..., :e, e:].mT[..., None] * k[..., None, :]).flatten(-2)
    out = (W[..., :e, :e] @ C.flatten(-2)).unflatten(-1, (keys, values)) + (sources.mT @ v).unflatten(-2, (e, keys))
    return y, out


def _pass_back(
    W: Tensor, C: Tensor, q: Tensor, k: Tensor, v: Tensor, dy: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of W, C, q, k and v."""
    e, keys, values = C.shape[-3:]
    scores, inside = q @ k.mT, dy @ v.mT
    dscores = W[..., e:, e:] * inside
    marks, source = W[..., e:, :e, None], W[..., :e, e:].mT[..., None]
    read = (dy @ C.flatten(-3, -2).mT).unflatten(-1, (e, keys))
    written = (v @ dout.flatten(-3, -2).mT).unflatten(-1, (e, keys))
    dq = dscores @ k + (marks * read).sum(-2)
    dk = dscores.mT @ q + (source * written).sum(-2)
    dv = (W[..., e:, e:] * scores).mT @ dy + (source * k[..., None, :]).flatten(-2) @ dout.flatten(-3, -2)
    dC = ((marks * q[..., None, :]).flatten(-2).mT @ dy).unflatten(-2, (e, keys))
    dC = dC + (W[..., :e, :e].mT @ dout.flatten(-2)).unflatten(-1, (keys, values))
    dW = torch.empty_like(W)
    dW[..., e:, e:] = scores * inside
    dW[..., e:, :e] = (read * q[..., None, :]).sum(-1)
    dW[..., :e, e:] = (written * k[..., None, :]).sum(-1).mT
    dW[..., :e, :e] = dout.flatten(-2) @ C.flatten(-2).mT
    return dW, dC, dq, dk, dv


class _Grid(NamedTuple):
    """One part of a batch, in the precision of the states: queries scaled, `[B, X, Y, H, …]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: tuple[Tensor, Tensor, Tensor]
    left: Tensor | None
    up: Tensor | None
    orientations: tuple[int, ...]


class _Gradients(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    gates: tuple[Tensor, ...]
    left: Tensor | None = None
    up: Tensor | None = None


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
    found: Tensor = total.flatten(-4, -3).flatten(-2, -1)
    return found


def _flat(t: Tensor) -> Tensor:
    """`[B, X, Y, H, D]` to `[B, H, XY, D]`."""
    return t.flatten(1, 2).transpose(1, 2)


def _whole_forward(g: _Grid) -> Tensor:
    W = _weights(*g.gates, g.orientations)
    y = (W * (_flat(g.q) @ _flat(g.k).mT)) @ _flat(g.v)
    found: Tensor = y.transpose(1, 2).unflatten(1, g.v.shape[1:3])
    return found


def _with_gates(
    function: Callable[..., Tensor], gates: tuple[Tensor, ...]
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
    """A function of the gates, and what turns its gradient into theirs."""
    with autograd_inside_an_op():
        leaves = tuple(t.detach().requires_grad_() for t in gates)
        result = function(*leaves)

    def pull(gradient: Tensor) -> tuple[Tensor, ...]:
        with autograd_inside_an_op():
            return torch.autograd.grad(result, leaves, gradient)

    return result.detach(), pull


def _whole_backward(g: _Grid, dy: Tensor) -> _Gradients:
    W, pull = _with_gates(lambda source, transition, mark: _weights(source, transition, mark, g.orientations), g.gates)
    q, k, v, dy = _flat(g.q), _flat(g.k), _flat(g.v), _flat(dy)
    scores, inside = q @ k.mT, dy @ v.mT
    dgates = pull(scores * inside)
    dv = (W * scores).mT @ dy
    inside *= W
    dq, dk = inside @ k, inside.mT @ q
    dq, dk, dv = (t.transpose(1, 2).unflatten(1, g.v.shape[1:3]) for t in (dq, dk, dv))
    return _Gradients(dq, dk, dv, dgates)


class _Walk:
    """A part of a batch cut into blocks, with orientations and heads as rows: N = B · O · H."""

    def __init__(self, g: _Grid) -> None:
        self.g = g
        self.batch, self.width, self.height, self.heads = g.q.shape[:4]
        nx, ny = max(1, -(-self.width // SIDE)), max(1, -(-self.height // SIDE))
        self.blocks = Blocks(nx, -(-self.width // nx), ny, -(-self.height // ny))
        self.q, self.k, self.v = (self.nodes(t) for t in (g.q, g.k, g.v))
        state = (self.heads, len(g.orientations), g.q.shape[-1], g.v.shape[-1])
        left = g.q.new_zeros(self.batch, self.height, *state) if g.left is None else g.left
        up = g.q.new_zeros(self.batch, self.width, *state) if g.up is None else g.up
        self.left, self.up = self.edges(left, up)

    def nodes(self, t: Tensor) -> Tensor:
        rows = walked(t, self.g.orientations, 1, 2).movedim(4, 2).flatten(0, 2)
        return self.blocks.nodes(rows)

    def from_nodes(self, t: Tensor) -> Tensor:
        rows = self.blocks.uncut(t, self.width, self.height)
        rows = rows.unflatten(0, (self.batch, len(self.g.orientations), self.heads)).movedim(2, 4)
        return unwalked(rows, self.g.orientations, 1, 2)

    def edges(self, left: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """States by blocks, `[ny, N, cy, K, V]` from the last y to the first, and `[nx, N, cx, K, V]`."""
        b = self.blocks
        left = walked(left, self.g.orientations, None, 1, 3).movedim(3, 2).flatten(0, 2)
        up = walked(up, self.g.orientations, 1, None, 3).movedim(3, 2).flatten(0, 2)
        return cut_edges(left, b.ny, b.cy).flip(0), cut_edges(up, b.nx, b.cx)

    def from_edges(self, left: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        rows = (self.batch, len(self.g.orientations), self.heads)
        left = uncut_edges(left.flip(0), self.height).unflatten(0, rows).movedim(2, 3)
        up = uncut_edges(up, self.width).unflatten(0, rows).movedim(2, 3)
        o = self.g.orientations
        return unwalked(left, o, None, 1, 3), unwalked(up, o, 1, None, 3)

    def maps(self, *gates: Tensor) -> Tensor:
        turned = (walked(t, self.g.orientations, 1, 2, 4).movedim(4, 2).flatten(0, 2) for t in gates)
        return self.blocks.maps(*turned)

    def forward(self, W: Tensor, keep: list[Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs of the nodes and the states after the last blocks; `keep` gets the states into each diagonal."""
        b, ys = self.blocks, []
        left, up = self.left.clone(), self.up.clone()
        pieces = zip(b.diagonals(), *(b.by_diagonal(t) for t in (W, self.q, self.k, self.v)), strict=True)
        for (i, j), *inputs in pieces:
            C = torch.cat([up[i], left[j]], 2)
            if keep is not None:
                keep.append(C)
            y, out = _pass(inputs[0], C, *inputs[1:])
            ys.append(y)
            up[i], left[j] = out[:, :, : b.cx], out[:, :, b.cx :]
        return b.from_diagonals(ys), left, up

    def backward(self, dy: Tensor, dright: Tensor | None, ddown: Tensor | None) -> _Gradients:
        g, b = self.g, self.blocks
        W, pull = _with_gates(self.maps, g.gates)
        kept: list[Tensor] = []
        self.forward(W, kept)
        left, up = torch.zeros_like(self.left), torch.zeros_like(self.up)
        if dright is not None and ddown is not None:
            left, up = self.edges(dright, ddown)
        pieces = zip(
            b.diagonals(), *(b.by_diagonal(t) for t in (W, self.q, self.k, self.v, self.nodes(dy))), strict=True
        )
        found = []
        for (i, j), W, q, k, v, dy in reversed(list(pieces)):
            dout = torch.cat([up[i], left[j]], 2)
            dW, dC, *rest = _pass_back(W, kept.pop(), q, k, v, dy, dout)
            found.append((dW, *rest))
            up[i], left[j] = dC[:, :, : b.cx], dC[:, :, b.cx :]
        dW, *rest = (b.from_diagonals(t[::-1]) for t in zip(*found, strict=True))
        dq, dk, dv = map(self.from_nodes, rest)
        return _Gradients(dq, dk, dv, pull(dW), *self.from_edges(left, up))


def _is_whole(q: Tensor, left: Tensor | None, up: Tensor | None, with_state: bool) -> bool:
    return not with_state and left is None and up is None and q.shape[1] * q.shape[2] <= WHOLE


def _parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: tuple[Tensor, Tensor, Tensor],
    left: Tensor | None,
    up: Tensor | None,
    orientations: Sequence[int],
    scale: float,
    whole: bool,
) -> Iterator[tuple[slice, _Grid]]:
    """The batch in parts of about `ELEMENTS` elements."""
    dtype = working_dtype(q)
    cells = q.shape[1] * q.shape[2]
    per_cell = 4 * cells if whole else q.shape[-1] * v.shape[-1] // 2 + 4 * SIDE * SIDE
    rows = max(1, ELEMENTS // max(1, cells * per_cell * q.shape[3] * len(orientations)))
    for start in range(0, q.shape[0], rows):
        part = slice(start, min(start + rows, q.shape[0]))
        source, transition, mark = (t[part].to(dtype) for t in gates)
        yield (
            part,
            _Grid(
                q[part].to(dtype) * scale,
                k[part].to(dtype),
                v[part].to(dtype),
                (source, transition, mark),
                None if left is None else left[part].to(dtype),
                None if up is None else up[part].to(dtype),
                tuple(orientations),
            ),
        )


def _boundary(q: Tensor, v: Tensor, length: int, orientations: Sequence[int], given: Tensor | None) -> Tensor:
    """The states on one side of the grid, as given or zeros, to be filled."""
    dtype = working_dtype(q)
    if given is not None:
        return given.to(dtype, copy=True)
    shape = (q.shape[0], length, q.shape[3], len(orientations), q.shape[-1], v.shape[-1])
    return torch.zeros(shape, dtype=dtype, device=q.device)


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
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    whole = _is_whole(q, left, up, with_state)
    y = torch.empty_like(v, memory_format=torch.contiguous_format)
    right, down = q.new_empty(0), q.new_empty(0)
    if with_state:
        right = _boundary(q, v, q.shape[2], orientations, left)
        down = _boundary(q, v, q.shape[1], orientations, up)
    if y.numel() == 0 and 0 in q.shape[:4]:
        return y, right, down
    for part, g in _parts(q, k, v, (source, transition, mark), left, up, orientations, scale, whole):
        if whole:
            found = _whole_forward(g)
        else:
            walk = _Walk(g)
            nodes, *edges = walk.forward(walk.maps(*g.gates), None)
            found = walk.from_nodes(nodes)
            if with_state:
                right[part], down[part] = walk.from_edges(*edges)
        if direct is not None:
            found = found + (direct[part].to(g.q.dtype) * (g.q * g.k).sum(-1))[..., None] * g.v
        y[part] = found
    return y, right, down


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
    dy, dright, ddown = grads if with_state else (grads[0], None, None)
    if dright is not None or ddown is not None:
        dright = _boundary(q, v, q.shape[2], orientations, dright)
        ddown = _boundary(q, v, q.shape[1], orientations, ddown)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    whole = _is_whole(q, left, up, with_state)
    inputs = (q, k, v, source, transition, mark, direct, left, up)
    found = [None if t is None else torch.zeros_like(t) for t in inputs]
    if 0 in q.shape[:4]:  # no cells: the states pass as they are
        for t, gradient in ((found[7], dright), (found[8], ddown)):
            if t is not None and gradient is not None:
                t += gradient
        return found
    for part, g in _parts(q, k, v, (source, transition, mark), left, up, orientations, scale, whole):
        dy_part = torch.zeros_like(g.v) if dy is None else dy[part].to(g.v.dtype)
        if whole:
            d = _whole_backward(g, dy_part)
        else:
            ends = (None if t is None else t[part].to(g.v.dtype) for t in (dright, ddown))
            d = _Walk(g).backward(dy_part, *ends)
        dq, dk, dv, ddirect = d.q, d.k, d.v, None
        if direct is not None:
            own = direct[part].to(g.v.dtype)
            match, wanted = (g.q * g.k).sum(-1), (dy_part * g.v).sum(-1)
            ddirect, dmatch = match * wanted, (own * wanted)[..., None]
            dq, dk, dv = dq + dmatch * g.k, dk + dmatch * g.q, dv + (own * match)[..., None] * dy_part
        for t, gradient in zip(found, (dq * scale, dk, dv, *d.gates, ddirect, d.left, d.up), strict=True):
            if t is not None and gradient is not None:
                t[part] = gradient
    return found
