"""Bases a second and peak memory of annotation, against the length of the sequence."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sinuous.core.bench import measure
from sinuous.core.bench.options import add_machine, add_outputs, positive_integers
from sinuous.core.hub import load
from sinuous.core.tables import Row, command, show, write_csv, write_markdown
from sinuous.genomics.annotation import CHUNK, check_annotator, encoded, strand_logits
from sinuous.genomics.io import read_sequences

METHOD = """Streamed: the passes of `sinuous.genomics.annotate` over a sequence, in chunks of {chunk} bases; each base
is read once from right to left, and once more on each strand from left to right. Whole: one forward pass of the model
over all bases. Both give the same labels. Each figure is one call in a process of its own, reading of the file not
counted; the peak is the growth of the resident memory beyond weights and the sequence's ids, of one byte a base."""
COLUMNS = ("length", "way", "seconds", "bases_per_s", "peak_mb")
STREAMED, WHOLE = "streamed", "whole"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="dna_xlstm_nano.arabidopsis_genes", help="weights, or a folder")
    parser.add_argument("--fasta", type=Path, help="cut the first sequence of this file; random bases, if absent")
    parser.add_argument("--lengths", default="65536,262144,1048576", help="comma-separated numbers of bases")
    parser.add_argument("--whole-up-to", type=int, default=262_144, help="longest sequence for the whole forward pass")
    parser.add_argument("--chunk", type=int, default=CHUNK, help="bases between states that are kept")
    add_machine(parser)
    parser.add_argument("--figure", type=Path, help="also draw memory against length into this file")
    add_outputs(parser)


def letters(model: Any, length: int, fasta: Path | None) -> Tensor:
    """Ids `[length]` of one byte each, random ones or those that a file begins with.

    Raises:
        ValueError: if the file's first sequence is shorter.
    """
    if fasta is None:
        bases: Tensor = model.tokenizer.natural
        drawn = torch.randint(len(bases), (length,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        return bases.to(torch.uint8)[drawn.int()]
    record = next(iter(read_sequences(fasta)))
    if len(record.sequence) < length:
        raise ValueError(
            f"--lengths must be at most {len(record.sequence)}, as {fasta} begins with so many bases (got {length})"
        )
    return encoded(model.tokenizer, record.sequence[:length], record.name)


@torch.inference_mode()
def label(model: nn.Module, ids: Tensor, way: str, chunk: int) -> None:
    if way == STREAMED:
        for _ in strand_logits(model, ids, chunk=chunk):
            pass
    else:
        model(ids[None].long())


def measure_call(
    name: str, way: str, length: int, fasta: Path | None, chunk: int, device: str, threads: int
) -> dict[str, float | None]:
    """Seconds and peak memory of labelling once, in this process; run it in a fresh one."""
    torch.set_num_threads(threads)
    place = torch.device(device)
    model = load(name).eval().to(place)
    ids = letters(model, length, fasta)
    label(model, ids[: min(length, 4096)], way, chunk)
    took = 0.0

    def call() -> None:
        nonlocal took
        began = time.perf_counter()
        label(model, ids, way, chunk)
        took = time.perf_counter() - began

    peak = measure.peak_growth({way: call}, place)
    if peak is None:
        call()
    return {"seconds": took, "peak_mb": None if peak is None else peak[way] / 1e6}


def run(options: argparse.Namespace) -> list[Row]:
    """All rows that the options ask for; the table is printed at the end.

    Raises:
        ValueError: for lengths that are no positive integers or too long for the file, or a model that labels no bases.
        FileNotFoundError: if there is no such file.
    """
    lengths = positive_integers("--lengths", options.lengths)
    model = load(options.model)
    check_annotator(model)
    letters(model, max(lengths), options.fasta)
    rows: list[Row] = []
    for length, way in itertools.product(lengths, (STREAMED, WHOLE)):
        if way == WHOLE and length > options.whole_up_to:
            continue
        measure.say(f"{length} bases, {way}")
        arguments = (options.model, way, length, options.fasta, options.chunk, options.device, options.threads)
        found = measure.in_fresh_process(measure_call, *arguments, timeout=7200) or dict.fromkeys(COLUMNS[2:])
        rate = None if found["seconds"] is None else length / found["seconds"]
        rows.append({"length": length, "way": way, "ours": way == STREAMED, **found, "bases_per_s": rate})
    title = (
        f"Annotation by {options.model}: {measure.machine(torch.device(options.device))}, {options.threads} thread(s), "
        f"torch {torch.__version__}"
    )
    show(rows, COLUMNS, title=title, group=("length",))
    method = f"{METHOD.format(chunk=options.chunk)}\n\n    {command('annotation', options)}"
    outputs: list[tuple[Path | None, Callable[[list[Row], Path], None]]] = [
        (options.csv, lambda rows, path: write_csv([{c: row[c] for c in COLUMNS} for row in rows], path)),
        (options.figure, lambda rows, path: draw(rows, path, title)),
        (options.markdown, lambda rows, path: write_markdown(rows, COLUMNS, path, title=title, method=method)),
    ]
    for path, write in outputs:
        if path:
            write(rows, path)
            print(path)
    return rows


def draw(rows: list[Row], path: Path, title: str) -> None:
    """Peak memory against length, one line for each way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.8, 4), layout="constrained")
    axes = figure.add_subplot()
    for way, colour in ((STREAMED, "#0072B2"), (WHOLE, "#D55E00")):
        points = [(row["length"], row["peak_mb"]) for row in rows if row["way"] == way and row["peak_mb"]]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", ms=4, lw=2, color=colour, label=way)
            axes.annotate(way, points[-1], xytext=(0, 6), textcoords="offset points", ha="center", color=colour)
    axes.set(xscale="log", yscale="log", xlabel="bases", ylabel="peak memory, MB")
    axes.set_title("\n".join(title.split(": ", 1)), fontsize=9, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
