"""Files as biologists have them, for tests of their readers."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

Write = Callable[..., Path]
"""Writes a content to a file of the name, `file.txt` if none is given."""
BGZIP_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")


def bgzip(content: bytes, block: int = 20) -> bytes:
    """Blocks as htslib writes them, each a gzip member with its size in an extra field."""
    made = b""
    for start in range(0, len(content), block):
        member = gzip.compress(content[start : start + block])
        body = member[10:]
        size = 18 + len(body) - 1
        made += b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x06\0BC\x02\0" + struct.pack("<H", size) + body
    return made + BGZIP_END
