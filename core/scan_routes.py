"""Orders in which a recurrence can visit the cells of a grid.

A route is a permutation of the cells: it makes a sequence of cells `[B, H·W, D]` in raster order, and brings the
sequence back to raster order. Every route exists for every grid.

    raster            row by row, each from the left                            Vim
    reversed          raster, from its end                                      Vim
    column            column by column, each from the top                       VMamba's SS2D
    column_reversed   column, from its end                                      VMamba's SS2D
    serpentine        row by row, alternately from the left and from the right  neighbours in time touch
    column_serpentine column by column from the left, alternately upwards and   LaMamba-Diff: its first begins at the
                      downwards                                                 bottom left
    windows           windows of a side, row by row, each inside row by row     LocalMamba
    hilbert           a space-filling curve                                     neighbours in time touch

The serpentines and `hilbert` step along an axis, with one exception: `hilbert` takes one diagonal step where the longer
side is odd and the shorter one is even and above 2. On such a grid no path of single steps joins the two ends of the
longer side. A recurrence that can run from the end reads a route and its reverse from one sequence.

`scan_route` gives a route as indices. `to_sequence` and `to_cells` follow a route by its name, without indices where a
transposition does. `to_sequences` follows several at once, and `sum_to_cells` sums what came of them.

Sources: VMamba (arXiv 2401.10166), section 4.2; LocalMamba (arXiv 2403.09338), section 3.2; LaMamba-Diff (arXiv
2408.02615), section 3.2; for the curve on rectangles of any shape, the recursive halving described by J. Červený,
"Generalized Hilbert space-filling curve".
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sinuous.core.checks import check_arguments, check_grid, check_range, check_sizes, described, is_whole
from sinuous.core.ops.operators import operators

CROSS = ("raster", "column", "reversed", "column_reversed")
"""The routes of VMamba's cross-scan, in its order: rows, columns, and both from their ends."""


class Route(NamedTuple):
    """order: raster index of the cell visited at each step, `[H·W]`; inverse: step at which each cell is visited."""

    order: Tensor
    inverse: Tensor

    def to_sequence(self, cells: Tensor) -> Tensor:
        """Put cells `[B, H·W, ...]`, in raster order, into the order of the route."""
        self._check(cells)
        return cells.index_select(1, self.order)

    def to_cells(self, sequence: Tensor) -> Tensor:
        """Bring a sequence `[B, H·W, ...]` in the order of the route back to raster order."""
        self._check(sequence)
        return sequence.index_select(1, self.inverse)

    def _check(self, cells: Tensor) -> None:
        steps = self.order.shape[0]
        if cells.shape[1] != steps:
            raise ValueError(f"there must be as many cells as the route has steps, {steps} (got {cells.shape[1]})")


Indices = npt.NDArray[np.int64]


def _raster(height: int, width: int) -> Indices:
    return np.arange(height * width, dtype=np.int64).reshape(height, width)


def _serpentine(step: Any, height: Any, width: Any) -> Any:
    """Cell at a step, and step of a cell: the route is its own inverse. These take arrays and tensors alike, and
    sizes that a tracer does not know."""
    row, place = step // width, step % width
    return row * width + place + row % 2 * (width - 1 - 2 * place)


def _column_serpentine(step: Any, height: Any, width: Any) -> Any:
    column, place = step // height, step % height
    return (place + (1 - column % 2) * (height - 1 - 2 * place)) * width + column


def _column_serpentine_step(cell: Any, height: Any, width: Any) -> Any:
    row, column = cell // width, cell % width
    return column * height + row + (1 - column % 2) * (height - 1 - 2 * row)


_SERPENTINES: dict[str, tuple[Callable[[Any, Any, Any], Any], Callable[[Any, Any, Any], Any]]] = {
    "serpentine": (_serpentine, _serpentine),
    "column_serpentine": (_column_serpentine, _column_serpentine_step),
}
"""By name, the cell at a step and the step of a cell."""


