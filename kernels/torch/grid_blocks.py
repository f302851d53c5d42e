"""A grid of gates cut into blocks, and each block as one linear map.

To the scalar gates a block of cells is one linear map, from the edges coming in and its own nodes to the edges going
out and its nodes. A single cell is the matrix

    (right, down, node) from (left, up, node) = ((T, S), (M, 0)),

and two neighbours are made one by the product over the edges between them, so that the map of a block takes a number of
products that is logarithmic in its sides.

Source: pLSTM (arXiv 2506.11997), section 4; sides are any numbers here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def _joined(first: Tensor, second: Tensor, shared: int) -> Tensor:
    """The maps of two neighbours, `[…, R, R]`, to the map of both.

    Indices are, in this order, the edges between such neighbours (`shared` of them), the edges of the other axis, and
    the nodes, of which there are `shared` for each edge of the other axis.
    """
    others = [(t.shape[-1] - shared) // (1 + shared) for t in (first, second)]
    through = second[..., :shared] @ first[..., :shared, :]
    above, below = first[..., shared:, :], second[..., shared:]
    cut = shared + others[0]

    def columns(of_first: Tensor, of_second: Tensor) -> Tensor:
        parts = (of_first[..., :cut], of_second[..., : others[1]], of_first[..., cut:], of_second[..., others[1] :])
        return torch.cat(parts, -1)

    upper = columns(above, above.new_zeros(*above.shape[:-1], below.shape[-1]))
    lower = columns(through, below)
    edge = shared + others[1]
    parts = (
        lower[..., :shared, :],
        upper[..., : others[0], :],
        lower[..., shared:edge, :],
        upper[..., others[0] :, :],
        lower[..., edge:, :],
    )
    return torch.cat(parts, -2)


def _folded(maps: Tensor, shared: int) -> Tensor:
    """The maps of a row of neighbours, `[count, …, R, R]`, to the map of all, in a logarithmic number of products."""
    count = maps.shape[0]
    if count == 1:
        return maps[0]
    even = count - count % 2
    whole = _folded(_joined(maps[0:even:2], maps[1:even:2], shared), shared)
    return whole if even == count else _joined(whole, maps[-1], shared)


def block_maps(source: Tensor, transition: Tensor, mark: Tensor) -> Tensor:
    """Gates of blocks, `[cx, cy, …, 2]` and `[cx, cy, …, 2, 2]`, to their maps `[…, R, R]`, R = cx + cy + cx cy.

    Indices are down or up edges by x, right or left edges by y, and nodes with x running fastest.
    """
    out = torch.cat([transition, source.unsqueeze(-1)], -1)
    node = torch.cat([mark, torch.zeros_like(mark[..., :1])], -1).unsqueeze(-2)
    strips = _folded(torch.cat([out, node], -2), 1)  # [cy, …], the edge along x ahead of those along y
    side = source.shape[0]
    order = [*range(1, side + 1), 0, *range(side + 1, 2 * side + 1)]
    return _folded(strips[..., order, :][..., order], side)


class Blocks(NamedTuple):
    """The cut of a grid: `nx · ny` blocks of `cx · cy` cells, the last ones filled up."""

    nx: int
    cx: int
    ny: int
    cy: int

    def cut(self, t: Tensor, fill: Tensor | None = None) -> Tensor:
        """`[N, X, Y, …]` to `[nx, ny, N, cx, cy, …]`; cells beyond the grid are zero or `fill`."""
        sides, whole = (self.nx * self.cx, self.ny * self.cy), t
        if sides != tuple(t.shape[1:3]):
            whole = t.new_zeros(t.shape[0], *sides, *t.shape[3:])
            if fill is not None:
                whole = whole + fill
            whole[:, : t.shape[1], : t.shape[2]] = t
        blocks: Tensor = whole.unflatten(2, (self.ny, self.cy)).unflatten(1, (self.nx, self.cx))
        return blocks.movedim((1, 3), (0, 1))

    def nodes(self, t: Tensor) -> Tensor:
        """`[N, X, Y, D]` to `[nx, ny, N, nodes, D]`, x running fastest."""
        return self.cut(t).transpose(3, 4).flatten(3, 4)

    def uncut(self, t: Tensor, width: int, height: int) -> Tensor:
        """The inverse of `nodes`: `[N, X, Y, D]`."""
        cells: Tensor = t.unflatten(3, (self.cy, self.cx)).transpose(3, 4).movedim((0, 1), (1, 3))
        return cells.flatten(3, 4).flatten(1, 2)[:, :width, :height]

    def maps(self, source: Tensor, transition: Tensor, mark: Tensor) -> Tensor:
        """Gates `[N, X, Y, …]` to maps `[nx, ny, N, R, R]`; cells beyond the grid let edges pass straight."""
        straight = torch.eye(2, dtype=source.dtype, device=source.device)
        gates = (self.cut(source), self.cut(transition, straight), self.cut(mark))
        return block_maps(*(t.movedim((3, 4), (0, 1)) for t in gates))

    def diagonals(self) -> list[tuple[slice, slice]]:
        """Blocks that pass together, from the first corner to the last: their x, and their y counted from the end,
        which rises with x."""
        slices = []
        for d in range(self.nx + self.ny - 1):
            start, stop, shift = max(0, d - self.ny + 1), min(d + 1, self.nx), self.ny - 1 - d
            slices.append((slice(start, stop), slice(start + shift, stop + shift)))
        return slices

    def by_diagonal(self, t: Tensor) -> tuple[Tensor, ...]:
        """`[nx, ny, …]` to a tensor for each diagonal."""
        order, sizes = self._order()
        diagonals: tuple[Tensor, ...] = t.flatten(0, 1).index_select(0, order.to(t.device)).split(sizes)
        return diagonals

    def from_diagonals(self, diagonals: Sequence[Tensor]) -> Tensor:
        order, _ = self._order()
        blocks = torch.cat(list(diagonals)).index_select(0, order.argsort().to(diagonals[0].device))
        by_place: Tensor = blocks.unflatten(0, (self.nx, self.ny))
        return by_place

    def _order(self) -> tuple[Tensor, list[int]]:
        blocks = [
            [x * self.ny + self.ny - 1 - y for x, y in zip(range(self.nx)[xs], range(self.ny)[ys], strict=True)]
            for xs, ys in self.diagonals()
        ]
        return torch.tensor([n for diagonal in blocks for n in diagonal]), [len(diagonal) for diagonal in blocks]


def cut_edges(t: Tensor, count: int, side: int) -> Tensor:
    """States `[N, edges, K, V]` to `[count, N, side, K, V]`, zeros beyond the grid."""
    whole = t.new_zeros(t.shape[0], count * side, *t.shape[2:])
    whole[:, : t.shape[1]] = t
    blocks: Tensor = whole.unflatten(1, (count, side)).movedim(1, 0)
    return blocks.contiguous()


def uncut_edges(t: Tensor, length: int) -> Tensor:
    edges: Tensor = t.movedim(0, 1).flatten(1, 2)
    return edges[:, :length]
