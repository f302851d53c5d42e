"""Resident memory while a model reads a film of any length frame by frame"""

from __future__ import annotations

import argparse
import importlib
import os
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sinuous.core.bench import measure
from sinuous.core.bench.options import add_outputs
from sinuous.core.checks import check_positive
from sinuous.core.extras import package
from sinuous.core.registry import create_model
from sinuous.core.tables import Row, command, show, write_csv, write_markdown
from sinuous.video.answering import watch
from sinuous.video.io import stream_frames
from sinuous.video.text_tokens import ByteTokens

COLUMNS = ("frames", "film_minutes", "resident_mb", "state_kb", "cpu_s")
METHOD = """`{model}` with random weights reads a film, {fps:g} frame(s) a second and {group} at a time, as `answer`
does: decoded, encoded, and read by the language model with its state carried on. Resident memory is that of the whole
process (VmRSS); the state is what is kept of all frames so far."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="test_video_ma2mba", help="a Video-Ma2mba")
    parser.add_argument("--mixer", default="mamba2", help="any causal mixer")
    parser.add_argument("--video", type=Path, help="a film of yours; without it, one is made")
    parser.add_argument("--minutes", type=int, default=60, help="of the film that is made, a picture a second")
    parser.add_argument("--fps", type=float, default=1.0, help="frames per second that are read")
    parser.add_argument("--every", type=int, default=360, help="frames from one row of the table to the next")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--figure", type=Path, help="also draw memory against frames into this file")
    add_outputs(parser)


def run(options: argparse.Namespace) -> list[Row]:
    """Rows of memory against frames.

    Raises:
        ValueError: if the model reads no films, or the file is none.
        OSError: where the system does not say how much memory a process has (anything but Linux).
    """
    check_positive(**{"--fps": options.fps})
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model: Any = create_model(options.model, pattern=options.mixer).eval()
    if not hasattr(model, "tokens_per_frame"):
        raise ValueError(f"--model must be a Video-Ma2mba (got {options.model}); give test_video_ma2mba")
    with tempfile.TemporaryDirectory() as folder:
        path = options.video
        if path is None:
            path = make_film(Path(folder) / "made.mp4", 60 * options.minutes)
            measure.say(f"made a film of {options.minutes} minutes, {path.stat().st_size / 1e6:.1f} MB")
        rows = readings(model, path, options.fps, options.every)
    show(rows, COLUMNS, title=f"{options.model} on {measure.machine(torch.device('cpu'))}", group=())
    note = growth(rows)
    print(note)
    if options.csv:
        write_csv(rows, options.csv)
        print(options.csv)
    if options.figure:
        draw(rows, options.figure)
        print(options.figure)
    if options.markdown:
        method = METHOD.format(group=model.frame_group, **vars(options)) + f"\n\n    {command('film_memory', options)}"
        if options.figure:
            method += f"\n\n![Memory against frames]({os.path.relpath(options.figure, options.markdown.parent)})"
        write_markdown(rows, COLUMNS, options.markdown, title="Memory of reading a film", method=method, notes=[note])
        print(options.markdown)
    return rows


def readings(model: Any, path: Path, fps: float, every: int) -> list[Row]:
    """Resident memory after the first group of frames, after every so many frames, and after the last."""
    rows: list[Row] = []
    start, upcoming, row = time.process_time(), 0, None
    for watched in watch(model, stream_frames(path, fps=fps, size=model.reading.sides), ByteTokens()):
        tensors = torch.utils._pytree.tree_leaves(watched.state)
        row = {
            "frames": watched.frames,
            "film_minutes": watched.time / 60,
            "resident_mb": measure.resident() / 1e6,
            "state_kb": sum(t.numel() * t.element_size() for t in tensors) / 1e3,
            "cpu_s": time.process_time() - start,
        }
        if watched.frames >= upcoming:
            rows.append(row)
            upcoming = watched.frames + every
    return rows if row is None or row is rows[-1] else [*rows, row]


def growth(rows: list[Row]) -> str:
    """A line on the memory of the second half of the frames, in which nothing is done for the first time."""
    later = rows[len(rows) // 2 :]
    low, high = (choose(row["resident_mb"] for row in later) for choose in (min, max))
    return (
        f"from frame {later[0]['frames']:,} to frame {later[-1]['frames']:,}, resident memory lies between "
        f"{low:.1f} and {high:.1f} MB"
    )


def make_film(path: Path, seconds: int, sides: tuple[int, int] = (96, 128)) -> Path:
    """Write a film of a square that moves over noise, a picture a second."""
    av = package("av", "video")
    rng = np.random.default_rng(0)
    height, width = sides
    noise = rng.integers(0, 60, (height, width, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for second in range(seconds):
            picture = np.roll(noise, second, (0, 1))
            left = second % (width - 16)
            picture[40:56, left : left + 16] = (200, 80, 40)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = second, Fraction(1)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def draw(rows: list[Row], path: Path) -> None:
    """Draw resident memory against frames."""
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
    axes.plot([row["frames"] for row in rows], [row["resident_mb"] for row in rows], marker="o")
    axes.set(xlabel="frames", ylabel="resident memory, MB", ylim=(0, None))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
