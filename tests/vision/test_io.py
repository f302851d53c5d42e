"""Pictures look to a model as they look to a person, whatever PIL's mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sinuous.vision.io import as_seen, read_image

RAMP = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (8, 1))


def made(mode: str) -> Image.Image:
    """A ramp from black to white in `mode`."""
    gray = Image.fromarray(RAMP)
    if mode == "I;16":
        return Image.fromarray(RAMP.astype(np.uint16) * 257)
    if mode == "I":
        return Image.fromarray(RAMP.astype(np.int32) * 257)
    if mode == "F":
        return Image.fromarray(RAMP.astype(np.float32) / 255)
    if mode == "LAB":
        return Image.merge("LAB", [gray, Image.new("L", gray.size, 128), Image.new("L", gray.size, 128)])
    if mode == "P":
        return gray.convert("P")
    return gray.convert("RGB").convert(mode) if mode not in ("LA", "PA") else gray.convert("LA").convert(mode)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "mode", ["L", "RGB", "P", "LA", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16", "F"]
)
def test_a_ramp_stays_a_ramp(mode: str, channels: int) -> None:
    seen = np.asarray(as_seen(made(mode), channels)).astype(int)
    assert seen.dtype.kind == "i"
    assert seen.shape == ((*RAMP.shape, 3) if channels == 3 else RAMP.shape)
    brightness = seen.mean(-1) if channels == 3 else seen
    assert abs(brightness - RAMP).max() <= (12 if mode == "LAB" else 4)


def test_two_colours_are_black_and_white() -> None:
    assert set(np.unique(np.asarray(as_seen(made("1"), 1)))) == {0, 255}


@pytest.mark.parametrize(("values", "dtype", "shown"), [
    ([[0, 100, 200]], np.int32, [0, 100, 200]),
    ([[0.0, 0.5, 1.0]], np.float32, [0, 128, 255]),
    ([[0.0, 100.0, 255.0]], np.float32, [0, 100, 255]),
    ([[-1.0, 0.0, 1.0]], np.float32, [0, 128, 255]),
    ([[0, 10**6, 2 * 10**6]], np.int32, [0, 128, 255]),
    ([[0.0, float("nan"), 1.0]], np.float32, [0, 0, 255]),
])  # fmt: skip
def test_wide_numbers_are_shown_over_the_range_that_holds_them(values: Any, dtype: Any, shown: list[int]) -> None:
    seen = np.asarray(as_seen(Image.fromarray(np.asarray(values, dtype)), 1))[0]
    assert abs(seen.astype(int) - shown).max() <= 1


def test_what_is_transparent_is_white() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert np.asarray(as_seen(clear)).min() == 255
    half = np.asarray(as_seen(Image.new("RGBA", (4, 4), (0, 0, 0, 128))))
    assert abs(int(half[0, 0, 0]) - 127) <= 1


def test_a_picture_that_was_turned_by_the_camera_stands_upright(tmp_path: Path) -> None:
    picture = Image.fromarray(np.kron(np.array([[0, 255]], np.uint8), np.ones((16, 16), np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=100)
    seen = np.asarray(read_image(tmp_path / "turned.jpg"))
    assert seen.shape[:2] == (32, 16)
    assert seen[2, 8, 0] < 50
    assert seen[-3, 8, 0] > 200


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\nno more", b"GIF89a", b"plain text"])
def test_what_is_no_picture_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read the picture .*x\.png"):
        read_image(tmp_path / "x.png")
