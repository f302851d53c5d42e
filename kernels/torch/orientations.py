"""The four ways to walk a grid, each brought to the walk from the first cell to the last by turning the grid.

Orientation o walks x from its end where o is odd, and y from its end where o ≥ 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _turned(t: Tensor, orientation: int, x: int | None, y: int | None) -> Tensor:
    axes = [axis for axis, bit in ((x, 1), (y, 2)) if axis is not None and orientation & bit]
    return t.flip(axes) if axes else t


def walked(t: Tensor, orientations: Sequence[int], x: int | None, y: int | None, axis: int | None = None) -> Tensor:
    """`[B, …]` to `[B, O, …]`, each orientation's part turned so that its walk starts at index 0.

    Args:
        x, y: axes of `t` along the sides of the grid.
        axis: that of `t` with a part for each orientation, behind x and y; all share `t` if absent.
    """
    parts = [t] * len(orientations) if axis is None else t.unbind(axis)
    return torch.stack([_turned(p, o, x, y) for p, o in zip(parts, orientations, strict=True)], 1)


def unwalked(t: Tensor, orientations: Sequence[int], x: int | None, y: int | None, axis: int | None = None) -> Tensor:
    """The transpose of `walked`: parts turned back, and stacked on `axis` or, where shared, summed."""
    parts = [_turned(p, o, x, y) for p, o in zip(t.unbind(1), orientations, strict=True)]
    if axis is not None:
        return torch.stack(parts, axis)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
