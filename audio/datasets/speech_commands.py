"""Speech Commands, version 2: one of 35 spoken words in a second of sound (Warden, arXiv 1804.03209)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from sinuous.audio.datasets.clips import Change, Clips, LabelledAudio
from sinuous.audio.datasets.files import sound_files
from sinuous.core.data import check_split, folder_of

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = (
    *("backward", "bed", "bird", "cat", "dog", "down", "eight", "five", "follow", "forward", "four", "go", "happy"),
    *("house", "learn", "left", "marvin", "nine", "no", "off", "on", "one", "right", "seven", "sheila", "six"),
    *("stop", "three", "tree", "two", "up", "visual", "wow", "yes", "zero"),
)
LISTS = {"val": "validation_list.txt", "test": "testing_list.txt"}


def files_of(folder: Path, classes: Sequence[str], split: str) -> list[tuple[Path, int]]:
    """Files of a split with the numbers of their classes: those in the official lists, and for `train` all others.

    Raises:
        FileNotFoundError: if a list, the folder of a class or a listed file is missing, or a folder is empty.
    """
    listed = {name: _listed(folder / file) for name, file in LISTS.items()}
    held_out = listed["val"] | listed["test"]
    found: list[tuple[Path, int]] = []
    for label, word in enumerate(classes):
        if not (folder / word).is_dir():
            raise FileNotFoundError(
                f"{folder.resolve()} has no folder {word!r}; words are expected in folders of their names, as in the "
                "unpacked archive of Speech Commands"
            )
        files = {f"{word}/{file.name}": file for file in sound_files(folder / word)}
        if split == "train":
            names = [name for name in files if name not in held_out]
        else:
            names = sorted(name for name in listed[split] if name.startswith(f"{word}/"))
        if lacking := [name for name in names if name not in files]:
            raise FileNotFoundError(
                f"{folder.resolve()} has no {lacking[0]}, which {LISTS[split]} lists; unpack the archive anew"
            )
        found += [(files[name], label) for name in names]
    return found


def _listed(path: Path) -> set[str]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no list {path.resolve()}; give the folder of the unpacked archive")
    return set(path.read_text(encoding="utf-8").split())


class SpeechCommands(LabelledAudio):
    """Spoken words, `(waves [B, 1, T], classes [B])`, split by the official lists; background noise is no class.

    Args:
        root: the folder of the unpacked archive.
        digits: only the ten digits.
        sample_rate: to which files of other rates are brought.
        seconds: of longer sounds the middle; the recordings last a second or less.
        augment: in training any place instead of the middle.
        change: of training's waves, see `LabelledAudio`.

    Raises:
        ValueError: if a number is out of its range.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        digits: bool = False,
        sample_rate: int = 16000,
        seconds: float | None = 1.0,
        augment: bool = True,
        change: Change | None = None,
    ) -> None:
        super().__init__(sample_rate, seconds, augment, change)
        self.root, self.classes = root, DIGITS if digits else WORDS

    def split(self, name: str) -> Clips:
        """Words of `train`, `val` or `test`.

        Raises:
            FileNotFoundError: if there is no folder, or it lacks lists, words or files.
            ValueError: for an unknown split.
        """
        found = files_of(folder_of(self.root), self.classes, check_split(name))
        return self.clips(name, [file for file, _ in found], [label for _, label in found])


def speech_commands(
    split: str, *, root: str | os.PathLike[str], digits: bool = False, sample_rate: int = 16000
) -> Clips:
    """Spoken words of one split as `(wave [1, T], class)`, see `SpeechCommands`."""
    return SpeechCommands(root, digits, sample_rate, seconds=None).split(split)
