"""Pictures of a long film by their times: wrong ones and milliseconds, beside decord, OpenCV and torchcodec."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sinuous.core.bench import measure
from sinuous.core.bench.options import add_outputs
from sinuous.core.checks import check_choice
from sinuous.core.tables import Row, command, show, write_csv, write_markdown
from sinuous.video.io import read_frames
from sinuous.video.writing import write_frames

METHOD = """Two films of {seconds} seconds, {height} × {width} pixels, H.264 with B-frames and a key picture every
{group}: in the even one a picture begins every 1/{rate} s; in the uneven one every second quarter of a minute has half
as many pictures, as films of phones do in the dark. Each picture shows its own number in black and white bars. Asked
for are the pictures that are shown at {pictures} times, the middles of equal spans: the last ones that begin at or
before them; pictures with another number are wrong, and `furthest` says by how many at the most. Each call opens the
file under a name that it has not had before, on one thread; `again` is the same call once more, on the same name.
Figures are medians of {repeats} calls by the {clock} clock, the readers taking turns; `ratio` is over ours. `by rate`
asks for the picture of number t times the average rate, which is what there is where a reader knows numbers alone;
`by stamps` looks the number up in the reader's own table of times."""

SIDES = (144, 256)
BITS = 16
COLUMNS = ("film", "reader", "version", "wrong", "furthest", "ms", "again_ms", "ratio")
Pictures = Sequence[NDArray[np.uint8]]


@dataclass(frozen=True)
class Reader:
    """A way of reading the pictures that are shown at some times.

    Attributes:
        name: in the table.
        package: that must be installed.
        read: `read(path, times)`, pictures `[H, W, C]`.
    """

    name: str
    package: str
    read: Callable[[str, list[float]], Pictures]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pictures", type=int, default=16, help="times that are asked for")
    parser.add_argument("--seconds", type=int, default=600, help="length of the films")
    parser.add_argument("--rate", type=int, default=25, help="pictures per second of the even film")
    parser.add_argument("--group", type=int, default=250, help="pictures from one key picture to the next")
    parser.add_argument("--repeats", type=int, default=5, help="calls, of which the median is shown")
    parser.add_argument("--clock", default="wall", choices=sorted(measure.CLOCKS), help="cpu suits a busy machine")
    add_outputs(parser)


