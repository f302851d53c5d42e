"""Files of sequences of all kinds are read as they are written, and what is wrong with one is said."""

from __future__ import annotations

import gzip
import struct
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from biological_files import Write, bgzip
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sinuous.genomics.io import Record, read_sequences

GENBANK = """\
LOCUS       XX000001                  75 bp    DNA     linear   PLN 01-JAN-2020
DEFINITION  A small gene of a plant,
            complete cds.
ACCESSION   XX000001 XX000009
VERSION     XX000001.2
KEYWORDS    .
FEATURES             Location/Qualifiers
     source          1..75
                     /organism="Arabidopsis thaliana"
ORIGIN
        1 acgtacgtac ACGTacgtnn acgtacgtac acgtacgtac acgtacgtac acgtacgtac
       61 ttttttgggg ggccc
//
LOCUS       second                     4 bp    DNA     linear   PLN 01-JAN-2020
DEFINITION  .
ORIGIN
        1 acgt
//
"""
EMBL = """\
ID   X56734; SV 1; linear; mRNA; STD; PLN; 24 BP.
XX
AC   X56734; S46826;
XX
DE   Trifolium repens mRNA for non-cyanogenic
DE   beta-glucosidase
XX
FT   source          1..24
FT                   /organism="Trifolium repens"
SQ   Sequence 24 BP; 6 A; 6 C; 6 G; 6 T; 0 other;
     acgtacgtac gtACGTacgt                                                     20
     acgt                                                                      24
//
"""
UNIPROT = """\
ID   CYC_HUMAN               Reviewed;          10 AA.
AC   P99999; A4D166;
DE   RecName: Full=Cytochrome c;
SQ   SEQUENCE   10 AA;  1100 MW;  0000000000000000 CRC64;
     MGDVEKGKKI
//
"""


def test_fasta_keeps_names_descriptions_and_case(write: Write) -> None:
    path = write(">chr1 the first one\nACGTacgt\nNNNN\n\n>chr2\nTT\n")
    assert list(read_sequences(path)) == [Record("chr1", "the first one", "ACGTacgtNNNN"), Record("chr2", "", "TT")]
    assert [record.name for record in read_sequences(str(path))] == ["chr1", "chr2"]


@pytest.mark.parametrize(
    "content",
    [
        ">a b  c\r\nACGT\r\nAC\r\n\r\n>d\r\nT\r\n",
        ">a b  c\rACGT\rAC\r>d\rT",
        "\ufeff>a b  c\nACGT\nAC\n>d\nT",
        "\n\n  \n>a b  c  \nACGT  \n\nAC\t\n\n>d\nT\n\n\n",
        "; a comment\n>a b  c\nACGT\n; another\nAC\n>d\nT\n",
        "> a b  c\nAC GT\n\tA C\n>d\nT",
        ">a\tb  c\nACGTAC\n>d\nT",
        "#8\t1\n>a b  c\nACGTAC\n>d\nT",
    ],
)
def test_fasta_of_every_habit_is_read(write: Write, content: str) -> None:
    assert list(read_sequences(write(content))) == [Record("a", "b  c", "ACGTAC"), Record("d", "", "T")]


def test_alignments_keep_gaps_and_insertions(write: Write) -> None:
    path = write("#3\t1\n>101\nMK-V\n>UniRef100_A\nMkkK-.V*\n", "family.a3m")
    assert [record.sequence for record in read_sequences(path)] == ["MK-V", "MkkK-.V*"]


@pytest.mark.parametrize("pack", [gzip.compress, bgzip, lambda raw: gzip.compress(raw[:9]) + gzip.compress(raw[9:])])
def test_compressed_files_are_told_by_content(write: Write, pack: Callable[[bytes], bytes]) -> None:
    records = [Record("a", "", "ACGT" * 30), Record("b", "x", "AC")]
    path = write(pack(f">a\n{'ACGT' * 30}\n>b x\nAC\n".encode()), "plain.fa")
    assert list(read_sequences(path)) == records


def test_flat_files_keep_name_definition_and_case(write: Write) -> None:
    first, second = read_sequences(write(GENBANK))
    assert first[:2] == ("XX000001.2", "A small gene of a plant, complete cds")
    assert first.sequence == "acgtacgtacACGTacgtnn" + "acgtacgtac" * 4 + "ttttttggggggccc"
    assert second == Record("second", "", "acgt")
    assert list(read_sequences(write(EMBL.replace("\n", "\r\n")))) == [
        Record("X56734.1", "Trifolium repens mRNA for non-cyanogenic beta-glucosidase", "acgtacgtacgtACGTacgtacgt")
    ]
    assert list(read_sequences(write(UNIPROT))) == [Record("P99999", "RecName: Full=Cytochrome c;", "MGDVEKGKKI")]


