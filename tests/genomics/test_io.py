"""What holds for every reader: paths that are odd, kinds that are not read, files that are cut, pipes."""

from __future__ import annotations

import gzip
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from biological_files import BGZIP_END, Write, bgzip

from sinuous.genomics.io import read_features, read_molecules, read_sequences, read_variants

READERS: tuple[Callable, ...] = (read_sequences, read_features, read_variants, read_molecules)


@pytest.mark.parametrize("read", READERS)
def test_missing_empty_and_odd_paths_are_told_when_a_file_is_opened(
    read: Callable, tmp_path: Path, write: Write
) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing"):
        read(tmp_path / "nothing")
    with pytest.raises(ValueError, match="is a folder; give a file"):
        read(tmp_path)
    write("x", "one.fa")
    with pytest.raises(ValueError, match=r"is a folder; give a file, such as .*one\.fa"):
        read(tmp_path)
    for odd in (None, 7, ["a"], b"x"):
        with pytest.raises(ValueError, match="path must be the name of a file"):
            read(odd)
    with pytest.raises(ValueError, match="is empty"):
        read(write(""))
    with pytest.raises(ValueError, match="empty text"):
        read(write(gzip.compress(b"")))
    with pytest.raises(ValueError, match="nothing but blank lines"):
        read(write("\n \r\n\t\n"))


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("start", "sentence"),
    [
        (b"PK\x03\x04abc", "a zip archive; unpack it"),
        (b"BZh91AY", "bzip2"),
        (b"\xfd7zXZ\0", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        ("\ufeff>a\nACGT".encode("utf-16-le"), "UTF-16"),
        (gzip.compress(b"BAM\1\0\0", mtime=0), "BAM"),
        (gzip.compress(b"BCF\2\2", mtime=0), "BCF"),
    ],
)
def test_files_of_other_kinds_are_named(read: Callable, write: Write, start: bytes, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        list(read(write(start)))


LONG = {
    read_sequences: "".join(f">r{i}\n{''.join(random.Random(i).choices('ACGT', k=60))}\n" for i in range(2000)),
    read_features: "".join(f"chr1\t{i}\t{i + 5}\tgene{i}\n" for i in range(5000)),
    read_variants: "#CHROM\tPOS\tID\tREF\tALT\n" + "".join(f"1\t{i}\trs{7 * i}\tA\tG\n" for i in range(1, 5000)),
    read_molecules: "".join(f"C{'C' * (i % 7)}O m{i}\n" for i in range(5000)),
}


@pytest.mark.parametrize("read", READERS)
def test_a_cut_gzip_is_told_with_its_place(read: Callable, write: Write) -> None:
    packed = gzip.compress(LONG[read].encode())
    for length in (12, len(packed) // 2, len(packed) - 4):
        with pytest.raises(ValueError, match=r"is cut: its compressed data end (after line \d+|at its beginning)"):
            list(read(write(packed[:length])))
    with pytest.raises(ValueError, match="is damaged"):
        list(read(write(packed[:-8] + b"\0\0\0\0" + packed[-4:])))
    if read is read_sequences:
        with pytest.raises(ValueError, match=r"after line \d+, in record 'r\d+'"):
            list(read(write(packed[: len(packed) // 2])))


@pytest.mark.parametrize("read", READERS)
def test_a_bgzip_file_that_is_cut_between_blocks_is_refused(read: Callable, write: Write) -> None:
    if read is read_molecules:
        pytest.importorskip("rdkit")
    whole = bgzip(LONG[read].encode(), 1000)
    assert list(read(write(whole)))
    with pytest.raises(ValueError, match="is cut: the block that ends every file of bgzip is missing"):
        read(write(whole.removesuffix(BGZIP_END)))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are needed")
@pytest.mark.parametrize("read", READERS)
def test_pipes_are_read(read: Callable, tmp_path: Path) -> None:
    if read is read_molecules:
        pytest.importorskip("rdkit")
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(LONG[read].encode(),))
    writer.start()
    assert len(list(read(tmp_path / "pipe"))) > 1000
    writer.join()