def numbered(count: int) -> Iterator[NDArray[np.uint8]]:
    """Gray pictures `[H, W]` of a slowly moving slope, each with its number in `BITS` bars at the top."""
    height, width = SIDES
    slope = (np.arange(height)[:, None] + np.arange(width)) % 256
    for number in range(count):
        picture = ((slope + number // 4) % 256).astype(np.uint8)
        bars = (number >> np.arange(BITS)) & 1
        picture[: height // 3] = np.repeat(bars * 255, width // BITS).astype(np.uint8)
        yield picture


def number_of(picture: NDArray[np.uint8]) -> int:
    """The number that a picture `[H, W, C]` shows."""
    height, width = SIDES
    bars = picture[2 : height // 3 - 2].mean((0, 2)).reshape(BITS, width // BITS)[:, 4:-4].mean(1) > 127
    return int((bars << np.arange(BITS)).sum())


def times_of(seconds: int, rate: int, uneven: bool) -> list[float]:
    """At which the pictures of a film begin."""
    times, tick = [], 0
    while tick < seconds * rate:
        times.append(tick / rate)
        tick += 2 if uneven and (tick // (15 * rate)) % 2 else 1
    return times


def by_sinuous(path: str, times: list[float]) -> Pictures:
    return list(read_frames(path, times=times)[0].permute(0, 2, 3, 1).numpy())


def by_decord(path: str, times: list[float], stamps: bool) -> Pictures:
    decord: Any = importlib.import_module("decord")
    reader = decord.VideoReader(path, num_threads=1)
    if stamps:
        begins = reader.get_frame_timestamp(np.arange(len(reader)))[:, 0]
        numbers = np.searchsorted(begins, np.array(times) + 1e-6, side="right") - 1
    else:
        numbers = np.array(times) * reader.get_avg_fps() + 1e-6
    return list(reader.get_batch(numbers.astype(int).clip(0, len(reader) - 1)).asnumpy())


def by_opencv(path: str, times: list[float], rate: bool) -> Pictures:
    cv2: Any = importlib.import_module("cv2")
    cv2.setNumThreads(1)
    film, pictures = cv2.VideoCapture(path), []
    for time in times:
        if rate:
            film.set(cv2.CAP_PROP_POS_FRAMES, int(time * film.get(cv2.CAP_PROP_FPS) + 1e-6))
        else:
            film.set(cv2.CAP_PROP_POS_MSEC, time * 1000)
        there, picture = film.read()
        pictures.append(picture if there else np.zeros((*SIDES, 3), np.uint8))
    film.release()
    return pictures


def by_torchcodec(path: str, times: list[float], mode: str) -> Pictures:
    decoders: Any = importlib.import_module("torchcodec.decoders")
    decoder = decoders.VideoDecoder(path, num_ffmpeg_threads=1, dimension_order="NHWC", seek_mode=mode)
    return list(decoder.get_frames_played_at(times).data.numpy())


READERS = (
    Reader("sinuous", "sinuous", by_sinuous),
    Reader("decord, by rate", "decord", lambda path, times: by_decord(path, times, stamps=False)),
    Reader("decord, by stamps", "decord", lambda path, times: by_decord(path, times, stamps=True)),
    Reader("OpenCV, by rate", "cv2", lambda path, times: by_opencv(path, times, rate=True)),
    Reader("OpenCV, by time", "cv2", lambda path, times: by_opencv(path, times, rate=False)),
    Reader("torchcodec, exact", "torchcodec", lambda path, times: by_torchcodec(path, times, "exact")),
    Reader("torchcodec, approximate", "torchcodec", lambda path, times: by_torchcodec(path, times, "approximate")),
)


def run(options: argparse.Namespace) -> list[Row]:
    """All rows that the options ask for; the table is printed at the end.

    Raises:
        ValueError: if there are more pictures than the bars can number.
        ModuleNotFoundError: if PyAV is missing.
    """
    check_choice("--clock", options.clock, measure.CLOCKS)
    if options.seconds * options.rate > 2**BITS:
        raise ValueError(f"--seconds times --rate must be {2**BITS} at most (got {options.seconds * options.rate})")
    torch.set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("even", "uneven"):
            measure.say(f"making the {name} film")
            begins = times_of(options.seconds, options.rate, name == "uneven")
            film = Path(folder) / f"{name}.mp4"
            encoding: Any = {"group": options.group, "ticks": options.rate, "options": {"preset": "veryfast"}}
            write_frames(film, numbered(len(begins)), begins, **encoding)
            rows += _of_film(options, name, film, begins)
    title = f"Pictures of a film: {measure.machine(torch.device('cpu'))}, one thread"
    show(rows, COLUMNS, title=title, group=("film",))
    if options.csv:
        write_csv(rows, options.csv)
        print(options.csv)
    if options.markdown:
        method = METHOD.format(**vars(options), height=SIDES[0], width=SIDES[1])
        write_markdown(
            rows, COLUMNS, options.markdown, title=title, method=f"{method}\n\n    {command('clips', options)}"
        )
        print(options.markdown)
    return rows


def _of_film(options: argparse.Namespace, name: str, film: Path, begins: list[float]) -> list[Row]:
    times = [(k + 0.5) * options.seconds / options.pictures for k in range(options.pictures)]
    shown = np.searchsorted(np.array(begins), np.array(times) + 1e-6, side="right") - 1
    readers = [reader for reader in READERS if _works(reader, film, times)]
    first: dict[str, list[float]] = {reader.name: [] for reader in readers}
    again: dict[str, list[float]] = {reader.name: [] for reader in readers}
    errors: dict[str, NDArray[np.int64]] = {}
    now = measure.CLOCKS[options.clock]
    for repeat in range(options.repeats):
        for place, reader in enumerate(readers):
            link = str(film.with_name(f"{name}-{repeat}-{place}.mp4"))
            os.link(film, link)
            for seen in (first, again):
                began = now()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    pictures = reader.read(link, times)
                seen[reader.name].append(now() - began)
            errors[reader.name] = np.abs(np.array([number_of(picture) for picture in pictures]) - shown)
    rows: list[Row] = [
        {
            "film": name,
            "reader": reader.name,
            "version": _version(reader.package),
            "wrong": int((errors[reader.name] > 0).sum()),
            "furthest": int(errors[reader.name].max()),
            "ms": statistics.median(first[reader.name]) * 1e3,
            "again_ms": statistics.median(again[reader.name]) * 1e3,
            "ours": reader.name == "sinuous",
        }
        for reader in readers
    ]
    return [{**row, "ratio": row["ms"] / rows[0]["ms"]} for row in rows]


def _works(reader: Reader, film: Path, times: list[float]) -> bool:
    """Whether a reader is installed and can be loaded; the call warms it up."""
    if importlib.util.find_spec(reader.package) is None:
        return False
    try:
        reader.read(str(film), times)
    except (ImportError, OSError, RuntimeError) as error:  # of a library of the system that is missing
        measure.say(f"{reader.name} is left out: {str(error).partition(chr(10))[0]}")
        return False
    return True


def _version(package: str) -> str:
    return str(getattr(importlib.import_module(package), "__version__", "-"))
