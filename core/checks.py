"""Checks of options that are numbers or names; those of tensors are in `sinuous.core.ops.checks`.

Each error names the option, what it must be, and what it is.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor


def check_sizes(**sizes: int) -> None:
    """Refuse sizes, counts and widths that are less than 1.

    Raises:
        ValueError: naming the first of them.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1 (got {size})")


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Refuse a value of the option `name` that is not among `choices`.

    Raises:
        ValueError: listing the choices.
    """
    if value not in choices:
        quoted = [repr(choice) for choice in choices]
        listed = " or ".join(quoted) if len(quoted) < 3 else f"one of {', '.join(quoted)}"
        raise ValueError(f"{name} must be {listed} (got {value!r})")


def check_place(block_index: int, num_blocks: int) -> None:
    """Refuse a place in depth that a model of `num_blocks` blocks does not have.

    Raises:
        ValueError: if `block_index` does not lie in [0, num_blocks).
    """
    if not 0 <= block_index < num_blocks:
        raise ValueError(f"block_index must be one of the {num_blocks} blocks, from 0 (got {block_index})")


def check_grid(grid: tuple[int, int], length: int, cu_seqlens: Tensor | None) -> None:
    """Refuse a grid that the tokens do not fill.

    Raises:
        ValueError: if `height · width` is not `length`, or the sequences are packed.
    """
    if cu_seqlens is not None:
        raise ValueError("packed sequences (cu_seqlens) are rows and have no grid; leave one of the two out")
    if grid[0] * grid[1] != length:
        raise ValueError(f"grid must have as many cells as there are tokens, {length} (got {grid[0]} x {grid[1]})")
