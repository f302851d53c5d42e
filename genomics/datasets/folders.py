"""Sequences sorted into folders of classes, as Genomic Benchmarks has them."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sinuous.core.checks import check_sizes
from sinuous.core.data import check_split, packed
from sinuous.genomics.datasets.files import folder_of
from sinuous.genomics.datasets.genome import split_of
from sinuous.genomics.letters import DNATokenizer

Example = tuple[Tensor, int]


class SequenceFolder:
    """Sequences in `root/train/CLASS/*.txt` and `root/test/CLASS/*.txt`, a file each: `(ids, labels)`.

    This is the layout of Genomic Benchmarks (Grešová et al., arXiv 2022.06.08.495248). Of the training files of each
    class, in the order of their names, each tenth validates. Sequences of one length make a batch `[B, T]`; others are
    packed into one row, `(ids [1, ΣT], labels [N], cu_seqlens)`.

    Args:
        root: the folder of one benchmark, with `train` and `test`.
        length: letters of the longest sequence that are read; None reads all. Of longer ones the middle is read.

    Raises:
        FileNotFoundError: if there is no such folder, or it lacks `train` or `test`.
        ValueError: if it is not given, or a size is less than 1.
    """

    noun = "sequences"

    def __init__(self, root: str | os.PathLike[str] | None = None, length: int | None = None) -> None:
        if root is None:
            raise ValueError(
                "sequences in folders are a collection of yours: give the folder that has train/CLASS/*.txt and "
                "test/CLASS/*.txt with data.root=FOLDER"
            )
        check_sizes(**({} if length is None else {"data.length": length}))
        self.root, self.length = folder_of(root), length
        for part in ("train", "test"):
            if not (self.root / part).is_dir():
                raise FileNotFoundError(
                    f"{self.root.resolve()} has no folder {part!r}; sequences are expected at {part}/CLASS/*.txt"
                )
        self.tokenizer = DNATokenizer()

    @functools.cached_property
    def classes(self) -> list[str]:
        """Names of the folders in `train`, sorted."""
        return _classes(self.root / "train")

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def split(self, name: str) -> FiledSequences:
        """Sequences of `train`, `val` or `test`.

        Raises:
            ValueError: for an unknown split, classes of `test` that `train` lacks, or files that are no sequences.
        """
        folder = self.root / ("test" if check_split(name) == "test" else "train")
        if strangers := sorted(set(_classes(folder)) - set(self.classes)):
            raise ValueError(
                f"{folder} has the class {strangers[0]}, which {self.root / 'train'} lacks; rename or remove it"
            )
        files, labels = [], []
        for label, one in enumerate(self.classes):
            for place, file in enumerate(_files(folder / one)):
                if name == "test" or (split_of(place) == "val") == (name == "val"):
                    files.append(file)
                    labels.append(label)
        if not files:
            raise ValueError(f"{folder} has no sequence for {name}; put files at {folder.name}/CLASS/*.txt")
        return FiledSequences(self.tokenizer, files, labels, self.length)

    def collate(self, examples: Sequence[Example]) -> tuple[Tensor, ...]:
        """Sequences of one length as rows, others packed."""
        if len({len(ids) for ids, _ in examples}) > 1:
            return packed(examples)
        ids, labels = zip(*examples, strict=True)
        return torch.stack(list(ids)), torch.tensor(labels)

    def facts(self) -> dict[str, Any]:
        """What weights trained on these sequences remember of them."""
        return {"classes": list(self.classes)}

    def model_options(self) -> dict[str, Any]:
        """Keyword arguments of any model of these sequences."""
        return {"head": "sequence", "num_classes": self.num_classes}

    def example(self) -> Tensor:
        return torch.full((1, 64 if self.length is None else self.length), int(self.tokenizer.letters[0]))


class FiledSequences(Dataset[Example]):
    """`(ids [T], class)` of each file, read when asked for.

    Raises:
        ValueError: on access, for a file that is empty or no sequence, which it names.
    """

    def __init__(
        self, tokenizer: DNATokenizer, files: Sequence[Path], labels: Sequence[int], length: int | None
    ) -> None:
        self.tokenizer, self.files, self.labels, self.length = tokenizer, files, labels, length

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        file = self.files[index]
        try:
            letters = "".join(file.read_text(encoding="ascii").split())
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is no text of one sequence ({error}); replace it or take it away") from error
        if not letters:
            raise ValueError(f"{file} is empty; a file holds one sequence: fill it or take it away")
        if self.length is not None and len(letters) > self.length:
            begin = (len(letters) - self.length) // 2
            letters = letters[begin : begin + self.length]
        return self.tokenizer.encode(letters, name=str(file)), self.labels[index]


def _classes(folder: Path) -> list[str]:
    found = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if odd := sorted(path.name for path in folder.iterdir() if path.is_file()):
        raise ValueError(f"{folder} has the file {odd[0]} where folders of classes are expected; move it into one")
    if not found:
        raise ValueError(f"{folder} has no folders of classes; sequences are expected at {folder.name}/CLASS/*.txt")
    return found


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = sorted(folder.iterdir())
    for path in found:
        if path.suffix != ".txt" or not path.is_file():
            raise ValueError(
                f"{folder} has {path.name}, which is no .txt file of one sequence; rename it or take it away"
            )
    return found
