"""Music in folders: one's own files, and the data sets of SaShiMi in the layout of the hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sinuous.audio.codecs import Codec
from sinuous.audio.datasets.coded import CodedAudio, CodeWindows, read_mono
from sinuous.audio.datasets.files import sound_files
from sinuous.audio.datasets.speech_commands import DIGITS, files_of
from sinuous.core.checks import check_near
from sinuous.core.data import SPLITS, check_split, folder_of

TRAIN, VAL = 0.88, 0.94
"""Ends of the training and validation files among all, of Goel et al. (arXiv 2202.09729)."""


class AudioFolder(CodedAudio):
    """Windows of the sound files in a folder, of any formats, rates and channels: `(codes [B, T], next codes [B, T])`.

    With folders `train`, `val` and `test` in it, each holds its split. Otherwise the files in natural order are split
    as in SaShiMi's experiments: the first 88 % train, the next 6 % validate, the last 6 % test.

    Args:
        root: the folder.
        length: samples of a training window.
        eval_length: samples of a window that is scored, `length` unless given.
        stride: samples between training windows, their length unless given.
        codec: a codec's name, or a codec.
        sample_rate: to which files of other rates are brought.
        augment: move training windows at random.
        drop_last: leave out what is left at the end of a file.

    Raises:
        FileNotFoundError, ValueError: if there is no such folder, codec or size.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        length: int = 16000,
        eval_length: int | None = None,
        stride: int | None = None,
        codec: str | Codec = "mu_law",
        sample_rate: int = 16000,
        augment: bool = True,
        drop_last: bool = False,
    ) -> None:
        super().__init__(length, eval_length, stride, codec, sample_rate, augment, drop_last)
        self.root = root

    def files(self, split: str) -> list[Path]:
        """Files of a split, in natural order.

        Raises:
            FileNotFoundError: if there is no folder, or no file.
            ValueError: if there are too few files for three splits, or folders for some only.
        """
        folder = folder_of(self.root)
        present = [name for name in SPLITS if (folder / name).is_dir()]
        if present and len(present) < len(SPLITS):
            lacking = next(name for name in SPLITS if name not in present)
            raise ValueError(
                f"{folder.resolve()} has a folder {present[0]} and no folder {lacking}; make all of train, val and "
                "test, or none of them"
            )
        if present:
            return sound_files(folder / split)
        found = sound_files(folder)
        first, second = int(TRAIN * len(found)), int(VAL * len(found))
        chosen = {"train": found[:first], "val": found[first:second], "test": found[second:]}
        if not all(chosen.values()):
            raise ValueError(
                f"{folder.resolve()} has {len(found)} sound files, too few to give 6 % of them to validation and to "
                "test; cut them into 17 or more, or sort them into folders train, val and test"
            )
        return chosen[split]

    def waves(self, split: str) -> list[Tensor]:
        return [read_mono(file, self.sample_rate) for file in self.files(split)]


class Recipe(NamedTuple):
    """Of a data set of SaShiMi.

    Attributes:
        codec: of the published figures.
        length: samples of a window.
        drop_last: whether what is left at the end of a file is left out.
    """

    codec: str
    length: int
    drop_last: bool


MUSIC = {
    "beethoven": Recipe("linear_s4", 128_000, True),
    "sc09": Recipe("mu_law_s4", 16_000, False),
    "youtubemix": Recipe("mu_law_s4", 131_072, True),
}
"""Data sets by the names of the hub's `krandiash/NAME`, with the codec and the windows of the published figures."""


class Music(AudioFolder):
    """Windows of Beethoven's sonatas, of an evening of piano music, or of spoken digits, as in SaShiMi's experiments.

    Beethoven and YouTubeMix are folders of WAV files at 16 kHz, split in natural order; SC09 has a folder for each
    digit, `validation_list.txt` and `testing_list.txt`. Each window is a clip: the authors' codec stretches it to the
    whole range, whose bits are those of their tables. Source: Goel et al. (arXiv 2202.09729), section 5 and appendix C.

    Args:
        name: `beethoven`, `youtubemix` or `sc09`.
        root: the folder of the hub's data set, unpacked.
        length: samples of a window; that of the experiments unless given.
        codec: likewise.
        augment: move training windows at random, which the authors do not.

    Raises:
        FileNotFoundError, ValueError: if there is no such name, folder, codec or size.
    """

    def __init__(
        self,
        name: str = "youtubemix",
        root: str | os.PathLike[str] | None = None,
        length: int | None = None,
        codec: str | Codec | None = None,
        augment: bool = False,
    ) -> None:
        check_near("data.name", name, MUSIC)
        recipe = MUSIC[name]
        super().__init__(
            root,
            recipe.length if length is None else length,
            codec=recipe.codec if codec is None else codec,
            augment=augment,
            drop_last=recipe.drop_last,
        )
        self.name = name

    def files(self, split: str) -> list[Path]:
        if self.name == "sc09":
            return [file for file, _ in files_of(folder_of(self.root), DIGITS, split)]
        return super().files(split)


def audio_folder(split: str, *, root: str | os.PathLike[str], length: int, **options: Any) -> CodeWindows:
    """Windows of `length` samples of one split of a folder of sound files.

    Args:
        split: `train`, `val` or `test`.
        root: the folder.
        length: samples of a window.
        options: `stride`, `codec`, `sample_rate` and `drop_last`, see `AudioFolder`; windows lie where they are.

    Raises:
        FileNotFoundError, ValueError: as `AudioFolder`.
    """
    check_split(split)
    return AudioFolder(root, length, length, augment=False, **options).split(split)


def music(
    split: str, *, name: str = "youtubemix", root: str | os.PathLike[str], length: int | None = None, **options: Any
) -> CodeWindows:
    """Windows of one split of `youtubemix`, `beethoven` or `sc09`.

    Args:
        split: `train`, `val` or `test`.
        name: of the data set.
        root: its folder.
        length: samples of a window; that of the experiments unless given.
        options: `codec`, see `Music`.

    Raises:
        FileNotFoundError, ValueError: as `Music`.
    """
    check_split(split)
    return Music(name, root, length, **options).split(split)
