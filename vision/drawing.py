"""Figures of pictures: a page of predictions, and the evidence for answers."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

if TYPE_CHECKING:
    from sinuous.vision.demo import Result
    from sinuous.vision.demo_rows import RowByRow

COLUMNS, FIRST_ROWS = 8, 4
_RIGHT, _WRONG, _INK = "#1b7f4d", "#c2352b", "#222222"

BLUR = 1.5
"""Pixels: width of the Gaussian that makes single pixels' shares a map one can look at; it keeps their sum."""


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


def _smooth(evidence: Tensor, scale: int) -> Tensor:
    """Shares `[H, W]`, blurred, on a grid that is `scale` times finer, for the eye."""
    span = torch.arange(-5, 6, dtype=evidence.dtype)
    line = torch.exp(-(span**2) / (2 * BLUR**2))
    kernel = line[:, None] * line / line.sum() ** 2
    blurred = F.conv2d(evidence[None, None], kernel[None, None], padding=5)
    return F.interpolate(blurred, scale_factor=scale, mode="bicubic")[0, 0]


def answer_grid(
    pictures: Sequence[Any], captions: Sequence[tuple[str, bool]], title: str, path: str | os.PathLike[str]
) -> Path:
    """Draw pictures with an answer below each, green where it is right or the truth is not known, else red.

    Args:
        pictures: what matplotlib draws, PIL images among others.
        captions: answer, and whether it is right.
        title: printed above.
        path: the PNG to write.
    """
    lines = -(-len(pictures) // COLUMNS)
    columns = min(COLUMNS, len(pictures))
    figure = Figure(figsize=(max(1.5 * columns, 4.5), 1.75 * lines + 0.5), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, color=_INK, x=0.01, ha="left")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis in axes[len(pictures) :]:
        axis.set_axis_off()
    for axis, picture, (text, right) in zip(axes, pictures, captions, strict=False):
        axis.imshow(picture)
        axis.set(xticks=[], yticks=[])
        axis.set_xlabel(text, fontsize=7, color=_RIGHT if right else _WRONG)
    figure.savefig(path, dpi=130)
    return Path(path)


class MaskedPicture(NamedTuple):
    """A picture with the classes of its pixels.

    Attributes:
        picture: `[C, H, W]` in 0..1, gray or colour.
        predicted: class of each pixel `[H, W]`, 0 for the background.
        truth: the right classes, where known.
        name: printed above, where there is one.
    """

    picture: Tensor
    predicted: Tensor
    truth: Tensor | None = None
    name: str = ""


def mask_grid(rows: Sequence[MaskedPicture], classes: Sequence[str], title: str, path: str | os.PathLike[str]) -> Path:
    """Draw pictures beside their predicted masks, and the true ones where known.

    Args:
        rows: pictures of any sizes.
        classes: names of the classes, that of the background first.
        title: printed above.
        path: the PNG to write.
    """
    panels = 2 + any(row.truth is not None for row in rows)
    columns = 1 if len(rows) < 3 else 2
    lines = math.ceil(len(rows) / columns)
    figure = Figure(figsize=(1.9 * panels * columns + 1.7, 2.05 * lines + 0.7), facecolor="white")
    height = figure.get_figheight()
    widths = ([1.0] * panels + [0.12]) * columns + [0.75]
    grid = figure.add_gridspec(
        lines, len(widths), width_ratios=widths, left=0.015, right=0.995, top=1 - 0.62 / height, bottom=0.08 / height,
        wspace=0.05, hspace=0.16,
    )  # fmt: skip
    colours = np.vstack([np.zeros((1, 3)), colormaps["tab20"](np.arange(len(classes) - 1) % 20)[:, :3]])
    for place, row in enumerate(rows):
        line, first = place % lines, (panels + 1) * (place // lines)
        gray = row.picture.mean(0).clamp(0, 1).numpy()
        shown: list[Any] = [row.picture.clamp(0, 1).movedim(0, -1).squeeze(-1).numpy(), row.predicted, row.truth]
        for panel, (content, heading) in enumerate(zip(shown, ("picture", "predicted", "truth"), strict=True)):
            if content is None:
                continue
            axes = figure.add_subplot(grid[line, first + panel])
            if panel:
                mask = content.numpy()
                light = colours[mask] * (0.45 + 0.55 * gray[..., None])
                content = np.where(mask[..., None] > 0, light, 0.35 * gray[..., None])
            axes.imshow(content, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            label = row.name if panel == 0 and row.name else heading
            axes.set_title(label, fontsize=8, color=_INK, pad=2)
    masks = [mask for row in rows for mask in (row.predicted, row.truth) if mask is not None]
    present = sorted({int(c) for mask in masks for c in mask.unique()} - {0})
    handles = [Patch(color=colours[c], label=classes[c]) for c in present]
    if handles:
        figure.legend(handles=handles, loc="center right", frameon=False, fontsize=8, handlelength=1, handleheight=1)
    figure.text(0.015, 1 - 0.3 / height, title, fontsize=11, weight="bold", color=_INK, va="center")
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=130)
    return Path(path)


def strip_grid(read: Sequence[RowByRow], classes: Sequence[str], title: str, path: str | os.PathLike[str]) -> Path:
    """Draw pictures beside a bar for each of their strips, in which every class has its probability after that strip.

    Args:
        read: pictures with the answers to their rows so far.
        classes: names of the classes.
        title: printed above.
        path: the PNG to write.
    """
    columns = 1 if len(read) < 3 else 2
    lines = math.ceil(len(read) / columns)
    figure = Figure(figsize=(4.6 * columns + 1.5, 1.75 * lines + 0.5), facecolor="white")
    height = figure.get_figheight()
    grid = figure.add_gridspec(
        lines, 3 * columns + 1, width_ratios=[1.0, 1.75, 0.1] * columns + [0.85], left=0.015, right=0.995,
        top=1 - 0.62 / height, bottom=0.1 / height, wspace=0.04, hspace=0.22,
    )  # fmt: skip
    colours = colormaps["tab10" if len(classes) <= 10 else "tab20"](np.arange(len(classes)) % 20)
    for place, one in enumerate(read):
        line, first = place % lines, 3 * (place // lines)
        rows, width = one.picture.shape
        left, right = (figure.add_subplot(grid[line, first + panel]) for panel in range(2))
        left.imshow(one.picture.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        probabilities = one.probabilities.double().numpy()
        for strip, shares in enumerate(probabilities):
            top = strip * one.strip - 0.5
            left.axhline(top, color="#7a7a80", linewidth=0.6)
            begins = np.concatenate([[0.0], np.cumsum(shares)[:-1]])
            right.barh(top + one.strip / 2, shares, 0.86 * one.strip, begins, color=colours, linewidth=0)
            best = int(shares.argmax())
            inside = shares[best] > 0.35
            right.text(
                begins[best] + shares[best] / 2, top + one.strip / 2, classes[best] if inside else "", fontsize=7,
                color="white", ha="center", va="center",
            )  # fmt: skip
        right.set(xlim=(0, 1), ylim=(rows - 0.5, -0.5))
        left.set(xlim=(-0.5, width - 0.5), ylim=(rows - 0.5, -0.5))
        for axes in (left, right):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        answer = classes[int(probabilities[-1].argmax())]
        colour = _INK if one.truth is None else _RIGHT if one.truth == answer else _WRONG
        left.set_title(one.name, fontsize=8, color=_INK, pad=2)
        right.set_title(f"in the end {answer}, {probabilities[-1].max():.0%}", fontsize=8, color=colour, pad=2)
    handles = [Patch(color=colour, label=name) for colour, name in zip(colours, classes, strict=True)]
    figure.legend(handles=handles, loc="center right", frameon=False, fontsize=8, handlelength=1, handleheight=1)
    figure.text(0.015, 1 - 0.3 / height, title, fontsize=11, weight="bold", color=_INK, va="center")
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=130)
    return Path(path)


def draw_evidence(result: Result, path: str | os.PathLike[str]) -> None:
    """Draw every picture, its evidence and its answers into a PNG file."""
    ink, faint, accent, wrong = "#1c1c1e", "#8e8e93", "#c8553d", "#3d7ea6"
    shown = result.findings
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(6.4 * columns, 1.78 * rows + 1.5), facecolor="white")
    height = figure.get_figheight()
    grid = figure.add_gridspec(
        rows,
        columns * 4,
        width_ratios=[1, 1, 1.45, 0.12] * columns,
        left=0.015,
        right=0.995,
        top=1 - 0.72 / height,
        bottom=0.72 / height,
        wspace=0.06,
        hspace=0.16,
    )
    # Made black in the middle, as the background of the pictures: no evidence leaves them as they are.
    dark = colormaps["berlin"](np.linspace(0, 1, 513))[:, :3]
    colours = ListedColormap(np.clip((dark - dark[256]) / (1 - dark[256]), 0, 1), "evidence")
    strength = torch.stack([_smooth(f.evidence, 1).abs().max() for f in shown]).median().item() or 1.0
    scale = Normalize(-strength, strength, clip=True)
    for i, finding in enumerate(shown):
        row, column = i % rows, i // rows
        picture, heat, bars = (figure.add_subplot(grid[row, 4 * column + k]) for k in range(3))
        picture.imshow(finding.picture.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        fine = F.interpolate(finding.picture[None, None], scale_factor=8, mode="bicubic")[0, 0].clamp(0, 1)
        light = torch.as_tensor(colours(scale(_smooth(finding.evidence, 8).numpy()))[..., :3])
        heat.imshow((1 - (1 - 0.42 * fine[..., None]) * (1 - light)).numpy(), interpolation="bilinear")
        for axes in (picture, heat):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        names, values = zip(*finding.answers, strict=True)
        places = range(len(names))
        right = finding.truth is None or finding.truth == names[0]
        bars.barh(places, [1.0] * len(names), height=0.3, color="#f2f2f4")
        bars.barh(places, values, height=0.3, color=[accent if right else wrong] + ["#c7c7cc"] * (len(names) - 1))
        for place, name, value in zip(places, names, values, strict=True):
            weight = "bold" if place == 0 else "normal"
            bars.text(0, place - 0.24, name, va="bottom", fontsize=9, color=ink, weight=weight)
            bars.text(1, place - 0.24, f"{value:.0%}", va="bottom", ha="right", fontsize=9, color=ink, weight=weight)
        bars.set(xlim=(-0.06, 1.0), ylim=(len(names) - 0.72, -1.0), xticks=[], yticks=[])
        bars.spines[:].set_visible(False)
        if finding.truth is None:
            bars.text(0, -0.78, finding.name, fontsize=7.5, color=faint, va="bottom")
        elif not right:
            bars.text(0, -0.78, f"in truth: {finding.truth}", fontsize=7.5, color=wrong, va="bottom")
    figure.text(0.018, 1 - 0.28 / height, "Why this answer?", fontsize=15, weight="bold", color=ink, va="center")
    subtitle = f"{result.model}: each picture, the evidence for its first answer, and the three likeliest answers"
    figure.text(0.018, 1 - 0.53 / height, subtitle, fontsize=9, color=faint, va="center")
    bar = figure.add_axes((0.02, 0.42 / height, 0.26, 0.13 / height))
    figure.colorbar(ScalarMappable(scale, colours), cax=bar, orientation="horizontal")
    bar.set_xticks([-strength, 0, strength], ["speaks against", "0", "speaks for"], fontsize=8, color=ink)
    for label, side in zip(bar.get_xticklabels(), ("left", "center", "right"), strict=True):
        label.set(horizontalalignment=side)
    bar.tick_params(length=0)
    bar.spines[:].set_visible(False)
    explanation = (
        "Colour is each pixel's share in the score of the first answer, compared with a black picture:\n"
        f"{result.method}. The shares add up."
    )
    figure.text(0.32, 0.42 / height, explanation, fontsize=8, color=faint, va="center", linespacing=1.5)
    figure.savefig(path, dpi=150)
