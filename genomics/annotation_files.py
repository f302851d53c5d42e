"""Annotations written to files: BED, GTF and bedGraph, from left to right as they are found.

.bed         name, start, end, label; every base is in one line                       from 0, end not included
.gtf         gene, from its first base of a gene or a CDS to the last, and its CDS    from 1, end included
.bedGraph    name, start, end, probability that the bases are in a CDS, either strand  from 0, end not included
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from sinuous.genomics.annotation import GAP, Part, Stretch, stretches

DIGITS = 2
"""Of probabilities; neighbours that are the same in so many share a line."""

Lines = Iterator[str]


def bed_lines(parts: Iterable[Part], classes: Sequence[str]) -> Lines:
    """A line for each stretch: its label is the class without blanks (`gene+`), or `gap`."""
    for stretch in stretches(parts, classes):
        yield f"{stretch.name}\t{stretch.start}\t{stretch.end}\t{stretch.label.replace(' ', '')}\n"


def gtf_lines(parts: Iterable[Part], classes: Sequence[str]) -> Lines:
    """A line for each gene, neighbouring stretches of one strand, and behind it one for each CDS in it.

    Bases between genes and gaps have no line. No frame is told, as none is found.
    """
    gene: list[Stretch] = []
    count: dict[str, int] = {}
    for stretch in stretches(parts, classes):
        if gene and (gene[-1].name, gene[-1].end, strand_of(gene[-1].label)) != (
            stretch.name,
            stretch.start,
            strand_of(stretch.label),
        ):
            yield from _gene(gene, count)
            gene = []
        if strand_of(stretch.label) != ".":
            gene.append(stretch)
    if gene:
        yield from _gene(gene, count)


def _gene(gene: Sequence[Stretch], count: dict[str, int]) -> Lines:
    name, strand = gene[0].name, strand_of(gene[0].label)
    count[name] = count.get(name, 0) + 1
    number = f"{name}.g{count[name]}"
    yield _gtf_line(name, "gene", gene[0].start, gene[-1].end, strand, f'gene_id "{number}";')
    for part in gene:
        if kind_of(part.label) == "CDS":
            attributes = f'gene_id "{number}"; transcript_id "{number}.t1";'
            yield _gtf_line(name, "CDS", part.start, part.end, strand, attributes)


def _gtf_line(name: str, kind: str, start: int, end: int, strand: str, attributes: str) -> str:
    return f"{name}\tsinuous\t{kind}\t{start + 1}\t{end}\t.\t{strand}\t.\t{attributes}\n"


def bedgraph_lines(parts: Iterable[Part], classes: Sequence[str]) -> Lines:
    """A line for each run of bases of one probability, which gaps have none of."""
    coding = torch.tensor([kind_of(name) == "CDS" for name in classes])
    yield 'track type=bedGraph name="CDS" description="probability of a CDS on either strand"\n'
    run: tuple[str, int, int, float] | None = None
    for part in parts:
        p = part.probabilities[:, coding.to(part.probabilities.device)].sum(-1).double().cpu()
        steps = (p * 10**DIGITS).round().long().masked_fill(part.gaps.cpu(), -1)
        values, counts = torch.unique_consecutive(steps, return_counts=True)
        ends = (part.start + counts.cumsum(0)).tolist()
        for value, start, end in zip(values.tolist(), [part.start, *ends], ends, strict=False):
            if run is not None and (run[0], run[2], run[3]) == (part.name, start, value):
                run = (run[0], run[1], end, value)
                continue
            if run is not None and run[3] >= 0:
                yield _bedgraph_line(*run)
            run = (part.name, start, end, value)
    if run is not None and run[3] >= 0:
        yield _bedgraph_line(*run)


def _bedgraph_line(name: str, start: int, end: int, value: float) -> str:
    return f"{name}\t{start}\t{end}\t{value / 10**DIGITS:g}\n"


LINES: dict[str, Callable[[Iterable[Part], Sequence[str]], Lines]] = {
    ".bed": bed_lines,
    ".gtf": gtf_lines,
    ".bedGraph": bedgraph_lines,
}
"""Functions that write a file, by how its name ends."""


def kind_of(label: str) -> str:
    """What a class is of, without its strand: `CDS` of `CDS +`."""
    return label.rstrip("+- ") or label


def strand_of(label: str) -> str:
    """Strand of a class: `+`, `-`, or `.` for one without."""
    return label[-1] if label != GAP and label[-1:] in ("+", "-") else "."
