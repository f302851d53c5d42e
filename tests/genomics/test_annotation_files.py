"""Annotations read back as they were written, in the coordinates of each format, whole or not at all."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sinuous.core.files import written_whole
from sinuous.genomics import annotation_files
from sinuous.genomics.annotation import Part
from sinuous.genomics.annotation_files import LINES
from sinuous.genomics.io import read_features

CLASSES = ("intergenic", "gene +", "gene -", "CDS +", "CDS -")
LABELS = {"chr1": "....ggGGGgGGg..nnnnhHHHhh", "chr2": "G", "scaffold 3": "HHgggn"}
"""Classes in short: . intergenic, g gene +, h gene -, G CDS +, H CDS -; n a gap."""


def parts(cut: int) -> Iterator[Part]:
    for name, labels in LABELS.items():
        for start in range(0, len(labels), cut):
            some = labels[start : start + cut]
            sure = torch.eye(5)[[".ghGH".find(label) if label != "n" else 3 for label in some]]
            yield Part(name, start, 0.9 * sure + 0.02, torch.tensor([label == "n" for label in some]))


def text(ending: str, cut: int = 100) -> str:
    return "".join(LINES[ending](parts(cut), CLASSES))


@pytest.mark.parametrize("ending", LINES)
def test_parts_do_not_show(ending: str) -> None:
    assert text(ending, 100) == text(ending, 7) == text(ending, 1)


def test_bed_has_each_base_once(tmp_path: Path) -> None:
    path = tmp_path / "annotation.bed"
    path.write_text(text(".bed"))
    short = {"intergenic": ".", "gene+": "g", "gene-": "h", "CDS+": "G", "CDS-": "H", "gap": "n"}
    painted = {name: [""] * len(labels) for name, labels in LABELS.items()}
    for feature in read_features(path):
        for place in range(feature.start, feature.end):
            painted[feature.seqid][place] += short[feature.kind]
    assert {name: "".join(labels) for name, labels in painted.items()} == LABELS
    assert all(len(line.split("\t")) == 4 for line in path.read_text().splitlines())


def test_gtf_has_genes_and_their_coding_parts(tmp_path: Path) -> None:
    path = tmp_path / "annotation.gtf"
    path.write_text(text(".gtf"))
    found = [(f.seqid, f.kind, f.start, f.end, f.strand, f.attributes["gene_id"]) for f in read_features(path)]
    assert found == [
        ("chr1", "gene", 4, 13, "+", "chr1.g1"),
        ("chr1", "CDS", 6, 9, "+", "chr1.g1"),
        ("chr1", "CDS", 10, 12, "+", "chr1.g1"),
        ("chr1", "gene", 19, 25, "-", "chr1.g2"),
        ("chr1", "CDS", 20, 23, "-", "chr1.g2"),
        ("chr2", "gene", 0, 1, "+", "chr2.g1"),
        ("chr2", "CDS", 0, 1, "+", "chr2.g1"),
        ("scaffold 3", "gene", 0, 2, "-", "scaffold 3.g1"),
        ("scaffold 3", "CDS", 0, 2, "-", "scaffold 3.g1"),
        ("scaffold 3", "gene", 2, 5, "+", "scaffold 3.g2"),
    ]
    assert path.read_text().splitlines()[0].split("\t")[3:5] == ["5", "13"]


def test_bedgraph_has_the_probability_of_coding(tmp_path: Path) -> None:
    path = tmp_path / "annotation.bedGraph"
    path.write_text(text(".bedGraph"))
    painted = {name: [None] * len(labels) for name, labels in LABELS.items()}
    for feature in read_features(path):
        for place in range(feature.start, feature.end):
            assert painted[feature.seqid][place] is None
            painted[feature.seqid][place] = feature.kind
    values = {".": "0.04", "g": "0.04", "h": "0.04", "G": "0.94", "H": "0.94", "n": None}
    assert painted == {name: [values[label] for label in labels] for name, labels in LABELS.items()}


def test_files_are_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "annotation.bed"

    def stopped_by(error: BaseException) -> None:
        with written_whole(path) as unfinished:
            unfinished.write_text("half")
            raise error

    with pytest.raises(KeyboardInterrupt):
        stopped_by(KeyboardInterrupt())
    assert not list(path.parent.iterdir())
    for words in ("first", "second"):
        with written_whole(path) as unfinished:
            unfinished.write_text(words)
            assert unfinished.suffix == path.suffix
        assert path.read_text() == words
    with pytest.raises(ValueError, match="stop"):
        stopped_by(ValueError("stop"))
    assert [file.name for file in path.parent.iterdir()] == ["annotation.bed"]
    assert path.read_text() == "second"


def test_strands_are_told_by_the_ends_of_classes() -> None:
    kinds = [(annotation_files.kind_of(name), annotation_files.strand_of(name)) for name in (*CLASSES, "gap", "-")]
    assert kinds == [
        ("intergenic", "."),
        ("gene", "+"),
        ("gene", "-"),
        ("CDS", "+"),
        ("CDS", "-"),
        ("gap", "."),
        ("-", "-"),
    ]
