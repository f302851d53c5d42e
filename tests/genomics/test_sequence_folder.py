"""Sequences in folders of classes, as Genomic Benchmarks has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sinuous.core.data import LabelledData, lacking
from sinuous.genomics.datasets import sequence_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, count in (("train", 20), ("test", 3)):
        for label, letter in (("negative", "a"), ("positive", "C")):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(count):
                (tmp_path / split / label / f"{i:02}.txt").write_text(letter * (i + 1) + "N\n")
    return tmp_path


def test_each_tenth_training_file_validates_and_lengths_are_packed(folder: Path) -> None:
    data = sequence_folder(root=folder)
    assert lacking(data, LabelledData) == []
    assert data.classes == ["negative", "positive"]
    train, val, test = (data.split(name) for name in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (36, 4, 6)
    assert [file.name for file in val.files] == ["08.txt", "18.txt", "08.txt", "18.txt"]
    assert data.tokenizer.decode(test[5][0]) == "CCCN"
    ids, labels, cu_seqlens = data.collate([test[0], test[5]])
    assert ids.shape == (1, 6)
    assert labels.tolist() == [0, 1]
    assert cu_seqlens.tolist() == [0, 2, 6]
    ids, labels = data.collate([test[0], test[3]])
    assert ids.shape == (2, 2)
    assert labels.tolist() == [0, 1]
    middle = sequence_folder(root=folder, length=2).split("test")[2][0]
    assert torch.equal(middle, data.tokenizer.encode("AA"))


def test_what_is_no_sequence_is_told(folder: Path) -> None:
    data = sequence_folder(root=folder)
    (folder / "test" / "negative" / "00.txt").write_text("")
    (folder / "test" / "negative" / "01.txt").write_text("ACGX!")
    (folder / "test" / "negative" / "02.txt").write_bytes(b"\xff\xd8")
    test = data.split("test")
    for index, message in (
        (0, "00.txt is empty"),
        (1, "'X' is not in the vocabulary of DNA .*01.txt"),
        (2, "02.txt is no text"),
    ):
        with pytest.raises(ValueError, match=message):
            test[index]
    (folder / "test" / "negative" / "notes.md").write_text("x")
    with pytest.raises(ValueError, match=r"has notes.md, which is no .txt file"):
        data.split("test")


def test_folders_of_another_layout_are_told(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(ValueError, match=r"with data.root=FOLDER"):
        sequence_folder()
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(FileNotFoundError, match="has no folder 'train'; sequences are expected at train/CLASS"):
        sequence_folder(root=empty)
    (folder / "test" / "neutral").mkdir()
    with pytest.raises(ValueError, match=r"has the class neutral, which .* lacks"):
        sequence_folder(root=folder).split("test")
    (folder / "train" / "README.txt").write_text("x")
    with pytest.raises(ValueError, match=r"has the file README.txt where folders of classes are expected"):
        sequence_folder(root=folder).split("train")
    (empty / "train").mkdir()
    (empty / "test").mkdir()
    with pytest.raises(ValueError, match=r"has no folders of classes"):
        sequence_folder(root=empty).split("train")
