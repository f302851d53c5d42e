"""Effects of variants on a genome: `sinuous demo genomics variants`."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch

from sinuous.core.demo_parts import check_output, model_with_weights, progress_bar
from sinuous.genomics.demo_annotate import SAMPLES, sample
from sinuous.genomics.effects import variant_effects
from sinuous.genomics.io import Record, Variant, read_features, read_sequences, read_variants

MODEL = "dna_xlstm_nano.arabidopsis_lm"
OUT = Path("sinuous_variants.tsv")
PAIRS = 30
"""Variants of each of the two kinds that the demo makes, if no files are given."""
DONOR, ELSEWHERE = "first base of an intron, G to A", "G to A within the same intron"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fasta", type=Path, metavar="F", help="your genome (default: variants of a bundled sequence)")
    parser.add_argument("--vcf", type=Path, metavar="V", help="its variants; given together with --fasta")
    parser.add_argument("--out", type=Path, default=OUT, metavar="TSV", help="a table of the effects")
    parser.add_argument("--model", metavar="NAME.TAG", help=f"weights, or a folder (default: {MODEL})")


def run(options: argparse.Namespace) -> list[Path]:
    """Score the variants, print those with the largest effects, and write all of them.

    Returns:
        The file that was written.

    Raises:
        ValueError: for what cannot be read, scored or written.
        FileNotFoundError: if there is no such file.
    """
    from sinuous.core.files import written_whole

    if (options.fasta is None) != (options.vcf is None):
        missing = "--vcf" if options.vcf is None else "--fasta"
        raise ValueError(f"{missing} is missing: variants are of a genome, so --fasta and --vcf go together")
    check_output("--out", options.out, (".tsv", ".txt"), [options.fasta, options.vcf])
    model = model_with_weights(options.model, MODEL)
    kinds: list[str] = []
    if options.vcf is None:
        genome = {record.name: record.sequence for record in sample()}
        variants, kinds = sample_variants()
    else:
        genome = {record.name: record.sequence for record in read_sequences(options.fasta, unique=True)}
        variants = list(read_variants(options.vcf))
    if not variants:
        raise ValueError(f"{options.vcf} has no variant to score; give a VCF with lines behind its header")
    with progress_bar() as tell:
        effects = variant_effects(model, genome, variants, progress=lambda done, of: tell("variants", done, of))
    with written_whole(options.out) as out, out.open("w", encoding="utf-8", newline="\n") as file:
        file.write("name\tposition\tref\talt\teffect\n")
        for variant, effect in zip(variants, effects.tolist(), strict=True):
            file.write("\t".join(map(str, variant)) + f"\t{effect:.6g}\n")
    show(variants, effects, kinds)
    return [options.out]


def show(variants: Sequence[Variant], effects: torch.Tensor, kinds: Sequence[str], most: int = 8) -> None:
    """Print the mean effect of each kind, or the variants that the model finds least probable."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="log p(alternative) - log p(reference), mean of both strands, in nats", title_justify="left")
    if kinds:
        of_kind = {kind: effects[torch.tensor([one == kind for one in kinds])] for kind in dict.fromkeys(kinds)}
        for column in ("variant", "number", "mean effect", "below 0"):
            table.add_column(column, justify="left" if column == "variant" else "right")
        for kind, some in of_kind.items():
            table.add_row(
                kind, str(len(some)), f"{float(some.mean()):+.2f}", f"{float((some < 0).double().mean()):.0%}"
            )
        lower = (of_kind[DONOR] < of_kind[ELSEWHERE]).double().mean()
        table.caption = f"the first of them is the less probable one in {float(lower):.0%} of the introns"
    else:
        for column in ("variant", "effect"):
            table.add_column(column, justify="right" if column == "effect" else "left")
        order = effects.argsort().tolist()
        for i in order[:most]:
            name, position, ref, alt = variants[i]
            table.add_row(f"{name}:{position} {_short(ref)}>{_short(alt)}", f"{float(effects[i]):+.2f}")
        if len(order) > most:
            table.caption = f"the {most} lowest of {len(order):,}"
    Console().print(table)


def _short(allele: str) -> str:
    return allele if len(allele) <= 12 else f"{allele[:11]}…"


def sample_variants() -> tuple[list[Variant], list[str]]:
    """Variants of the demo's sample: for some introns G to A at the first base, and once more within the same intron.

    Nearly every intron begins with GT, and is not cut out without it; so the first change should be improbable.
    """
    (record,) = sample()
    variants, kinds = [], []
    for first, within, strand in _introns(record)[:PAIRS]:
        ref, alt = ("G", "A") if strand == "+" else ("C", "T")
        for place, kind in ((first, DONOR), (within, ELSEWHERE)):
            variants.append(Variant(record.name, place + 1, ref, alt))
            kinds.append(kind)
    return variants, kinds


def _introns(record: Record) -> list[tuple[int, int, str]]:
    """Places of the first G of introns of the sample, of a G within each, and their strands."""
    offset = int(record.name.rpartition(":")[2].partition("-")[0]) - 1
    sequence = record.sequence.upper()
    coding: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for feature in read_features(SAMPLES / "athaliana_chr1.gtf.gz"):
        if feature.kind == "CDS" and offset <= feature.start and feature.end <= offset + len(sequence):
            transcript = (feature.attributes.get("transcript_id", ""), feature.strand)
            coding.setdefault(transcript, []).append((feature.start - offset, feature.end - offset))
    found: dict[tuple[int, int], tuple[int, int, str]] = {}
    for (_, strand), parts in coding.items():
        ordered = sorted(parts)
        for (_, start), (end, _) in itertools.pairwise(ordered):
            intron = sequence[start:end]
            if strand == "+" and intron.startswith("GT") and (within := intron.find("G", 20, len(intron) - 20)) > 0:
                found[start, end] = (start, start + within, strand)
            if strand == "-" and intron.endswith("AC") and (within := intron.find("C", 20, len(intron) - 20)) > 0:
                found[start, end] = (end - 1, start + within, strand)
    return list(found.values())
