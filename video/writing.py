"""Films written picture by picture, each at its time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sinuous.core.checks import check_sizes


def write_frames(
    path: str | os.PathLike[str],
    pictures: Iterable[NDArray[np.uint8]],
    times: Iterable[float],
    *,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    group: int = 250,
    ticks: int = 600,
    options: Mapping[str, str] | None = None,
) -> None:
    """Write a film.

    Args:
        path: of the file, whose ending names the container.
        pictures: uint8 `[H, W]`, gray, or `[H, W, 3]`, one after another; all of one size.
        times: of the pictures in seconds, rising; each is moved to the nearest tick.
        codec: by FFmpeg's name; `ffv1` with `pixel_format="gray"` keeps gray pictures as they are.
        pixel_format: in which they are stored.
        group: pictures from one key picture to the next.
        ticks: of a second; the header promises as many pictures. 600 is a multiple of the usual rates.
        options: of the codec.

    Raises:
        ModuleNotFoundError: if PyAV is missing.
        ValueError: if there is no picture, or `group` or `ticks` is less than 1.
    """
    import av

    check_sizes(group=group, ticks=ticks)
    with av.open(os.fspath(path), "w") as container:
        stream: Any = None
        for picture, time in zip(pictures, times, strict=False):
            if stream is None:
                stream = container.add_stream(codec, rate=ticks)
                stream.height, stream.width = picture.shape[:2]
                stream.pix_fmt, stream.codec_context.gop_size = pixel_format, group
                stream.time_base = stream.codec_context.time_base = Fraction(1, ticks)
                stream.options = dict(options or {})
            frame: Any = av.VideoFrame.from_ndarray(picture, format="gray" if picture.ndim == 2 else "rgb24")
            frame.pts, frame.time_base = round(time * ticks), Fraction(1, ticks)
            container.mux(stream.encode(frame))
        if stream is None:
            raise ValueError("pictures must be one or more (got none); give some")
        container.mux(stream.encode())
