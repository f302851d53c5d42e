"""Datasets of pictures: collections with labels, and pictures that are made as they are read.

Every dataset is a plain `torch.utils.data.Dataset` with a list `classes`; `split` chooses its part.
"""

from __future__ import annotations

from sinuous.vision.datasets.arrows import ArrowPictures, ArrowPointing, arrow_pointing
from sinuous.vision.datasets.collages import Collages, MaskedImages, collage
from sinuous.vision.datasets.labelled import (
    BUNDLED_FASHION_MNIST,
    ClassFolder,
    InMemoryImages,
    LabelledImages,
    cifar10,
    fashion_mnist,
    image_folder,
    read_idx,
    synthetic,
)

__all__ = [
    "BUNDLED_FASHION_MNIST",
    "ArrowPictures",
    "ArrowPointing",
    "ClassFolder",
    "Collages",
    "InMemoryImages",
    "LabelledImages",
    "MaskedImages",
    "arrow_pointing",
    "cifar10",
    "collage",
    "fashion_mnist",
    "image_folder",
    "read_idx",
    "synthetic",
]
