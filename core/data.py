"""Data as tasks read it: plain objects of a domain, recognised by what they offer and not by their class."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sinuous.core.checks import check_choice

SPLITS = ("train", "val", "test")


class Data(Protocol):
    """The three splits of a collection of examples.

    Optional, and found by name:

    - `collate(examples)` makes a batch; torch's default does if it is absent.
    - `lengths` of a dataset that `split` gives, a number for each example: batches of training may then be made of
      examples of like length, see `sinuous.apps.batches`.
    - `augment`, a bool: whether training examples are changed at random; a run that wants them as they are sets it.
    - `facts()` gives what weights trained on this data remember of it, in numbers, words and lists: `classes`, sizes,
      `mean`; `sinuous eval` and loading use them, and refuse data that contradicts them.
    - `model_options()` gives keyword arguments that any model of this data needs (sizes, number of classes), for
      `sinuous eval model_name=…`.

    Attributes:
        noun: what one example is, in the plural, such as `pictures`.
    """

    noun: str

    def split(self, name: str) -> Dataset[Any]:
        """The examples of `train`, `val` or `test`."""
        ...

    def example(self) -> Tensor:
        """A batch of one input of zeros, with which a model can be tried."""
        ...


class LabelledData(Data, Protocol):
    """One class for each example: batches `(inputs, labels [B])`.

    A third entry is `cu_seqlens` or a dictionary, as of `TokenData`.

    Attributes:
        num_classes: how many there are.
        classes: their names, in the order of their numbers.
    """

    num_classes: int

    @property
    def classes(self) -> Sequence[str]: ...


class TokenData(Data, Protocol):
    """Sequences of tokens: batches `(ids [B, T], targets [B, T])`, targets of -100 being ignored.

    A third entry is `cu_seqlens` of sequences packed into one row, or a dictionary of tensors that the model is given
    by name, such as `position_ids`.

    Attributes:
        unit: what one token is, in the singular, such as `byte` or `base`; scores are bits per unit.
        vocab_size: how many different tokens there are.
    """

    unit: str
    vocab_size: int


class PositionLabels(Data, Protocol):
    """One class for each position, in one axis or two: batches `(inputs, labels [B, T] or [B, H, W])`, -100 ignored.

    Attributes:
        num_classes: how many there are.
        unit: what one position is, in the singular, such as `pixel` or `base`.
        classes: names of the classes, in the order of their numbers.
    """

    num_classes: int
    unit: str

    @property
    def classes(self) -> Sequence[str]: ...


def lacking(data: Any, kind: type) -> list[str]:
    """Names of what `kind`, one of the classes above, asks for and `data` does not have.

    Unlike `isinstance`, this computes no property: the names of classes may have to be read from a disk.
    """
    asked: set[str] = set()
    for base in kind.__mro__:
        if base in (Data, LabelledData, TokenData, PositionLabels):
            asked |= {name for name in (*vars(base), *inspect.get_annotations(base)) if not name.startswith("_")}
    absent = object()
    return sorted(name for name in asked if inspect.getattr_static(data, name, absent) is absent)


def check_split(name: str) -> str:
    """Return `name`, which must be a split.

    Raises:
        ValueError: if there is no such split.
    """
    check_choice("split", name, SPLITS)
    return name


PACKED = (".whl", ".zip", ".tar", ".tgz", ".deb")
"""Endings of packages, which must be unpacked before their files are read."""
_UNPACKING = {".deb": "dpkg -x {0} FOLDER", ".tar": "tar -xf {0}", ".tgz": "tar -xf {0}"}


def folder_of(root: str | os.PathLike[str] | None) -> Path:
    """The folder `root` of a user's data.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if none is given, or it is a file.
    """
    if root is None:
        raise ValueError("this data lies in a folder of yours: give it with data.root=FOLDER")
    path = Path(root).expanduser()
    if path.is_file():
        command = _UNPACKING.get(path.suffix, "python -m zipfile -e {0} FOLDER").format(path.name)
        unpack = f"unpack it ({command}) and " if path.suffix in PACKED else ""
        raise ValueError(f"data.root must be a folder (got the file {path.resolve()}); {unpack}give the folder")
    if not path.is_dir():
        raise FileNotFoundError(
            f"there is no folder {path.resolve()}; give the folder of the data with data.root=FOLDER"
        )
    return path


def packed(examples: Sequence[tuple[Tensor, Any]]) -> tuple[Tensor, Tensor, Tensor]:
    """Put sequences of different lengths into one row, so that no recurrence reads padding.

    Args:
        examples: `(inputs [T, ...], label)` or `(inputs [T, ...], targets [T, ...])`, each of its own T.

    Returns:
        `(inputs [1, ΣT, ...], labels [N] or targets [1, ΣT, ...], cu_seqlens [N + 1])`.
    """
    inputs = [sequence for sequence, _ in examples]
    ends = torch.tensor([0, *(len(sequence) for sequence in inputs)]).cumsum(0)
    if isinstance(examples[0][1], Tensor) and examples[0][1].ndim:
        targets = torch.cat([target for _, target in examples])[None]
    else:
        targets = torch.tensor([int(label) for _, label in examples])
    return torch.cat(inputs)[None], targets, ends
