"""Text as windows of bytes."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest
import torch

from sinuous.core.language.datasets import ByteText, ByteWindows


def test_the_bundled_novels_are_whole_and_apart() -> None:
    sizes = {split: len(ByteText(256).split(split).text) for split in ("train", "val", "test")}
    assert sizes == {"train": 3_558_179, "val": 233_480, "test": 233_374}
    train = bytes(ByteText(256).split("train").text)
    assert b"It is a truth universally acknowledged" in train
    assert b"Sir Walter Elliot" not in train


def test_windows_cover_every_byte_once_as_a_target() -> None:
    windows = ByteWindows(bytes(range(100)), 9)
    targets = torch.cat([windows[i][1] for i in range(len(windows))])
    assert torch.equal(targets, torch.arange(1, 100))
    given, following = windows[3]
    assert torch.equal(given[1:], following[:-1])


def test_a_stride_holds_for_training_only() -> None:
    train, test = (ByteText(256, stride=64).split(name) for name in ("train", "test"))
    assert torch.equal(train[1][0][:192], train[0][0][64:])
    assert torch.equal(test[1][0][:1], test[0][1][-1:])


def test_a_folder_of_ones_own_may_be_packed(tmp_path: Path) -> None:
    (tmp_path / "train.txt.xz").write_bytes(lzma.compress(b"abcdefgh"))
    (tmp_path / "val.txt").write_bytes(b"ABCDEFGH")
    assert bytes(ByteText(3, root=tmp_path).split("train")[0][0].tolist()) == b"abc"
    assert bytes(ByteText(3, root=tmp_path).split("val")[0][0].tolist()) == b"ABC"


def test_mistakes_are_told(tmp_path: Path) -> None:
    (tmp_path / "train.txt.xz").write_bytes(b"no archive")
    (tmp_path / "val.txt").write_bytes(b"abc")
    for split, length, kind, message in (
        ("train", 3, ValueError, "is damaged"),
        ("val", 3, ValueError, r"has 3 bytes and a window with its target needs 4"),
        ("test", 3, FileNotFoundError, r"there is no text .*test\.txt"),
        ("dev", 3, ValueError, "split must be one of 'train', 'val', 'test'"),
        ("val", 0, ValueError, "must be at least 1"),
    ):
        with pytest.raises(kind, match=message):
            ByteText(length, root=tmp_path).split(split)
