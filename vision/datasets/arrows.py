"""Arrow pointing: does the arrow point at the circle? Small pictures to learn from, large ones to extrapolate to.

Pöppel, Freinschlag, Schmied, Lin and Hochreiter, "pLSTM: parallelizable Linear Source Transition Mark networks" (arXiv
2506.11997, section 5.1 and appendix); https://github.com/ml-jku/arrow_pointing_dataset. The objects of a picture keep
their sizes in pixels when the picture grows; only the distance between them does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from torch.utils.data import Dataset

from sinuous.core.checks import check_near, check_positive, check_sizes, is_whole
from sinuous.vision.datasets.labelled import LabelledImages, Transform

PAD, LEAST_RADIUS, RADIUS_RANGE = 30, 15, 15
"""Units: margin between picture and centres, least radius of a circle, and by how much it may be larger."""

HEAD_ANGLE, HEAD_SHARE, CLEARANCE = 0.5, 2.5, 1.2
"""Angle between shaft and head in radians; shaft over head; factor of the radius between hits and misses."""

LEAST_SIDE = 5 * PAD
"""Units: in smaller pictures the arrow may lie inside the circle."""


@dataclass(frozen=True)
class Split:
    """Seed and number of a split's pictures, and how many times `side` they are large."""

    seed: int
    length: int
    scale: int


SPLITS = {
    "train": Split(42, 100_000, 1),
    "val": Split(100_042, 5_120, 1),
    "ext_val": Split(100_043, 5_120, 2),
    "test": Split(200_042, 10_240, 1),
    "ext_test": Split(200_043, 10_240, 2),
}


class _Default(int):
    """A default that can be told from the same number given by a caller."""


SIDE = _Default(192)


class Scene(NamedTuple):
    """Arrow and circle of a picture, positions in pixels.

    Attributes:
        label: 1 if the arrow points at the circle.
        arrow: centre of the arrow (x, y).
        angle: direction of its tip, in radians from x to y.
        arrow_length: in units.
        arrow_width: of its strokes, in units.
        circle: centre (x, y).
        radius: of the circle.
    """

    label: int
    arrow: tuple[float, float]
    angle: float
    arrow_length: int
    arrow_width: int
    circle: tuple[float, float]
    radius: float


class ArrowPointing(Dataset[tuple[Any, int]]):
    """Pictures `(RGB picture, 1 if the arrow points at the circle, else 0)`, each drawn when it is read.

    Args:
        side: height and width in pixels.
        unit: pixels per unit of length.
        arrow_length: range of the arrow's length in units, the end excluded.
        arrow_width: range of the width of its strokes in units, the end excluded.
        length: number of pictures.
        seed: of the collection.
        transform: applied to each PIL image.
    """

    classes = ("points elsewhere", "points at the circle")

    def __init__(
        self,
        side: int,
        unit: float,
        arrow_length: Sequence[float],
        arrow_width: Sequence[float],
        length: int,
        seed: int,
        transform: Transform | None,
    ) -> None:
        self.side, self.unit, self.length, self.transform = side, unit, length, transform
        self.arrow_length, self.arrow_width = arrow_length, arrow_width
        self.first = int(np.random.default_rng(seed).integers(2**62))

    def __len__(self) -> int:
        return self.length

    def scene(self, index: int) -> Scene:
        """Arrow and circle of picture `index`."""
        rng = np.random.default_rng(self.first + index)
        pad, span = PAD * self.unit, self.side - 2 * PAD * self.unit
        label = int(rng.uniform() < 0.5)
        arrow_length, arrow_width = (int(rng.uniform(low, high)) for low, high in (self.arrow_length, self.arrow_width))
        arrow = span * rng.uniform(), span * rng.uniform()
        radius = (LEAST_RADIUS + RADIUS_RANGE * rng.uniform()) * self.unit
        # At least two radii away along each axis, on a torus.
        circle = [place + 2 * radius + (span - 4 * radius) * rng.uniform() for place in arrow]
        circle = [place - span if place > span else place for place in circle]
        dx, dy = circle[0] - arrow[0], circle[1] - arrow[1]
        squared = dx * dx + dy * dy
        aimed = radius / CLEARANCE if label else radius * CLEARANCE
        half_angle = math.acos(math.sqrt(abs((squared - aimed * aimed) / squared)))
        towards = math.atan2(dy, dx)
        if label:
            angle = towards - half_angle + 2 * half_angle * rng.uniform()
        else:
            angle = towards + half_angle + (2 * math.pi - 2 * half_angle) * rng.uniform()
        return Scene(
            label,
            (arrow[0] + pad, arrow[1] + pad),
            angle,
            arrow_length,
            arrow_width,
            (circle[0] + pad, circle[1] + pad),
            radius,
        )

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must lie between {-len(self)} and {len(self) - 1} (got {index})")
        scene = self.scene(index % len(self))
        image: Any = draw(scene, self.side, self.unit)
        return (image if self.transform is None else self.transform(image)), scene.label


