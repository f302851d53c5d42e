"""Waves as codes to be predicted one after the other: windows of pieces, each beginning from silence."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from sinuous.audio import codecs
from sinuous.audio.codecs import Codec
from sinuous.audio.io import read_audio
from sinuous.core.checks import check_sizes
from sinuous.core.data import check_split
from sinuous.core.tasks.language_modelling import IGNORED

Example = tuple[Tensor, Tensor]


class CodeWindows(Dataset[Example]):
    """Windows of waves as `(codes, next codes)`, both int64 and of one length.

    A window stands alone, as a model meets it that begins there: its first code is that of silence, and what is to be
    predicted is the window itself,

        codes = (silence, c_1, …, c_{T-1}),   next codes = (c_1, …, c_T).

    The last window of a wave is as long as what is left of it.

    Args:
        waves: `[T]` each.
        codec: that encodes a window.
        length: samples of a window, at most.
        stride: samples from one window to the next; `length` uses each sample once as a target.
        moved: begin each window up to `stride` later, drawn from torch's generator, but so that it is whole where the
            wave is long enough.
        whole: leave out windows shorter than `length`.

    Raises:
        ValueError: if a size is less than 1, or there is no window.
    """

    def __init__(
        self,
        waves: Sequence[Tensor],
        codec: Codec,
        length: int,
        stride: int | None = None,
        moved: bool = False,
        whole: bool = False,
    ) -> None:
        stride = length if stride is None else stride
        check_sizes(length=length, stride=stride)
        self.waves, self.codec, self.length, self.stride, self.moved = waves, codec, length, stride, moved
        self.places = [
            (number, start)
            for number, wave in enumerate(waves)
            for start in range(0, max(len(wave) - length, 0) + stride, stride)
            if start < len(wave) and not (whole and start + length > len(wave))
        ]
        if not self.places:
            longest = max(map(len, waves), default=0)
            raise ValueError(
                f"there is no window of {length:,} samples, as the longest wave has {longest:,}; give a smaller length"
            )

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Example:
        number, start = self.places[index]
        wave = self.waves[number]
        if self.moved:
            start = min(start + int(torch.randint(self.stride, ())), max(len(wave) - self.length, 0))
        targets = self.codec.encode(wave[start : start + self.length])
        return F.pad(targets[:-1], (1, 0), value=self.codec.silence), targets


class CodedAudio:
    """Data of coded sound; a subclass says by `waves` what each split has.

    Args:
        length: samples of a training window.
        eval_length: samples of a window that is scored; of longer waves the windows are scored each from its own start.
        stride: samples between training windows, their length unless given.
        codec: a codec's name, or one made by `sinuous.audio.codecs.codec`.
        sample_rate: to which files of other rates are brought.
        augment: move training windows at random.
        drop_last: leave out windows shorter than a whole one.

    Attributes:
        codec: that encodes.
        codes_per_sample: of it.
        vocab_size: number of codes.
        unit: what bits are counted by, `sample`.

    Raises:
        ValueError: if a size is less than 1, or there is no such codec.
    """

    noun = "windows"
    unit = "sample"

    def __init__(
        self,
        length: int,
        eval_length: int | None,
        stride: int | None,
        codec: str | Codec,
        sample_rate: int,
        augment: bool,
        drop_last: bool = False,
    ) -> None:
        eval_length = length if eval_length is None else eval_length
        given = {"length": length, "eval_length": eval_length, "stride": stride, "sample_rate": sample_rate}
        check_sizes(**{f"data.{name}": size for name, size in given.items() if size is not None})
        self.length, self.eval_length, self.stride, self.sample_rate = length, eval_length, stride, sample_rate
        self.codec = codec if isinstance(codec, Codec) else codecs.codec(codec)
        self.augment, self.drop_last = augment, drop_last

    @property
    def codes_per_sample(self) -> int:
        return self.codec.codes_per_sample

    @property
    def vocab_size(self) -> int:
        return self.codec.vocab_size

    def waves(self, split: str) -> list[Tensor]:
        """Waves `[T]` of `train`, `val` or `test`, at `sample_rate`."""
        raise NotImplementedError

    def split(self, name: str) -> CodeWindows:
        """Windows of `train`, `val` or `test`.

        Raises:
            FileNotFoundError: if files are missing.
            ValueError: for an unknown split, files that cannot be read, or waves that are too short.
        """
        training = check_split(name) == "train"
        return CodeWindows(
            self.waves(name),
            self.codec,
            self.length if training else self.eval_length,
            self.stride if training else None,
            moved=training and self.augment,
            whole=self.drop_last,
        )

    def collate(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Windows as rows; behind the end of shorter ones stands silence that does not count."""
        longest = max(len(codes) for codes, _ in examples)
        return (
            torch.stack([F.pad(codes, (0, longest - len(codes)), value=self.codec.silence) for codes, _ in examples]),
            torch.stack([F.pad(targets, (0, longest - len(targets)), value=IGNORED) for _, targets in examples]),
        )

    def facts(self) -> dict[str, Any]:
        """What weights trained on these sounds remember of them."""
        options: dict[str, Any] = dataclasses.asdict(self.codec) if dataclasses.is_dataclass(self.codec) else {}
        rate = {"sample_rate": self.sample_rate, "vocab_size": self.vocab_size}
        return {"unit": self.unit, "codec": self.codec.name, **options, **rate}

    def model_options(self) -> dict[str, Any]:
        """Keyword arguments of any model of these codes."""
        return {"vocab_size": self.vocab_size}

    def example(self) -> Tensor:
        return torch.full((1, self.length * self.codes_per_sample), self.codec.silence)


def read_mono(path: str | os.PathLike[str] | Path, sample_rate: int) -> Tensor:
    """The wave `[T]` of a file: the mean of its channels, at `sample_rate`."""
    return read_audio(path, sample_rate=sample_rate, mono=True)[0][0]
