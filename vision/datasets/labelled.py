"""Labelled images as plain `torch.utils.data.Dataset`s: `(image, label)` with a PIL image, or what `transform` makes.

Every dataset has the splits `train`, `val` and `test` and a list `classes`. Where a source has no validation set, the
last sixth of its training set is one. Reading is torchvision's; this file adds splits and errors that say what to do.
"""

from __future__ import annotations

import functools
import gzip
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.layers import to_2tuple
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets

from sinuous.core.checks import check_near
from sinuous.core.data import SPLITS, check_split
from sinuous.vision.io import MODES, PictureTransform, read_image

BUNDLED_FASHION_MNIST = Path(__file__).parents[1] / "samples" / "fashion_mnist"
INNER_FASHION_MNIST = ("FashionMNIST/raw", "usr/share/datasets/fashion-mnist")
"""Where the files of Fashion-MNIST lie in a folder of torchvision's, and in Debian's package, unpacked."""

Transform = Callable[..., Any]


class LabelledImages:
    """Pictures of a collection with one label each, through transforms: `(image [C, H, W], label)`.

    Args:
        dataset: `dataset(split=..., transform=...)` makes a split; it lists its `classes`.
        train_transform: a PIL image to a tensor, with augmentation.
        eval_transform: the same without.
        num_classes: number of classes, which the collection must have.
        in_chans: channels of an image: 1, which makes coloured pictures gray, or 3.
        img_size: height and width of an image, or one number for both.
        mean: per channel, to show pictures as they were.
        std: per channel, likewise.
        root: given to `dataset`, where it is not None.
        source: likewise.
        lengths: number of pictures of splits, given to `dataset` as `length`.

    Raises:
        ValueError: for channels that no picture has, or another number of means than of channels.
    """

    noun = "images"
    transform_of: ClassVar[Callable[..., Any]] = PictureTransform
    """Maker of the transform that `dataset` is given, of one of those below and the number of channels."""

    def __init__(
        self,
        dataset: Callable[..., Any],
        train_transform: Transform,
        eval_transform: Transform,
        *,
        num_classes: int,
        in_chans: int,
        img_size: int | Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        root: str | os.PathLike[str] | None = None,
        source: str | None = None,
        lengths: Mapping[str, int] | None = None,
    ) -> None:
        places = {"root": root, "source": source}
        self.dataset = functools.partial(dataset, **{key: place for key, place in places.items() if place is not None})
        self.train_transform, self.eval_transform = train_transform, eval_transform
        _check_channels(in_chans, mean, std)
        self.num_classes, self.in_chans = num_classes, in_chans
        self.img_size = to_2tuple(img_size)
        self.mean, self.std = tuple(mean), tuple(std)
        self.lengths = dict(lengths or {})
        for split in self.lengths:
            check_near("split of data.lengths", split, SPLITS)
        self.augment = True

    def split(self, name: str) -> Any:
        """The pictures of `train`, `val` or `test`.

        Raises:
            ValueError: if the collection has another number of classes than `num_classes`.
        """
        augmented = name == "train" and self.augment
        made = self.read(name, self.train_transform if augmented else self.eval_transform)
        if len(made.classes) != self.num_classes:
            raise ValueError(
                f"the {name} data has {len(made.classes)} classes and the model predicts {self.num_classes}; "
                f"give data.num_classes={len(made.classes)}"
            )
        return made

    def read(self, name: str, transform: Transform) -> Any:
        """The pictures of a split through `transform`."""
        options = {"split": name, **self.options(name)}
        return self.dataset(transform=self.transform_of(transform, self.in_chans), **options)

    def options(self, name: str) -> dict[str, Any]:
        """Options of `dataset` for one split."""
        return {"length": self.lengths[name]} if name in self.lengths else {}

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes, in the order of their numbers."""
        classes: Sequence[str] = self.dataset(split="test", transform=None).classes
        return classes

    def example(self) -> Tensor:
        return torch.zeros(1, self.in_chans, *self.img_size)

    def facts(self) -> dict[str, Any]:
        """What weights trained on these pictures remember of them."""
        height, width = self.img_size
        return {
            "img_size": height if height == width else [height, width],
            "in_chans": self.in_chans,
            "mean": list(self.mean),
            "std": list(self.std),
            "classes": list(self.classes),
        }

    def model_options(self) -> dict[str, Any]:
        """Keyword arguments of any model of these pictures."""
        return {"img_size": self.img_size, "in_chans": self.in_chans, "num_classes": self.num_classes}


def _check_channels(in_chans: int, mean: Sequence[float], std: Sequence[float]) -> None:
    if in_chans not in MODES:
        raise ValueError(f"data.in_chans must be 1 (gray) or 3 (colour) (got {in_chans})")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != in_chans:
            average = f"{sum(values) / max(len(values), 1):.4g}"
            raise ValueError(
                f"data.{name} must have one number for each of the {in_chans} channels of data.in_chans "
                f"(got {list(values)}); give data.{name}=[{','.join([average] * in_chans)}]"
            )


def read_idx(folder: str | os.PathLike[str], name: str) -> NDArray[np.uint8]:
    """The array of unsigned bytes in the IDX file `name` of `folder`, or in `name.gz`.

    Raises:
        FileNotFoundError: if there is neither.
        ValueError: if the file is damaged, or is no IDX file of unsigned bytes.
    """
    plain = Path(folder) / name
    packed = plain.with_name(f"{name}.gz")
    path = packed if packed.is_file() else plain
    if not path.is_file():
        raise FileNotFoundError(
            f"{Path(folder).resolve()} has no {name} or {name}.gz; give the folder with the IDX files"
        )
    try:
        content = gzip.decompress(path.read_bytes()) if path is packed else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged ({error}); copy or download it again") from error
    if content[:3] != b"\0\0\x08" or len(content) < 4:
        raise ValueError(f"{path} is no IDX file of unsigned bytes; copy or download it again")
    start = 4 + 4 * content[3]
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    if len(content) - start != np.prod(shape):
        raise ValueError(
            f"{path} is cut off: {len(content) - start:,} bytes where its header promises {int(np.prod(shape)):,}; "
            "copy or download it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


class InMemoryImages(Dataset[tuple[Any, int]]):
    """Images held as one array of bytes, `[N, H, W]` gray or `[N, H, W, 3]` colour.

    Args:
        images: unsigned bytes.
        labels: class numbers, `[N]`.
        classes: names of the classes.
        transform: applied to each image as a PIL image.
    """

    def __init__(
        self, images: NDArray[np.uint8], labels: NDArray[Any], classes: list[str], transform: Transform | None
    ) -> None:
        self.images, self.labels, self.classes, self.transform = images, labels, classes, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image: Any = Image.fromarray(self.images[index])
        return (image if self.transform is None else self.transform(image)), int(self.labels[index])


def _of_split(split: str, count: int) -> slice:
    """Rows of `count` training images that belong to `split`, where the last sixth is the validation set."""
    held_out = count // 6
    return slice(0, count - held_out) if split == "train" else slice(count - held_out, count)


def _root(root: str | os.PathLike[str] | None, key: str = "data.root") -> Path:
    if root is None:
        raise ValueError(f"this data lies in a folder of yours: give it with {key}=FOLDER")
    path = Path(root).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path.resolve()}; give the folder of the data with {key}=FOLDER")
    return path


def fashion_mnist(
    split: str = "train",
    *,
    source: str = "bundled",
    root: str | os.PathLike[str] | None = None,
    transform: Transform | None = None,
) -> InMemoryImages:
    """Fashion-MNIST: 28 × 28 gray pictures of ten kinds of clothing (Xiao, Rasul and Vollgraf, arXiv 1708.07747).

    Args:
        split: `train`, `val` (the last sixth of the training file) or `test`.
        source: `bundled`, the subset of 10,000 + 2,000 + 2,000 images that comes with the package; `folder`, the IDX
            files in `root`, 50,000 + 10,000 + 10,000 in the full set, also where torchvision or Debian's package
            dataset-fashion-mnist puts them below it; `download`, fetched into `root` by torchvision.
        root: the folder for `folder` and `download`.
        transform: applied to each PIL image.

    Raises:
        FileNotFoundError: if a folder or file is missing.
        ValueError: for a wrong split or source, or a damaged file.
        OSError: if the download fails.
    """
    check_split(split)
    if source not in ("bundled", "folder", "download"):
        raise ValueError(f"source must be bundled, folder or download (got {source!r})")
    if source == "bundled":
        folder = BUNDLED_FASHION_MNIST
    elif source == "download":
        _fetch(datasets.FashionMNIST, root)
        folder = Path(str(root)).expanduser() / "FashionMNIST" / "raw"
    else:
        folder = _root(root)
        inside = [folder / inner for inner in INNER_FASHION_MNIST if (folder / inner).is_dir()]
        folder = inside[0] if inside else folder
    part = "t10k" if split == "test" else "train"
    images = read_idx(folder, f"{part}-images-idx3-ubyte")
    labels = read_idx(folder, f"{part}-labels-idx1-ubyte")
    if images.ndim != 3 or len(images) != len(labels):
        raise ValueError(
            f"{folder} does not hold matching files: images {list(images.shape)}, labels {list(labels.shape)}; "
            "copy or download both again"
        )
    rows = slice(None) if split == "test" else _of_split(split, len(labels))
    return InMemoryImages(images[rows], labels[rows], list(datasets.FashionMNIST.classes), transform)


def _fetch(dataset: Callable[..., Any], root: str | os.PathLike[str] | None) -> Any:
    """Let torchvision download `dataset` into `root`, and explain it if that fails."""
    if root is None:
        raise ValueError("source=download needs a folder to download to: give it with data.root=FOLDER")
    try:
        return dataset(root, download=True)
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"{dataset.__name__} could not be downloaded ({error}); where there is no network, put its files into a "
            "folder and give data.source=folder data.root=FOLDER"
        ) from error


def cifar10(
    split: str = "train",
    *,
    source: str = "folder",
    root: str | os.PathLike[str] | None = None,
    transform: Transform | None = None,
) -> InMemoryImages:
    """CIFAR-10: 32 × 32 colour pictures of ten kinds of things (Krizhevsky 2009).

    Args:
        split: `train`, `val` (the last sixth of the training set) or `test`.
        source: `folder`, where `root` holds `cifar-10-batches-py`; `download`, fetched into `root` by torchvision.
        root: that folder.
        transform: applied to each PIL image.

    Raises:
        FileNotFoundError: if the folder is missing.
        ValueError: for a wrong split or source, or damaged files.
        OSError: if the download fails.
    """
    check_split(split)
    if source not in ("folder", "download"):
        raise ValueError(f"source must be folder or download (got {source!r})")
    if source == "download":
        _fetch(datasets.CIFAR10, root)
    folder = _root(root)
    try:
        data = datasets.CIFAR10(folder, train=split != "test")
    except (RuntimeError, EOFError, KeyError) as error:
        raise ValueError(
            f"{folder.resolve()} holds no intact cifar-10-batches-py ({error}); use data.source=download, or unpack "
            "cifar-10-python.tar.gz there"
        ) from error
    labels = np.asarray(data.targets)
    rows = slice(None) if split == "test" else _of_split(split, len(labels))
    return InMemoryImages(data.data[rows], labels[rows], list(data.classes), transform)


def image_folder(
    split: str = "train", *, root: str | os.PathLike[str] | None = None, transform: Transform | None = None
) -> datasets.ImageFolder:
    """Pictures sorted into folders: `root/train/CLASS/*.jpg`, `root/val/CLASS/*.jpg` and, if there is one, `root/test`.

    This is ImageNet's usual layout. Without a `test` folder, `val` is the test set too. Classes are numbered as the
    training folder's are, where there is one.

    Raises:
        FileNotFoundError: if a folder is missing or holds no pictures.
        ValueError: for a wrong split; and, on access, for an unreadable picture, which it names.
    """
    check_split(split)
    base = _root(root)
    folder = base / "val" if split == "test" and not (base / "test").is_dir() else base / split
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{base.resolve()} has no folder {split!r}; pictures are expected at {split}/CLASS/*.jpg"
        )
    return ClassFolder(folder, base / "train" if (base / "train").is_dir() else folder, transform)


class ClassFolder(datasets.ImageFolder):
    """Pictures of one split, sorted into folders of classes, which are numbered as those of the training folder are.

    A split may lack classes; its own are refused.

    Args:
        folder: of the split.
        training: of the training split.
        transform: applied to each PIL image.

    Raises:
        FileNotFoundError: if a class of the training folder has no pictures.
        ValueError: if the split has classes that the training folder lacks.
    """

    def __init__(self, folder: Path, training: Path, transform: Transform | None) -> None:
        self._training = training
        allow_empty = folder != training
        super().__init__(str(folder), transform=transform, loader=read_image, allow_empty=allow_empty)

    def find_classes(self, directory: str | os.PathLike[str]) -> tuple[list[str], dict[str, int]]:
        classes, numbers = super().find_classes(self._training)
        present = {entry.name for entry in os.scandir(directory) if entry.is_dir() and not entry.name.startswith(".")}
        if strangers := sorted(present - set(classes)):
            raise ValueError(
                f"{directory} has classes that {self._training} lacks: {', '.join(strangers)}; a model is trained on "
                f"those of the training folder, which are {', '.join(classes)}"
            )
        return classes, numbers


def synthetic(
    split: str = "train",
    *,
    sizes: dict[str, int],
    image_size: tuple[int, int, int],
    num_classes: int,
    transform: Transform | None = None,
) -> datasets.FakeData:
    """Noise with random labels, the same for the same split and index: stands in for any image data in tests.

    Args:
        split: `train`, `val` or `test`.
        sizes: number of images per split.
        image_size: channels, height, width.
        num_classes: number of classes.
        transform: applied to each PIL image.
    """
    check_split(split)
    offset = 100_000_000 * SPLITS.index(split)
    data = datasets.FakeData(sizes[split], tuple(image_size), num_classes, transform=transform, random_offset=offset)
    data.classes = [str(c) for c in range(num_classes)]
    return data
