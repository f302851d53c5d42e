"""Files of a data set: in a folder of the user's, laid out as the packages that hold them, or bundled."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from sinuous.core import data
from sinuous.core.data import PACKED

SAMPLES = Path(__file__).parents[1] / "samples"
DEEPEST = 5
"""Folders between `data.root` and a file, at most: site-packages holds a package's data in two or three."""


def folder_of(root: str | os.PathLike[str] | None) -> Path:
    """The folder `root`, or the bundled samples; raises as `sinuous.core.data.folder_of` does."""
    return SAMPLES if root is None else data.folder_of(root)


def find_file(root: str | os.PathLike[str] | None, patterns: Sequence[str], noun: str) -> Path:
    """The first file that matches the first pattern that any does, in `root` or in folders below it.

    Args:
        root: a folder; None is that of the bundled samples.
        patterns: of names, as `*.gtf.gz`.
        noun: what the file holds, for messages.

    Raises:
        FileNotFoundError: if there is no folder or file, saying what is looked for.
        ValueError: if the folder is a file, or the file is still packed.
    """
    folder = folder_of(root)
    for pattern in patterns:
        for depth in range(DEEPEST + 1):
            if found := sorted(path for path in folder.glob("*/" * depth + pattern) if path.is_file()):
                return found[0]
    if packed := sorted(path.name for path in folder.iterdir() if path.suffix in PACKED):
        raise ValueError(
            f"{folder.resolve()} holds {packed[0]}, which is still packed; unpack it there: "
            f"python -m zipfile -e {packed[0]} ."
        )
    raise FileNotFoundError(
        f"{folder.resolve()} and the folders below it have no {noun}; a file called {' or '.join(patterns)} is "
        "looked for: unpack the package that holds it there, or give another data.root"
    )