def _windows(height: int, width: int, window: int) -> Indices:
    row, column = np.divmod(_raster(height, width).ravel(), max(width, 1))
    return np.lexsort((column, row, column // window, row // window)).astype(np.int64)


def _curve(corner: complex, along: complex, across: complex) -> Iterator[complex]:
    """Walk over the cells of a rectangle, from `corner` to the far end of `along`.

    `along` and `across` are axis-parallel vectors that span it. Points and vectors are complex numbers, x + iy.
    """
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


def _hilbert(height: int, width: int) -> Indices:
    if height * width == 0:
        return np.empty(0, dtype=np.int64)
    spans = (complex(width, 0), complex(0, height))
    points = _curve(0j, *(spans if width >= height else spans[::-1]))
    return np.array([round(p.imag) * width + round(p.real) for p in points], dtype=np.int64)


_ORDERS: dict[str, Callable[[int, int], Indices]] = {
    "raster": lambda height, width: _raster(height, width).ravel(),
    "reversed": lambda height, width: _raster(height, width).ravel()[::-1],
    "column": lambda height, width: _raster(height, width).T.ravel(),
    "column_reversed": lambda height, width: _raster(height, width).T.ravel()[::-1],
    "serpentine": lambda height, width: _serpentine(_raster(height, width).ravel(), height, width),
    "column_serpentine": lambda height, width: _column_serpentine(_raster(height, width).ravel(), height, width),
    "hilbert": _hilbert,
}


def list_routes() -> list[str]:
    """Names that `scan_route` knows, sorted."""
    return sorted([*_ORDERS, "windows"])


@functools.lru_cache(maxsize=256)
def _indices(name: str, height: int, width: int, window: int) -> tuple[Indices, Indices]:
    # NumPy's, not torch's: a tensor made under fake tensors or on the meta device would stay in the cache.
    order = _windows(height, width, window) if name == "windows" else _ORDERS[name](height, width)
    return order.copy(), np.argsort(order)  # a copy, as torch takes no negative strides


@check_arguments
def scan_route(name: str, height: int, width: int, *, window: int = 2, device: torch.device | None = None) -> Route:
    """Make the route `name` over `height` × `width` cells, as int64 indices `[H·W]`.

    Args:
        name: one of `list_routes()`.
        height, width: of the grid, at least 0.
        window: side of a window in cells, for `windows`; those at the edges are smaller where it does not
            divide.
        device: where the indices are.

    Indices are computed once per grid; the tensors are new in each call, so that a module should keep them.

    Raises:
        ValueError: for an unknown name (naming the closest), a negative size, or a window of less than 1.
    """
    check_range(0, math.inf, height=height, width=width)
    check_route(name)
    check_sizes(window=window)
    order, inverse = _indices(name, height, width, window if name == "windows" else 0)
    return Route(torch.tensor(order, device=device), torch.tensor(inverse, device=device))


def check_route(name: str) -> None:
    """Refuse a name that no route has.

    Raises:
        ValueError: naming the closest.
    """
    if name not in list_routes():
        close = difflib.get_close_matches(str(name), list_routes(), n=1) or list_routes()
        raise ValueError(f"there is no scan route {name!r}; did you mean {' or '.join(map(repr, close))}?")


@torch.compiler.assume_constant_result
def row_order(name: str, height: int, width: int, class_row: int) -> Tensor:
    """A route over the cells of a grid and a class token among them, as `Stack` takes it: int64 `[2, L]`, the token at
    each step and the step of each token.

    Args:
        name: of the route.
        height, width: of the grid.
        class_row: row of the class token among the tokens, which is also its step; -1 for none.
    """
    order, _ = _indices(name, height, width, 2 if name == "windows" else 0)
    return _with_class_row(order, class_row)


@torch.compiler.assume_constant_result
def time_first_order(frames: int, cells: int, class_row: int) -> Tensor:
    """The order that follows every cell of a clip through time before it goes to the next, for a `Stack`: int64
    `[2, L]`, the token at each step and the step of each token.

    Args:
        frames: number of frames, whose tokens follow one another.
        cells: tokens of a frame.
        class_row: row of the class token among the tokens, which is also its step; -1 for none.
    """
    order = np.arange(frames * cells, dtype=np.int64).reshape(frames, cells).T.ravel()
    return _with_class_row(order, class_row)


def _with_class_row(order: Indices, class_row: int) -> Tensor:
    if class_row >= 0:
        order = np.insert(order + (order >= class_row), class_row, class_row)
    return torch.from_numpy(np.stack([order, np.argsort(order)]))


def to_sequence(cells: Tensor, route: str, height: int, width: int) -> Tensor:
    """Put cells `[B, H·W, ...]`, in raster order, into the order of a route.

    `raster` copies nothing and `column` once; these two also run in TorchScript. Other routes gather along indices,
    which are computed once per grid; a compiled graph holds them as constants.

    Raises:
        ValueError: for an unknown route, naming the closest.
    """
    _check_cells(cells, height, width)
    if route == "raster":
        return cells
    if route == "column":
        return _transposed(cells, height, width)
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        raise ValueError("TorchScript has only the routes raster and column; compile or export instead")
    else:
        return cells.index_select(1, _order(route, height, width)[0].to(cells.device))


def to_cells(sequence: Tensor, route: str, height: int, width: int) -> Tensor:
    """Bring a sequence `[B, H·W, ...]` in the order of a route back to raster order: undo `to_sequence`.

    Raises:
        ValueError: for an unknown route, naming the closest.
    """
    _check_cells(sequence, height, width)
    if route == "raster":
        return sequence
    if route == "column":
        return _transposed(sequence, width, height)
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        raise ValueError("TorchScript has only the routes raster and column; compile or export instead")
    else:
        return sequence.index_select(1, _order(route, height, width)[1].to(sequence.device))


def to_sequences(cells: Tensor, routes: tuple[str, ...], height: int, width: int) -> Tensor:
    """Put cells `[B, H·W, D]`, in raster order, into the orders of K routes: `[B, H·W, K, D]`, in one copy.

    Raises:
        ValueError: for an unknown route, naming the closest.
    """
    _check_cells(cells, height, width)
    order, step = _orders(routes, height, width, cells)
    return operators.take_orders(cells, order, step)


def sum_to_cells(sequences: Tensor, routes: tuple[str, ...], height: int, width: int) -> Tensor:
    """Bring sequences `[B, H·W, K, D]` in the orders of K routes back to raster order, and sum them: `[B, H·W, D]`.

    Raises:
        ValueError: for an unknown route, naming the closest.
    """
    _check_cells(sequences, height, width)
    order, step = _orders(routes, height, width, sequences)
    return operators.sum_orders(sequences, order, step)


def _check_cells(cells: Tensor, height: int, width: int) -> None:
    if not isinstance(cells, Tensor) or cells.ndim < 2:
        raise ValueError("cells must be a tensor [B, H·W, ...]; convert them with torch.as_tensor")
    if not torch.jit.is_scripting() and not torch.compiler.is_compiling():  # type: ignore[attr-defined]
        for name, side in (("height", height), ("width", width)):
            if not is_whole(side):
                raise ValueError(f"{name} must be a whole number (got {described(side)})")
        check_range(0, math.inf, height=height, width=width)
        check_grid([height, width], cells.shape[1], None)


def _transposed(cells: Tensor, height: int, width: int) -> Tensor:
    by_column: Tensor = cells.unflatten(1, [height, width]).transpose(1, 2).flatten(1, 2)
    return by_column


@torch.compiler.assume_constant_result
def _order(route: str, height: int, width: int) -> tuple[Tensor, Tensor]:
    return scan_route(route, height, width)


def _orders(routes: tuple[str, ...], height: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cells at the steps, and steps of the cells, of all routes: `[H·W, K]` each, where `like` is."""
    if torch.compiler.is_compiling() and all(route in _SERPENTINES for route in routes):
        cells = torch.arange(height * width, device=like.device)
        pairs = [_SERPENTINES[route] for route in routes]
        order = torch.stack([cell(cells, height, width) for cell, _ in pairs], 1)
        return order, torch.stack([step(cells, height, width) for _, step in pairs], 1)
    if keeps_tensors(like):
        return _kept_orders(routes, height, width, like.device)
    return _new_orders(routes, height, width, like.device)


def _new_orders(routes: tuple[str, ...], height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    both = [_order(route, height, width) for route in routes]
    return torch.stack([one[0] for one in both], 1).to(device), torch.stack([one[1] for one in both], 1).to(device)


@functools.lru_cache(maxsize=64)
def _kept_orders(routes: tuple[str, ...], height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # a tensor of inference would be refused by a later training
        return _new_orders(routes, height, width, device)


def keeps_tensors(like: Tensor) -> bool:
    """Whether tensors that depend on sizes alone may be kept for later calls beside `like`: not under a tracer, under
    fake tensors or on the meta device, whose tensors are not those of other calls."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    return not (traced or like.is_meta or isinstance(like, FakeTensor))
