"""Windows of waves as they are, for models that make or change waves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from sinuous.audio.datasets.coded import CodedAudio
from sinuous.audio.datasets.folders import Music
from sinuous.audio.datasets.hold_music import HoldMusic
from sinuous.core.checks import check_choice, check_sizes
from sinuous.core.data import check_split

SOURCES = ("hold_music", "sc09", "beethoven", "youtubemix")


class WaveSpans(Dataset[tuple[Tensor, int]]):
    """`(wave [1, length], 0)`: windows of waves that follow each other, those that are left over being left out.

    Args:
        waves: `[T]` each; shorter ones than a window end in silence.
        length: samples of a window.
        moved: begin each up to a window later, drawn from torch's generator, where the wave is long enough.
    """

    def __init__(self, waves: Sequence[Tensor], length: int, moved: bool = False) -> None:
        self.waves, self.length, self.moved = waves, length, moved
        self.places = [
            (number, start * length)
            for number, wave in enumerate(waves)
            for start in range(max(1, len(wave) // length))
        ]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        number, start = self.places[index]
        wave = self.waves[number]
        if self.moved:
            start = min(start + int(torch.randint(self.length, ())), max(len(wave) - self.length, 0))
        span = wave[start : start + self.length]
        return F.pad(span, (0, self.length - len(span))).unsqueeze(0), 0


class WaveWindows:
    """Windows of one of the sets of music or of SC09, `(waves [B, 1, length], zeros [B])`.

    Args:
        name: `hold_music`, `sc09`, `beethoven` or `youtubemix`.
        length: samples of a window.
        root: folder of the set; None takes the bundled hold music.
        augment: move training windows at random.

    Raises:
        ValueError: if there is no such set, or the length is less than 1.
    """

    noun = "windows"

    def __init__(
        self,
        name: str = "hold_music",
        length: int = 8192,
        root: str | os.PathLike[str] | None = None,
        augment: bool = True,
    ) -> None:
        check_choice("data.name", name, SOURCES)
        check_sizes(**{"data.length": length})
        self.length, self.augment = length, augment
        self.source: CodedAudio = HoldMusic(length, root=root) if name == "hold_music" else Music(name, root=root)

    @property
    def sample_rate(self) -> int:
        return self.source.sample_rate

    def split(self, name: str) -> WaveSpans:
        """Windows of `train`, `val` or `test`."""
        return WaveSpans(self.source.waves(check_split(name)), self.length, self.augment and name == "train")

    def facts(self) -> dict[str, Any]:
        """What weights trained on these waves remember of them."""
        return {"sample_rate": self.sample_rate}

    def example(self) -> Tensor:
        return torch.zeros(1, 1, self.length)
