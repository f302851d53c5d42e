"""Draw molecules from a model and print a table of how good they are.

    python tools/molecule_scores.py chem_xlstm_nano.moses FOLDER      # the unzipped package molsets
    python tools/molecule_scores.py runs/mine FOLDER --count 1000 --temperatures 0.8,1.0

New are molecules that are not in the training file of FOLDER, validation included.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from sinuous.core.generation import Sampling
from sinuous.core.hub import load
from sinuous.core.tables import cell, markdown_table
from sinuous.genomics.datasets.molecules import Molecules
from sinuous.genomics.design import SAMPLING, sample_molecules
from sinuous.genomics.molecule_sets import molecule_report

COLUMNS = ("temperature", "syntax", "valid", "unique", "novel", "scaffolds", "diversity", "molecules_per_s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="weights, or a folder of sinuous.save")
    parser.add_argument("folder", type=Path, help="the unzipped package with the training molecules")
    parser.add_argument("--count", type=int, default=10_000, help="molecules to draw for each row")
    parser.add_argument("--temperatures", default="1.0", help="comma-separated")
    parser.add_argument("--seed", type=int, default=0, help="of the first molecule; the others count up")
    options = parser.parse_args()
    model = load(options.model).eval()
    data = Molecules(root=options.folder)
    known = [*data.smiles("train"), *data.smiles("val")]
    rows = []
    for temperature in map(float, options.temperatures.split(",")):
        sampling = Sampling(temperature=temperature, max_new_tokens=SAMPLING.max_new_tokens, seed=options.seed)
        for syntax in (False, True):
            began = time.perf_counter()
            drawn = sample_molecules(model, options.count, syntax=syntax, sampling=sampling)
            rate = options.count / (time.perf_counter() - began)
            report = molecule_report(drawn, reference=known)
            row = {"temperature": temperature, "syntax": syntax, **report, "molecules_per_s": rate}
            rows.append({c: f"{row[c]:.4f}" if c in COLUMNS[2:5] else cell(row[c]) for c in COLUMNS})
            print(rows[-1], flush=True)
    print(f"\n{options.count:,} molecules drawn for each row, seed {options.seed}\n")
    print(markdown_table(rows, COLUMNS))


if __name__ == "__main__":
    main()
