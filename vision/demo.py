"""Classify pictures of clothing and show the evidence, label their pixels, read them row by row, or tell where arrows
point.

sinuous demo vision --image shoe.png --out evidence.png
sinuous demo vision --task segment --image wardrobe.png --out masks.png
sinuous demo vision --task rows --image shoe.png --out rows.png
sinuous demo vision --task arrow --image arrow.png --out answers.png
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from sinuous.core.checks import check_near
from sinuous.vision import demo_arrow, demo_rows, demo_segment
from sinuous.vision.attribution import pixel_shares
from sinuous.vision.datasets import fashion_mnist
from sinuous.vision.io import light_on_black, read_named

MODEL = "vim_nano.fashion_mnist"

NOTE = (
    "your pictures were made gray and 28 x 28: the model learned from Fashion-MNIST, where each picture is one light "
    "piece of clothing, centred on black"
)


@dataclass(frozen=True)
class Finding:
    """Answers to one picture, and the evidence for the first of them.

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
    """All findings of one model, how the evidence was found, and what was done to the pictures first, or None."""

    model: str
    findings: list[Finding]
    method: str
    note: str | None


def prepare(image: Image.Image, size: int = 28) -> Image.Image:
    """A picture of any size and colour as Fashion-MNIST would show it: gray, square, the subject light on black.

    What `light_on_black` makes light is cut out, and fills the square along its longer side.
    """
    subject = light_on_black(image)
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


def explain(
    images: Sequence[Image.Image | str | os.PathLike[str]] | None = None, *, model: str = MODEL, top: int = 3
) -> Result:
    """Classify pictures with a model that comes with weights, and find the evidence for its answers.

    Args:
        images: pictures or paths of pictures; one of each class from the bundled test set if absent.
        model: a classifier trained on Fashion-MNIST. Evidence is the attention of scans where its mixers have it, as
            those of Vim, else integrated gradients.
        top: how many answers to keep.

    Raises:
        ValueError: if a file is no picture, or the model has no weights or is no classifier of gray pictures.
    """
    from sinuous.core.hub import load

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
        named = read_named(images)
        names, pictures = [name for name, _ in named], [prepare(image) for _, image in named]
        known, note = [None] * len(named), NOTE
    gray = torch.stack([pil_to_tensor(p) for p in pictures]).float() / 255
    mean, std = (torch.tensor(cfg[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    shares = pixel_shares(network, (gray - mean) / std, baseline=(0 - mean) / std)
    probabilities = shares.logits.softmax(-1)
    findings = []
    for i, name in enumerate(names):
        best = probabilities[i].topk(min(top, len(classes)))
        answers = [(classes[c], float(p)) for p, c in zip(best.values, best.indices.tolist(), strict=True)]
        findings.append(Finding(name, gray[i, 0], known[i], answers, shares.pixels[i]))
    return Result(model, findings, shares.method, note)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--task",
        default="classify",
        metavar="|".join(TASKS),
        help="what to do with the pictures: name what they show, the class of each pixel, what they show after every "
        "strip of rows, or where an arrow points",
    )
    parser.add_argument(
        "--image", type=Path, nargs="+", metavar="PATH", help="your pictures (default: bundled samples)"
    )
    parser.add_argument("--out", type=Path, default=Path("sinuous_vision.png"), metavar="PNG")
    parser.add_argument("--model", help=f"a model with weights for the task (default for classify: {MODEL})")


def run(options: argparse.Namespace) -> None:
    """Print what was found, and draw it into `options.out`.

    Raises:
        ValueError: for what cannot be shown or read.
    """
    check_near("--task", options.task, TASKS)
    if options.out.is_dir() or not options.out.suffix:
        raise ValueError(f"--out must be a picture's file, such as {options.out / 'seen.png'} (got {options.out})")
    TASKS[options.task](options)
    print(options.out)


def _classify(options: argparse.Namespace) -> None:
    """Print the answers, and draw them with their evidence."""
    from rich.console import Console
    from rich.table import Table

    from sinuous.vision import drawing  # needs matplotlib

    result = explain(options.image, model=options.model or MODEL)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    drawing.draw_evidence(result, options.out)
    table = Table(title=f"{result.model} sees", title_justify="left")
    for column in ("picture", "answer", "probability", "next", "then"):
        table.add_column(column, justify="right" if column == "probability" else "left")
    for finding in result.findings:
        (answer, probability), *others = finding.answers
        right = finding.truth in (None, answer)
        rest = [f"{name} {p:.1%}" for name, p in others]
        table.add_row(finding.name, answer if right else f"[red]{answer}[/]", f"{probability:.1%}", *rest)
    Console().print(table)
    if result.note:
        print(result.note)


TASKS: dict[str, Callable[[argparse.Namespace], None]] = {
    "classify": _classify,
    "segment": demo_segment.show,
    "rows": demo_rows.show,
    "arrow": demo_arrow.show,
}
"""Functions by their `--task`: each prints what it finds and draws `options.out`."""
