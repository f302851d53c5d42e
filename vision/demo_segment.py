"""A class for each pixel: `sinuous demo vision --task segment`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sinuous.vision.datasets import collage
from sinuous.vision.io import light_on_black, read_named
from sinuous.vision.segmentation import Segmenter

MODEL = "segmenter.collage"

SAMPLES = 6

NOTE = (
    "your pictures were made gray, light on black, and at most 64 pixels long: the model learned from collages of "
    "Fashion-MNIST, pieces of clothing of 16 to 40 pixels on black"
)


@dataclass(frozen=True)
class Labelled:
    """A picture with the class of each of its pixels.

    Attributes:
        name: where the picture comes from.
        picture: what the model saw, `[C, H, W]` in 0..1.
        predicted: class of each pixel, `[H, W]`, 0 for the background.
        truth: the right classes, where known.
    """

    name: str
    picture: Tensor
    predicted: Tensor
    truth: Tensor | None

    def shares(self, classes: Sequence[str]) -> list[tuple[str, float]]:
        """Predicted classes besides the background with their shares of its complement, the largest first."""
        counts = torch.bincount(self.predicted.flatten(), minlength=len(classes))[1:].double()
        order = counts.argsort(descending=True)
        return [
            (classes[int(c) + 1], float(counts[c] / counts.sum()))
            for c in order
            if counts[c] >= 0.005 * counts.sum() > 0
        ]


def prepare(image: Image.Image, longest: int = 64) -> Image.Image:
    """A picture of any size and colour as the collages are: gray, light on black, so many pixels along its longer
    side."""
    whole = Image.fromarray((255 * light_on_black(image)).astype(np.uint8))
    width, height = (max(1, round(longest * side / max(whole.size))) for side in whole.size)
    return whole.resize((width, height), Image.Resampling.LANCZOS)


def segment(
    images: Sequence[Image.Image | str | os.PathLike[str]] | None = None, *, model: str = MODEL
) -> tuple[list[Labelled], list[str]]:
    """Find the class of each pixel with a `Segmenter` that comes with weights.

    Args:
        images: pictures or paths of pictures; the first test collages if absent.
        model: a segmenter of gray pictures.

    Returns:
        The pictures with their classes, and the names of the classes, that of the background first.

    Raises:
        ValueError: if a file is no picture, or the model has no weights or is no segmenter of gray pictures.
    """
    from sinuous.core.hub import load

    network = load(model).eval()
    cfg = cast("dict[str, Any]", getattr(network, "pretrained_cfg", {}))
    classes = cfg.get("label_names")
    if not isinstance(network, Segmenter) or network.in_chans != 1 or not classes:
        raise ValueError(
            f"--task segment needs a segmenter of gray pictures with names for its classes (got {model!r}); leave "
            f"--model out for {MODEL}"
        )
    shown: list[tuple[str, Image.Image, Tensor | None]]
    if images is None:
        data = collage("test", length=SAMPLES)
        shown = [(f"collage {i + 1}", *data[i]) for i in range(SAMPLES)]
    else:
        longest = max(cfg["input_size"][1:])
        shown = [(name, prepare(image, longest), None) for name, image in read_named(images)]
    mean, std = (torch.tensor(cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))
    labelled = []
    for name, image, truth in shown:
        picture = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)[None]
        with torch.no_grad():
            logits = network(((picture - mean) / std)[None])
        labelled.append(Labelled(name, picture, logits[0].argmax(0), truth))
    return labelled, list(classes)


def show(options: argparse.Namespace) -> None:
    """Print the classes found in each picture, and draw the masks beside the pictures into `options.out`.

    Raises:
        ValueError: as `segment`.
    """
    from rich.console import Console
    from rich.table import Table

    from sinuous.vision import drawing  # needs matplotlib

    model = options.model or MODEL
    labelled, classes = segment(options.image, model=model)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [drawing.MaskedPicture(one.picture, one.predicted, one.truth, one.name) for one in labelled]
    drawing.mask_grid(rows, classes, f"{model}: the class of each pixel", options.out)
    table = Table(title=f"{model} sees", title_justify="left")
    for column in ("picture", "classes, by their share of what is no background"):
        table.add_column(column)
    for one in labelled:
        listed = ", ".join(f"{name} {share:.0%}" for name, share in one.shares(classes))
        table.add_row(one.name, listed or "nothing")
    Console().print(table)
    if options.image is not None:
        print(NOTE)
