"""Sound files of a data set: in a folder of the user's, or bundled."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from sinuous.core.checks import check_choice
from sinuous.core.data import PACKED, folder_of

SAMPLES = Path(__file__).parents[1] / "samples"
SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif")
SOURCES = ("bundled", "folder")


def source_folder(source: str | None, root: str | os.PathLike[str] | None, bundled: str) -> Path:
    """The folder `root`, or that of bundled samples.

    Args:
        source: `bundled` or `folder`; None takes the folder where `root` is given.
        root: a folder.
        bundled: name of the folder of samples.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if the source is neither, needs a folder and has none, or has one and needs none.
    """
    if source is not None:
        check_choice("data.source", source, SOURCES)
    if source == "bundled" and root is not None:
        raise ValueError(f"data.source=bundled reads no folder (got data.root={root}); leave one of the two out")
    return SAMPLES / bundled if (source or ("bundled" if root is None else "folder")) == "bundled" else folder_of(root)


def sound_files(folder: Path, noun: str = "sound") -> list[Path]:
    """All sound files in a folder and those below it, in natural order: `2.wav` before `10.wav`.

    Names that begin with a dot are left out; endings may be in upper case.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if there is none and the folder holds a package that is still packed.
    """
    found = sorted(_below(folder), key=lambda path: natural(path.relative_to(folder).as_posix()))
    if found:
        return found
    if packed := sorted(path.name for path in folder.iterdir() if path.suffix in PACKED):
        raise ValueError(f"{folder.resolve()} holds {packed[0]}, which is still packed; unpack it there")
    raise FileNotFoundError(
        f"{folder.resolve()} and the folders below it have no {noun}; files ending with {', '.join(SUFFIXES)} are "
        "looked for: give another data.root"
    )


def _below(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _below(path)
        elif path.suffix.lower() in SUFFIXES:
            yield path


def natural(name: str) -> list[tuple[bool, int, str]]:
    """Key that sorts numbers within names by their value, and others as letters do."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name) if part]
