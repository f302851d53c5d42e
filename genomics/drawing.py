"""Figures: genes along a sequence, effects of a protein's mutations, and molecules."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sinuous.genomics.annotation import Part
from sinuous.genomics.annotation_files import kind_of, strand_of
from sinuous.genomics.molecules import read_smiles
from sinuous.genomics.packages import package

_INK, _FAINT, _PAPER = "#1c1c1e", "#8e8e93", "white"
_GENE, _CODING, _GAP, _LINE = "#bcd4e6", "#1f5f8b", "#e5e5ea", "#d1d1d6"
_FILLED = "#b5482a"
_BEHIND_TEXT = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1.5}

Numbers = NDArray[np.float64]

COLUMNS = 1600
"""Places along the axis of a figure, at most; of a longer sequence each is the mean of several bases."""
RESIDUES = "GAVLIMFWYPCSTNQDEKRH"
"""Rows of a heat map, alike ones beside each other."""
PER_LINE = 60
"""Residues in a line of a heat map."""


class Profile:
    """Probabilities along the first sequence that goes by, in few numbers whatever its length.

    Attributes:
        name: of the sequence; None as long as there is none.
        start, end: bases that it has read, from 0.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        tracks = [("+", ("gene", "CDS")), ("+", ("CDS",)), ("-", ("gene", "CDS")), ("-", ("CDS",))]
        self.tracks = torch.tensor(
            [[strand_of(c) == strand and kind_of(c) in kinds for c in classes] for strand, kinds in tracks]
        ).double()
        self.name: str | None = None
        self.start = self.end = 0
        self.width = 1
        self._sums: Numbers = np.zeros((5, 2 * COLUMNS))

    def watch(self, parts: Iterable[Part]) -> Iterator[Part]:
        """Pass parts on, and keep what they have."""
        for part in parts:
            if self.name is None:
                self.name, self.start, self.end = part.name, part.start, part.start
            if part.name == self.name:
                self._add(part)
            yield part

    def _add(self, part: Part) -> None:
        p = (self.tracks @ part.probabilities.double().cpu().T).numpy()
        numbers = np.vstack([np.where(part.gaps.cpu().numpy(), 0, p), part.gaps.cpu().numpy()])
        self.end = part.start + len(part.gaps)
        while self.end - self.start > 2 * COLUMNS * self.width:
            self._sums[:, :COLUMNS] = self._sums[:, 0::2] + self._sums[:, 1::2]
            self._sums[:, COLUMNS:] = 0
            self.width *= 2
        place = (part.start - self.start + np.arange(numbers.shape[1])) // self.width
        for row, values in zip(self._sums, numbers, strict=True):
            row += np.bincount(place, values, minlength=len(row))

    def means(self) -> tuple[Numbers, Numbers]:
        """Middles of the places, in bases from 0, and means there, `[5, n]`: the probability of a gene and of a CDS on
        the first strand, both on the second, and the share of gaps."""
        columns = -(-(self.end - self.start) // self.width)
        edges = self.start + np.minimum(np.arange(columns + 1) * self.width, self.end - self.start)
        means: Numbers = self._sums[:, :columns] / np.diff(edges)
        return (edges[:-1] + edges[1:]) / 2, means


class Known(NamedTuple):
    """A stretch of an annotation that is drawn below the model's."""

    start: int
    end: int
    kind: str
    strand: str


def draw_annotation(profile: Profile, title: str, path: str | os.PathLike[str], known: Sequence[Known] = ()) -> None:
    """Draw the probabilities of genes along a sequence, one strand above the other, into an image file.

    Args:
        profile: what was seen of the sequence.
        title: printed above.
        path: of the image.
        known: genes and CDS of the curated annotation, drawn below.
    """
    bases, (gene, coding, gene_back, coding_back, gaps) = profile.means()
    unit, name = (1e6, "Mb") if profile.end >= 2e6 else (1e3, "kb") if profile.end >= 2e3 else (1.0, "bases")
    figure = Figure(figsize=(11, 4.4 if known else 3.5), layout="constrained", facecolor=_PAPER)
    FigureCanvasAgg(figure)
    figure.suptitle(f"Where are genes in {profile.name}?", x=0.012, ha="left", fontsize=14, weight="bold", color=_INK)
    axes: Any = figure.subplots(
        2 if known else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 1] if known else [1]
    )
    track = axes[0, 0]
    edges = np.concatenate([[profile.start], (bases[:-1] + bases[1:]) / 2, [profile.end]]) / unit
    for values, colour in ((gene, _GENE), (coding, _CODING), (-gene_back, _GENE), (-coding_back, _CODING)):
        track.stairs(values, edges, fill=True, color=colour, linewidth=0)
    if gaps.any():
        track.stairs(2 * np.sign(gaps) - 1, edges, baseline=-1, fill=True, color=_GAP, linewidth=0, zorder=0)
    track.axhline(0, color=_INK, linewidth=0.8)
    track.set(ylim=(-1, 1), xlim=(profile.start / unit, profile.end / unit), ylabel="probability")
    track.set_yticks([-1, -0.5, 0, 0.5, 1], ["1", "0.5", "0", "0.5", "1"])
    for strand, height in (("+ strand", 0.97), ("\N{MINUS SIGN} strand", 0.03)):
        anchor = "top" if height > 0.5 else "bottom"
        track.text(0.006, height, strand, fontsize=8, va=anchor, transform=track.transAxes, bbox=_BEHIND_TEXT)
    patches = [Patch(color=_GENE, label="gene"), Patch(color=_CODING, label="CDS")]
    patches += [Patch(color=_GAP, label="gap (N)")] if gaps.any() else []
    track.set_title(title, loc="left", fontsize=9, color=_FAINT)
    figure.legend(handles=patches, loc="upper right", ncols=3, frameon=False, fontsize=9)
    if known:
        _draw_known(axes[1, 0], known, unit)
    axes[-1, 0].set_xlabel(f"{name} of {profile.name}", color=_INK)
    _plain(axes.ravel())
    figure.savefig(path, dpi=150)


