"""What a reader of films believes after each frame, and the frames that changed its mind."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from rich.progress import track
from torch import Tensor

from sinuous.core.checks import check_sizes
from sinuous.core.demo_parts import model_with_weights
from sinuous.core.registry import create_model
from sinuous.video.backgrounds import to_gray
from sinuous.video.datasets import NeedleInVideo
from sinuous.video.frame_reader import FrameReader
from sinuous.video.io import clip_info, stream_frames

MODEL = "frame_reader_nano.needle"
PART = 64
"""Frames that are read at a time."""


class Evidence(NamedTuple):
    """Answers along a film.

    Attributes:
        name: of the file.
        times: of the T frames, in seconds.
        probabilities: of the answers after each frame, `[T, K]`.
        answers: their names.
    """

    name: str
    times: list[float]
    probabilities: Tensor
    answers: list[str]

    @property
    def answer(self) -> int:
        """The most probable one after the last frame."""
        return int(self.probabilities[-1].argmax())


def reader_of(name: str | None) -> FrameReader:
    """A reader by the name of its weights, from a folder that `sinuous.save` has written, or from the weights of a run.

    Raises:
        ValueError: if there are no such weights, or they are of another kind of model.
    """
    if name is not None and Path(name).suffix == ".safetensors":
        model = create_model("frame_reader_nano", checkpoint_path=name).eval()
    else:
        model = model_with_weights(name, MODEL)
    if not isinstance(model, FrameReader) or not model.can_carry or not model.num_classes:
        raise ValueError(f"--model must be a reader of films with a head and a state (got {name}); give {MODEL}")
    return model


@torch.inference_mode()
def read_evidence(model: FrameReader, path: str | os.PathLike[str], fps: float | None = None) -> Evidence:
    """Answers of a reader after each frame of a film of any length, in memory that does not grow with it.

    Args:
        model: a reader whose head reads the last frame.
        path: of the film.
        fps: frames per second that are read; every one if absent.

    Raises:
        ValueError: if the file is no film.
    """
    cfg = cast("dict[str, Any]", getattr(model, "pretrained_cfg", {}))
    mean, std = (cfg.get(name, usual)[0] for name, usual in (("mean", (0.4,)), ("std", (0.2,))))
    info = clip_info(path)
    total = info.num_frames if fps is None else max(1, round(info.duration * fps))
    frames = stream_frames(path, fps=fps, size=model.img_size)
    times, parts, state = [], [], None
    for part in _parts(track(frames, description="reading frames", total=total, transient=True), PART):
        gray = torch.stack([torch.from_numpy(to_gray(pixels.numpy()[None]))[0] for pixels, _ in part])
        logits, state = model.prefill(((gray.float() / 255 - mean) / std)[None, None], state)
        parts.append(logits[0].float().softmax(-1))
        times += [time for _, time in part]
    names = list(cfg.get("label_names") or ())
    if len(names) != model.num_classes:
        usual = NeedleInVideo.classes
        names = list(usual) if len(usual) == model.num_classes else [f"answer {i}" for i in range(model.num_classes)]
    return Evidence(Path(path).name, times, torch.cat(parts), names)


def turning_points(evidence: Evidence, count: int = 2) -> list[int]:
    """The frames after which the probabilities have changed most, in the order of time: half the sum of the changes;
    those of the first frame are from equal ones."""
    check_sizes(count=count)
    p = evidence.probabilities
    before = torch.cat([torch.full_like(p[:1], 1 / p.shape[1]), p[:-1]])
    change = (p - before).abs().sum(1) / 2
    return sorted(change.topk(min(count, len(change))).indices.tolist())


def _parts(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    items = iter(items)
    while part := list(itertools.islice(items, size)):
        yield part
