"""Orders in which a recurrence can visit the cells of a grid.

A route is a permutation: `x.flatten(1, 2)[:, route.order]` is the sequence of `x` `[B, H, W, D]`, and
`y[:, route.inverse]` brings a sequence back to cells in raster order. Every route exists for every grid.

    raster            row by row, each from the left                            Vim
    reversed          raster, from its end                                      Vim
    column            column by column, each from the top                       VMamba's SS2D
    column_reversed   column, from its end                                      VMamba's SS2D
    serpentine        row by row, alternately from the left and from the right  neighbours in time touch
    windows           windows of a side, row by row, each inside row by row     LocalMamba
    hilbert           a space-filling curve                                     neighbours in time touch

`cross_routes` gives the four of VMamba's cross-scan.

Sources: VMamba (arXiv 2401.10166), section 4.2; LocalMamba (arXiv 2403.09338), section 3.2; for the curve on rectangles
of any shape, the recursive halving described by J. Červený, "Generalized Hilbert space-filling curve".
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Route(NamedTuple):
    """order: raster index of the cell visited at each step, `[H·W]`; inverse: step at which each cell is visited."""

    order: Tensor
    inverse: Tensor


def _raster(height: int, width: int) -> Tensor:
    return torch.arange(height * width).view(height, width)


def _serpentine(height: int, width: int) -> Tensor:
    cells = _raster(height, width)
    cells[1::2] = cells[1::2].flip(1)
    return cells.flatten()


def _windows(height: int, width: int, window: int) -> Tensor:
    if window < 1:
        raise ValueError(f"window must be at least 1 (got {window})")
    rows = _raster(height, width).split(window, 0)
    return torch.cat([tile.flatten() for row in rows for tile in row.split(window, 1)])


def _curve(corner: complex, along: complex, across: complex) -> Iterator[complex]:
    """Cells of the rectangle at `corner` spanned by two axis-parallel vectors, from the corner to the far end of
    `along`. Points and vectors are complex numbers, x + iy."""
    length, breadth = round(abs(along)), round(abs(across))
    step, side = along / length, across / breadth
    if breadth == 1:
        yield from (corner + k * step for k in range(length))
    elif length == 1:
        yield from (corner + k * side for k in range(breadth))
    elif 2 * length > 3 * breadth:  # long: two rectangles one after the other
        first = length // 2
        first += first % 2 if length > 2 else 0  # an even cut lets the halves meet side by side
        yield from _curve(corner, first * step, across)
        yield from _curve(corner + first * step, along - first * step, across)
    else:  # a U: up the near side, along the far one, down again
        near, far = length // 2, breadth // 2
        far += far % 2 if breadth > 2 else 0
        yield from _curve(corner, far * side, near * step)
        yield from _curve(corner + far * side, along, across - far * side)
        yield from _curve(corner + along - step + (far - 1) * side, -far * side, near * step - along)


def _hilbert(height: int, width: int) -> Tensor:
    if height * width == 0:
        return torch.empty(0, dtype=torch.long)
    spans = (complex(width, 0), complex(0, height))
    points = _curve(0j, *(spans if width >= height else spans[::-1]))
    return torch.tensor([round(p.imag) * width + round(p.real) for p in points])


_ORDERS: dict[str, Callable[[int, int], Tensor]] = {
    "raster": lambda height, width: _raster(height, width).flatten(),
    "reversed": lambda height, width: _raster(height, width).flatten().flip(0),
    "column": lambda height, width: _raster(height, width).T.flatten(),
    "column_reversed": lambda height, width: _raster(height, width).T.flatten().flip(0),
    "serpentine": _serpentine,
    "hilbert": _hilbert,
}


def list_routes() -> list[str]:
    """Names that `scan_route` knows, sorted."""
    return sorted([*_ORDERS, "windows"])


def scan_route(name: str, height: int, width: int, *, window: int = 2, device: torch.device | None = None) -> Route:
    """The route `name` over `height` × `width` cells, as int64 indices `[H·W]`.

    Args:
        name: one of `list_routes()`.
        height, width: of the grid, at least 0.
        window: side of a window in cells, for `windows`; those at the edges are smaller where it does not
            divide.
        device: where the indices are.

    Raises:
        ValueError: for an unknown name (naming the closest), a negative size, or a window of less than 1.
    """
    if min(height, width) < 0:
        raise ValueError(f"a grid cannot have a negative side (got {height} x {width})")
    if name == "windows":
        order = _windows(height, width, window)
    elif name in _ORDERS:
        order = _ORDERS[name](height, width)
    else:
        close = difflib.get_close_matches(name, list_routes(), n=1) or list_routes()
        raise ValueError(f"there is no scan route {name!r}; did you mean {' or '.join(map(repr, close))}?")
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    return Route(order.to(device), inverse.to(device))


def cross_routes(height: int, width: int, *, device: torch.device | None = None) -> tuple[Route, Route, Route, Route]:
    """VMamba's cross-scan: by rows, by columns, and both from their ends, in its order."""
    by_row, by_column, rows_back, columns_back = (
        scan_route(name, height, width, device=device) for name in ("raster", "column", "reversed", "column_reversed")
    )
    return by_row, by_column, rows_back, columns_back
