"""Find genes, score variants, fill gaps of proteins and draw molecules.

sinuous demo genomics annotate --fasta genome.fa --out genes.gtf --figure genes.png
sinuous demo genomics variants --fasta genome.fa --vcf some.vcf --out effects.tsv
sinuous demo genomics protein --fasta homologs.fa --spans 10-20 --out mutations.png
sinuous demo genomics molecules --count 24 --out drawn.png --smiles drawn.smi

Without one of these words all four run on samples that come with the package.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from types import ModuleType

from sinuous.core.weights import all_weights

PARTS = {
    "annotate": "genes along sequences of any length, without windows",
    "variants": "how probable variants of a genome are",
    "protein": "gaps of a protein filled beside its homologs, and all its mutations",
    "molecules": "new molecules, and a report on them",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="part", metavar="|".join(PARTS))
    for name, summary in PARTS.items():
        command = commands.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        _module(name).add_arguments(command)


def run(options: argparse.Namespace) -> None:
    """Run one part of the demo, or all on bundled samples, and print the names of the files that were written.

    Raises:
        ValueError: for what cannot be done, or if there are no weights for it.
    """
    if options.part is not None:
        written = _module(options.part).run(options)
    else:
        written = _all()
    for path in written:
        print(path)


def _all() -> list[Path]:
    written: list[Path] = []
    missing = [name for name in PARTS if _module(name).MODEL not in all_weights()]
    if len(missing) == len(PARTS):
        raise ValueError(
            f"the weights {', '.join(_module(name).MODEL for name in PARTS)} do not come with this version of the "
            "package; give a model of your own: sinuous demo genomics annotate --model FOLDER"
        )
    for name, summary in PARTS.items():
        print(f"{name}: {summary}")
        if name in missing:
            print(f"the weights {_module(name).MODEL} do not come with this version of the package: left out")
            continue
        parser = argparse.ArgumentParser()
        _module(name).add_arguments(parser)
        options = parser.parse_args(["--figure", str(_module(name).FIGURE)] if name == "annotate" else [])
        written += _module(name).run(options)
    return written


def _module(part: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.demo_{part}")