def draw(scene: Scene, side: int, unit: float = 1.0) -> Image.Image:
    """Draw a scene in black on white, RGB."""
    image = Image.new("RGB", (side, side), "white")
    canvas = ImageDraw.Draw(image)
    width = max(1, math.floor(scene.arrow_width * unit + 0.5))
    (x, y), half = scene.arrow, scene.arrow_length // 2 * unit
    cos, sin = math.cos(scene.angle), math.sin(scene.angle)
    tip = (x + half * cos, y + half * sin)
    strokes = [(x - half * cos, y - half * sin)]
    head = math.floor(scene.arrow_length / HEAD_SHARE) * unit
    for turned in (scene.angle - HEAD_ANGLE, scene.angle + HEAD_ANGLE):
        strokes.append((tip[0] - head * math.cos(turned), tip[1] - head * math.sin(turned)))
    for start in strokes:
        canvas.line([start, tip], fill="black", width=width)
    (cx, cy), r = scene.circle, scene.radius
    canvas.ellipse([cx - r, cy - r, cx + r, cy + r], fill="black")
    return image


def arrow_pointing(
    split: str = "train",
    *,
    side: int = SIDE,
    unit: float = 1.0,
    arrow_length: Sequence[float] = (15, 30),
    arrow_width: Sequence[float] = (2, 4),
    length: int | None = None,
    seed: int | None = None,
    transform: Transform | None = None,
) -> ArrowPointing:
    """Arrow-pointing extrapolation (arXiv 2506.11997): an index is always the same picture.

    The splits `ext_val` and `ext_test` are for extrapolation: 384 × 384 where `side` is not given.

    Args:
        split: `train`, `val`, `ext_val`, `test` or `ext_test`.
        side: height and width in pixels.
        unit: pixels per unit in which margin, radius, lengths and widths are measured; all that is drawn scales.
        arrow_length: range of the arrow's length in units, the end excluded.
        arrow_width: range of the width of its strokes in units, the end excluded.
        length: number of pictures; 100,000, 5,120, 5,120, 10,240 and 10,240 if absent.
        seed: of the collection; 42, 100042, 100043, 200042 and 200043 if absent.
        transform: applied to each PIL image.

    Raises:
        ValueError: for an unknown split (naming the nearest), a side below 150 units, or an empty range.
    """
    check_near("split", split, SPLITS)
    check_sizes(side=side)
    check_positive(unit=unit)
    _check_range("arrow_length", arrow_length)
    _check_range("arrow_width", arrow_width)
    kind = SPLITS[split]
    side = int(side) * kind.scale if isinstance(side, _Default) else int(side)
    if side < LEAST_SIDE * unit:
        raise ValueError(
            f"side must be at least {LEAST_SIDE * unit:g} pixels with unit={unit:g}, or the arrow may lie inside the "
            f"circle (got {side}); give a larger side or a smaller unit"
        )
    length = kind.length if length is None else length
    check_sizes(length=length)
    seed = kind.seed if seed is None else seed
    if not is_whole(seed) or seed < 0:
        raise ValueError(f"seed must be a whole number of 0 or more (got {seed!r})")
    return ArrowPointing(side, unit, arrow_length, arrow_width, length, seed, transform)


def _check_range(name: str, values: Sequence[float]) -> None:
    if len(values) != 2 or not 1 <= values[0] <= values[1] < math.inf:
        raise ValueError(f"{name} must be two numbers of at least 1, the smaller one first (got {values!r})")


class ArrowPictures(LabelledImages):
    """`LabelledImages` of arrows and circles, whose `dataset` is `arrow_pointing` with its options filled in.

    Args:
        extrapolate: validation and test read `ext_val` and `ext_test`; `img_size` is then twice that of the training.
        train_seed: seed of the training pictures; that of the split if absent.
        options: as those of `LabelledImages`; `img_size` is the side of the pictures.

    Raises:
        ValueError: for pictures that are no squares.
    """

    def __init__(
        self, *transforms: Any, extrapolate: bool = False, train_seed: int | None = None, **options: Any
    ) -> None:
        super().__init__(*transforms, **options)
        if self.img_size[0] != self.img_size[1]:
            raise ValueError(f"data.img_size must be one number, as arrows lie in squares (got {list(self.img_size)})")
        self.extrapolate, self.train_seed = extrapolate, train_seed

    def options(self, name: str) -> dict[str, Any]:
        options = {**super().options(name), "side": self.img_size[0]}
        if name == "train":
            options["seed"] = self.train_seed
        elif self.extrapolate:
            options["split"] = f"ext_{name}"
        return options
