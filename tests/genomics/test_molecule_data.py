"""Molecules token by token: splits, ends, pads, and files that are none."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
import torch

from sinuous.core.data import TokenData, lacking
from sinuous.core.tasks.language_modelling import IGNORED
from sinuous.genomics.datasets import molecules


def test_rows_are_whole_molecules_with_their_end() -> None:
    data = molecules()
    assert lacking(data, TokenData) == []
    tokenizer = data.tokenizer
    for split, count in {"train": 923, "val": 102, "test": 257}.items():
        rows, smiles = data.split(split), data.smiles(split)
        assert len(rows) == len(smiles) == count
        for (ids, targets), text in list(zip(rows, smiles, strict=True))[:50]:
            assert ids[0] == tokenizer.start
            assert targets[-1] == tokenizer.end
            assert torch.equal(ids[1:], targets[:-1])
            assert tokenizer.decode(targets[:-1]) == text
    short, long = min(rows, key=lambda row: len(row[0])), max(rows, key=lambda row: len(row[0]))
    ids, targets = data.collate([short, long])
    assert torch.equal(targets[0] == IGNORED, torch.arange(len(long[0])) >= len(short[0]))
    assert (ids[0, len(short[0]) :] == tokenizer.pad).all()


def test_a_folder_of_moses_is_split_as_documented(tmp_path: Path) -> None:
    (tmp_path / "moses" / "data").mkdir(parents=True)
    for split, count in (("train", 40), ("test", 9)):
        with gzip.open(tmp_path / "moses" / "data" / f"{split}.csv.gz", "wt") as file:
            file.write("SMILES\n" + "".join(f"{'C' * (i + 1)}\n" for i in range(count)))
    data = molecules(root=tmp_path, val=10_000, test=5)
    train, val = (set(data.smiles(split)) for split in ("train", "val"))
    assert (len(train), len(val), len(train | val)) == (36, 4, 40)
    assert sorted(map(len, val)) == [6, 16, 26, 36]
    assert data.smiles("test") == ["C" * (i + 1) for i in range(5)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name,weight\nmethane,16\n", "has no column smiles \\(its columns are name, weight\\)"),
        (b"smiles\n", "holds no molecule"),
        (b"\xff\xfe\x00", "is damaged"),
    ],
)
def test_tables_without_molecules_are_told(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "train.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        molecules(root=tmp_path).split("train")
    with pytest.raises(FileNotFoundError, match=r"have no test set of molecules; a file called test.csv.gz or"):
        molecules(root=tmp_path).split("test")


def test_lists_of_smiles_may_have_names(tmp_path: Path) -> None:
    (tmp_path / "train.smi").write_text("CCO ethanol\n\nc1ccccc1 benzene\n" + "C x\n" * 18)
    assert molecules(root=tmp_path).smiles("train")[:2] == ["CCO", "c1ccccc1"]


@pytest.mark.parametrize("options", [{"val": 0}, {"test": 0}])
def test_sizes_are_at_least_one(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        molecules(**options)
