"""Molecules as SMILES, token by token."""

from __future__ import annotations

import csv
import gzip
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from sinuous.core.checks import check_sizes
from sinuous.core.data import check_split
from sinuous.core.tasks.language_modelling import IGNORED
from sinuous.genomics.datasets.files import find_file
from sinuous.genomics.letters import SmilesTokenizer

Row = tuple[Tensor, Tensor]
"""`(ids [T], targets [T])`."""


def files_of(split: str) -> tuple[str, ...]:
    """Names under which the molecules of the training or the test set are looked for."""
    return (f"{split}.csv.gz", f"{split}.csv", f"{split}.smi.gz", f"{split}.smi", f"solubility.{split}.csv.gz")


def read_smiles(path: Path) -> list[str]:
    """The column of SMILES of a table with a header, or the first word of each line of a `.smi`.

    Unlike `sinuous.genomics.read_molecules` this checks no chemistry, which would take minutes for a million.

    Raises:
        ValueError: if the file is damaged, or has no such column, or no molecule.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as lines:
            if ".smi" in path.suffixes:
                found = [words[0] for line in lines if (words := line.split())]
            else:
                rows = csv.reader(lines)
                header = [name.strip().lower() for name in next(rows, [])]
                if "smiles" not in header:
                    raise ValueError(f"{path} has no column smiles (its columns are {', '.join(header) or 'none'})")
                column = header.index("smiles")
                found = [row[column] for row in rows if len(row) > column and row[column]]
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is damaged ({error}); unpack or copy it again") from error
    if not found:
        raise ValueError(f"{path} holds no molecule; unpack or copy it again")
    return found


class Molecules:
    """Molecules to model token by token: `(ids [B, T], targets [B, T])`.

    A row is `[BEG]`, the tokens and, as the last target, `[END]`. Behind shorter rows stand pads, whose targets are
    -100 and which no causal model has seen before.

    Args:
        root: a folder that holds, in it or below it, `train` and `test` as `.csv.gz` with a column SMILES, such as the
            unzipped package molsets (MOSES), or as `.smi`; None is the bundled molecules of known solubility.
        val: molecules of the training file, evenly spread over it, that validate; a tenth of it if that is less.
        test: the first molecules of the test file; None takes all.

    Raises:
        ValueError: if a number is less than 1.
    """

    noun = "molecules"
    unit = "token"
    length = 32
    """Tokens of the example that a model is tried with; molecules have their own."""

    def __init__(
        self, root: str | os.PathLike[str] | None = None, val: int = 10_000, test: int | None = 20_000
    ) -> None:
        check_sizes(**{"data.val": val, **({} if test is None else {"data.test": test})})
        self.root, self.val, self.test = root, val, test
        self.tokenizer = SmilesTokenizer()
        begin, pad = self.tokenizer.start, self.tokenizer.pad
        assert begin is not None
        assert pad is not None
        self.begin, self.pad = begin, pad
        self.vocab_size = self.tokenizer.vocab_size

    def smiles(self, split: str) -> list[str]:
        """The molecules of `train`, `val` or `test`.

        Raises:
            FileNotFoundError: if files are missing.
            ValueError: for an unknown split, or damaged files.
        """
        file = "test" if check_split(split) == "test" else "train"
        found = read_smiles(find_file(self.root, files_of(file), f"{file} set of molecules"))
        if split == "test":
            return found[: self.test]
        count = min(self.val, len(found) // 10)
        held_out = {(2 * i + 1) * len(found) // (2 * count) for i in range(count)}
        return [one for place, one in enumerate(found) if (place in held_out) == (split == "val")]

    def split(self, name: str) -> MoleculeRows:
        """Rows of `train`, `val` or `test`; see `smiles`."""
        return MoleculeRows(self.tokenizer, self.smiles(name))

    def collate(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Rows in one batch, filled up behind."""
        ids, targets = zip(*rows, strict=True)
        return (
            pad_sequence(list(ids), batch_first=True, padding_value=self.pad),
            pad_sequence(list(targets), batch_first=True, padding_value=IGNORED),
        )

    def facts(self) -> dict[str, Any]:
        """What weights trained on these molecules remember of them."""
        return {"unit": self.unit, "vocab_size": self.vocab_size}

    def model_options(self) -> dict[str, Any]:
        """Keyword arguments of any model of these molecules."""
        return {"head": "lm", "vocab_size": self.vocab_size}

    def example(self) -> Tensor:
        return torch.full((1, self.length), self.begin)


class MoleculeRows(Dataset[Row]):
    """Molecules of one split, see `Molecules`.

    Attributes:
        lengths: letters of each, by which batches may be made of molecules of like length.
    """

    def __init__(self, tokenizer: SmilesTokenizer, smiles: Sequence[str]) -> None:
        self.tokenizer, self.smiles = tokenizer, smiles
        self.lengths = [len(one) for one in smiles]

    def __len__(self) -> int:
        return len(self.smiles)

    def __getitem__(self, index: int) -> Row:
        ids = self.tokenizer.encode(self.smiles[index], name=f"molecule {index + 1}")
        begin, end = ids.new_tensor([self.tokenizer.start]), ids.new_tensor([self.tokenizer.end])
        return torch.cat([begin, ids]), torch.cat([ids, end])
