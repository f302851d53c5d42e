"""Clips as tensors, every picture at its time: what a player shows at t is what is read at t.

    pixels, times = read_frames("film.mp4", num_frames=8)

Time 0 is that of the first picture; a picture is shown until the next one is, and the last one for as long as its
packet says. Sound may outlast the pictures, and headers may promise more or fewer of them: neither counts. Pixels are
as they are stored (`clip_info` says how wide they are), the picture upright. Where data is damaged, the pictures up to
the next key picture are left out: a decoder could only make them up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sinuous.core.checks import check_positive, check_range, check_sizes, described
from sinuous.video.film import GRACE, Film, PictureList, Pixels, Source, list_pictures, warn_of_damage

NEAR = 16
"""Packets up to which pictures on the way to the next one are decoded rather than left out by a seek."""


@dataclass(frozen=True)
class ClipInfo:
    """What a file says of its pictures.

    Attributes:
        height, width: of an upright picture, in pixels.
        duration: from the first picture to the end of the last, in seconds.
        num_frames: number of pictures.
        fps: pictures per second on the average; 0 where a single one has no duration.
        rotation: by which stored pictures are turned to be upright, clockwise: 0, 90, 180 or 270 degrees.
        pixel_aspect: width of an upright picture's pixel over its height.
        codec: by FFmpeg's name, such as `h264`.
    """

    height: int
    width: int
    duration: float
    num_frames: int
    fps: float
    rotation: int
    pixel_aspect: float
    codec: str


def clip_info(path: Source) -> ClipInfo:
    """Facts on the film in a file, from its packets and first picture.

    Raises:
        ValueError: if the file is no film, or none of its pictures can be decoded.
        FileNotFoundError: if there is no such file.
    """
    film = list_pictures(path)
    height, width = _upright(film)
    return ClipInfo(
        height=height,
        width=width,
        duration=film.end,
        num_frames=len(film.stamps),
        fps=len(film.stamps) / film.end if film.end else 0.0,
        rotation=film.turn.degrees,
        pixel_aspect=1 / film.pixel_aspect if film.turn.swap else film.pixel_aspect,
        codec=film.codec,
    )


def read_frames(
    path: Source,
    *,
    fps: float | None = None,
    num_frames: int | None = None,
    times: Sequence[float] | Tensor | None = None,
    start: float = 0.0,
    stop: float | None = None,
    size: int | tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Read pictures of a film: every one, or those shown at certain times.

    At most one of the three ways to choose times is given. A late picture costs the decoding of one group of pictures,
    and any order of reading gives what decoding everything gives.

    Args:
        path: of the file.
        fps: at `start` + k / `fps` for k = 0, 1, … while that is before `stop` and the end of the pictures.
        num_frames: in the middles of so many equal spans between `start` and `stop`; pictures come several times where
            there are fewer.
        times: at these, in seconds, in any order; they leave no room for `start` and `stop`.
        start: seconds from the first picture; pictures that begin earlier are left out where every one is read.
        stop: likewise, not included; the end of the pictures if absent or later.
        size: height and width to resize to, or one number for both; the pictures' own if absent.

    Returns:
        (pixels, times): uint8 `[T, 3, H, W]`, and float64 `[T]`: the times chosen, or those at which pictures begin.

    Raises:
        ValueError: if the file is no film, no picture can be decoded, a time is beyond the end, or an option is wrong.
        FileNotFoundError: if there is no such file.

    Warns:
        UserWarning: naming file and place, if the film is damaged; what can be decoded is then read.
    """
    film = list_pictures(path)
    chosen = _chosen(path, film, fps, num_frames, times, start, stop)
    sides = _sides(film, size)
    if chosen is None:
        first, last = _range(film, start, stop)
        pixels, begins = torch.empty(last - first, 3, *sides, dtype=torch.uint8), []
        for (frame, time), row in zip(_every(path, film, first, last, sides), pixels, strict=False):
            row.copy_(torch.from_numpy(frame))
            begins.append(time)
        return pixels[: len(begins)], torch.tensor(begins, dtype=torch.float64)
    pixels = torch.empty(len(chosen), 3, *sides, dtype=torch.uint8)
    rows = np.argsort(chosen, kind="stable")
    for row, (frame, _) in zip(rows, _shown(path, film, chosen[rows], sides), strict=True):
        pixels[row] = torch.from_numpy(frame)
    return pixels, torch.from_numpy(chosen)


def stream_frames(
    path: Source,
    *,
    fps: float | None = None,
    start: float = 0.0,
    stop: float | None = None,
    size: int | tuple[int, int] | None = None,
) -> Iterator[tuple[Tensor, float]]:
    """Read a film of any length picture by picture, in memory that does not grow with it.

    Args:
        path, fps, start, stop, size: as in `read_frames`.

    Yields:
        (pixels, time): uint8 `[3, H, W]`, and seconds.

    Raises:
        ValueError, FileNotFoundError: as `read_frames`, at the call.

    Warns:
        UserWarning: as `read_frames`.
    """
    film = list_pictures(path)
    chosen = _chosen(path, film, fps, None, None, start, stop)
    sides = _sides(film, size)
    if chosen is None:
        shown = _every(path, film, *_range(film, start, stop), sides)
    else:
        shown = _shown(path, film, chosen, sides)
    return ((torch.from_numpy(frame), time) for frame, time in shown)