def _draw_known(axis: Any, known: Sequence[Known], unit: float) -> None:
    for start, end, kind, strand in known:
        middle, height, colour = (0.5, 0.5, _CODING) if kind == "CDS" else (0.5, 0.22, _GENE)
        low = middle - height / 2 if strand == "+" else -middle - height / 2
        axis.add_patch(Rectangle((start / unit, low), (end - start) / unit, height, color=colour, linewidth=0))
    axis.axhline(0, color=_LINE, linewidth=0.8)
    axis.set(ylim=(-1, 1))
    axis.set_yticks([-0.5, 0.5], ["\N{MINUS SIGN}", "+"])
    axis.set_title("curated annotation", loc="left", fontsize=9, color=_FAINT)


def _plain(axes: Iterable[Any]) -> None:
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(_LINE)
        axis.tick_params(colors=_INK, length=0, labelsize=8)


def draw_mutations(
    protein: str,
    log_p: Tensor,
    residues: Mapping[str, int],
    filled: Sequence[tuple[int, int]],
    title: str,
    path: str | os.PathLike[str],
) -> None:
    """Draw the effect of every substitution of a protein as a heat map, in lines of `PER_LINE` residues.

    Args:
        protein: letters.
        log_p: log-probabilities of the tokens at each residue, `[T, V]`.
        residues: tokens of the letters.
        filled: spans that the model wrote, which are marked.
        title: printed above.
        path: of the image.
    """
    rows = [residues[letter] for letter in RESIDUES]
    own = log_p.gather(1, torch.tensor([[residues[letter]] for letter in protein]))
    own = own.masked_fill(own.isinf(), torch.nan)  # of letters that stand for no certain residue
    effects = (log_p[:, rows] - own).T.numpy()
    lines = -(-len(protein) // PER_LINE)
    width = min(len(protein), PER_LINE)
    figure = Figure(figsize=(max(1.6 + 0.165 * width, 6.0), 1.1 + 3.2 * lines), layout="constrained", facecolor=_PAPER)
    FigureCanvasAgg(figure)
    figure.suptitle("What does each mutation do?", x=0.012, ha="left", fontsize=14, weight="bold", color=_INK)
    known = effects[np.isfinite(effects)]
    deepest, highest = np.percentile(known, [1, 99.5]) if known.size else (-1.0, 1.0)
    scale = TwoSlopeNorm(0, min(float(deepest), -0.1), max(float(highest), 0.1))
    axes: Any = figure.subplots(lines, 1, squeeze=False)
    for line, axis in enumerate(axes[:, 0]):
        first = line * PER_LINE
        stop = min(first + PER_LINE, len(protein))
        shown = axis.imshow(effects[:, first:stop], cmap="RdBu", norm=scale, aspect="auto", interpolation="nearest")
        axis.set_xlim(-0.5, width - 0.5)
        for column, letter in enumerate(protein[first:stop]):
            mark = any(a <= first + column < b for a, b in filled)
            ink: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7, "family": "monospace"}
            weight = {"color": _FILLED, "weight": "bold"} if mark else {"color": _INK}
            axis.text(column, -1.1, letter, **ink, **weight)
            if letter in RESIDUES:
                axis.plot(column, RESIDUES.index(letter), ".", color=_FILLED if mark else _INK, markersize=2.5)
        for a, b in ((max(a, first), min(b, stop)) for a, b in filled):
            if a < b:
                box = Rectangle((a - first - 0.5, -0.5), b - a, len(RESIDUES), fill=False, color=_FILLED, linewidth=1.2)
                axis.add_patch(box)
        ticks = [i for i in range(first, stop) if (i + 1) % 10 == 0 or i == first]
        axis.set_xticks([i - first for i in ticks], [str(i + 1) for i in ticks])
        axis.set_yticks(range(len(RESIDUES)), list(RESIDUES))
        axis.tick_params(colors=_INK, length=0, labelsize=7)
        axis.spines[:].set_visible(False)
    axes[0, 0].set_title(title, loc="left", fontsize=9, color=_FAINT, pad=16)
    bar = figure.colorbar(shown, ax=axes, fraction=0.03, aspect=18, shrink=min(1.0, 1.6 / lines), pad=0.015)
    bar.set_label("log p(new) \N{MINUS SIGN} log p(old), nats", fontsize=8, color=_INK)
    bar.ax.tick_params(length=0, labelsize=8)
    bar.outline.set_visible(False)
    with matplotlib.rc_context({"font.family": "sans-serif"}):
        figure.savefig(path, dpi=150)


