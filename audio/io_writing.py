"""Writing files of sound: whole ones, or none."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from sinuous.audio.io_reading import BLOCK, FilePath
from sinuous.core.checks import check_choice, check_sizes, described
from sinuous.core.extras import package
from sinuous.core.files import ended_in_order

FORMATS = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".ogg": ("OGG", "VORBIS"),
    ".opus": ("OGG", "OPUS"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
    ".aiff": ("AIFF", "PCM_16"),
    ".aif": ("AIFF", "PCM_16"),
}
"""libsndfile's format and usual subtype for the endings of names."""
OPUS_RATES = (8000, 12000, 16000, 24000, 48000)


def write_audio(path: FilePath, wave: Tensor, rate: int, *, subtype: str | None = None) -> Path:
    """Write a file of sound in the format that its name ends with: wav, flac, ogg, opus, mp3 or aiff.

    A file appears under its name when it is whole. Samples beyond ±1 are clipped by formats of whole numbers.

    Args:
        path: of the file; one that is there is replaced.
        wave: `[C, T]`, or `[T]` for one channel.
        rate: samples per second.
        subtype: soundfile's name of how samples are kept, as `PCM_24` or `FLOAT`; None takes 16 bits for WAV, FLAC and
            AIFF.

    Returns:
        The path.

    Raises:
        ValueError: if the ending, rate, channels or subtype are none that can be written, or samples are no numbers.
        OSError: if the file cannot be written to its end, as on a full disk; nothing is left of it then.
        ModuleNotFoundError: if the extra `audio` is missing.
    """
    wave = _channels_first(wave)
    with AudioWriter(path, rate, wave.shape[0], subtype=subtype) as writer:
        writer.write(wave)
    return writer.path


