"""Single notes of 128 instruments in 16 families, rendered from the sound font FluidR3 (MIT) by tools/audio_samples.py.

The families are those of General MIDI, eight instruments each. Whole instruments are held out: of each family the
fourth validates, the second and the seventh test. What is heard in training is thus another instrument of the family.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from sinuous.audio.datasets.clips import Change, Clips, LabelledAudio
from sinuous.audio.datasets.coded import read_mono
from sinuous.audio.datasets.files import source_folder
from sinuous.core.data import check_split

FAMILIES = (
    "piano",
    "chromatic percussion",
    "organ",
    "guitar",
    "bass",
    "strings",
    "ensemble",
    "brass",
    "reed",
    "pipe",
    "synth lead",
    "synth pad",
    "synth effects",
    "ethnic",
    "percussive",
    "sound effects",
)
PER_FAMILY = 8
VAL, TEST = (3,), (1, 6)
"""Places in their family, from 0, of the instruments that are held out."""
LIST = "notes.csv"
COLUMNS = ("file", "start", "seconds", "program", "pitch", "velocity")
RATE = 16000


class Note(NamedTuple):
    """Where a note lies and what it is.

    Attributes:
        file: name of its file.
        start: seconds from the beginning of the file.
        seconds: of the note.
        program: number of the instrument in General MIDI, from 0.
        pitch: in MIDI's half tones; 69 is 440 Hz.
        velocity: how hard it is struck, up to 127.
    """

    file: str
    start: float
    seconds: float
    program: int
    pitch: int
    velocity: int


def split_of(program: int) -> str:
    """The split of the instrument with this number."""
    place = program % PER_FAMILY
    return "val" if place in VAL else "test" if place in TEST else "train"


def read_list(folder: Path) -> list[Note]:
    """The notes that `notes.csv` of a folder lists.

    Raises:
        FileNotFoundError: if there is no list, or a file is missing that it names.
        ValueError: if a line is no note.
    """
    path = folder / LIST
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no list of notes {path.resolve()}; render notes into the folder with tools/audio_samples.py"
        )
    found: list[Note] = []
    with path.open(encoding="utf-8", newline="") as lines:
        for number, row in enumerate(csv.DictReader(lines), 2):
            try:
                numbers = {name: float(row[name]) for name in COLUMNS[1:]}
                note = Note(
                    row["file"],
                    numbers["start"],
                    numbers["seconds"],
                    *(int(numbers[name]) for name in COLUMNS[3:]),
                )
                whole = 0 <= note.program < PER_FAMILY * len(FAMILIES) and note.start >= 0 and note.seconds > 0
            except (KeyError, TypeError, ValueError):
                whole = False
            if not whole:
                raise ValueError(f"{path}, line {number}: a note must have {', '.join(COLUMNS)}; render the notes anew")
            found.append(note)
    if not found:
        raise ValueError(f"{path} lists no note; render the notes anew")
    return found


class Notes(LabelledAudio):
    """Notes with the number of the instrument's family, `(waves [B, 1, T], classes [B])`.

    Args:
        source: `bundled` or `folder`; None takes the folder where `root` is given.
        root: a folder that tools/audio_samples.py rendered; None takes the bundled notes.
        sample_rate: to which files of other rates are brought.
        seconds: of longer notes the middle; None takes all.
        augment: in training any place instead of the middle.
        change: of training's waves, see `LabelledAudio`.

    Raises:
        ValueError: if a number is out of its range.
    """

    noun = "notes"
    classes = FAMILIES

    def __init__(
        self,
        source: str | None = None,
        root: str | os.PathLike[str] | None = None,
        sample_rate: int = RATE,
        seconds: float | None = None,
        augment: bool = True,
        change: Change | None = None,
    ) -> None:
        super().__init__(sample_rate, seconds, augment, change)
        self.source, self.root = source, root
        self._notes: list[tuple[Note, Tensor]] | None = None

    def waves(self) -> list[tuple[Note, Tensor]]:
        """All notes with their waves `[1, T]`.

        Raises:
            FileNotFoundError, ValueError: as `read_list`; also if a file ends before a note does.
        """
        if self._notes is None:
            folder = source_folder(self.source, self.root, "notes")
            listed = read_list(folder)
            files = {name: read_mono(folder / name, self.sample_rate) for name in dict.fromkeys(n.file for n in listed)}
            self._notes = []
            for note in listed:
                start, length = (round(seconds * self.sample_rate) for seconds in (note.start, note.seconds))
                wave = files[note.file][start : start + length]
                if len(wave) < length:
                    raise ValueError(
                        f"{folder / note.file} ends before the note that {LIST} lists at {note.start:g} s; render the "
                        "notes anew"
                    )
                self._notes.append((note, wave[None]))
        return self._notes

    def split(self, name: str) -> Clips:
        """Notes of `train`, `val` or `test`; raises as `waves`, and ValueError for an unknown split."""
        check_split(name)
        chosen = [(wave, note.program // PER_FAMILY) for note, wave in self.waves() if split_of(note.program) == name]
        return self.clips(name, [wave for wave, _ in chosen], [label for _, label in chosen])


def notes(
    split: str,
    *,
    source: str | None = None,
    root: str | os.PathLike[str] | None = None,
    sample_rate: int = RATE,
    seconds: float | None = None,
) -> Clips:
    """Notes of one split as `(wave [1, T], family)`, see `Notes`."""
    return Notes(source, root, sample_rate, seconds, augment=False).split(split)
