"""Genes along sequences of any length: `sinuous demo genomics annotate`."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from sinuous.core.demo_parts import PICTURES, check_output, model_with_weights, progress_bar
from sinuous.core.files import written_whole
from sinuous.genomics.annotation import CHUNK, GAP, Part, classes_of, label_parts
from sinuous.genomics.annotation_files import LINES, kind_of
from sinuous.genomics.io import Record, read_features, read_sequences

MODEL = "dna_xlstm_nano.arabidopsis_genes"
OUT, FIGURE = Path("sinuous_genes.bed"), Path("sinuous_genes.png")
SAMPLES = Path(__file__).parent / "samples"
SAMPLE = (200_000, 260_000)
"""Bases of the bundled sequence that the demo reads, if no file is given."""


class Region(NamedTuple):
    """Bases of a record, counted from 0, half-open."""

    name: str
    start: int
    end: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fasta", type=Path, metavar="F", help="your sequences (default: a part of a bundled one)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="O", help="a .bed, .gtf or .bedGraph to write")
    parser.add_argument("--chunk", type=int, default=CHUNK, metavar="N", help="bases between states that are kept")
    parser.add_argument(
        "--region", type=region, metavar="NAME:START-END", help="bases to label, from 1, END included; all are read"
    )
    parser.add_argument("--figure", type=Path, metavar="PNG", help="a picture of the first sequence, or of the region")
    parser.add_argument("--model", metavar="NAME.TAG", help=f"weights, or a folder (default: {MODEL})")


def region(text: str) -> Region:
    """Read NAME:START-END, as samtools does: from 1, END included."""
    name, _, bounds = text.rpartition(":")
    start, _, end = bounds.replace(",", "").partition("-")
    if not (name and start.isdecimal() and end.isdecimal() and 1 <= int(start) <= int(end)):
        raise argparse.ArgumentTypeError(
            f"must be like chr1:1001-2000, with 1 the first base and END not below START (got {text!r})"
        )
    return Region(name, int(start) - 1, int(end))


def run(options: argparse.Namespace) -> list[Path]:
    """Label the bases, print how many have which label, and write the files.

    Returns:
        The files that were written.

    Raises:
        ValueError: for what cannot be read, labelled or written.
        FileNotFoundError: if there is no such file.
    """
    check_output("--out", options.out, list(LINES), [options.fasta, options.figure])
    check_output("--figure", options.figure, PICTURES, [options.fasta])
    model = model_with_weights(options.model, MODEL)
    if options.figure is not None:
        from sinuous.genomics import drawing  # needs matplotlib
    classes = classes_of(model)
    records = sample() if options.fasta is None else read_sequences(options.fasta)
    bounds = None
    if options.region is not None:
        records = only(records, options.region)
        bounds = options.region[1:]
    counts: Counter[str] = Counter()
    write = next(write for ending, write in LINES.items() if ending.lower() == options.out.suffix.lower())
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(written_whole(options.out))
        tell = stack.enter_context(progress_bar())
        parts = label_parts(
            model,
            records,
            chunk=options.chunk,
            region=bounds,
            progress=lambda name, way, done, of: tell(f"{name}, {way}", done, of),
        )
        parts = counted(parts, classes, counts)
        profile = None if options.figure is None else drawing.Profile(classes)
        with out.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(write(parts if profile is None else profile.watch(parts), classes))
        if profile is not None:
            picture = stack.enter_context(written_whole(options.figure))
            known = [] if options.fasta is not None else [drawing.Known(*one) for one in sample_genes()]
            known = [one for one in known if one.end > profile.start and one.start < profile.end]
            title = f"probabilities by {options.model or MODEL}, from both sides of every base"
            drawing.draw_annotation(profile, title, picture, known)
    show(counts, time.perf_counter() - began)
    return [options.out] + ([] if options.figure is None else [options.figure])


def only(records: Iterable[Record], wanted: Region) -> Iterator[Record]:
    """The record of a region, which must be in it.

    Raises:
        ValueError: if there is no such record, or it is shorter.
    """
    names = []
    for record in records:
        if record.name == wanted.name:
            if wanted.end > len(record.sequence):
                raise ValueError(
                    f"--region must be a part of {record.name}, 1-{len(record.sequence)} (got {wanted.start + 1}-"
                    f"{wanted.end})"
                )
            yield record
            return
        names.append(record.name)
    known = ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
    raise ValueError(f"--region names a record that is not there, {wanted.name!r}; there are {known}")


def counted(parts: Iterable[Part], classes: Sequence[str], counts: Counter[str]) -> Iterator[Part]:
    """Pass parts on, and count their labels."""
    names = [*classes, GAP]
    for part in parts:
        labels = part.probabilities.argmax(-1).masked_fill(part.gaps, len(classes))
        counts.update(dict(zip(names, torch.bincount(labels, minlength=len(names)).tolist(), strict=True)))
        yield part


def show(counts: Counter[str], seconds: float) -> None:
    """Print how many bases have which label."""
    from rich.console import Console
    from rich.table import Table

    total = sum(counts.values())
    table = Table(title=f"{total:,} bases, {total / max(seconds, 1e-9):,.0f} bases/s", title_justify="left")
    table.add_column("label")
    table.add_column("bases", justify="right")
    table.add_column("share", justify="right")
    for label, count in counts.items():
        if count or label != GAP:
            table.add_row(label, f"{count:,}", f"{count / max(total, 1):.1%}")
    Console().print(table)


def sample() -> Iterator[Record]:
    """A part of the bundled sequence."""
    for record in read_sequences(SAMPLES / "athaliana_chr1.fa.gz"):
        start, end = SAMPLE
        name = f"{record.name}:{start + 1}-{end}"
        yield Record(name, "a part of A. thaliana's chromosome 1", record.sequence[start:end])


def sample_genes() -> Iterator[tuple[int, int, str, str]]:
    """Start, end, kind and strand of the curated genes and CDS of that part."""
    start, end = SAMPLE
    for feature in read_features(SAMPLES / "athaliana_chr1.gtf.gz"):
        if kind_of(feature.kind) in ("gene", "CDS") and feature.end > start and feature.start < end:
            yield max(feature.start - start, 0), min(feature.end, end) - start, feature.kind, feature.strand
