"""Collages: several pieces of clothing in one picture, with a class for each pixel. A synthetic composite of real
pictures, where no set of pictures with masks is free to come with the package."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from sinuous.core.checks import check_near, check_sizes
from sinuous.core.data import SPLITS
from sinuous.vision.datasets.labelled import InMemoryImages, LabelledImages, Transform, fashion_mnist
from sinuous.vision.io import as_seen

FEWEST, MOST = 2, 5
SMALLEST, LARGEST = 16, 40
"""Pixels: sides of the items."""

THRESHOLD = 20
"""An item covers those of its pixels that are lighter than this, of 255."""


class Collages(Dataset[tuple[Any, Any]]):
    """Pairs `(gray picture, mask [side, side])`, each made when it is read from an index's own random numbers.

    A collage has 2 to 5 items with sides of 16 to 40 pixels, later ones over earlier ones. Masks are int64: 0 for the
    background, c + 1 where class c is seen.

    Args:
        items: pictures with labels to paste.
        split: name of the split that the items are from.
        side: height and width.
        length: number of collages.
        transform: `transform(picture, mask)` of both together, such as those of `torchvision.transforms.v2`; the mask
            is a `tv_tensors.Mask`.
    """

    def __init__(
        self, items: InMemoryImages, split: str, side: int, length: int, transform: Callable[..., Any] | None
    ) -> None:
        self.items, self.split, self.side, self.length, self.transform = items, split, side, length, transform
        self.classes = ["background", *items.classes]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must lie between {-len(self)} and {len(self) - 1} (got {index})")
        picture, mask = self._made(index % len(self))
        image = Image.fromarray(picture)
        labels = torch.from_numpy(mask)
        if self.transform is None:
            return image, labels
        image, labels = self.transform(image, tv_tensors.Mask(labels))
        return image, labels.as_subclass(Tensor)

    def _made(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        # Python promises the numbers of `random()` for all versions, and nothing of the other draws.
        numbers = random.Random(len(SPLITS) * index + SPLITS.index(self.split))

        def below(count: int) -> int:
            return int(numbers.random() * count)

        picture = np.zeros((self.side, self.side), np.uint8)
        mask = np.zeros((self.side, self.side), np.int64)
        for _ in range(FEWEST + below(MOST - FEWEST + 1)):
            item = below(len(self.items))
            size = SMALLEST + below(LARGEST - SMALLEST + 1)
            top, left = below(self.side - size + 1), below(self.side - size + 1)
            scaled = Image.fromarray(self.items.images[item]).resize((size, size), Image.Resampling.BILINEAR)
            pixels = np.asarray(scaled)
            place = (slice(top, top + size), slice(left, left + size))
            covered = pixels > THRESHOLD
            picture[place][covered] = pixels[covered]
            mask[place][covered] = int(self.items.labels[item]) + 1
        return picture, mask


def collage(
    split: str = "train",
    *,
    side: int = 64,
    source: str = "bundled",
    root: str | os.PathLike[str] | None = None,
    length: int | None = None,
    transform: Callable[..., Any] | None = None,
) -> Collages:
    """Collages of Fashion-MNIST: `(picture, mask)` with 11 classes, an index always the same, on any machine.

    Args:
        split: `train`, `val` or `test`; items are from that split of Fashion-MNIST.
        side: height and width in pixels.
        source: of Fashion-MNIST, see `fashion_mnist`.
        root: likewise.
        length: number of collages; as many as there are items if absent.
        transform: `transform(picture, mask)` of both together.

    Raises:
        ValueError: for an unknown split (naming the nearest) or source, or a side smaller than the largest item.
        FileNotFoundError: if a folder or file is missing.
    """
    check_near("split", split, SPLITS)
    check_sizes(side=side)
    if side < LARGEST:
        raise ValueError(f"side must be at least {LARGEST}, the side of the largest item (got {side})")
    items = fashion_mnist(split, source=source, root=root)
    length = len(items) if length is None else length
    check_sizes(length=length)
    return Collages(items, split, side, length, transform)


class PairTransform:
    """A transform of pictures with their masks that first shows pictures as a model of `channels` reads them.

    Raises:
        ValueError: if it is given, or gives, a mask of another size than its picture.
    """

    def __init__(self, transform: Transform, channels: int) -> None:
        self.transform, self.channels = transform, channels

    def __call__(self, image: Image.Image, mask: Tensor) -> tuple[Any, Tensor]:
        _check_size("the mask of a picture", mask, (image.height, image.width))
        picture, mask = self.transform(as_seen(image, self.channels), mask)
        if isinstance(picture, Tensor):
            _check_size("a transformed mask", mask, tuple(picture.shape[-2:]))
            picture = picture.as_subclass(Tensor)
        return picture, mask


def _check_size(what: str, mask: Tensor, size: tuple[int, ...]) -> None:
    if tuple(mask.shape[-2:]) != size:
        raise ValueError(
            f"{what} must have the picture's height and width, {size[0]} x {size[1]} (got "
            f"{' x '.join(map(str, mask.shape))}); cut and scale both together, as torchvision.transforms.v2 does"
        )


class MaskedImages(LabelledImages):
    """`LabelledImages` with a class for each pixel: `(image [C, H, W], mask [H, W])`, of which -100 does not count.

    The transforms of `dataset`, and thus those given here, take picture and mask together, as those of
    `torchvision.transforms.v2` do.
    """

    unit = "pixel"
    transform_of: ClassVar[Callable[..., Any]] = PairTransform