def draw_molecules(smiles: Sequence[str], title: str, path: str | os.PathLike[str], most: int = 24) -> None:
    """Draw molecules in a grid, with their SMILES, into an image file.

    Args:
        smiles: valid molecules.
        title: printed above.
        path: of the image.
        most: how many are drawn.

    Raises:
        ModuleNotFoundError: if the extra `genomics` is missing.
    """
    drawer = package("rdkit.Chem.Draw.rdMolDraw2D")
    shown = list(smiles)[:most]
    columns = min(6, max(len(shown), 1))
    lines = max(-(-len(shown) // columns), 1)
    figure = Figure(figsize=(max(2.1 * columns, 6.0), 2.15 * lines + 0.9), layout="constrained", facecolor=_PAPER)
    FigureCanvasAgg(figure)
    top = figure.get_figheight()
    layout: Any = figure.get_layout_engine()
    layout.set(rect=(0, 0, 1, 1 - 0.75 / top), hspace=0.02)
    figure.text(
        0.012, 1 - 0.24 / top, "Which molecules does it draw?", fontsize=14, weight="bold", color=_INK, va="center"
    )
    figure.text(0.012, 1 - 0.55 / top, title, fontsize=9, color=_FAINT, va="center")
    axes: Any = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.ravel():
        axis.set_axis_off()
    for axis, text in zip(axes.ravel(), shown, strict=False):
        canvas = drawer.MolDraw2DCairo(420, 380)
        canvas.drawOptions().padding = 0.08
        canvas.drawOptions().fixedBondLength = 48  # at most: larger molecules are fitted
        drawer.PrepareAndDrawMolecule(canvas, read_smiles(text))
        canvas.FinishDrawing()
        axis.imshow(Image.open(io.BytesIO(canvas.GetDrawingText())), interpolation="antialiased")
        label = text if len(text) <= 32 else f"{text[:31]}…"
        axis.text(0.5, -0.02, label, transform=axis.transAxes, ha="center", va="top", fontsize=6.5, color=_INK,
                  parse_math=False)  # fmt: skip
    figure.savefig(path, dpi=150)
