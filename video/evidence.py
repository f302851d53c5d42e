"""What a reader of films believes after each frame, and the frames that its answer rests on."""

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
from sinuous.core.stack import Stack
from sinuous.video.backgrounds import to_gray
from sinuous.video.datasets import NeedleInVideo
from sinuous.video.frame_reader import FrameReader
from sinuous.video.io import clip_info, stream_frames

MODEL = "frame_reader_nano.needle"
PART = 64
"""Frames that are decoded and encoded at a time."""

CANDIDATES, TOGETHER, STEPS = 32, 8, 1024
"""Frames that are left out in turn, so many at a time, and frames that are read again at a time."""


class Evidence(NamedTuple):
    """Answers along a film.

    Attributes:
        name: of the file.
        times: of the T frames, in seconds.
        probabilities: of the answers after each frame, `[T, K]`.
        answers: their names.
        decisive: the two frames that the answer rests on, in the order of time, see `decisive_frames`.
    """

    name: str
    times: list[float]
    probabilities: Tensor
    answers: list[str]
    decisive: list[int]

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


@torch.no_grad()
def read_evidence(model: FrameReader, path: str | os.PathLike[str], fps: float | None = None) -> Evidence:
    """Answers of a reader after each frame of a film of any length; of each frame, only its features are kept.

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
    times, parts, features, state = [], [], [], None
    for part in _parts(track(frames, description="reading frames", total=total, transient=True), PART):
        gray = torch.stack([torch.from_numpy(to_gray(pixels.numpy()[None]))[0] for pixels, _ in part])
        features.append(model.encode(((gray.float() / 255 - mean) / std)[None, None]))
        logits, state = model.prefill_features(features[-1], state)
        parts.append(logits[0].float().softmax(-1))
        times += [time for _, time in part]
    names = list(cfg.get("label_names") or ())
    if len(names) != model.num_classes:
        usual = NeedleInVideo.classes
        names = list(usual) if len(usual) == model.num_classes else [f"answer {i}" for i in range(model.num_classes)]
    return Evidence(Path(path).name, times, torch.cat(parts), names, decisive_frames(model, torch.cat(features, 1)))


def decisive_frames(model: FrameReader, features: Tensor, count: int = 2) -> list[int]:
    """The frames without which the answer after the last frame is least probable, in the order of time.

        effect of frame t = log p(answer | x) − log p(answer | x with x_t replaced by the mean of all frames)

    It is computed for the frames with the greatest |∂ log p(answer) / ∂x_t| |x_t − mean|; time grows linearly with the
    film. On 30 test clips of 256 frames, 57 of the 60 frames that it returned hid an item
    (tools/decisive_frames.py).

    Args:
        model: a reader whose head reads the last frame.
        features: of the frames, `[1, N, D]`, from `FrameReader.encode`.
        count: frames that are returned, at most N.
    """
    check_sizes(count=count)
    x = features.detach()
    mean = x.mean(1)
    layers = cast("Stack", model.layers)
    before = layers.grad_checkpointing, layers.checkpoint_layers, layers.checkpoint_steps or None
    layers.set_grad_checkpointing(steps=STEPS)
    try:
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            final = model.forward_head(layers(leaf))[0].log_softmax(-1)
            answer = int(final.argmax())
            (slope,) = torch.autograd.grad(final[answer], leaf)
    finally:
        layers.set_grad_checkpointing(before[0], layers=before[1], steps=before[2])
    near = (slope.norm(dim=-1) * (x - mean).norm(dim=-1))[0].topk(min(CANDIDATES, x.shape[1])).indices
    without = [
        _final(model, x, group, mean)[:, answer]
        for group in track(near.split(TOGETHER), description="leaving frames out", transient=True)
    ]
    # The answer's own log-probability is the same for all.
    effects = -torch.cat(without)
    return sorted(near[effects.topk(min(count, len(near))).indices].tolist())


@torch.no_grad()
def _final(model: FrameReader, x: Tensor, left_out: Tensor, mean: Tensor) -> Tensor:
    """Log-probabilities of the answers `[M, K]` after the last frame, one of the M frames left out in each row."""
    state, logits = None, x
    for start in range(0, x.shape[1], STEPS):
        part = x[:, start : start + STEPS].repeat(len(left_out), 1, 1)
        for row, place in enumerate((left_out - start).tolist()):
            if 0 <= place < part.shape[1]:
                part[row, place] = mean[0]
        logits, state = model.prefill_features(part, state)
    return logits[:, -1].log_softmax(-1)


def _parts(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    items = iter(items)
    while part := list(itertools.islice(items, size)):
        yield part
