"""What made clips show behind their items: a texture that drifts, or a film of yours."""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]


class Texture:
    """Frames `[T, size, size]` of a smooth random texture that drifts by whole pixels, over and over from side to side,
    with a little noise; every `scene` frames there is another one.

    All arithmetic is in whole numbers, so that it gives the same bytes everywhere."""

    CELLS = 8

    def __init__(self, size: int, scene: int = 16) -> None:
        self.size, self.scene = size, scene

    def __call__(self, rng: np.random.Generator, frames: int) -> Frames:
        made = np.empty((frames, self.size, self.size), np.uint8)
        for start in range(0, frames, self.scene):
            texture, drift = self._texture(rng), rng.integers(-1, 2, size=2)
            for frame in range(start, min(start + self.scene, frames)):
                made[frame] = np.roll(texture, (frame - start) * drift, (0, 1))
        made += rng.integers(0, 16, made.shape, np.uint8)
        return made

    def _texture(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """Random values of a grid on a torus, interpolated linearly, from 0 to 200."""
        coarse = rng.integers(0, 201, (self.CELLS, self.CELLS))
        cell, share = np.divmod(np.arange(self.size) * self.CELLS, self.size)
        after = (cell + 1) % self.CELLS
        rows = coarse[cell] * (self.size - share)[:, None] + coarse[after] * share[:, None]
        smooth: NDArray[np.int64] = (rows[:, cell] * (self.size - share) + rows[:, after] * share) // self.size**2
        return smooth


class FilmFrames:
    """Frames `[T, size, size]` of a film, gray, from a random place in a part of it; a shorter part is repeated.

    Args:
        path: of the film.
        span: of the part, in shares of the film.
        size: height and width to resize to.
        fps: frames per second.

    Raises:
        ValueError: if the file is no film.
        FileNotFoundError: if there is no such file.
    """

    def __init__(self, path: str | os.PathLike[str], span: tuple[float, float], size: int, fps: float = 8.0) -> None:
        from sinuous.video.io import clip_info

        duration = clip_info(path).duration
        self.path, self.size, self.fps = path, size, fps
        self.start, self.length = span[0] * duration, (span[1] - span[0]) * duration

    def __call__(self, rng: np.random.Generator, frames: int) -> Frames:
        from sinuous.video.io import read_frames

        times = self.start + (rng.random() * self.length + np.arange(frames) / self.fps) % max(self.length, 1e-9)
        moments, back = np.unique(times, return_inverse=True)
        return to_gray(read_frames(self.path, times=moments.tolist(), size=self.size)[0].numpy())[back]


def to_gray(pixels: Frames) -> Frames:
    """Brightness `[T, H, W]` of colours `[T, 3, H, W]`, by ITU-R BT.601 and in whole numbers."""
    red, green, blue = (pixels[:, channel].astype(np.uint32) for channel in range(3))
    return ((299 * red + 587 * green + 114 * blue + 500) // 1000).astype(np.uint8)
