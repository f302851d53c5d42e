"""Files of places in sequences: annotations (GTF, GFF3, BED) and variants (VCF)."""

from __future__ import annotations

import os
import re
import urllib.parse
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

from sinuous.core.checks import check_choice
from sinuous.genomics.files import Lines, shown


class Feature(NamedTuple):
    """A stretch of a sequence.

    Attributes:
        seqid: name of the sequence.
        kind: the type of a GTF or GFF3, the name (fourth column) of a BED, or `"region"`.
        start, end: first letter and the one behind the last, from 0.
        strand: `"+"`, `"-"`, or `"."` where it is open.
        attributes: of the last column of a GTF or GFF3, values of one key being joined by commas; or the further
            columns of a BED.
    """

    seqid: str
    kind: str
    start: int
    end: int
    strand: str
    attributes: dict[str, str]


class Variant(NamedTuple):
    """An allele that differs from the genome.

    Attributes:
        name: of the sequence.
        position: of the first letter of `ref`, from 1.
        ref, alt: letters of the genome, and those in their place.
    """

    name: str
    position: int
    ref: str
    alt: str


def read_features(path: str | os.PathLike[str]) -> Iterator[Feature]:
    """Stream the features of a GTF, GFF3 or BED file, plain or compressed by gzip or bgzip.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is empty, cut, or a line is no feature, with the line.
    """
    lines = Lines(path)
    try:
        lines.skip_blank()
    except BaseException:
        lines.close()
        raise
    return _features(lines)


def _features(lines: Lines) -> Iterator[Feature]:
    read: Callable[[Lines, str], Feature] | None = None
    try:
        for line in lines:
            if line.startswith((">", "##FASTA")):  # a GFF3 may end with its sequences
                if read is None:
                    raise lines.refusal(f"no feature (got {shown(line)}); give a GTF, GFF3 or BED file, not a FASTA")
                return
            if not line.strip() or line.startswith(("#", "track ", "track\t", "browser ", "browser\t")):
                continue
            if read is None:
                read = _feature_reader(lines, line)
            yield read(lines, line)
    finally:
        lines.close()


def _feature_reader(lines: Lines, line: str) -> Callable[[Lines, str], Feature]:
    columns = line.split("\t")
    if len(columns) >= 8 and columns[3].strip().isdecimal() and columns[4].strip().isdecimal():
        return _gff
    columns = line.split()
    if len(columns) >= 3 and columns[1].isdecimal() and columns[2].isdecimal():
        return _bed
    raise lines.refusal(
        f"no feature (got {shown(line)}); a line of GTF or GFF3 has nine columns between tabs, the fourth and fifth "
        "being start and end, a line of BED begins with name, start and end"
    )


def _gff(lines: Lines, line: str) -> Feature:
    columns = [column.strip() for column in line.split("\t")]
    if len(columns) < 8:
        raise lines.refusal(f"a GTF or GFF3 line has nine columns between tabs (got {len(columns)} in {shown(line)})")
    seqid, _, kind, start, end, _, strand, _, *others = columns
    first, last = _whole(lines, "start", start), _whole(lines, "end", end)
    if not 1 <= first <= last:
        raise lines.refusal(f"start must be at least 1 and at most end (got {start} and {end})")
    text = others[0] if others else ""
    gff3 = re.match(r"[^\s=;\"]+=", text) is not None
    attributes = _gff3_attributes(text) if gff3 else _gtf_attributes(text)
    if gff3:
        seqid, kind = urllib.parse.unquote(seqid), urllib.parse.unquote(kind)
    return Feature(seqid, kind, first - 1, last, strand if strand in ("+", "-") else ".", attributes)


def _gff3_attributes(text: str) -> dict[str, str]:
    pairs = (part.partition("=") for part in text.split(";") if part.strip() not in ("", "."))
    return {urllib.parse.unquote(key.strip()): urllib.parse.unquote(value.strip()) for key, _, value in pairs}


def _gtf_attributes(text: str) -> dict[str, str]:
    attributes: dict[str, str] = {}
    for key, quoted, bare in re.findall(r'([^\s;"]+)\s+(?:"([^"]*)"|([^;"]*[^;"\s]))', text):
        value = quoted or bare
        attributes[key] = f"{attributes[key]},{value}" if key in attributes else value
    return attributes


BED = ("name", "score", "strand", "thick_start", "thick_end", "color", "block_count", "block_sizes", "block_starts")


def _bed(lines: Lines, line: str) -> Feature:
    columns = line.rstrip().split("\t") if "\t" in line else line.split()
    if len(columns) < 3:
        raise lines.refusal(f"a BED line begins with name, start and end (got {shown(line)})")
    start, end = _whole(lines, "start", columns[1]), _whole(lines, "end", columns[2])
    if start > end:
        raise lines.refusal(f"start must be at most end (got {start} and {end})")
    attributes = dict(zip(BED, (column.strip() for column in columns[3:]), strict=False))
    strand = attributes.pop("strand", ".")
    kind = attributes.get("name") or "region"
    return Feature(columns[0].strip(), kind, start, end, strand if strand in ("+", "-") else ".", attributes)


def _whole(lines: Lines, name: str, text: str) -> int:
    if not text.strip().isdecimal():
        raise lines.refusal(f"{name} must be a whole number (got {shown(text)})")
    return int(text)


def read_variants(path: str | os.PathLike[str], *, on_symbolic: str = "raise") -> Iterator[Variant]:
    """Stream the alleles of a VCF file, plain or compressed by gzip or bgzip: one for each alternative of a line.

    Alternatives that are missing (`.`), or are missing because of a deletion before them (`*`), are no variants.

    Args:
        path: of the file.
        on_symbolic: `"raise"`, or `"skip"` alternatives without letters (`<DEL>`, breakends); a warning counts them.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is empty, cut, or a line is no variant, with the line.
    """
    check_choice("on_symbolic", on_symbolic, ("raise", "skip"))
    lines = Lines(path)
    try:
        lines.skip_blank()
    except BaseException:
        lines.close()
        raise
    return _variants(lines, on_symbolic == "skip")


def _variants(lines: Lines, skip: bool) -> Iterator[Variant]:
    skipped = 0
    try:
        for line in lines:
            if not line.strip() or line.startswith("#"):
                continue
            columns = [column.strip() for column in line.split("\t")]
            if len(columns) < 5:
                raise lines.refusal(
                    f"no variant (got {shown(line)}); a VCF line has CHROM, POS, ID, REF and ALT between tabs"
                )
            name, position, _, ref, alts = columns[:5]
            if not position.isdecimal():
                raise lines.refusal(f"POS must be a whole number (got {shown(position)})")
            if not re.fullmatch("[A-Za-z]+", ref):
                raise lines.refusal(f"REF must be letters (got {shown(ref)})")
            for alt in alts.split(","):
                if alt in (".", "*", "<*>", "<NON_REF>"):
                    continue
                if re.fullmatch("[A-Za-z]+", alt):
                    if int(position) < 1:
                        raise lines.refusal(f"POS must be at least 1 (got {position})")
                    yield Variant(name, int(position), ref, alt)
                elif skip:
                    skipped += 1
                else:
                    raise lines.refusal(
                        f"ALT must be letters (got {shown(alt)} at {name}:{position}); symbolic alleles have no "
                        "sequence: filter them out, or give on_symbolic='skip'"
                    )
    finally:
        lines.close()
    if skipped:
        warnings.warn(f"{skipped} symbolic alleles of {lines.path} were skipped", stacklevel=2)
