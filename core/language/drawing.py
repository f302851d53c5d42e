"""A figure of text, each character coloured by its surprisal."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

COLUMNS = 84
WIDTH, HEIGHT = 0.088, 0.185
"""Inches of a character's cell."""
ADVANCE = 0.602
"""Width of a character of DejaVu Sans Mono, over the size of the font."""
MOST = 8.0
"""Bits at the end of the scale: a byte of 256 that nothing speaks for."""
LINE_END = "↵"
_INK, _FAINT, _PROMPT = "#1c1c1e", "#8e8e93", "#3d7ea6"
_COLOURS = LinearSegmentedColormap.from_list("surprisal", ["#ffffff", "#fbe3b1", "#f0a35e", "#c8553d", "#6d1a36"])

Characters = Sequence[tuple[str, float]]
"""Characters and their surprisals in bits, NaN where there is none."""


@dataclass(frozen=True)
class Panel:
    """A text of the figure.

    Attributes:
        title: printed above it.
        characters: with their surprisals.
        prompt: how many characters at its start are underlined.
    """

    title: str
    characters: Characters
    prompt: int = 0


def wrapped(characters: Characters, columns: int = COLUMNS) -> list[Characters]:
    """Lines of at most `columns` characters, broken after new lines and, where a line is too long, after a space."""
    lines: list[Characters] = []
    line: list[tuple[str, float]] = []
    for character in characters:
        line.append(character)
        if character[0] == "\n":
            lines.append(line)
            line = []
        elif len(line) > columns:
            spaces = [i for i, (c, _) in enumerate(line[:-1]) if c == " "]
            end = spaces[-1] + 1 if spaces else columns
            lines.append(line[:end])
            line = line[end:]
    return [*lines, line] if line else lines


def draw_surprisal(panels: Sequence[Panel], title: str, path: str | os.PathLike[str]) -> None:
    """Draw texts, below one another, into an image file."""
    pages = [wrapped(panel.characters) for panel in panels]
    margin, head, above = 0.3, 0.72, 0.42
    width = COLUMNS * WIDTH + 2 * margin
    height = head + sum(above + len(lines) * HEIGHT for lines in pages) + margin
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    left = margin / width
    figure.text(left, 1 - 0.3 / height, "What surprises it?", fontsize=15, weight="bold", color=_INK, va="center")
    figure.text(left, 1 - 0.58 / height, title, fontsize=9, color=_FAINT, va="center")
    scale = Normalize(0, MOST, clip=True)
    _draw_scale(figure, scale, (1 - (margin + 2.0) / width, 1 - 0.4 / height, 1.85 / width, 0.12 / height))
    top = head
    for panel, lines in zip(panels, pages, strict=True):
        top += above
        figure.text(left, 1 - (top - 0.13) / height, panel.title, fontsize=9, color=_INK, va="center")
        bottom = top + len(lines) * HEIGHT
        axes = figure.add_axes((left, 1 - bottom / height, COLUMNS * WIDTH / width, (bottom - top) / height))
        _draw_lines(axes, lines, panel.prompt, scale)
        top = bottom
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # drawn as a box
        figure.savefig(path, dpi=150)


def _draw_lines(axes: Axes, lines: Sequence[Characters], prompt: int, scale: Normalize) -> None:
    bits = np.full((max(len(lines), 1), COLUMNS), math.nan)
    for row, line in enumerate(lines):
        bits[row, : len(line)] = [b for _, b in line][:COLUMNS]
    axes.imshow(
        np.ma.masked_invalid(bits), cmap=_COLOURS, norm=scale, aspect="auto", extent=(0, COLUMNS, len(lines), 0)
    )
    font: dict[str, Any] = {
        "family": "DejaVu Sans Mono",
        "fontsize": WIDTH * 72 / ADVANCE,
        "ha": "center",
        "va": "center_baseline",
    }
    drawn = 0
    for row, line in enumerate(lines):
        for column, (character, surprise) in enumerate(line):
            dark = surprise > 0.55 * MOST
            colour = "white" if dark else _INK
            if character == "\n":
                character, colour = LINE_END, "white" if dark else _FAINT
            axes.text(column + 0.5, row + 0.5, character, color=colour, parse_math=False, **font)
        underlined = min(max(prompt - drawn, 0), len(line))
        if underlined:
            axes.plot([0, underlined], [row + 0.96] * 2, color=_PROMPT, linewidth=1.4, solid_capstyle="butt")
        drawn += len(line)
    axes.set(xlim=(0, COLUMNS), ylim=(len(lines), 0))
    axes.axis("off")


def _draw_scale(figure: Figure, scale: Normalize, place: tuple[float, float, float, float]) -> None:
    bar = figure.add_axes(place)
    figure.colorbar(ScalarMappable(scale, _COLOURS), cax=bar, orientation="horizontal")
    bar.set_xticks([0, 2, 4, 6, MOST], ["0", "2", "4", "6", "8 bits"], fontsize=8, color=_INK)
    bar.tick_params(length=0)
    bar.spines[:].set_visible(False)
