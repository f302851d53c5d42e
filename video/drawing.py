"""Figures of films along their time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

if TYPE_CHECKING:
    from sinuous.video.demo import Scenes

_INK, _FAINT, _LINE, _CUT, _PAPER = "#1c1c1e", "#8e8e93", "#1f5f8b", "#b5482a", "white"


def draw_scenes(scenes: Scenes, starts: Sequence[float], frames: Tensor, path: str | os.PathLike[str]) -> None:
    """Draw the first frames of scenes above the likeness of neighbouring frames, into an image file.

    Args:
        scenes: of a film.
        starts: of the scenes that are shown, in seconds.
        frames: their first frames, uint8 `[S, 3, H, W]`.
        path: of the image.
    """
    figure = Figure(figsize=(11, 3.6), layout="constrained", facecolor=_PAPER)
    FigureCanvasAgg(figure)
    figure.suptitle(f"Scenes of {scenes.name}", x=0.012, ha="left", fontsize=14, weight="bold", color=_INK)
    grid = figure.add_gridspec(2, max(6, len(frames)), height_ratios=[1, 1])
    for number, (start, frame) in enumerate(zip(starts, frames, strict=True)):
        shown: Any = figure.add_subplot(grid[0, number])
        shown.imshow(frame.permute(1, 2, 0).numpy())
        shown.set_title(f"{start:.1f} s", fontsize=8, color=_FAINT)
        shown.set_axis_off()
    line: Any = figure.add_subplot(grid[1, :])
    line.plot(scenes.times[1:], scenes.likeness, color=_LINE, linewidth=1)
    for start in scenes.starts[1:]:
        line.axvline(start, color=_CUT, linewidth=1)
    line.set(xlim=(0, scenes.end or 1), xlabel="seconds", ylabel="likeness to the frame before")
    line.spines[["top", "right"]].set_visible(False)
    line.tick_params(colors=_INK, length=0, labelsize=8)
    figure.savefig(path, dpi=150)
