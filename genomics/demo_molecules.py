"""Molecules drawn by a model, and a report on them: `sinuous demo genomics molecules`."""

from __future__ import annotations

import argparse
from pathlib import Path

from sinuous.core.checks import check_sizes
from sinuous.core.demo_parts import PICTURES, check_output, model_with_weights, progress_bar
from sinuous.core.files import written_whole
from sinuous.core.generation import Sampling
from sinuous.genomics.design import sample_molecules
from sinuous.genomics.molecule_sets import molecule_report
from sinuous.genomics.molecules import read_smiles

MODEL = "chem_xlstm_nano.moses"
OUT, SMILES = Path("sinuous_molecules.png"), Path("sinuous_molecules.smi")
COUNT = 24
TOGETHER = 128
"""Molecules that are drawn at a time."""
TRIES = 5
"""Texts that are drawn for each molecule, at most, when some are none."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=COUNT, metavar="N", help="molecules to draw")
    parser.add_argument("--like", nargs="+", default=(), metavar="SMILES", help="molecules to go on from")
    parser.add_argument("--out", type=Path, default=OUT, metavar="PNG", help="a picture of the first of them")
    parser.add_argument("--smiles", type=Path, default=SMILES, metavar="FILE", help="for all of them, one a line")
    parser.add_argument("--seed", type=int, default=0, help="of the draws; another seed, other molecules")
    parser.add_argument("--model", metavar="NAME.TAG", help=f"weights, or a folder (default: {MODEL})")


def run(options: argparse.Namespace) -> list[Path]:
    """Draw molecules, print a report on them, and write SMILES and picture.

    Returns:
        The files that were written.

    Raises:
        ValueError: for what cannot be drawn or written.
    """
    from sinuous.genomics import drawing  # needs matplotlib

    check_sizes(**{"--count": options.count})
    check_output("--out", options.out, PICTURES, [options.smiles])
    check_output("--smiles", options.smiles, (".smi", ".smiles", ".txt"))
    model = model_with_weights(options.model, MODEL)
    drawn: list[str] = []
    valid: list[str] = []
    with progress_bar() as tell:
        while len(valid) < options.count and len(drawn) < TRIES * options.count:
            number = min(TOGETHER, options.count - len(valid))
            sampling = Sampling(temperature=1.0, seed=options.seed + len(drawn))
            new = sample_molecules(model, number, like=options.like, syntax=True, sampling=sampling)
            drawn += new
            valid += [text for text in new if text and read_smiles(text) is not None]
            tell("molecules", len(valid), options.count)
    if not valid:
        raise ValueError(
            f"none of {len(drawn)} drawn texts is a molecule, such as {drawn[0]!r}; the model needs more training"
        )
    report = molecule_report(drawn)
    with written_whole(options.smiles) as smiles, written_whole(options.out) as out:
        smiles.write_text("".join(f"{text}\n" for text in valid), encoding="utf-8", newline="\n")
        title = f"drawn by {options.model or MODEL}"
        title += f" after {len(options.like)} molecules" if options.like else ""
        drawing.draw_molecules(valid, title, out)
    if len(valid) < options.count:
        print(f"only {len(valid)} of {options.count} molecules, since {len(drawn) - len(valid)} drawn texts are none")
    print(
        f"{report['valid']:.1%} of {len(drawn)} drawn texts are molecules, and {report['unique']:.1%} of these differ: "
        f"{int(report['scaffolds'])} scaffolds, diversity {report['diversity']:.2f}"
    )
    return [options.smiles, options.out]
