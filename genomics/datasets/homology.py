"""Which proteins are related, told by the words of five residues that they share.

The share of two proteins is the number of different words that both have, over that of the one with fewer. Words that
many proteins have tell nothing of kinship and are not counted. This finds relatives with half of their residues alike,
as those of close species and of young families are; it is no search for remote homologs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

WORD = 5
COMMON = 64
"""Words that more proteins than this have are not counted."""
LEAST_SHARE, LEAST_WORDS = 0.05, 8
"""Below either, two proteins are not related: two of 400 residues without kinship share none or one word."""


class Kinship(NamedTuple):
    """Pairs of related proteins, both ways, sorted by the first and then by falling share.

    Attributes:
        first: index of a protein.
        second: index of its relative.
        share: of their words, in (0, 1].
        cluster: number of each protein's cluster, the least index in it: all that relatives of relatives lead to.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    share: NDArray[np.float64]
    cluster: NDArray[np.int64]

    def relatives(self, protein: int) -> NDArray[np.int64]:
        """Those of one protein, closest first."""
        begin, end = np.searchsorted(self.first, (protein, protein + 1))
        return self.second[begin:end]


def kinship(proteins: Sequence[str]) -> Kinship:
    """Compare all proteins with each other: seconds for ten thousand.

    Args:
        proteins: residues as capital letters.
    """
    count = len(proteins)
    words, owners = _words(proteins)
    sizes = np.bincount(owners, minlength=count)
    begins = np.flatnonzero(np.r_[True, words[1:] != words[:-1]]) if len(words) else np.zeros(0, np.int64)
    spread = np.diff(np.r_[begins, len(words)])
    keys = [np.zeros(0, np.int64)]
    for size in range(2, COMMON + 1):
        groups = owners[begins[spread == size][:, None] + np.arange(size)]
        left, right = np.triu_indices(size, 1)
        keys.append((groups[:, left] * count + groups[:, right]).ravel())
    pairs, shared = np.unique(np.concatenate(keys), return_counts=True)
    first, second = pairs // max(count, 1), pairs % max(count, 1)
    share = shared / np.minimum(sizes[first], sizes[second])
    related = (share >= LEAST_SHARE) & (shared >= LEAST_WORDS)
    first, second, share = first[related], second[related], share[related]
    first, second, share = np.r_[first, second], np.r_[second, first], np.r_[share, share]
    order = np.lexsort((second, -share, first))
    first, second, share = first[order], second[order], share[order]
    return Kinship(first, second, share, _clusters(count, first, second))


def _words(proteins: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each different word of each protein as a number, sorted, with the protein's index."""
    letters = np.frombuffer("".join(proteins).encode(), np.uint8).astype(np.int64) - ord("A")
    owners = np.repeat(np.arange(len(proteins)), [len(protein) for protein in proteins])
    starts = max(len(letters) - WORD + 1, 0)
    words = np.zeros(starts, np.int64)
    for offset in range(WORD):
        words = words * 26 + letters[offset : offset + starts]
    within = owners[:starts] == owners[WORD - 1 :]
    pairs = np.unique(words[within] * max(len(proteins), 1) + owners[:starts][within])
    return pairs // max(len(proteins), 1), pairs % max(len(proteins), 1)


def _clusters(count: int, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
    """The least index that each protein is joined to, by pairs that are listed both ways."""
    least = np.arange(count)
    while True:
        lower = least.copy()
        np.minimum.at(lower, first, least[second])
        lower = lower[lower]
        if np.array_equal(lower, least):
            return least
        least = lower
