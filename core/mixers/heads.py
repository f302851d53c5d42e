"""Sizes of heads: how a width is divided among them."""

from __future__ import annotations


def per_head(width: int, heads: int, what: str) -> int:
    """Return `width / heads`.

    Args:
        width: channels, or whatever else is shared out.
        heads: their number.
        what: name of the width, for the error.

    Raises:
        ValueError: if that is no whole number of at least 1.
    """
    if heads < 1 or width < 1 or width % heads:
        raise ValueError(f"{what} must be a positive multiple of the number of heads (got {width} and {heads} heads)")
    return width // heads


def heads_of(width: int, size: int) -> int:
    """Count the heads of `size` channels, or of the next size above it that divides `width`."""
    return next(n for n in range(max(width // size, 1), 0, -1) if width % n == 0)
