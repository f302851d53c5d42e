"""Does the arrow point at the circle? `sinuous demo vision --task arrow`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor

from sinuous.core.weights import all_weights
from sinuous.vision.datasets import arrow_pointing
from sinuous.vision.io import as_seen, read_named

TAG = "arrow_pointing_small"
"""Tag of weights that the experiment of that name trained."""

SIDES = (96, 192)
"""Pixels: of the training, and of pictures to extrapolate to."""

SAMPLES = 8
"""Pictures of each size."""


_WORDS = {True: "points at it", False: "does not"}


@dataclass(frozen=True)
class Pointing:
    """A picture of an arrow and a circle, and whether the one points at the other.

    Attributes:
        name: where the picture comes from.
        picture: what the model saw.
        probability: that the arrow points at the circle.
        truth: whether it does, where known.
    """

    name: str
    picture: Image.Image
    probability: float
    truth: bool | None

    @property
    def answer(self) -> bool:
        return self.probability > 0.5


def default_model() -> str:
    """Name of the first weights for arrows that come with the package.

    Raises:
        ValueError: if there are none.
    """
    names = [weights.name for weights in all_weights().values() if weights.tag == TAG]
    if not names:
        raise ValueError(
            "no weights for --task arrow come with this version; train some with `sinuous train "
            f"experiment=vision/{TAG}` (half an hour on one core), save them by sinuous.save, and give the folder as "
            "--model"
        )
    # That of the paper first.
    return min(names, key=lambda name: (not name.startswith("plstm"), name))


def prepare(image: Image.Image, side: int) -> Image.Image:
    """A picture of any size and colour in RGB, on a white square."""
    return ImageOps.pad(as_seen(image, 3), (side, side), Image.Resampling.LANCZOS, color="white")


def point(
    images: Sequence[Image.Image | str | os.PathLike[str]] | None = None, *, model: str | None = None
) -> list[Pointing]:
    """Tell for each picture whether its arrow points at its circle.

    Args:
        images: pictures or paths of pictures; test pictures of two sizes if absent.
        model: weights by name, or a folder of `sinuous.save`; those that come with the package if absent.

    Raises:
        ValueError: if a file is no picture, or the model has no weights or has not two classes of coloured pictures.
    """
    from sinuous.core.hub import load

    name = model or default_model()
    network: Any = load(name).eval()
    if getattr(network, "num_classes", None) != 2 or getattr(network, "in_chans", None) != 3:
        raise ValueError(
            f"--task arrow needs a model of coloured pictures with two classes (got {name!r}); give one that was "
            f"trained by experiment=vision/{TAG}"
        )
    shown: list[tuple[str, Image.Image, bool | None]] = []
    if images is None:
        for split, side in zip(("test", "ext_test"), SIDES, strict=True):
            data = arrow_pointing(split, side=side, unit=0.5, arrow_length=(40, 60), arrow_width=(4, 7), length=SAMPLES)
            shown += [(f"{side} px, picture {i + 1}", data[i][0], bool(data[i][1])) for i in range(SAMPLES)]
    else:
        shown = [(of_file, prepare(image, SIDES[0]), None) for of_file, image in read_named(images)]
    cfg = cast("dict[str, Any]", network.pretrained_cfg)
    mean, std = (torch.tensor(cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))
    answers = []
    for of_picture, image, truth in shown:
        network.set_input_size(img_size=image.size[::-1])
        with torch.no_grad():
            logits = network(((pil_to_tensor(image) / 255 - mean) / std)[None])
        answers.append(Pointing(of_picture, image, float(logits[0].softmax(0)[1]), truth))
    return answers


def show(options: argparse.Namespace) -> None:
    """Print the answers, and draw them into `options.out`.

    Raises:
        ValueError: as `point`.
    """
    from rich.console import Console
    from rich.table import Table

    from sinuous.vision import drawing  # needs matplotlib

    model = options.model or default_model()
    answers = point(options.image, model=model)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    captions = [(f"{_WORDS[one.answer]} ({one.probability:.0%})", one.truth in (None, one.answer)) for one in answers]
    pictures = [one.picture for one in answers]
    drawing.answer_grid(pictures, captions, f"{model}: does the arrow point at the circle?", options.out)
    table = Table(title=f"{model} sees", title_justify="left")
    for column in ("picture", "points at the circle", "probability"):
        table.add_column(column)
    for one, (_, right) in zip(answers, captions, strict=True):
        answer = "yes" if one.answer else "no"
        table.add_row(one.name, answer if right else f"[red]{answer}[/]", f"{one.probability:.1%}")
    Console().print(table)
