"""Pictures from files, and as a model reads them: whatever PIL opens looks to the model as it looks to a person."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MODES = {1: "L", 3: "RGB"}
"""PIL's mode for each number of channels that a model may read."""


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read the picture in a file, upright, in RGB.

    Raises:
        ValueError: if the file is no picture or is damaged.
    """
    try:
        with Image.open(path) as image:
            return as_seen(image)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"cannot read the picture {path} ({error}); replace it or take it out of the folder"
        ) from error


def read_named(images: Sequence[Image.Image | str | os.PathLike[str]]) -> list[tuple[str, Image.Image]]:
    """Read pictures from paths, and give each its file's name, or its number if it is a picture already.

    Raises:
        ValueError: if a file is no picture or is damaged.
    """
    return [
        (f"picture {i}", image) if isinstance(image, Image.Image) else (Path(image).name, read_image(image))
        for i, image in enumerate(images, 1)
    ]


def as_seen(image: Image.Image, channels: int = 3) -> Image.Image:
    """Show a picture of any of PIL's modes as a viewer does: upright, on white where it is transparent, in 8 bits.

    Gray pictures of 16 bits keep their range: 65535 is white. Those of 32 bits or floats are shown from black to white
    over 0 to 1, 0 to 255 or 0 to 65535, whichever is the least that holds their values, or else over their own range.

    Args:
        image: a picture.
        channels: 1 for gray, 3 for colour.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    if image.mode == "LAB":  # which PIL turns into colours only
        image = image.convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert(MODES[channels])


def light_on_black(image: Image.Image) -> np.ndarray:
    """Show a picture in gray `[H, W]` from 0 to 1 with its subject light on black, as Fashion-MNIST does.

    The border's median gray is taken for the background. What differs from it becomes light, so that dark clothing on a
    light ground is inverted.
    """
    gray = np.asarray(as_seen(image, 1), dtype=np.float32)
    border = np.concatenate((gray[0], gray[-1], gray[:, 0], gray[:, -1]))
    background = np.median(border)
    subject = background - gray if background > 127 else gray - background
    light: np.ndarray = np.clip(subject / max(subject.max(), 1.0), 0, 1)
    return light


def _eight_bits(values: np.ndarray) -> np.ndarray:
    floats = np.nan_to_num(values.astype(np.float64))
    low, high = float(floats.min(initial=0)), float(floats.max(initial=0))
    if values.dtype.itemsize == 2:
        high = 65535.0
    else:
        high = next((top for top in (1.0, 255.0, 65535.0) if low >= 0 and high <= top), high)
    low = min(low, 0.0)
    scaled: np.ndarray = np.rint((floats - low) * (255 / max(high - low, 1e-12)))
    return scaled.astype(np.uint8)


class PictureTransform:
    """A transform of PIL images that first shows them as a model of `channels` reads them."""

    def __init__(self, transform: Callable[[Image.Image], Any], channels: int) -> None:
        self.transform, self.channels = transform, channels

    def __call__(self, image: Image.Image) -> Any:
        return self.transform(as_seen(image, self.channels))
