"""Read a film with two hidden items frame by frame, or find the scenes of a film of yours, of any length.

sinuous demo video                                                the clip that comes with the package
sinuous demo video --video film.mp4 --fps 1 --out scenes.png      scenes of yours
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from sinuous.core.checks import check_positive
from sinuous.core.weights import all_weights
from sinuous.video.evidence import MODEL, Evidence, read_evidence, reader_of
from sinuous.video.io import clip_info, read_frames, stream_frames
from sinuous.video.scenes import scene_cuts

CLIP = Path(__file__).parent / "samples" / "needle.mkv"
"""256 frames, two of which hide an item; beside it lies what they hide."""

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
    parser.add_argument("--video", metavar="PATH", type=Path, help="a film of yours; without it, the clip with needles")
    parser.add_argument("--fps", metavar="F", type=float, help="frames per second of yours that are looked at; 1")
    parser.add_argument("--out", metavar="PNG", type=Path, help="the picture; needle.png, or scenes.png of yours")
    parser.add_argument(
        "--model", metavar="NAME", help=f"a reader of films: weights, a folder, a file of a run; {MODEL} for the clip"
    )


def run(options: argparse.Namespace) -> None:
    """Read the clip with needles, or a film where a model is given, and draw what its frames say; else find the scenes
    of a film and draw them. The name of the picture is printed last.

    Raises:
        ValueError: if the file is no film, or the model no reader of films.
    """
    sample = options.video is None
    if options.model is not None or (sample and MODEL in all_weights()):
        out = options.out or Path("needle.png")
        path = options.video or CLIP
        _show_evidence(path, read_evidence(reader_of(options.model), path, options.fps), sample, out)
        return
    if sample:
        print(
            f"the weights {MODEL} do not come with this version of the package: nothing reads the clip, and its scenes "
            "are shown instead. Train a reader by the commands of docs/benchmarks/video_protocol.md, and give its "
            "weights with --model"
        )
    _show_scenes(options.video or CLIP, options.fps or (4.0 if sample else 1.0), options.out or Path("scenes.png"))


def _show_evidence(path: Path, evidence: Evidence, sample: bool, out: Path) -> None:
    from sinuous.video.drawing import draw_evidence

    decisive = evidence.decisive
    shown = sorted({*decisive, *(round(i * (len(evidence.times) - 1) / (SHOWN - 3)) for i in range(SHOWN - 2))})
    hidden = json.loads(CLIP.with_suffix(".json").read_text(encoding="utf-8")) if sample else {}
    pixels, _ = read_frames(path, times=[evidence.times[i] for i in shown])
    draw_evidence(evidence, shown, pixels, out, hidden=hidden.get("frames", ()))
    probability = float(evidence.probabilities[-1, evidence.answer])
    print(
        f"{evidence.name}: {evidence.answers[evidence.answer]} ({probability:.2f}), from {len(evidence.times)} frames"
    )
    print("the answer rests most on the frames at " + " and ".join(f"{evidence.times[i]:.2f} s" for i in decisive))
    if hidden:
        times = " and ".join(f"{evidence.times[i]:.2f} s" for i in hidden["frames"])
        print(f"hidden are: {hidden['answer']}, at {times}")
    print(out)


def _show_scenes(path: Path, fps: float, out: Path) -> None:
    from sinuous.video.drawing import draw_scenes

    scenes = find_scenes(path, fps)
    starts, frames = first_frames(path, scenes)
    draw_scenes(scenes, starts, frames, out)
    print(f"{scenes.name}: {len(scenes.starts)} scene(s) in {scenes.end:.1f} s, {len(scenes.times)} frames looked at")
    print("scenes begin at " + ", ".join(f"{start:.2f}" for start in scenes.starts[:SHOWN]) + " s")
    print(out)
