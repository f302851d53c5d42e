"""The answer after every strip of rows: `sinuous demo vision --task rows`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from sinuous.vision.io import read_named
from sinuous.vision.vir import ViR

MODEL = "vir_nano.fashion_mnist"


@dataclass(frozen=True)
class RowByRow:
    """A picture with what a model thinks of it after every strip of rows.

    Attributes:
        name: where the picture comes from.
        picture: what the model saw, gray `[H, W]` in 0..1.
        probabilities: of the classes after each strip, `[strips, K]`.
        strip: height of a strip in pixels.
        truth: the right class, where known.
    """

    name: str
    picture: Tensor
    probabilities: Tensor
    strip: int
    truth: str | None

    @property
    def settled(self) -> int:
        """Rows of pixels after which the likeliest class stays what it is in the end."""
        answers = self.probabilities.argmax(1)
        others = (answers != answers[-1]).nonzero().flatten().tolist()
        return (others[-1] + 2 if others else 1) * self.strip


def read_rows(
    images: Sequence[Image.Image | str | os.PathLike[str]] | None = None, *, model: str = MODEL
) -> tuple[list[RowByRow], list[str]]:
    """Read pictures strip by strip with a `ViR` that comes with weights, a row of patches at a time.

    Args:
        images: pictures or paths of pictures; one of each class from the bundled test set if absent.
        model: a ViR trained on Fashion-MNIST.

    Returns:
        The pictures with the answers to their rows so far, and the names of the classes.

    Raises:
        ValueError: if a file is no picture, or the model has no weights or is no ViR for gray pictures.
    """
    from sinuous.core.hub import load
    from sinuous.vision.demo import prepare, samples  # which has this task among its own

    network = load(model).eval()
    cfg = cast("dict[str, Any]", getattr(network, "pretrained_cfg", {}))
    classes = cfg.get("label_names")
    if not isinstance(network, ViR) or network.in_chans != 1 or not classes:
        raise ValueError(
            f"--task rows needs a ViR for gray pictures with names for its classes (got {model!r}); leave --model out "
            f"for {MODEL}"
        )
    height, width = network.patch_embed.img_size
    strip = network.patch_embed.patch_size[0]
    truths: list[str | None]
    if images is None:
        pictures, known = samples()
        names, truths = known, list(known)
    else:
        named = read_named(images)
        names, pictures = [name for name, _ in named], [prepare(image, min(height, width)) for _, image in named]
        truths = [None] * len(named)
    gray = torch.stack([pil_to_tensor(picture) for picture in pictures]).float() / 255
    mean, std = (torch.tensor(cfg[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    answers, state = [], network.initial_state(len(gray))
    with torch.no_grad():
        for rows in ((gray - mean) / std).split(strip, 2):
            logits, state = network.prefill(rows, state)
            answers.append(logits.softmax(-1))
    probabilities = torch.stack(answers, 1)
    read = zip(names, gray[:, 0], probabilities, truths, strict=True)
    return [RowByRow(name, picture, p, strip, truth) for name, picture, p, truth in read], list(classes)


def show(options: argparse.Namespace) -> None:
    """Print the final answers and when they were settled, and draw the answers beside the strips into `options.out`.

    Raises:
        ValueError: as `read_rows`.
    """
    from rich.console import Console
    from rich.table import Table

    from sinuous.vision import drawing  # needs matplotlib
    from sinuous.vision.demo import NOTE

    model = options.model or MODEL
    read, classes = read_rows(options.image, model=model)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    drawing.strip_grid(read, classes, f"{model}: the answer after every {read[0].strip} rows of pixels", options.out)
    table = Table(title=f"{model} reads from the top", title_justify="left")
    for column in ("picture", "answer", "probability", "settled after"):
        table.add_column(column, justify="left" if column in ("picture", "answer") else "right")
    for one in read:
        best = int(one.probabilities[-1].argmax())
        answer = classes[best] if one.truth in (None, classes[best]) else f"[red]{classes[best]}[/]"
        share = f"{float(one.probabilities[-1, best]):.1%}"
        table.add_row(one.name, answer, share, f"{one.settled} of {one.picture.shape[0]} rows")
    Console().print(table)
    if options.image is not None:
        print(NOTE)
