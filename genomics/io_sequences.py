"""Files of sequences: FASTA, A3M and A2M, GenBank, EMBL and UniProt's flat files, 2bit."""

from __future__ import annotations

import io
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from sinuous.genomics.files import Lines, open_bytes, shown
from sinuous.genomics.packages import package

TWO_BIT = (b"\x1a\x41\x27\x43", b"\x43\x27\x41\x1a")
FLAT = r"LOCUS +\S|ID   \S"
"""First lines of records of GenBank, and of EMBL and UniProt."""
STRANGERS = {
    "@": "FASTQ; write it as FASTA (for instance with seqtk seq -a)",
    "# STOCKHOLM": "a Stockholm alignment; write it as A3M or FASTA (esl-reformat a2m)",
    "CLUSTAL": "a Clustal alignment; write it as FASTA",
    "#NEXUS": "a NEXUS file; write it as FASTA",
    "##gff": "an annotation (GFF); give the FASTA with its sequences",
    "#gtf": "an annotation (GTF); give the FASTA with its sequences",
    "##fileformat=VCF": "a list of variants (VCF); give a FASTA",
    "!<arch>": "an archive; give a FASTA",
    "{": "JSON; give a FASTA",
    "<": "XML or a web page; give a FASTA",
}


class Record(NamedTuple):
    """A sequence of a file.

    Attributes:
        name: the first word of its header, or its accession.
        description: the header behind the name, or the definition.
        sequence: letters as they are written, gaps and lower case included, without blanks.
    """

    name: str
    description: str
    sequence: str


def read_sequences(path: str | os.PathLike[str], *, unique: bool = False) -> Iterator[Record]:
    """Stream the records of a file of sequences.

    FASTA (A3M and A2M too, with gaps and lower case as they are), GenBank, EMBL and UniProt's flat files, plain or
    compressed by gzip or bgzip, and 2bit (with the package biopython of the extra `genomics`) are told by content. One
    record is in memory at a time.

    Args:
        path: of the file.
        unique: refuse a second record of one name, as where records are looked up by name.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is empty, cut, or no file of sequences, or a record has no name or no letters, with the line.
        ModuleNotFoundError: for 2bit, if the extra `genomics` is missing.
    """
    stream = open_bytes(path)
    try:
        two_bit = cast("Any", stream).peek(4)[:4] in TWO_BIT
        if two_bit:
            records = _two_bit(path, stream)
        else:
            lines = Lines(path, stream)
            lines.skip_blank()
            records = _closing(lines, _reader(lines))
    except BaseException:
        stream.close()
        raise
    return _different(path, records) if unique else records


def _closing(lines: Lines, read: Callable[[Lines], Iterator[Record]]) -> Iterator[Record]:
    try:
        yield from read(lines)
    finally:
        lines.close()


def _different(path: str | os.PathLike[str], records: Iterator[Record]) -> Iterator[Record]:
    names = set()
    for record in records:
        if record.name in names:
            raise ValueError(f"{path} has two records {record.name!r}; give each a name of its own")
        names.add(record.name)
        yield record


def _reader(lines: Lines) -> Callable[[Lines], Iterator[Record]]:
    """The reader of a text, by its first lines."""
    (first,) = lines.ahead(1)
    if re.match(FLAT, first):
        return _flat
    for beginning, kind in STRANGERS.items():
        if first.upper().startswith(beginning.upper()):
            raise ValueError(f"{lines.path} is {kind}")
    if first.lstrip()[0] in ">;#":
        return _fasta
    if re.fullmatch(r"[A-Za-z*.\-\s]+", first):
        raise lines.refusal(
            f"letters without a header (got {shown(first)}); begin each record with a line '>' and its name",
            lines.number + 1,
        )
    raise ValueError(f"{lines.path} is not FASTA, GenBank, EMBL or 2bit (it begins with {shown(first)})")


class _Open:
    """A record whose letters are being read."""

    def __init__(self, lines: Lines, name: str, description: str, line: int | None = None) -> None:
        if not name:
            raise lines.refusal("a record without a name; give it one")
        self.lines, self.line = lines, line or lines.number
        self.name, self.description = name, description
        self.letters = bytearray()
        lines.place = f", in record {name!r}"

    def add(self, text: str) -> None:
        self.letters += "".join(text.split()).encode()

    def closed(self) -> Record:
        if not self.letters:
            raise self.lines.refusal(f"record {self.name!r} has no letters; take it out or add them", self.line)
        return Record(self.name, self.description, self.letters.decode())


