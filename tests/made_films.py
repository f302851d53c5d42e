"""Small films made with PyAV, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

SIDES = (48, 64)


def picture(number: int, sides: tuple[int, int] = SIDES) -> np.ndarray:
    """Picture `number`, RGB `[H, W, 3]`: noise, a level that grows with the number and a square that moves."""
    height, width = sides
    made = np.random.default_rng(number).integers(0, 30, (height, width, 3), np.uint8)
    made[:, :, 0] += np.uint8(number * 3 % 200)
    made[10:20, number % (width - 10) : number % (width - 10) + 10] = 255
    return made


def make_clip(
    path: Path,
    *,
    codec: str = "libx264",
    count: int = 48,
    ticks: Sequence[int] | None = None,
    rate: int = 24,
    group: int = 12,
    options: dict[str, str] | None = None,
    sides: tuple[int, int] = SIDES,
    pixel_aspect: Fraction | None = None,
    rotation: int | None = None,
    sound: float = 0.0,
    metadata: dict[str, str] | None = None,
    pixel_format: str = "yuv420p",
    pictures: Sequence[np.ndarray] | None = None,
) -> Path:
    """Write a film whose picture k begins at `ticks[k] / rate` seconds, with so many seconds of sound beside it."""
    av: Any = __import__("av")
    with av.open(str(path), "w") as container:
        container.metadata.update(metadata or {})
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *sides, pixel_format
        stream.time_base = stream.codec_context.time_base = Fraction(1, rate)
        stream.codec_context.gop_size = group
        if options is not None:
            stream.options = options
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if rotation is not None:
            stream.set_display_rotation(rotation)
        voice = container.add_stream("aac", rate=8000) if sound else None
        ticks = range(count) if ticks is None else ticks
        for number, tick in enumerate(ticks):
            made = picture(number, sides) if pictures is None else pictures[number]
            frame = av.VideoFrame.from_ndarray(made, format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if voice is not None:
            for start in range(0, int(sound * 8000), 1024):
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                silence.sample_rate, silence.pts, silence.time_base = 8000, start, Fraction(1, 8000)
                container.mux(voice.encode(silence))
            container.mux(voice.encode())
    return path