class AudioWriter:
    """Writes a file of sound part by part; it appears under its name when it is closed, whole and playable.

        with AudioWriter("song.wav", 16000) as writer:
            for part in parts:
                writer.write(part)

    An exception within `with`, such as Ctrl-C, closes the file with what has been written, and so does SIGTERM, which
    ends the process then; if that is nothing, or the disk is full, no file is left.

    Args:
        path: as of `write_audio`.
        rate: samples per second.
        channels: how many.
        subtype: as of `write_audio`.

    Attributes:
        path: of the file.
        frames: samples of each channel that have been written.

    Raises:
        ValueError, OSError, ModuleNotFoundError: as `write_audio`.
    """

    def __init__(self, path: FilePath, rate: int, channels: int = 1, *, subtype: str | None = None) -> None:
        check_sizes(rate=rate, channels=channels)
        if not isinstance(path, str | os.PathLike):
            raise ValueError(f"path must be the name of a file (got {described(path)})")
        self.path, self.rate, self.channels, self.frames = Path(path), rate, channels, 0
        self._soundfile = package("soundfile", "audio")
        self._format, usual = self._format_of()
        self._subtype = usual if subtype is None else self._known(subtype)
        if self._subtype == "OPUS" and rate not in OPUS_RATES:
            raise ValueError(f"rate must be one of {', '.join(map(str, OPUS_RATES))} for Opus (got {rate}): {path}")
        # Beside the file, so that one step puts it in its place; its name is this process's own.
        whole = self.path.resolve()
        self._part = whole.with_name(f".{whole.stem}.{os.getpid()}.part{whole.suffix}")
        self._file = self._open()
        self._order = contextlib.ExitStack()

    def _format_of(self) -> tuple[str, str]:
        if self.path.is_dir():
            raise ValueError(f"{self.path} is a folder; give the name of a file in it")
        if self.path.suffix.lower() not in FORMATS:
            raise ValueError(f"the name of a file of sound must end with {', '.join(FORMATS)} (got {self.path})")
        return FORMATS[self.path.suffix.lower()]

    def _known(self, subtype: str) -> str:
        """A subtype that the format has."""
        fitting = [s for s in self._soundfile.available_subtypes(self._format) if (s == "OPUS") == self._is_opus()]
        check_choice(f"subtype of {self.path.name}", subtype, fitting)
        return subtype

    def _is_opus(self) -> bool:
        return self.path.suffix.lower() == ".opus"

    def _open(self) -> Any:
        folder = self._part.parent
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder} to write {self.path.name} in; make it first")
        try:
            return self._soundfile.SoundFile(
                os.fspath(self._part), "w", self.rate, self.channels, self._subtype, format=self._format
            )
        except self._soundfile.SoundFileError as error:
            unwritten = self._unwritten()
            self._remove()
            if isinstance(unwritten, PermissionError) or not shutil.disk_usage(folder).free:
                raise unwritten from error
            said = getattr(error, "error_string", str(error)).rstrip(".")
            raise ValueError(
                f"{self.path} cannot have {self.channels} channels of {self._subtype} at {self.rate:,} Hz ({said}); "
                "choose another rate, subtype or format"
            ) from error

    def write(self, wave: Tensor) -> None:
        """Append a wave, `[C, T]`, or `[T]` for one channel.

        Raises:
            ValueError: if it has another number of channels, or samples that are no finite numbers.
            OSError: if it cannot be written; the file is removed then.
        """
        wave = _channels_first(wave)
        if wave.shape[0] != self.channels:
            raise ValueError(f"wave must have {self.channels} channels, [C, T] (got {described(wave)})")
        if not bool(wave.isfinite().all()):
            raise ValueError(f"wave must have finite numbers, to be written to {self.path} (got NaN or inf)")
        if self._file is None:
            raise ValueError(f"{self.path} is closed; make another AudioWriter")
        for block in wave.detach().to("cpu", torch.float32).split(BLOCK, 1):
            try:
                self._file.write(block.mT.contiguous().numpy())
            except (self._soundfile.SoundFileError, AssertionError, OSError) as error:
                self._give_up(error)
            self.frames += block.shape[1]

    def close(self) -> None:
        """Finish the file and put it in its place.

        Raises:
            OSError: if it cannot be written; it is removed then.
        """
        if self._file is None:
            return
        try:
            self._file.close()
            self._check_written()
            if self.frames:
                os.replace(self._part, self.path.resolve())
        except (self._soundfile.SoundFileError, OSError) as error:
            self._give_up(error)
        except BaseException:  # told to end while it is finished
            self._discard()
            raise
        self._file = None
        if not self.frames:
            self._remove()
            raise ValueError(f"no sound was given to be written to {self.path}; give a wave with samples")

    def _check_written(self) -> None:
        """Read the length back: libsndfile tells nobody if the header or the last page did not fit on the disk."""
        if self._soundfile.info(os.fspath(self._part)).frames < self.frames:
            raise OSError("it is shorter than what was written")

    def __enter__(self) -> AudioWriter:
        self._order.enter_context(ended_in_order())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._order:
            if error is not None and not self.frames:
                self._discard()
            self.close()

    def _discard(self) -> None:
        with contextlib.suppress(self._soundfile.SoundFileError, OSError):
            if self._file is not None:
                self._file.close()
        self._file = None
        self._remove()

    def _give_up(self, error: Exception) -> None:
        sentence = self._unwritten()
        self._discard()
        raise sentence from error

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            self._part.unlink(missing_ok=True)

    def _unwritten(self) -> OSError:
        folder = self._part.parent
        if not os.access(folder, os.W_OK):
            return PermissionError(f"{self.path} cannot be written: {folder} does not allow it; choose another folder")
        free = shutil.disk_usage(folder).free / 1e6
        return OSError(
            f"{self.path} could not be written to its end and was left out, with {free:,.1f} MB free on its disk; make "
            "room, or choose another folder"
        )


def _channels_first(wave: Tensor) -> Tensor:
    if not isinstance(wave, Tensor) or wave.ndim not in (1, 2) or not wave.is_floating_point():
        raise ValueError(f"wave must be a tensor of floats, [C, T] or [T] (got {described(wave)})")
    return wave[None] if wave.ndim == 1 else wave
