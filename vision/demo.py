"""What a small image classifier sees: its answers, and the parts of each picture that spoke for them.

`sinuous demo vision` draws the result of `run` with `draw`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from sinuous.vision.attribution import evidence
from sinuous.vision.datasets import fashion_mnist, read_image

MODEL = "vim_nano.fashion_mnist"

NOTE = (
    "your pictures were made gray and 28 x 28: the model learned from Fashion-MNIST, where each picture is one light "
    "piece of clothing, centred on black"
)

BLUR = 1.5
"""Pixels: width of the Gaussian that makes single pixels' shares a map one can look at; it keeps their sum."""


@dataclass(frozen=True)
class Finding:
    """What was found in one picture.

    Attributes:
        name: where the picture comes from.
        picture: what the model saw, gray `[H, W]` in 0..1.
        truth: the right answer, where known.
        answers: the classes with the highest probabilities, likeliest first.
        evidence: share of each pixel in the likeliest class's score `[H, W]`, against it where negative.
    """

    name: str
    picture: Tensor
    truth: str | None
    answers: list[tuple[str, float]]
    evidence: Tensor


@dataclass(frozen=True)
class Result:
    """All findings of one model, and what was done to the pictures first, or None."""

    model: str
    findings: list[Finding]
    note: str | None


def prepare(image: Image.Image, size: int = 28) -> Image.Image:
    """A picture of any size and colour as Fashion-MNIST would show it: gray, square, the subject light on black.

    The border's median gray is taken for the background. What differs from it becomes light (so that dark clothing on
    a light ground is inverted), is cut out, and fills the square along its longer side.
    """
    gray = np.asarray(image.convert("L"), dtype=np.float32)
    border = np.concatenate((gray[0], gray[-1], gray[:, 0], gray[:, -1]))
    background = np.median(border)
    subject = background - gray if background > 127 else gray - background
    subject = np.clip(subject / max(subject.max(), 1.0), 0, 1)
    rows, columns = ((subject > 0.1).any(axis) for axis in (1, 0))
    if rows.any():
        (top, bottom), (left, right) = (np.flatnonzero(inside)[[0, -1]] for inside in (rows, columns))
        subject = subject[top : bottom + 1, left : right + 1]
    cut = Image.fromarray((255 * subject).astype(np.uint8))
    # A subject may be so thin that its shorter side would round to nothing.
    width, height = (max(1, round(size * side / max(cut.size))) for side in cut.size)
    square = Image.new("L", (size, size))
    place = ((size - width) // 2, (size - height) // 2)
    square.paste(cut.resize((width, height), Image.Resampling.LANCZOS), place)
    return square


def samples() -> tuple[list[Image.Image], list[str]]:
    """The first picture of each class in the bundled test set, and their classes."""
    data = fashion_mnist("test")
    first: dict[int, Image.Image] = {}
    for image, label in (data[i] for i in range(len(data))):
        first.setdefault(label, image)
        if len(first) == len(data.classes):
            break
    labels = sorted(first)
    return [first[label] for label in labels], [data.classes[label] for label in labels]


def run(
    images: Sequence[Image.Image | str | os.PathLike[str]] | None = None, *, model: str = MODEL, top: int = 3
) -> Result:
    """Classify pictures with a model that comes with weights, and find the evidence for its answers.

    Args:
        images: pictures or paths of pictures; one of each class from the bundled test set if absent.
        model: a Vision Mamba trained on Fashion-MNIST.
        top: how many answers to keep.

    Raises:
        ValueError: if a file is no picture, or the model has no weights or is no classifier of gray pictures.
    """
    from sinuous.core.registry import load

    network = load(model).eval()
    cfg = cast("dict[str, Any]", network.pretrained_cfg)
    classes = cfg.get("label_names")
    if not classes or getattr(network, "in_chans", None) != 1:
        raise ValueError(f"the demo needs a classifier of gray pictures with names for its classes (got {model!r})")
    if images is None:
        pictures, truths = samples()
        names, note = truths, None
        known: list[str | None] = list(truths)
    else:
        opened = [image if isinstance(image, Image.Image) else read_image(image) for image in images]
        names = [f"picture {i + 1}" if isinstance(p, Image.Image) else Path(p).name for i, p in enumerate(images)]
        pictures, known, note = [prepare(image) for image in opened], [None] * len(opened), NOTE
    gray = torch.stack([pil_to_tensor(p) for p in pictures]).float() / 255
    mean, std = (torch.tensor(cfg[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    found = evidence(network, (gray - mean) / std, baseline=(0 - mean) / std)
    probabilities = found.logits.softmax(-1)
    findings = []
    for i, name in enumerate(names):
        best = probabilities[i].topk(min(top, len(classes)))
        answers = [(classes[c], float(p)) for p, c in zip(best.values, best.indices.tolist(), strict=True)]
        findings.append(Finding(name, gray[i, 0], known[i], answers, found.pixels[i]))
    return Result(model, findings, note)


def _smooth(evidence: Tensor, scale: int) -> Tensor:
    """Shares `[H, W]`, blurred, on a grid that is `scale` times finer, for the eye."""
    span = torch.arange(-5, 6, dtype=evidence.dtype)
    line = torch.exp(-(span**2) / (2 * BLUR**2))
    kernel = line[:, None] * line / line.sum() ** 2
    blurred = F.conv2d(evidence[None, None], kernel[None, None], padding=5)
    return F.interpolate(blurred, scale_factor=scale, mode="bicubic")[0, 0]


def draw(result: Result, path: str | os.PathLike[str]) -> None:
    """Draw every picture, its evidence and its answers into a PNG file.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import ListedColormap, Normalize
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the figure needs matplotlib; install it with: pip install 'sinuous[train]'") from None
    ink, faint, accent, wrong = "#1c1c1e", "#8e8e93", "#c8553d", "#3d7ea6"
    shown = result.findings
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(6.4 * columns, 1.78 * rows + 1.5), facecolor="white")
    height = figure.get_figheight()
    grid = figure.add_gridspec(
        rows,
        columns * 4,
        width_ratios=[1, 1, 1.45, 0.12] * columns,
        left=0.015,
        right=0.995,
        top=1 - 0.72 / height,
        bottom=0.72 / height,
        wspace=0.06,
        hspace=0.16,
    )
    # Made black in the middle, as the background of the pictures: no evidence leaves them as they are.
    dark = colormaps["berlin"](np.linspace(0, 1, 513))[:, :3]
    colours = ListedColormap(np.clip((dark - dark[256]) / (1 - dark[256]), 0, 1), "evidence")
    strength = torch.stack([_smooth(f.evidence, 1).abs().max() for f in shown]).median().item() or 1.0
    scale = Normalize(-strength, strength, clip=True)
    for i, finding in enumerate(shown):
        row, column = i % rows, i // rows
        picture, heat, bars = (figure.add_subplot(grid[row, 4 * column + k]) for k in range(3))
        picture.imshow(finding.picture.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        fine = F.interpolate(finding.picture[None, None], scale_factor=8, mode="bicubic")[0, 0].clamp(0, 1)
        light = torch.as_tensor(colours(scale(_smooth(finding.evidence, 8).numpy()))[..., :3])
        heat.imshow((1 - (1 - 0.42 * fine[..., None]) * (1 - light)).numpy(), interpolation="bilinear")
        for axes in (picture, heat):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        names, values = zip(*finding.answers, strict=True)
        places = range(len(names))
        right = finding.truth is None or finding.truth == names[0]
        bars.barh(places, [1.0] * len(names), height=0.3, color="#f2f2f4")
        bars.barh(places, values, height=0.3, color=[accent if right else wrong] + ["#c7c7cc"] * (len(names) - 1))
        for place, name, value in zip(places, names, values, strict=True):
            weight = "bold" if place == 0 else "normal"
            bars.text(0, place - 0.24, name, va="bottom", fontsize=9, color=ink, weight=weight)
            bars.text(1, place - 0.24, f"{value:.0%}", va="bottom", ha="right", fontsize=9, color=ink, weight=weight)
        bars.set(xlim=(-0.06, 1.0), ylim=(len(names) - 0.72, -1.0), xticks=[], yticks=[])
        bars.spines[:].set_visible(False)
        if finding.truth is None:
            bars.text(0, -0.78, finding.name, fontsize=7.5, color=faint, va="bottom")
        elif not right:
            bars.text(0, -0.78, f"in truth: {finding.truth}", fontsize=7.5, color=wrong, va="bottom")
    figure.text(0.018, 1 - 0.28 / height, "Why this answer?", fontsize=15, weight="bold", color=ink, va="center")
    subtitle = f"{result.model}: each picture, the evidence for its first answer, and the three likeliest answers"
    figure.text(0.018, 1 - 0.53 / height, subtitle, fontsize=9, color=faint, va="center")
    bar = figure.add_axes((0.02, 0.42 / height, 0.26, 0.13 / height))
    figure.colorbar(ScalarMappable(scale, colours), cax=bar, orientation="horizontal")
    bar.set_xticks([-strength, 0, strength], ["speaks against", "0", "speaks for"], fontsize=8, color=ink)
    for label, side in zip(bar.get_xticklabels(), ("left", "center", "right"), strict=True):
        label.set(horizontalalignment=side)
    bar.tick_params(length=0)
    bar.spines[:].set_visible(False)
    explanation = (
        "Colour is each pixel's share in the score of the first answer, compared with a black picture:\n"
        "the two scans of every layer, read as attention, multiplied through the network. The shares add up."
    )
    figure.text(0.32, 0.42 / height, explanation, fontsize=8, color=faint, va="center", linespacing=1.5)
    figure.savefig(path, dpi=150)
