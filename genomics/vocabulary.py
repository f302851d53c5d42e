"""Ids and their written forms: what the tokenizers of all kinds of sequences have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sinuous.core.checks import described


class Vocabulary:
    """Tokens in the order of their ids.

    Args:
        tokens: written forms; `""` for ids that stand for nothing.
        letters: ids of what a text may have.
        natural: those of them among which a new letter is chosen; all of them if absent.

    Attributes:
        tokens: as given.
        letters, natural: int64, sorted.
        special: all other ids, int64, sorted.
        start, end, pad, mask, unknown: ids of special tokens, `None` for those that the vocabulary lacks.
        ignored: id of a letter that no score counts, or `None`.
    """

    kind: str
    start: int | None = None
    end: int | None = None
    pad: int | None = None
    mask: int | None = None
    unknown: int | None = None
    ignored: int | None = None

    def __init__(self, tokens: Sequence[str], letters: Iterable[int], natural: Iterable[int] | None = None) -> None:
        self.tokens = tuple(tokens)
        self.letters = torch.tensor(sorted(letters))
        self.natural = self.letters if natural is None else torch.tensor(sorted(natural))
        self.special = torch.tensor(sorted(set(range(len(self.tokens))) - set(self.letters.tolist())))

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size})"

    def encode(self, text: str, name: str | None = None) -> Tensor:
        """Ids `[T]` of a text, int64, without start and end tokens.

        Args:
            text: letters.
            name: of the record, which an error tells.

        Raises:
            ValueError: for a letter that the vocabulary lacks, with the record, the position and the letter.
        """
        raise NotImplementedError

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """Write ids `[T]` as text, without start, end and padding; other special tokens are written by their names.

        Raises:
            ValueError: if there are several rows, or an id that the vocabulary lacks.
        """
        left_out = {self.start, self.end, self.pad}
        return "".join(self.tokens[i] for i in self._checked(ids).tolist() if i not in left_out)

    def _checked(self, ids: Tensor | Sequence[int]) -> Tensor:
        try:
            row = torch.as_tensor(ids).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"ids must be whole numbers (got {described(ids)}); give a tensor or a list") from error
        if row.ndim != 1 or (row.numel() and (row.is_floating_point() or row.is_complex() or row.dtype == torch.bool)):
            raise ValueError(f"ids must be one row of whole numbers (got {described(ids)}); decode row by row")
        row = row.long()
        low, high = (int(row.min()), int(row.max())) if row.numel() else (0, 0)
        outside = [i for i in (low, high) if not 0 <= i < self.vocab_size]
        unwritten = outside or [int(i) for i in row.bincount().nonzero() if not self.tokens[i]]
        if unwritten:
            raise ValueError(
                f"the vocabulary of {self.kind} has no token {unwritten[0]} (got ids from {low} to {high}); "
                "decode with the tokenizer that made the ids"
            )
        return row

    def _refusal(self, text: str, place: int, letter: str, name: str | None, remedy: str) -> ValueError:
        record = "the text" if name is None else repr(name)
        return ValueError(
            f"{letter!r} is not in the vocabulary of {self.kind} (got it in {record} at position {place + 1} of "
            f"{len(text)}, counted from 1); {remedy}"
        )