def _fasta(lines: Lines) -> Iterator[Record]:
    """Read headers `>name description`, each with lines of letters; lines that begin with `;` are comments, and lines
    that begin with `#` too where no record is open, as ColabFold's alignments have them."""
    record = None
    for line in lines:
        if line.startswith(">"):
            if record is not None:
                yield record.closed()
            name, *description = line[1:].split(None, 1) or [""]
            record = _Open(lines, name, "".join(description).strip())
        elif line.startswith(";") or not line.strip():
            continue
        elif record is not None:
            record.add(line)
        elif not line.startswith("#"):
            raise lines.refusal(
                f"letters without a header (got {shown(line)}); begin each record with a line '>' and its name"
            )
    if record is None:
        raise ValueError(f"{lines.path} has no record; a FASTA file has a line '>' and a name before each sequence")
    yield record.closed()


DIGITS = dict.fromkeys(map(ord, "0123456789"))


def _flat(lines: Lines) -> Iterator[Record]:
    """Read GenBank's, EMBL's and UniProt's flat files: name and definition, and the letters between `ORIGIN` or `SQ`
    and `//`. Features are not read, so that a chromosome costs its letters only, and case is kept.

    The name is the accession with its version, as in the archives' FASTA, or else that of the first line.
    """
    for line in lines:
        if not line.strip():
            continue
        if not re.match(FLAT, line):
            raise lines.refusal(f"a record must begin with LOCUS or ID (got {shown(line)})")
        record = _flat_head(lines, line)
        for letters in lines:
            if letters.startswith("//"):
                break
            record.add(letters.translate(DIGITS))
        else:
            raise lines.refusal(f"record {record.name!r} has no end, a line //; the file is cut")
        yield record.closed()


def _flat_head(lines: Lines, first: str) -> _Open:
    """Read the lines before the letters."""
    words = [word.rstrip(";") for word in first.split()]
    name = ".".join((words[1], words[3])) if words[2:3] == ["SV"] and len(words) > 3 else words[1]
    lines.place = f", in record {name!r}"
    width, definition = (12, "DEFINITION") if words[0] == "LOCUS" else (5, "DE")
    start, field, description = lines.number, "", []
    for line in lines:
        key, value = line[:width].strip(), line[width:].strip()
        field = key or field
        if key.startswith("//"):
            lines.back(line)
            break
        if key in ("ORIGIN", "SQ"):
            break
        if key in ("ACCESSION", "VERSION", "AC", "SV") and value and "." not in name:
            name = value.split()[0].rstrip(";")
        elif field == definition and value:
            description.append(value)
    else:
        raise lines.refusal(f"record {name!r} has no end, a line //; the file is cut")
    return _Open(lines, name, " ".join(description).removesuffix("."), start)


def _two_bit(path: str | os.PathLike[str], stream: BinaryIO) -> Iterator[Record]:
    seq_io = package("Bio.SeqIO")
    with stream:
        file: Any = stream
        if not (isinstance(file.raw, io.FileIO) and file.seekable()):  # compressed, or a pipe
            file = tempfile.TemporaryFile()  # noqa: SIM115 closed when nothing names it
            shutil.copyfileobj(stream, file)
            file.seek(0)
        _check_two_bit(path, file)
        for record in seq_io.parse(file, "twobit"):
            yield Record(record.id, "", bytes(record.seq).decode())


def _check_two_bit(path: str | os.PathLike[str], file: BinaryIO) -> None:
    """Refuse a 2bit file that ends within its index or a sequence, which Biopython reads as if it had zeros there."""
    order: Literal["little", "big"] = "little" if file.read(4) == TWO_BIT[1] else "big"

    def whole(size: int = 4) -> int:
        raw = file.read(size)
        if len(raw) < size:
            raise ValueError(f"{path} is cut: its index or its blocks end too early; download it again")
        return int.from_bytes(raw, order)

    version, count, _ = whole(), whole(), whole()
    if version:
        raise ValueError(f"{path} is 2bit of version {version}, which is not read; write it as FASTA (twoBitToFa)")
    if not count:
        raise ValueError(f"{path} has no record; give a file with some")
    places = []
    for _ in range(count):
        letters = file.read(whole(1))
        places.append((letters.decode("ascii", "replace"), whole()))
    size = file.seek(0, os.SEEK_END)
    for name, place in places:
        file.seek(place)
        length = whole()
        for _ in ("N", "lower case"):
            file.seek(8 * whole(), os.SEEK_CUR)
        whole()
        if file.tell() + (length + 3) // 4 > size:
            raise ValueError(f"{path} is cut: record {name!r} ends too early; download it again")
    file.seek(0)
