"""A protein's gaps filled beside its homologs, and all its mutations: `sinuous demo genomics protein`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sinuous.core.demo_parts import PICTURES, check_output, model_with_weights, progress_bar
from sinuous.core.files import written_whole
from sinuous.core.generation import Sampling
from sinuous.core.modes import evaluating
from sinuous.genomics.contexts import read_context
from sinuous.genomics.demo_annotate import SAMPLES
from sinuous.genomics.effects import residue_log_probabilities
from sinuous.genomics.filling import fill_spans
from sinuous.genomics.io import Record, read_sequences
from sinuous.genomics.reading import check_continues
from sinuous.genomics.spans import check_spans

MODEL = "prot_xlstm_nano.cress"
OUT = Path("sinuous_protein.png")
SHORTEST, LONGEST = 90, 160
"""Residues of the bundled protein that is taken, if no file is given: the first that is as long as its relative. The
weights have not seen it, a gene of the test split of the whole chromosome."""
SPANS = ((20, 26), (60, 70))
DRAWN = 1200
"""Residues whose mutations are computed and drawn, at most: each takes a reading of the whole protein."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fasta", type=Path, metavar="F", help="a protein, then its homologs (default: bundled ones)")
    parser.add_argument(
        "--spans",
        type=span,
        nargs="+",
        metavar="START-END",
        help="residues to write anew, such as 10-20: from 0, END not included, so ten from the eleventh on",
    )
    parser.add_argument("--out", type=Path, default=OUT, metavar="PNG", help="a heat map of all mutations")
    parser.add_argument("--model", metavar="NAME.TAG", help=f"weights, or a folder (default: {MODEL})")


def span(text: str) -> tuple[int, int]:
    """Read START-END: from 0, END not included."""
    start, _, end = text.partition("-")
    if not (start.isdecimal() and end.isdecimal() and int(start) < int(end)):
        raise argparse.ArgumentTypeError(f"must be like 10-20, with END above START (got {text!r})")
    return int(start), int(end)


def run(options: argparse.Namespace) -> list[Path]:
    """Fill the spans of the first record behind the others, print it before and after, and draw its mutations.

    Returns:
        The file that was written.

    Raises:
        ValueError: for what cannot be read, filled or written.
        FileNotFoundError: if there is no such file.
    """
    from sinuous.genomics import drawing  # needs matplotlib

    check_output("--out", options.out, PICTURES, [options.fasta])
    model = model_with_weights(options.model, MODEL)
    tokenizer = check_continues(model)
    records = sample() if options.fasta is None else list(read_sequences(options.fasta))
    protein = tokenizer.decode(tokenizer.encode(records[0].sequence, name=records[0].name))
    spans = options.spans or ([] if options.fasta is not None else SPANS)
    spans = check_spans(spans, len(protein))
    context = [record.sequence for record in records[1:]]
    for record in records[1:]:
        tokenizer.encode(record.sequence, name=record.name)  # whose name an error tells
    filled = fill_spans(model, protein, spans, context, Sampling()) if spans else protein
    log_p = mutations(model, filled, context)
    others = "1 homolog" if len(context) == 1 else f"{len(context)} homologs"
    title = f"{records[0].name} behind {others}, by {options.model or MODEL}"
    title += f"; its first {DRAWN:,} residues" if len(filled) > DRAWN else ""
    title += "; what it wrote is framed" if spans else ""
    with written_whole(options.out) as out:
        residues = {letter: int(tokenizer.encode(letter)) for letter in set(filled) | set(drawing.RESIDUES)}
        drawing.draw_mutations(filled[:DRAWN], log_p, residues, spans, title, out)
    show(records[0].name, protein, filled, spans)
    return [options.out]


def mutations(model: Any, protein: str, context: Sequence[str]) -> Tensor:
    """Log-probabilities of the tokens at each of the first residues, hidden while all others are read, `[T, V]`."""
    ids = model.tokenizer.encode(protein)
    with evaluating(model), torch.no_grad(), progress_bar() as tell:
        state = read_context(model, context)
        rows = residue_log_probabilities(
            model, ids, range(min(len(ids), DRAWN)), state, lambda done, of: tell("residues", done, of)
        )
        return torch.stack(list(rows))


def show(name: str, before: str, after: str, spans: Sequence[tuple[int, int]]) -> None:
    """Print the spans before and after."""
    from rich.console import Console
    from rich.table import Table

    if not spans:
        print(f"{name}: {len(after)} residues; --spans 10-20 would write some anew")
        return
    table = Table(title=f"{name}, {len(after)} residues", title_justify="left")
    for column in ("span, from 0", "it was", "it is", "the same"):
        table.add_column(column)
    for start, stop in spans:
        same = sum(a == b for a, b in zip(before[start:stop], after[start:stop], strict=True))
        table.add_row(f"{start}-{stop}", before[start:stop], after[start:stop], f"{same} of {stop - start}")
    Console().print(table)
    print(after)


def sample() -> list[Record]:
    """A bundled protein of *A. thaliana*, and its nearest relative in *A. arenosa*."""
    own, relatives = (list(read_sequences(SAMPLES / f"{species}.faa.gz")) for species in ("athaliana", "aarenosa"))
    pairs = zip(own, relatives, strict=True)
    return next([a, b] for a, b in pairs if SHORTEST <= len(a.sequence) == len(b.sequence) <= LONGEST)
