"""Find the scenes of a film of any length, and draw them along its time.

sinuous demo video --video film.mp4 --fps 1 --out scenes.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from sinuous.core.checks import check_positive
from sinuous.video.io import clip_info, read_frames, stream_frames
from sinuous.video.scenes import scene_cuts

THUMBNAIL = 16
"""Side of the thumbnails whose likeness says where scenes end."""

SHOWN = 12
"""Scenes that are drawn, evenly chosen where there are more."""


class Scenes(NamedTuple):
    """Scenes of a film.

    Attributes:
        name: of the file.
        times: of the frames that were looked at, in seconds.
        likeness: cosine of each frame and the next, from -1 to 1.
        starts: at which the scenes begin, the first at 0.
        end: of the film, in seconds.
    """

    name: str
    times: list[float]
    likeness: list[float]
    starts: list[float]
    end: float


def find_scenes(path: Path, fps: float = 1.0, alpha: float = 2.0) -> Scenes:
    """Scenes of a film, by SceneTiling on thumbnails; of each frame, only its thumbnail is kept.

    Args:
        path: of the film.
        fps: frames per second that are looked at.
        alpha: as in `scene_cuts`.

    Raises:
        ValueError: if the file is no film.
    """
    check_positive(fps=fps)
    end = clip_info(path).duration
    frames = stream_frames(path, fps=fps, size=THUMBNAIL)
    times, rows = [], []
    for pixels, time in track(frames, description="looking at frames", total=max(1, round(end * fps)), transient=True):
        times.append(time)
        rows.append(pixels.flatten().half() / 255 - 0.5)
    features = torch.stack(rows).float()
    starts = [0.0] + [times[cut] for cut in scene_cuts(features, alpha)]
    likeness = F.cosine_similarity(features[:-1], features[1:], dim=1).tolist()
    return Scenes(Path(path).name, times, likeness, starts, end)


def first_frames(path: Path, scenes: Scenes, side: int = 160) -> tuple[list[float], Tensor]:
    """Starts of at most `SHOWN` scenes, and their first frames, uint8 `[S, 3, H, W]` with the longer side `side`."""
    count = len(scenes.starts)
    chosen = sorted({round(i * (count - 1) / (SHOWN - 1)) for i in range(SHOWN)}) if count > SHOWN else range(count)
    starts = [scenes.starts[i] for i in chosen]
    info = clip_info(path)
    height, width = float(info.height), info.width * info.pixel_aspect
    scale = side / max(height, width)
    return starts, read_frames(path, times=starts, size=(max(1, round(height * scale)), max(1, round(width * scale))))[
        0
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--video", metavar="PATH", type=Path, help="a film of yours")
    parser.add_argument("--fps", metavar="F", type=float, default=1.0, help="frames per second that are looked at")
    parser.add_argument("--out", metavar="PNG", type=Path, default=Path("scenes.png"), help="the picture")


def run(options: argparse.Namespace) -> None:
    """Find the scenes of a film, draw them, and print the name of the picture.

    Raises:
        ValueError: if there is no film, or the file is none.
    """
    if options.video is None:
        raise ValueError(
            "the clip with needles needs weights, which do not come with this version of the package; give a film of "
            "yours: sinuous demo video --video PATH"
        )
    from sinuous.video.drawing import draw_scenes

    scenes = find_scenes(options.video, options.fps)
    starts, frames = first_frames(options.video, scenes)
    draw_scenes(scenes, starts, frames, options.out)
    print(f"{scenes.name}: {len(scenes.starts)} scene(s) in {scenes.end:.1f} s, {len(scenes.times)} frames looked at")
    print("scenes begin at " + ", ".join(f"{start:.2f}" for start in scenes.starts[:SHOWN]) + " s")
    print(options.out)
