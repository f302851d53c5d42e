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
    from sinuous.video.evidence import Evidence

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


def draw_evidence(
    evidence: Evidence,
    shown: Sequence[int],
    frames: Tensor,
    path: str | os.PathLike[str],
    hidden: Sequence[int] = (),
) -> None:
    """Draw frames of a film above the probabilities of the answers after each, into an image file.

    Args:
        evidence: of a film; the frames that its answer rests on are marked, in the picture and along the time.
        shown: frames that are shown.
        frames: their pixels, uint8 `[S, 3, H, W]`.
        path: of the image.
        hidden: frames in which something is known to be hidden.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained", facecolor=_PAPER)
    FigureCanvasAgg(figure)
    answer = evidence.answers[evidence.answer]
    figure.suptitle(f"{evidence.name}: {answer}", x=0.012, ha="left", fontsize=14, weight="bold", color=_INK)
    grid = figure.add_gridspec(2, max(6, len(frames)), height_ratios=[1, 1.8])
    for column, (number, frame) in enumerate(zip(shown, frames, strict=True)):
        panel: Any = figure.add_subplot(grid[0, column])
        panel.imshow(frame.permute(1, 2, 0).numpy(), interpolation="nearest")
        marked = number in evidence.decisive
        panel.set_title(f"{evidence.times[number]:.1f} s", fontsize=8, color=_CUT if marked else _FAINT)
        panel.set(xticks=(), yticks=())
        for spine in panel.spines.values():
            spine.set(visible=marked, color=_CUT, linewidth=2.5)
    line: Any = figure.add_subplot(grid[1, :])
    order = evidence.probabilities[-1].argsort(descending=True).tolist()
    for rank, answer_index in reversed(list(enumerate(order))):
        style = {"color": _LINE, "linewidth": 2} if rank == 0 else {"color": _FAINT, "linewidth": 0.8}
        told = evidence.answers[answer_index] if rank < 3 else None
        line.plot(evidence.times, evidence.probabilities[:, answer_index].tolist(), label=told, **style)
    for number in evidence.decisive:
        line.axvline(evidence.times[number], color=_CUT, linewidth=1)
    if hidden:
        places = [evidence.times[number] for number in hidden]
        line.plot(places, [1.04] * len(places), "v", color=_INK, markersize=6, clip_on=False, label="hidden here")
    line.set(xlim=(0, max(evidence.times[-1], 1e-9)), ylim=(0, 1.08), xlabel="seconds", ylabel="probability so far")
    line.legend(loc="upper left", fontsize=8, edgecolor="none", framealpha=0.9, reverse=True)
    line.spines[["top", "right"]].set_visible(False)
    line.tick_params(colors=_INK, length=0, labelsize=8)
    figure.savefig(path, dpi=150)