def test_flat_files_read_as_biopython_reads_them(write: Write) -> None:
    seq_io = pytest.importorskip("Bio.SeqIO")
    for content, kind in ((GENBANK, "genbank"), (EMBL, "embl")):
        path = write(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read = [(record.id, str(record.seq)) for record in seq_io.parse(path, kind)]
        assert [(record.name, record.sequence.upper()) for record in read_sequences(path)] == read


def two_bit(records: dict[str, str], swap: bool = False) -> bytes:
    """UCSC's format, with N blocks and lower-case blocks."""
    order = ">" if swap else "<"

    def blocks(places: list[bool]) -> bytes:
        framed = [False, *places, False]
        edges = [i for i in range(len(places) + 1) if framed[i] != framed[i + 1]]
        starts, ends = edges[::2], edges[1::2]
        sizes = [end - start for start, end in zip(starts, ends, strict=True)]
        return struct.pack(f"{order}I{2 * len(starts)}I", len(starts), *starts, *sizes)

    bodies = []
    for sequence in records.values():
        codes = ["TCAG".index(letter) if letter in "TCAG" else 0 for letter in sequence.upper()]
        codes += [0] * (-len(codes) % 4)
        packed = bytes(
            a << 6 | b << 4 | c << 2 | d for a, b, c, d in zip(*(codes[i::4] for i in range(4)), strict=True)
        )
        body = struct.pack(f"{order}I", len(sequence)) + blocks([letter in "Nn" for letter in sequence])
        bodies.append(body + blocks([letter.islower() for letter in sequence]) + struct.pack(f"{order}I", 0) + packed)
    offset = 16 + sum(len(name) + 5 for name in records)
    made = struct.pack(f"{order}4I", 0x1A412743, 0, len(records), 0)
    for name, body in zip(records, bodies, strict=True):
        made += struct.pack(f"{order}B", len(name)) + name.encode() + struct.pack(f"{order}I", offset)
        offset += len(body)
    return made + b"".join(bodies)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_two_bit_is_read(write: Write, swap: bool, pack: Callable[[bytes], bytes]) -> None:
    pytest.importorskip("Bio")
    records = {"chr1": "ACGTacgtNNNNACGTAnn", "chrM": "TTTTT"}
    path = write(pack(two_bit(records, swap)), "genome.2bit")
    assert {record.name: record.sequence for record in read_sequences(path)} == records


def test_a_cut_two_bit_is_refused(write: Write) -> None:
    pytest.importorskip("Bio")
    whole = two_bit({"chr1": "ACGT" * 100})
    for length in (6, 20, 40, len(whole) - 10):
        with pytest.raises(ValueError, match="is cut"):
            list(read_sequences(write(whole[:length])))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    records=st.lists(st.tuples(st.text("abc|._-1", min_size=1), st.text("ACGTNacgtn-", min_size=1)), min_size=1),
    width=st.integers(1, 70),
    newline=st.sampled_from(["\n", "\r\n", "\r"]),
    packed=st.booleans(),
)
def test_what_is_written_as_fasta_is_read(
    tmp_path: Path, records: list[tuple[str, str]], width: int, newline: str, packed: bool
) -> None:
    lines = []
    for name, sequence in records:
        lines += [f">{name} of {name}", *(sequence[i : i + width] for i in range(0, len(sequence), width))]
    content = newline.join(lines).encode()
    (tmp_path / "file").write_bytes(gzip.compress(content) if packed else content)
    assert list(read_sequences(tmp_path / "file")) == [Record(name, f"of {name}", letters) for name, letters in records]


def test_a_record_in_one_line_of_30_megabases_is_read_in_bounded_memory(write: Write) -> None:
    path = write(b">chr1\n" + b"ACGTTGCA" * 3_750_000 + b"\n>chr2\nAC\n")
    tracemalloc.start()
    lengths = [(record.name, len(record.sequence)) for record in read_sequences(path)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lengths == [("chr1", 30_000_000), ("chr2", 2)]
    assert peak < 6 * 30_000_000


def test_records_are_streamed_one_at_a_time(write: Write) -> None:
    path = write("".join(f">r{i}\n{'ACGT' * 25_000}\n" for i in range(100)))
    tracemalloc.start()
    assert sum(len(record.sequence) for record in read_sequences(path)) == 10_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def test_records_of_one_name_are_refused_where_names_must_differ(write: Write) -> None:
    path = write(">a\nAC\n>b\nT\n>a\nG\n")
    assert [record.name for record in read_sequences(path)] == ["a", "b", "a"]
    with pytest.raises(ValueError, match="two records 'a'"):
        list(read_sequences(path, unique=True))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("ACGTACGT\n", "line 1: letters without a header .*'ACGTACGT'"),
        ("# x\nACGT\n>a\nAC\n", "line 2: letters without a header"),
        ("# x\n# y\n", "has no record"),
        (">\nACGT\n", "line 1: a record without a name"),
        (">a\nACGT\n> \nAC\n", "line 3: a record without a name"),
        (">a\n>b\nACGT\n", "line 1: record 'a' has no letters"),
        (">a\nAC\n>b\n\n", "line 3: record 'b' has no letters"),
        ("@read1\nACGT\n+\nIIII\n", "is FASTQ"),
        ("# STOCKHOLM 1.0\nseq ACGT\n//\n", "Stockholm"),
        ("CLUSTAL W\n", "Clustal"),
        ("##gff-version 3\n", "GFF"),
        ("##fileformat=VCFv4.2\n", "VCF"),
        ("chr1\t10\t20\n", "is not FASTA"),
        ("hello, world 1\n", "is not FASTA"),
        ("<!DOCTYPE html>\n", "a web page"),
        (GENBANK[:440], "record 'XX000001.2' has no end"),
        (GENBANK[:200], "record 'XX000001.2' has no end"),
        (EMBL + ">a\nACGT\n", "line 14: a record must begin with LOCUS or ID"),
        (GENBANK.replace("        1 acgt\n//", "//"), "record 'second' has no letters"),
        ("LOCUS       a 4 bp\nCONTIG      join(b)\n//\n", "record 'a' has no letters"),
    ],
)
def test_what_is_wrong_with_a_file_of_sequences_is_said(write: Write, content: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        list(read_sequences(write(content)))
    assert "file.txt" in str(error.value)
