"""Prompts of telephone systems in five languages, each spoken by one voice: Debian's asterisk-core-sounds-*-wav.

The packages hold some 560 recordings each at 8 kHz (en, es, fr: CC-BY-SA-3.0; it, ru: CC-BY-3.0). A recording's split
is given by its name without the voice, so that what is said in one language never trains for another: crc32(name) mod
10, below 8 trains, 8 validates, 9 tests. As a language has one voice, this is telling voices as much as languages.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

from sinuous.audio.datasets.clips import Change, Clips, LabelledAudio
from sinuous.audio.datasets.files import sound_files
from sinuous.audio.io import audio_info, read_audio
from sinuous.core.data import check_split, folder_of

LANGUAGES = ("en", "es", "fr", "it", "ru")
RATE = 8000
SHORTEST, QUIETEST = 0.2, 0.01
"""Seconds of the shortest recording that counts, and the peak of the quietest."""


def split_of(name: str) -> str:
    """The split of a prompt, by its path below the folder of the voice, such as `digits/1.wav`."""
    return ("val", "test")[number - 8] if (number := zlib.crc32(name.encode()) % 10) >= 8 else "train"


class Voices(LabelledAudio):
    """Prompts with the number of their language, `(waves [B, 1, T], classes [B])`.

    Left out are those of silence, shorter than 0.2 s, or that never reach a hundredth of full scale.

    Args:
        root: a folder with the unpacked packages: below it, folders such as `en_US_f_Allison`, one for each language.
        sample_rate: to which files of other rates are brought.
        seconds: of longer prompts the middle; None takes all.
        augment: in training any place instead of the middle.
        change: of training's waves, see `LabelledAudio`.

    Raises:
        ValueError: if a number is out of its range.
    """

    classes = LANGUAGES

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        sample_rate: int = RATE,
        seconds: float | None = None,
        augment: bool = True,
        change: Change | None = None,
    ) -> None:
        super().__init__(sample_rate, seconds, augment, change)
        self.root = root
        self._prompts: list[tuple[Path, str, int, int]] | None = None

    def prompts(self) -> list[tuple[Path, str, int, int]]:
        """File, split, class and samples of each prompt that counts.

        Raises:
            FileNotFoundError: if there is no folder, or none of a language in it.
            ValueError: if a file cannot be read.
        """
        if self._prompts is None:
            folder = folder_of(self.root)
            self._prompts = []
            for label, language in enumerate(LANGUAGES):
                voices = sorted(path for path in folder.rglob(f"{language}_*_*") if path.is_dir())
                if not voices:
                    raise FileNotFoundError(
                        f"{folder.resolve()} and the folders below it have no voice {language}_*, such as "
                        f"sounds/en_US_f_Allison; unpack asterisk-core-sounds-{language}-wav there (dpkg -x)"
                    )
                for file in sound_files(voices[0], "prompts"):
                    name = file.relative_to(voices[0]).as_posix()
                    samples = 0 if name.startswith("silence/") else self._samples(file)
                    if samples:
                        self._prompts.append((file, split_of(name), label, samples))
        return self._prompts

    def _samples(self, file: Path) -> int:
        """Samples of a prompt, 0 if it does not count."""
        info = audio_info(file)
        if info.seconds < SHORTEST:  # a few of the packages hold nothing
            return 0
        wave, rate = read_audio(file, mono=True)
        if float(wave.abs().max()) < QUIETEST:
            return 0
        return -(-wave.shape[1] * self.sample_rate // rate)

    def split(self, name: str) -> Clips:
        """Prompts of `train`, `val` or `test`; raises as `prompts`, and ValueError for an unknown split."""
        check_split(name)
        chosen = [prompt for prompt in self.prompts() if prompt[1] == name]
        files, _, labels, lengths = (list(column) for column in zip(*chosen, strict=True))
        return self.clips(name, files, labels, lengths)


def voices(split: str, *, root: str | os.PathLike[str], sample_rate: int = RATE, seconds: float | None = None) -> Clips:
    """Prompts of one split as `(wave [1, T], class)`, see `Voices`."""
    return Voices(root, sample_rate, seconds, augment=False).split(split)
