"""Models of bytes to compare with: a trigram model, and xz."""

from __future__ import annotations

import lzma
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sinuous.core.checks import check_sizes

BYTES = 256
LONGEST = 7
"""Bytes of the longest n-gram: as many as fit into a 64-bit number."""


class _Counts(NamedTuple):
    """Counts of all n-grams of one length.

    Attributes:
        grams: those that occur, each as one number, sorted.
        times: how often each of them does.
        contexts: their beginnings, without the last byte, sorted.
        total: how often each context is followed by any byte.
        kinds: by how many different ones.
    """

    grams: NDArray[np.int64]
    times: NDArray[np.int64]
    contexts: NDArray[np.int64]
    total: NDArray[np.int64]
    kinds: NDArray[np.int64]


class NGram:
    """A model of the next byte after the `order` - 1 bytes before it, with all shorter contexts mixed in.

    With h a context, h' the same without its first byte, n(hc) the number of times that byte c follows h in the
    training text, n(h) their sum and N(h) the number of different bytes that follow h,

        p(c | h) = (n(hc) + N(h) p(c | h')) / (n(h) + N(h)),      below the empty context p = 1 / 256

    Witten and Bell (IEEE Transactions on Information Theory 37, 1991), as interpolation in Chen and Goodman (Computer
    Speech and Language 13, 1999, section 2.4).

    Args:
        text: to learn from.
        order: length of an n-gram, 3 for a trigram model.

    Raises:
        ValueError: if `order` is not from 1 to 7.
    """

    def __init__(self, text: bytes, order: int = 3) -> None:
        check_sizes(order=order)
        if order > LONGEST:
            raise ValueError(f"order must be at most {LONGEST} (got {order}); give a smaller one")
        self.order = order
        self._counts = [_count(_grams(text, n)) for n in range(1, order + 1)]

    def bits(self, text: bytes) -> NDArray[np.float64]:
        """Surprisal -log2 p of each byte of a text after those before it, `[len(text)]`."""
        p = np.full(len(text), 1 / BYTES)
        for n, counts in enumerate(self._counts, 1):
            grams = _grams(text, n)
            (times,) = _look_up(grams, counts.grams, counts.times)
            total, kinds = _look_up(grams >> 8, counts.contexts, counts.total, counts.kinds)
            shorter = p[n - 1 :]
            p[n - 1 :] = np.where(total > 0, (times + kinds * shorter) / np.maximum(total + kinds, 1), shorter)
        bits: NDArray[np.float64] = -np.log2(p)
        return bits


def _grams(text: bytes, n: int) -> NDArray[np.int64]:
    """Each n bytes in a row as one number, `[len(text) - n + 1]`."""
    symbols = np.frombuffer(text, np.uint8).astype(np.int64)
    length = max(len(symbols) - n + 1, 0)
    grams = np.zeros(length, np.int64)
    for i in range(n):
        grams = grams << 8 | symbols[i : i + length]
    return grams


def _count(occurrences: NDArray[np.int64]) -> _Counts:
    grams, times = np.unique(occurrences, return_counts=True)
    contexts, first, kinds = np.unique(grams >> 8, return_index=True, return_counts=True)
    total = np.add.reduceat(times, first) if len(first) else times
    return _Counts(grams, times, contexts, total, kinds)


def _look_up(keys: NDArray[np.int64], known: NDArray[np.int64], *values: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Values at the places of `keys` in `known`, which is sorted; 0 for those that are not in it."""
    if not len(known):
        return [np.zeros_like(keys) for _ in values]
    places = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return [np.where(known[places] == keys, value[places], 0) for value in values]


def xz_bits(text: bytes, after: bytes = b"") -> float:
    """Bits that xz (preset 9e) needs for each byte of `text`, where it may point back into the text `after` which it
    comes: the growth of the compressed size.

    Raises:
        ValueError: if `text` is empty.
    """
    if not text:
        raise ValueError("the text is empty; give at least one byte")
    size = len(_xz(after + text)) - (len(_xz(after)) if after else 0)
    return 8 * size / len(text)


def _xz(text: bytes) -> bytes:
    return lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
