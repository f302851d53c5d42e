"""Text as bytes: windows of a file for training and scoring language models without a tokenizer."""

from __future__ import annotations

import lzma
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sinuous.core.checks import check_sizes
from sinuous.core.data import check_split

BYTES = 256
BUNDLED_AUSTEN = Path(__file__).parent / "samples" / "austen"


def read_text(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a file, unpacked if its name ends in `.xz`.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no text {path.resolve()}; give the path of a file")
    try:
        return lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}); copy it again") from error


class ByteWindows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of a text: `(bytes [length], the bytes one step later [length])`, both int64.

    Args:
        text: the whole text.
        length: bytes in a window.
        stride: bytes from one window to the next; `length` uses every byte once as a target.

    Raises:
        ValueError: if the text is shorter than one window, or a size is less than 1.
    """

    def __init__(self, text: bytes, length: int, stride: int | None = None) -> None:
        self.length, self.stride = length, length if stride is None else stride
        check_sizes(length=self.length, stride=self.stride)
        if len(text) <= length:
            raise ValueError(
                f"the text has {len(text):,} bytes and a window with its target needs {length + 1:,}; "
                "give a longer text or a smaller length"
            )
        self.text = np.frombuffer(text, np.uint8)

    def __len__(self) -> int:
        return (len(self.text) - 1 - self.length) // self.stride + 1

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.stride
        window = torch.from_numpy(self.text[start : start + self.length + 1].astype(np.int64))
        return window[:-1], window[1:]


class ByteText:
    """Windows of the three splits of a text.

    Args:
        length: bytes in a window.
        stride: bytes between the starts of training windows; the other splits use every byte once.
        root: a folder with `train.txt`, `val.txt` and `test.txt`, or the same with `.xz`; without it the bundled novels
            of Jane Austen (3.6 MB of five novels to train on, a sixth to validate and test).

    Raises:
        ValueError: if a size is less than 1.
    """

    noun = "windows"
    unit = "byte"
    vocab_size = BYTES

    def __init__(self, length: int = 256, stride: int = 64, root: str | os.PathLike[str] | None = None) -> None:
        check_sizes(**{"data.length": length, "data.stride": stride})
        self.length, self.stride = length, stride
        self.folder = BUNDLED_AUSTEN if root is None else Path(root).expanduser()

    def split(self, name: str) -> ByteWindows:
        """Windows of `train`, `val` or `test`.

        Raises:
            FileNotFoundError: if the folder lacks the file.
            ValueError: for an unknown split, a damaged file or a text shorter than a window.
        """
        path = self.folder / f"{check_split(name)}.txt"
        packed = path.with_name(f"{path.name}.xz")
        stride = self.stride if name == "train" else None
        return ByteWindows(read_text(packed if packed.is_file() else path), self.length, stride)

    def facts(self) -> dict[str, Any]:
        """What weights trained on this text remember of it."""
        return {"unit": self.unit, "vocab_size": self.vocab_size}

    def example(self) -> Tensor:
        return torch.zeros(1, self.length, dtype=torch.long)
