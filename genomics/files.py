"""Text files as biologists have them: plain or compressed, of any system's newlines, perhaps cut in a download."""

from __future__ import annotations

import gzip
import io
import itertools
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from sinuous.core.checks import described

GZIP = b"\x1f\x8b"
BGZIP_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
"""The empty block with which every file of bgzip ends (SAM specification, section 4.1.2)."""
OTHERS = {
    b"PK\x03\x04": "a zip archive; unpack it",
    b"BZh": "compressed by bzip2; unpack it, or compress it by gzip",
    b"\xfd7zXZ": "compressed by xz; unpack it, or compress it by gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it, or compress it by gzip",
    b"\xff\xfe": "text in UTF-16; save it in UTF-8",
    b"\xfe\xff": "text in UTF-16; save it in UTF-8",
    b"BAM\1": "a BAM file; write its sequences as FASTA (samtools fasta)",
    b"BCF": "a BCF file; write it as VCF (bcftools view)",
    b"CRAM": "a CRAM file; write its sequences as FASTA (samtools fasta)",
    b"\x89HDF": "an HDF5 file; export it as text",
    b"%PDF": "a PDF; give the data themselves",
    b"<!DOCTYPE": "a web page; download the file itself",
    b"<html": "a web page; download the file itself",
}
"""Beginnings of files that are often given by mistake, and what to do about each."""


def open_bytes(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file, decompressing gzip and bgzip, told by content.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the path is no path or a folder, or the file is empty, cut or of a kind that is not read.
    """
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"path must be the name of a file (got {described(path)})")
    if Path(path).is_dir():
        some = next((entry for entry in sorted(Path(path).iterdir()) if entry.is_file()), "one of its files")
        raise ValueError(f"{path} is a folder; give a file, such as {some}")
    try:
        raw = open(path, "rb")  # noqa: SIM115 closed by who reads it
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    try:
        start = raw.peek(18)
        if not start:
            raise ValueError(f"{path} is empty; give a file with content")
        if not start.startswith(GZIP):
            _refuse_others(path, start)
            return raw
        _check_bgzip_end(path, raw, start)
        stream = io.BufferedReader(cast("io.RawIOBase", gzip.GzipFile(fileobj=raw)), 1 << 16)
        try:
            start = stream.peek(18)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise damage(path, "at its beginning", error) from error
        if not start:
            raise ValueError(f"{path} has nothing but an empty text, compressed; give a file with content")
        _refuse_others(path, start)
    except BaseException:
        raw.close()
        raise
    return cast("BinaryIO", stream)


def _refuse_others(path: str | os.PathLike[str], start: bytes) -> None:
    for beginning, kind in OTHERS.items():
        if start.lower().startswith(beginning.lower()):
            raise ValueError(f"{path} is {kind}")


def _check_bgzip_end(path: str | os.PathLike[str], raw: BinaryIO, start: bytes) -> None:
    """Refuse a bgzip file without its last block: cut between two blocks, it would read well to the end."""
    if start[3] & 4 and start[12:14] == b"BC" and stat.S_ISREG(os.fstat(raw.fileno()).st_mode):
        with open(path, "rb") as again:
            again.seek(max(again.seek(0, os.SEEK_END) - len(BGZIP_END), 0))
            if again.read() != BGZIP_END:
                raise ValueError(
                    f"{path} is cut: the block that ends every file of bgzip is missing; download or compress it again"
                )


def damage(path: str | os.PathLike[str], place: str, error: Exception) -> ValueError:
    """The sentence for compressed data that end too early or do not decompress."""
    how = "is cut: its compressed data end" if isinstance(error, EOFError) else f"is damaged ({error})"
    return ValueError(f"{path} {how} {place}; download or compress it again")


class Lines:
    """Lines of a text without their ends, and how many were read.

    Ends may be those of Unix, Windows or old Macs; a byte order mark goes.

    Args:
        path: of the file.
        stream: where it is open already.

    Attributes:
        number: of the line read last, from 1.
        place: where the file is just now, for the sentence about a cut one.

    Raises:
        FileNotFoundError, ValueError: as `open_bytes`; also, while reading, if the data are cut or damaged.
    """

    def __init__(self, path: str | os.PathLike[str], stream: BinaryIO | None = None) -> None:
        self.path = path
        self.number = 0
        self.place = ""
        self._text = io.TextIOWrapper(stream or open_bytes(path), encoding="utf-8-sig", errors="replace")
        self._again: list[str] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._again:
            self.number += 1
            return self._again.pop()
        try:
            line = self._text.readline()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise damage(self.path, f"after line {self.number}{self.place}", error) from error
        if not line:
            raise StopIteration
        self.number += 1
        return line.removesuffix("\n")

    def back(self, *lines: str) -> None:
        """Let the lines read last, in their order, be read again."""
        self._again += reversed(lines)
        self.number -= len(lines)

    def ahead(self, most: int) -> list[str]:
        """The next lines, at most so many, which stay to be read."""
        lines = list(itertools.islice(self, most))
        self.back(*lines)
        return lines

    def skip_blank(self) -> None:
        """Go on to the next line with text.

        Raises:
            ValueError: if there is none.
        """
        for line in self:
            if line.strip():
                self.back(line)
                return
        raise ValueError(f"{self.path} has nothing but blank lines; give a file with content")

    def close(self) -> None:
        self._text.close()

    def refusal(self, what: str, line: int | None = None) -> ValueError:
        """The sentence about what is wrong at a line, the one read last if none is given."""
        return ValueError(f"{self.path}, line {self.number if line is None else line}: {what}")


def shown(line: str, most: int = 40) -> str:
    """The beginning of a line, quoted."""
    return repr(line if len(line) <= most else line[:most] + "…")
