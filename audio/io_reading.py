"""Reading files of sound, block by block to their end: the length that a header gives is a promise."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sinuous.audio.resampling import resample
from sinuous.core.checks import check_range, check_sizes, described
from sinuous.core.extras import package

BLOCK = 65536
"""Frames read or written at once."""
FilePath = str | os.PathLike[str]


class AudioInfo(NamedTuple):
    """Facts about a file of sound.

    Attributes:
        sample_rate: samples per second, of each channel.
        channels: how many it has.
        frames: samples of each channel; those of an MP3 are counted, as its header only guesses.
        seconds: frames / sample_rate.
        format: of the file, as `WAV`, `FLAC`, `OGG`, `MP3` or `AIFF`.
        subtype: how samples are kept in it, as `PCM_16`, `FLOAT` or `VORBIS`.
    """

    sample_rate: int
    channels: int
    frames: int
    seconds: float
    format: str
    subtype: str


def read_audio(
    path: FilePath,
    *,
    sample_rate: int | None = None,
    mono: bool = False,
    start: float = 0.0,
    seconds: float | None = None,
) -> tuple[Tensor, int]:
    """Read a file of sound, or a part of it.

    Samples of whole numbers are divided by their full scale, so that they lie in [-1, 1); those of floats, and of lossy
    formats, may lie beyond.

    Args:
        path: of a WAV, FLAC, Ogg, MP3 or AIFF file.
        sample_rate: samples per second of the result; None keeps the file's. See `resample`.
        mono: the mean of the channels, instead of all of them.
        start: seconds before the part.
        seconds: of the part; None reads to the end, and so does more than there is.

    Returns:
        wave: float32 `[C, T]`, T at least 1.
        rate: its samples per second.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is a folder, empty or cut off, no sound that soundfile reads, without a sample in the part, or
            has samples that are no numbers; if an argument is out of its range.
        ModuleNotFoundError: if the extra `audio` is missing.
    """
    check_range(0, float("inf"), start=start, seconds=seconds)
    check_sizes(**({} if sample_rate is None else {"sample_rate": sample_rate}))
    with opened(path) as file:
        rate = int(file.samplerate)
        first = _frames_in(start, rate)
        most = None if seconds is None else _frames_in(seconds, rate)
        parts = [torch.from_numpy(block.T.copy()) for block in _part(file, first, most, mono)]
        if not parts:
            raise ValueError(_without_sound(path, file, start, most))
    wave = torch.cat(parts, 1)
    if not bool(wave.isfinite().all()):
        place = int((~wave.isfinite().all(0)).nonzero()[0])
        raise ValueError(
            f"{path} has samples that are no finite numbers, first at {start + place / rate:.3f} s; write it anew "
            "without them, or read a part before them (seconds=)"
        )
    if sample_rate is None or sample_rate == rate:
        return wave, rate
    try:
        return resample(wave, rate, sample_rate), sample_rate
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def audio_info(path: FilePath) -> AudioInfo:
    """Tell rate, channels, length and format of a file of sound; its header is read, and all of an MP3.

    Raises:
        FileNotFoundError, ValueError, ModuleNotFoundError: as `read_audio`.
    """
    with opened(path) as file:
        frames = int(file.frames)
        if file.format == "MP3":
            frames = sum(len(block) for block in _blocks(file))
        rate = int(file.samplerate)
        return AudioInfo(rate, int(file.channels), frames, frames / rate, str(file.format), str(file.subtype))


@contextlib.contextmanager
def opened(path: FilePath) -> Iterator[Any]:
    """Open a file of sound with soundfile; what goes wrong while it is read becomes a sentence that names it.

    Raises:
        FileNotFoundError, ValueError, ModuleNotFoundError: as `read_audio`.
    """
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"path must be the name of a file (got {described(path)})")
    soundfile = package("soundfile", "audio")
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder; give a file of sound")
    try:
        raw = open(path, "rb")  # noqa: SIM115 closed below
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be opened ({error.strerror}); give a file that may be read") from error
    with raw:
        if not raw.peek(1):
            raise ValueError(f"{path} is empty; give a file of sound")
    try:
        with soundfile.SoundFile(os.fspath(path)) as file:
            file.seekable = lambda: False  # or soundfile seeks after each block, which in an MP3 lands elsewhere
            yield file
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: of a name that ends in .raw
        said = " ".join(getattr(error, "error_string", str(error)).split()).rstrip(".")
        raise ValueError(
            f"{path} is no sound that can be read, or is damaged or cut off ({said}); give a WAV, FLAC, Ogg, MP3 or "
            "AIFF file"
        ) from error


def _frames_in(seconds: float, rate: int) -> int:
    return round(min(seconds * rate, 2.0**62))


def _part(file: Any, first: int, most: int | None, mono: bool) -> Iterator[NDArray[np.float32]]:
    """Blocks `[frames, C]` from frame `first` on, `most` frames in all."""
    if first and file.format != "MP3":
        file.seek(min(first, int(file.frames)))
        first = 0
    for block in _blocks(file):  # of an MP3 what comes before is read and left out
        if first >= len(block):
            first -= len(block)
            continue
        block, first = block[first:], 0
        if most is not None:
            block = block[:most]
            most -= len(block)
        if len(block):
            yield block.mean(1, keepdims=True, dtype=np.float32) if mono else block
        if most == 0:
            return


def _blocks(file: Any) -> Iterator[NDArray[np.float32]]:
    """Blocks `[frames, C]` from where the file stands to where nothing more comes."""
    while True:
        block = np.empty((BLOCK, file.channels), np.float32)
        count = file.buffer_read_into(block.data.cast("B"), "float32")
        if not count:
            return
        yield block[:count]


def _without_sound(path: FilePath, file: Any, start: float, most: int | None) -> str:
    if most == 0:
        return f"seconds must be long enough for a sample of {path} at {file.samplerate:,} Hz; give more"
    if start and file.frames:
        length = file.frames / file.samplerate
        return f"{path} has no sound from {start:g} s on, it lasts {length:.3f} s; give a smaller start"
    return f"{path} has no sound: its header promises none, as of a recording that was never finished; give another"
