"""A page of predictions as a PNG."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

COLUMNS, FIRST_ROWS = 8, 4
_RIGHT, _WRONG, _INK = "#1b7f4d", "#c2352b", "#222222"


def prediction_grid(
    predictions: Tensor,
    picture: Callable[[int], Tensor],
    classes: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    title: str,
    path: str | os.PathLike[str],
) -> Path:
    """Draw the first pictures of a set, and below them the mistakes of which the model was surest.

    Args:
        predictions: per picture its predicted class, the probability of that class, and its label, `[N, 3]`.
        picture: position in the set -> normalised picture `[C, H, W]`.
        classes: names of the classes.
        mean: per channel, undoes the normalisation.
        std: per channel, likewise.
        title: printed above.
        path: the PNG to write.
    """
    predicted, probability, label = predictions.double().numpy().T
    first = np.arange(min(len(predicted), COLUMNS * FIRST_ROWS))
    mistakes = np.flatnonzero(predicted != label)
    surest = mistakes[np.argsort(-probability[mistakes], kind="stable")][:COLUMNS]
    pages = [(f"The first {len(first)}", first)]
    pages += (
        [(f"The surest mistakes ({len(mistakes):,} of {len(predicted):,} are wrong)", surest)] if len(surest) else []
    )
    rows = [int(np.ceil(len(shown) / COLUMNS)) for _, shown in pages]

    figure = Figure(figsize=(1.35 * COLUMNS, 1.75 * sum(rows) + 0.5 * len(rows) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, color=_INK, x=0.01, ha="left")
    parts: Any = figure.subfigures(len(pages), 1, squeeze=False, height_ratios=[r + 0.3 for r in rows])
    for part, (heading, shown), count in zip(parts.ravel(), pages, rows, strict=True):
        part.suptitle(heading, fontsize=9, color=_INK, x=0.01, ha="left")
        axes = part.subplots(count, COLUMNS, squeeze=False).ravel()
        for axis in axes:
            axis.set_axis_off()
        for axis, index in zip(axes, shown, strict=False):
            right = predicted[index] == label[index]
            _draw(axis, _as_shown(picture(int(index)), mean, std), _RIGHT if right else _WRONG)
            text = f"{classes[int(predicted[index])]} {probability[index]:.0%}"
            text += "" if right else f"\nis {classes[int(label[index])]}"
            axis.set_title(text, fontsize=7, color=_RIGHT if right else _WRONG, pad=3)
    target = Path(path)
    with matplotlib.rc_context({"font.family": "sans-serif"}):
        figure.savefig(target, dpi=130, facecolor="white")
    return target


def _as_shown(picture: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    channels: np.ndarray = picture.float().cpu().numpy() * np.reshape(std, (-1, 1, 1)) + np.reshape(mean, (-1, 1, 1))
    shown: np.ndarray = np.clip(channels.transpose(1, 2, 0), 0, 1)
    return shown


def _draw(axis: Any, picture: np.ndarray, colour: str) -> None:
    height, width, channels = picture.shape
    axis.imshow(picture if channels == 3 else picture[..., 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    frame: dict[str, Any] = {"fill": False, "edgecolor": colour, "linewidth": 1.6, "clip_on": False}
    axis.add_patch(matplotlib.patches.Rectangle((-0.5, -0.5), width, height, **frame))