def _chosen(
    path: Source,
    film: PictureList,
    fps: float | None,
    num_frames: int | None,
    times: Sequence[float] | Tensor | None,
    start: float,
    stop: float | None,
) -> np.ndarray | None:
    """Times at which pictures are wanted, or None for every picture."""
    ways = {"fps": fps, "num_frames": num_frames, "times": times}
    given_ways = [name for name, way in ways.items() if way is not None]
    if len(given_ways) > 1:
        raise ValueError(f"{' and '.join(given_ways)} each choose the times; give one of them")
    check_range(0, math.inf, start=start, stop=stop)
    if times is not None:
        if start != 0 or stop is not None:
            raise ValueError("times are those of the whole film; leave out start and stop")
        moments = _moments(times)
        late = moments[moments > film.end + GRACE]
        if len(late):
            raise ValueError(_too_late(path, film, "times has", float(late[0])))
        return moments
    if film.end and start >= film.end:
        raise ValueError(_too_late(path, film, "start is", start))
    if stop is not None and stop <= start:
        raise ValueError(f"stop must be after start (got start={start} and stop={stop}); give a later stop")
    end = film.end if stop is None else min(stop, film.end)
    if fps is not None:
        check_positive(fps=fps)
        chosen: np.ndarray = start + np.arange(math.ceil((end - start) * fps) + 1) / float(fps)
        return chosen[: max(1, int(np.searchsorted(chosen, end - GRACE)))]
    if num_frames is not None:
        check_sizes(num_frames=num_frames)
        middles: np.ndarray = start + (np.arange(num_frames) + 0.5) * ((end - start) / num_frames)
        return middles
    return None


def _moments(times: Any) -> np.ndarray:
    try:
        moments = np.array(times, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"times must be numbers of seconds (got {described(times)}); give a list of them") from error
    if moments.ndim != 1 or not np.isfinite(moments).all() or (moments < 0).any():
        raise ValueError(f"times must be a list of seconds of 0 or more (got {described(times)}); give such a list")
    return moments


def _too_late(path: Source, film: PictureList, what: str, time: float) -> str:
    return f"{path} ends at {film.end:.2f} s, and {what} {time:g}; choose times up to its end"


def _range(film: PictureList, start: float, stop: float | None) -> tuple[int, int]:
    """Numbers of the first picture that begins at `start` or later, and of the first that begins at `stop` or later."""
    first, last = np.searchsorted(film.times, [start - GRACE, math.inf if stop is None else stop - GRACE])
    return int(first), int(last)


def _upright(film: PictureList) -> tuple[int, int]:
    return (film.width, film.height) if film.turn.swap else (film.height, film.width)


def _sides(film: PictureList, size: Any) -> tuple[int, int]:
    """Height and width of the pictures that are wanted."""
    if size is None:
        return _upright(film)
    sides = (size, size) if not isinstance(size, Sequence) else tuple(size)
    if len(sides) != 2:
        raise ValueError(f"size must be one number, or height and width (got {described(size)}); give two numbers")
    check_sizes(size=sides[0])
    check_sizes(size=sides[1])
    return sides


def _pixels(film: PictureList, frame: Any, sides: tuple[int, int]) -> Pixels:
    """A decoded picture as `[3, H, W]`, upright and resized; also one whose size differs from that of the first."""
    height, width = sides[::-1] if film.turn.swap else sides
    same = (frame.height, frame.width) == (height, width)
    rgb = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation=None if same else "BICUBIC")
    return np.ascontiguousarray(film.turn.apply(rgb).transpose(2, 0, 1))


def _every(
    path: Source, film: PictureList, first: int, last: int, sides: tuple[int, int]
) -> Iterator[tuple[Pixels, float]]:
    """Pictures with numbers from `first` up to `last`, not included, and when they begin."""
    if first >= last:
        return
    with _open(path, film) as opened:
        for stamp, frame in opened.pictures(film, int(film.stamps[first])):
            number = min(int(np.searchsorted(film.stamps, stamp)), len(film.stamps) - 1)
            if number >= last:
                return
            if number >= first:
                yield _pixels(film, frame, sides), float(film.times[number])


def _shown(
    path: Source, film: PictureList, times: np.ndarray, sides: tuple[int, int]
) -> Iterator[tuple[Pixels, float]]:
    """Pictures shown at `times`, which ascend."""
    with _open(path, film) as opened:
        pictures: Iterator[tuple[int, Any]] | None = None
        shown = ahead = made = None
        for time in times.tolist():
            stamp = int(film.stamps[film.at(time)])
            if pictures is None or (ahead is not None and _far(film, ahead[0], stamp)):
                pictures, shown = opened.pictures(film, stamp), None
                ahead = next(pictures, None)
            while ahead is not None and (shown is None or ahead[0] <= stamp):
                shown, ahead, made = ahead, next(pictures, None), None
            if shown is None:
                raise ValueError(f"no picture of {path} can be decoded; the file has changed or is damaged")
            made = _pixels(film, shown[1], sides) if made is None else made
            yield made, time


def _far(film: PictureList, ahead: int, stamp: int) -> bool:
    """Whether a seek to the picture of `stamp` spares enough decoding, the one of `ahead` being next."""
    keys = film.keys_before(stamp)
    return bool(keys) and film.places[keys[0]] - film.places.get(ahead, 0) > NEAR


def _open(path: Source, film: PictureList) -> Film:
    """The film, after a warning of the damage that is known of it, which is then the only one."""
    opened = Film(path, warn=film.damage is None)
    if film.damage is not None:
        warn_of_damage(str(path), film.damage)
    return opened
