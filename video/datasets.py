"""Clips that are made as they are read: small pictures on a drifting texture, or on a film of yours.

Every item comes from a data set of pictures, which is handed in as `pictures(split=...)`: a list of `(picture, label)`
with names in `classes`, such as `sinuous.vision.datasets.fashion_mnist`. Items of a split come from the same split of
the pictures. The same seed and index give the same bytes, in any process.

Shapes: clips are uint8 `[1, T, H, W]`, gray.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sinuous.core.checks import check_positive, check_range, check_sizes, is_whole
from sinuous.core.data import SPLITS, check_split
from sinuous.video.backgrounds import FilmFrames, Frames, Texture

ITEM = 14
"""Side of an item in pixels: pictures of 28 at half their size."""

LENGTHS = {"train": 20_000, "val": 1_000, "test": 2_000}
"""Clips of a split."""

FILM_SPANS = {"train": (0.0, 0.6), "val": (0.6, 0.7), "test": (0.7, 1.0)}
"""Part of a film that is the background of a split."""


class MovingClips(Dataset[tuple[Tensor, int]]):
    """An item that moves over a drifting texture: `(clip, direction and speed)`, 8 directions × 2 speeds.

    The item begins anywhere, leaves at one side and enters at the other, by whole pixels: each single frame is the same
    for all 16 classes in distribution, and only the order of frames tells them apart. The texture drifts on its own.

    Args:
        split: `train`, `val` or `test`.
        pictures: `pictures(split=...)` gives the items.
        num_frames: T.
        img_size: height and width of a frame.
        length: number of clips; 20,000, 1,000 and 2,000 if absent.
        seed: of the collection.
        root: a film that takes the place of the texture, in parts of its own for each split.
        still: share of the clips whose background stands still, so that nothing moves but the item; a model that has
            learned those finds the others easier.

    Raises:
        ValueError: for an unknown split, a frame smaller than an item, a share outside [0, 1], or a file that is no
            film.
    """

    DIRECTIONS: ClassVar[Mapping[str, tuple[int, int]]] = {
        "right": (0, 1),
        "down right": (1, 1),
        "down": (1, 0),
        "down left": (1, -1),
        "left": (0, -1),
        "up left": (-1, -1),
        "up": (-1, 0),
        "up right": (-1, 1),
    }
    SPEEDS: ClassVar[Mapping[str, int]] = {"slowly": 1, "fast": 3}
    """Pixels per frame, along each axis."""
    classes: ClassVar[tuple[str, ...]] = tuple(map(" ".join, itertools.product(DIRECTIONS, SPEEDS)))

    def __init__(
        self,
        split: str = "train",
        *,
        pictures: Callable[..., Any],
        num_frames: int = 8,
        img_size: int = 32,
        length: int | None = None,
        seed: int = 0,
        root: str | os.PathLike[str] | None = None,
        still: float = 0.0,
    ) -> None:
        self.length = _checked(split, num_frames, img_size, length, seed)
        check_range(0, 1, still=still)
        self.still = still
        self.num_frames, self.img_size, self.seed = num_frames, img_size, (seed, SPLITS.index(split), 0)
        self.items = [item for of_class in _items(pictures, split).values() for item in of_class]
        self.background = _background(split, img_size, root)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        rng = _rng(self, index)
        label = int(rng.integers(len(self.classes)))
        name, speed = divmod(label, len(self.SPEEDS))
        down, right = (step * list(self.SPEEDS.values())[speed] for step in list(self.DIRECTIONS.values())[name])
        item = self.items[rng.integers(len(self.items))]
        top, left = rng.integers(self.img_size, size=2)
        frames = self.background(rng, self.num_frames)
        if self.still and rng.random() < self.still:
            frames[:] = frames[0]
        for step, frame in enumerate(frames):
            rows = (top + step * down + np.arange(ITEM)) % self.img_size
            columns = (left + step * right + np.arange(ITEM)) % self.img_size
            place = np.ix_(rows, columns)
            frame[place] = np.where(item > 0, item, frame[place])
        return torch.from_numpy(frames)[None], label


class Needle(NamedTuple):
    """What a clip of `NeedleInVideo` holds: the frames of the two items and their kinds, in the order of time."""

    frames: tuple[int, int]
    kinds: tuple[str, str]


class NeedleInVideo(Dataset[tuple[Tensor, int]]):
    """Two items of different kinds in 2 of N frames: `(clip, which kind came before which)`, 12 classes.

    Whoever finds both items but not their order is right half of the time. Items are 14 × 14 pixels in frames of 32 ×
    32, 50 to 80 % opaque; the frames are a drifting texture with cuts.

    Args:
        split: `train`, `val` or `test`.
        num_frames: N.
        pictures: `pictures(split=...)` gives the items, among them those of `KINDS`.
        seed: of the collection.
        length: number of clips; 20,000, 1,000 and 2,000 if absent.
        img_size: height and width of a frame.
        root: a film that takes the place of the texture, in parts of its own for each split.

    Raises:
        ValueError: for an unknown split, fewer than 2 frames, pictures without one of the kinds, a frame smaller than
            an item, or a file that is no film.
    """

    KINDS: ClassVar[tuple[str, ...]] = ("trouser", "dress", "sneaker", "bag")
    PAIRS: ClassVar[tuple[tuple[str, str], ...]] = tuple(itertools.permutations(KINDS, 2))
    classes: ClassVar[tuple[str, ...]] = tuple(f"{first}, then {second}" for first, second in PAIRS)
    OPACITY: ClassVar[tuple[float, float]] = (0.5, 0.8)

    def __init__(
        self,
        split: str = "train",
        num_frames: int = 64,
        *,
        pictures: Callable[..., Any],
        seed: int = 0,
        length: int | None = None,
        img_size: int = 32,
        root: str | os.PathLike[str] | None = None,
    ) -> None:
        self.length = _checked(split, num_frames, img_size, length, seed)
        if num_frames < 2:
            raise ValueError(f"num_frames must be at least 2, one for each item (got {num_frames}); give more")
        self.num_frames, self.img_size, self.seed = num_frames, img_size, (seed, SPLITS.index(split), 1)
        self.items = _of_kinds(pictures, split, self.KINDS)
        self.background = _background(split, img_size, root)

    def __len__(self) -> int:
        return self.length

    def needle(self, index: int) -> Needle:
        """Frames and kinds of the items of clip `index`."""
        return self._draw(_rng(self, index))

    def _draw(self, rng: np.random.Generator) -> Needle:
        first, second = sorted(rng.choice(self.num_frames, size=2, replace=False).tolist())
        return Needle((first, second), self.PAIRS[rng.integers(len(self.PAIRS))])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        rng = _rng(self, index)
        needle = self._draw(rng)
        frames = self.background(rng, self.num_frames)
        for number, kind in zip(needle.frames, needle.kinds, strict=True):
            _hide(rng, frames[number], self.items[kind], self.OPACITY)
        return torch.from_numpy(frames)[None], self.PAIRS.index(needle.kinds)


class NeedleFrames(Dataset[tuple[Tensor, int]]):
    """One frame alone, with an item in every second one: `(clip, nothing or which kind)`, 5 classes.

    Frames and items are those of `NeedleInVideo`; an encoder of frames learns here what to look for.

    Args:
        split: `train`, `val` or `test`.
        pictures, seed, img_size, root: as of `NeedleInVideo`.
        length: number of frames; 20,000, 1,000 and 2,000 if absent.
        num_frames: 1.

    Raises:
        ValueError: as `NeedleInVideo`, and for more than one frame.
    """

    classes: ClassVar[tuple[str, ...]] = ("nothing", *NeedleInVideo.KINDS)

    def __init__(
        self,
        split: str = "train",
        *,
        pictures: Callable[..., Any],
        seed: int = 0,
        length: int | None = None,
        num_frames: int = 1,
        img_size: int = 32,
        root: str | os.PathLike[str] | None = None,
    ) -> None:
        self.length = _checked(split, num_frames, img_size, length, seed)
        if num_frames != 1:
            raise ValueError(f"num_frames must be 1, as each example is one frame (got {num_frames}); leave it out")
        self.seed = (seed, SPLITS.index(split), 2)
        self.items = _of_kinds(pictures, split, NeedleInVideo.KINDS)
        self.background = _background(split, img_size, root)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        rng = _rng(self, index)
        label = int(rng.integers(2) and rng.integers(1, len(self.classes)))
        frames = self.background(rng, 1)
        if label:
            _hide(rng, frames[0], self.items[self.classes[label]], NeedleInVideo.OPACITY)
        return torch.from_numpy(frames)[None], label


class LabelledClips:
    """Clips of a collection with one label each, as a model reads them: `(clip float32 [1, T, H, W], label)`.

    Args:
        dataset: `dataset(split)` makes a split, as `MovingClips` and `NeedleInVideo` do.
        num_classes: number of classes, which the collection must have.
        num_frames, img_size: of a clip, given to `dataset`.
        mean, std: clips are normalised by these, of gray values from 0 to 1.
        in_chans: 1.
        lengths: number of clips of splits, given to `dataset` as `length`.
        root: given to `dataset`, where it is not None.

    Raises:
        ValueError: if the collection has another number of classes, or clips with more channels are asked for.
    """

    noun = "clips"

    def __init__(
        self,
        dataset: Callable[..., Any],
        *,
        num_classes: int,
        num_frames: int,
        img_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        in_chans: int = 1,
        lengths: Mapping[str, int] | None = None,
        root: str | os.PathLike[str] | None = None,
    ) -> None:
        check_sizes(num_frames=num_frames, img_size=img_size)
        check_positive(std=std[0])
        kind: Any = getattr(dataset, "func", dataset)
        if len(kind.classes) != num_classes:
            raise ValueError(f"num_classes must be {len(kind.classes)}, as the collection has (got {num_classes})")
        if in_chans != 1:
            raise ValueError(f"in_chans must be 1, as these clips are gray (got {in_chans}); leave it out")
        places = {} if root is None else {"root": root}
        self.dataset = functools.partial(dataset, num_frames=num_frames, img_size=img_size, **places)
        self.classes: Sequence[str] = kind.classes
        self.num_classes, self.in_chans, self.num_frames, self.img_size = num_classes, in_chans, num_frames, img_size
        self.mean, self.std, self.lengths = tuple(mean), tuple(std), dict(lengths or {})

    def split(self, name: str) -> Dataset[tuple[Tensor, int]]:
        return _Normalised(self.dataset(check_split(name), length=self.lengths.get(name)), self.mean[0], self.std[0])

    def example(self) -> Tensor:
        return torch.zeros(1, self.in_chans, self.num_frames, self.img_size, self.img_size)

    def facts(self) -> dict[str, Any]:
        sizes = {"num_frames": self.num_frames, "img_size": self.img_size, "in_chans": self.in_chans}
        return {"classes": list(self.classes), "mean": list(self.mean), "std": list(self.std), **sizes}

    def model_options(self) -> dict[str, Any]:
        sizes = {"num_frames": self.num_frames, "img_size": self.img_size, "in_chans": self.in_chans}
        return {"num_classes": self.num_classes, **sizes}


class _Normalised(Dataset[tuple[Tensor, int]]):
    def __init__(self, clips: Any, mean: float, std: float) -> None:
        self.clips, self.mean, self.std = clips, mean, std

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        clip, label = self.clips[index]
        return (clip.float() / 255 - self.mean) / self.std, label


def _of_kinds(pictures: Callable[..., Any], split: str, kinds: Sequence[str]) -> dict[str, list[Frames]]:
    items = _items(pictures, split)
    if absent := [kind for kind in kinds if kind not in items]:
        raise ValueError(f"pictures must have the classes {', '.join(kinds)} (got none of {', '.join(absent)})")
    return {kind: items[kind] for kind in kinds}


def _hide(rng: np.random.Generator, frame: Frames, items: Sequence[Frames], opacity: tuple[float, float]) -> None:
    """Put one of the items anywhere into a frame `[H, W]`, as opaque as `opacity` allows, from least to most."""
    item = items[int(rng.integers(len(items)))].astype(np.int32)
    percent = rng.integers(round(100 * opacity[0]), round(100 * opacity[1]), endpoint=True)
    top, left = rng.integers(len(frame) - ITEM, size=2, endpoint=True)
    part = frame[top : top + ITEM, left : left + ITEM]
    mixed = (part * (100 - percent) + item * percent + 50) // 100
    part[:] = np.where(item > 0, mixed, part)


def _background(split: str, size: int, root: Any) -> Callable[[np.random.Generator, int], Frames]:
    return Texture(size) if root is None else FilmFrames(root, FILM_SPANS[split], size)


def _rng(data: Any, index: int) -> np.random.Generator:
    if not -len(data) <= index < len(data):
        raise IndexError(f"index must lie between {-len(data)} and {len(data) - 1} (got {index})")
    return np.random.default_rng([*data.seed, index % len(data)])


def _checked(split: str, num_frames: int, img_size: int, length: int | None, seed: int) -> int:
    """Number of clips."""
    check_split(split)
    length = LENGTHS[split] if length is None else length
    check_sizes(num_frames=num_frames, img_size=img_size, length=length)
    if img_size < ITEM:
        raise ValueError(f"img_size must be at least {ITEM}, the side of an item (got {img_size}); give larger frames")
    if not is_whole(seed) or seed < 0:
        raise ValueError(f"seed must be a whole number of 0 or more (got {seed!r})")
    return length


def _items(pictures: Callable[..., Any], split: str) -> dict[str, list[Frames]]:
    """Items of a split by their kind, in small letters: pictures at half their size, 0 where they are dark."""
    data = pictures(split=split)
    names = [str(name).lower() for name in data.classes]
    items: dict[str, list[Frames]] = {}
    for number in range(len(data)):
        picture, label = data[number]
        pixels = np.asarray(picture, np.uint16)
        if pixels.shape != (2 * ITEM, 2 * ITEM):
            raise ValueError(
                f"pictures must be gray and {2 * ITEM} × {2 * ITEM} (got {list(pixels.shape)}); resize them"
            )
        small = (pixels.reshape(ITEM, 2, ITEM, 2).sum((1, 3)) // 4).astype(np.uint8)
        items.setdefault(names[label], []).append(np.where(small > 24, small, 0).astype(np.uint8))
    return items
