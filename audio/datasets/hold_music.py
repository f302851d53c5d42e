"""Music for those who wait on the telephone: five tracks of 18 minutes in all, 8 kHz, of which two pieces are bundled.

The tracks come with the Debian package asterisk-moh-opsound-wav (Macroform, Manolo Camp, Reno Project; CC-BY-SA-3.0).
They end in fade-outs, so that a split in time would test on silence. Here block b of a track holds its samples from
32,000 b on (4 s); blocks with b mod 16 = 7 validate, 15 test, and runs of all others train.
"""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from sinuous.audio.codecs import Codec
from sinuous.audio.datasets.coded import CodedAudio, CodeWindows, read_mono
from sinuous.audio.datasets.files import sound_files, source_folder
from sinuous.core.data import check_split

RATE, BLOCK = 8000, 32000
PACKAGE = "moh"
"""Folder of the tracks in the package."""

PERIOD, VAL, TEST = 16, 7, 15


def split_of(block: int) -> str:
    """The split of the block of this number."""
    return {VAL: "val", TEST: "test"}.get(block % PERIOD, "train")


def runs(wave: Tensor, split: str) -> list[Tensor]:
    """Parts of a track that belong to a split: single blocks of `val` and `test`, runs of blocks of `train`."""
    starts = range(0, len(wave), BLOCK)
    chosen = [start for start in starts if split_of(start // BLOCK) == split]
    if split != "train":
        return [wave[start : start + BLOCK] for start in chosen]
    parts: list[list[int]] = []
    for start in chosen:
        if parts and parts[-1][1] == start:
            parts[-1][1] = start + BLOCK
        else:
            parts.append([start, start + BLOCK])
    return [wave[start:stop] for start, stop in parts]


class HoldMusic(CodedAudio):
    """Windows of hold music, `(codes [B, T], next codes [B, T])`; a block that is scored is one window.

    Args:
        length: samples of a training window.
        eval_length: samples of a window that is scored; a block has 32,000.
        stride: samples between training windows, their length unless given.
        codec: a codec's name, or a codec.
        source: `bundled` or `folder`; None takes the folder where `root` is given.
        root: a folder with the tracks, such as that of the unpacked package; where it has a folder `moh`, as the
            package does, sounds elsewhere are left out. None takes the bundled pieces, the first 64 s of two tracks,
            whose blocks are of the same splits.
        augment: move training windows at random.

    Raises:
        FileNotFoundError, ValueError: if there is no such folder, source, codec or size.
    """

    def __init__(
        self,
        length: int = 8192,
        eval_length: int = BLOCK,
        stride: int | None = None,
        codec: str | Codec = "mu_law",
        source: str | None = None,
        root: str | os.PathLike[str] | None = None,
        augment: bool = True,
    ) -> None:
        super().__init__(length, eval_length, stride, codec, RATE, augment)
        self.source, self.root = source, root
        self._tracks: list[Tensor] | None = None

    def tracks(self) -> list[Tensor]:
        """All of each track, `[T]`."""
        if self._tracks is None:
            folder = source_folder(self.source, self.root, "hold_music")
            files = sound_files(folder, "hold music")
            # Packages of spoken prompts may lie unpacked beside it.
            files = [file for file in files if PACKAGE in file.relative_to(folder).parts] or files
            self._tracks = [read_mono(file, RATE) for file in files]
        return self._tracks

    def waves(self, split: str) -> list[Tensor]:
        found = [part for track in self.tracks() for part in runs(track, split)]
        if not found:
            raise ValueError(
                f"the hold music has no part for {split}: of 16 blocks of 4 s of a track the eighth validates and the "
                "last tests; give tracks of 64 s or more"
            )
        return found


def hold_music(split: str, *, length: int, **options: Any) -> CodeWindows:
    """Windows of `length` samples of one split of hold music.

    Args:
        split: `train`, `val` or `test`.
        length: samples of a window.
        options: `stride`, `codec`, `source` and `root`, see `HoldMusic`; windows lie where they are, unmoved.

    Raises:
        FileNotFoundError, ValueError: as `HoldMusic`.
    """
    check_split(split)
    return HoldMusic(length, length, augment=False, **options).split(split)
