"""Sounds with a class each, of different lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from sinuous.audio.io import audio_info, read_audio
from sinuous.core.checks import check_positive, check_sizes
from sinuous.core.data import check_split

Example = tuple[Tensor, int]
Change = Callable[[Tensor], Tensor]
"""Of a wave `[1, T]` to another; its class stays."""


class Clips(Dataset[Example]):
    """`(wave [1, T], class)` of files that are read when they are asked for, or of waves.

    Args:
        sounds: paths of files, or waves `[1, T]`.
        labels: of each.
        sample_rate: to which files of other rates are brought.
        samples: of a longer sound so many are taken; None takes all.
        moved: take them from a random place, drawn from torch's generator, instead of the middle.
        change: of what was taken, each time.
    """

    def __init__(
        self,
        sounds: Sequence[Path] | Sequence[Tensor],
        labels: Sequence[int],
        sample_rate: int,
        samples: int | None = None,
        moved: bool = False,
        change: Change | None = None,
    ) -> None:
        self.sounds, self.labels, self.sample_rate = sounds, labels, sample_rate
        self.samples, self.moved, self.change = samples, moved, change

    def __len__(self) -> int:
        return len(self.sounds)

    def __getitem__(self, index: int) -> Example:
        sound = self.sounds[index]
        wave = sound if isinstance(sound, Tensor) else read_audio(sound, sample_rate=self.sample_rate, mono=True)[0]
        extra = 0 if self.samples is None else max(wave.shape[1] - self.samples, 0)
        if extra:
            start = int(torch.randint(extra + 1, ())) if self.moved else extra // 2
            wave = wave[:, start : start + wave.shape[1] - extra]
        return wave if self.change is None else self.change(wave), int(self.labels[index])


class ClipsWithLengths(Clips):
    """`Clips` that knows the length of each before it is read, so that batches of training are of like lengths.

    Args:
        lengths: samples of each at `sample_rate`; the others are those of `Clips`.
    """

    def __init__(self, lengths: Sequence[int], *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        most = self.samples
        self.lengths = [length if most is None else min(length, most) for length in lengths]


class LabelledAudio:
    """Data of sounds with a class each; a subclass has `classes` and `split`.

    Args:
        sample_rate: to which files of other rates are brought.
        seconds: of longer sounds so much is taken, from the middle, in training from anywhere; None takes all.
        augment: whether in training the place is random, and what is taken is changed.
        change: how, such as `WaveChanges(pitch=5)`; None leaves it as it is.

    Raises:
        ValueError: if the rate is less than 1, or there are no seconds.
    """

    noun = "clips"
    classes: Sequence[str]

    def __init__(self, sample_rate: int, seconds: float | None, augment: bool, change: Change | None = None) -> None:
        check_sizes(**{"data.sample_rate": sample_rate})
        check_positive(**{"data.seconds": seconds})
        self.sample_rate, self.seconds, self.augment, self.change = sample_rate, seconds, augment, change

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def split(self, name: str) -> Clips:
        """Clips of `train`, `val` or `test`."""
        raise NotImplementedError

    def clips(self, name: str, sounds: Any, labels: Sequence[int], lengths: Sequence[int] | None = None) -> Clips:
        """The dataset of a split from its sounds."""
        training = check_split(name) == "train"
        samples = None if self.seconds is None else max(1, round(self.seconds * self.sample_rate))
        augmented = training and self.augment
        options: dict[str, Any] = {
            "samples": samples,
            "moved": augmented,
            "change": self.change if augmented else None,
        }
        if lengths is None:
            return Clips(sounds, labels, self.sample_rate, **options)
        return ClipsWithLengths(lengths, sounds, labels, self.sample_rate, **options)

    def collate(self, examples: Sequence[Example]) -> tuple[Any, ...]:
        """Waves `[B, 1, T]`, classes `[B]`, and `{"lengths": [B]}` where they differ; zeros are behind them."""
        lengths = [wave.shape[1] for wave, _ in examples]
        waves = torch.stack([F.pad(wave, (0, max(lengths) - wave.shape[1])) for wave, _ in examples])
        labels = torch.tensor([label for _, label in examples])
        return (waves, labels) if len({*lengths}) == 1 else (waves, labels, {"lengths": torch.tensor(lengths)})

    def facts(self) -> dict[str, Any]:
        """What weights trained on these sounds remember of them."""
        return {"classes": list(self.classes), "sample_rate": self.sample_rate}

    def model_options(self) -> dict[str, Any]:
        """Keyword arguments of any model of these sounds."""
        return {"num_classes": self.num_classes, "sample_rate": self.sample_rate}

    def example(self) -> Tensor:
        return torch.zeros(1, 1, round(self.sample_rate * (self.seconds or 1.0)))


def samples_of(path: Path, sample_rate: int) -> int:
    """Samples that a file has at `sample_rate`, by its header."""
    info = audio_info(path)
    return -(-info.frames * sample_rate // info.sample_rate)
