"""Splice sites: where an intron begins or ends, against places that only look like it."""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from sinuous.core.checks import check_range, check_sizes
from sinuous.core.data import check_split
from sinuous.genomics.datasets.genome import Genome, split_of

DONOR, ACCEPTOR, DECOY = range(3)
CLASSES = ("donor", "acceptor", "decoy")
SEED = 0
"""Of the choice of decoys, which is the same in every run."""


class Sites(NamedTuple):
    """Boundaries between two bases, sorted by place; arrays of one length.

    Attributes:
        record: number of the sequence.
        boundary: bases of the forward strand before it.
        reverse: whether the site is on the other strand.
        label: its class.
    """

    record: NDArray[np.int64]
    boundary: NDArray[np.int64]
    reverse: NDArray[np.bool_]
    label: NDArray[np.int64]

    def only(self, chosen: NDArray[Any]) -> Sites:
        return Sites(*(column[chosen] for column in self))


def introns(genome: Genome) -> Sites:
    """Both ends of every intron, the gap between neighbouring exons of a transcript, each once."""
    numbers = {name: number for number, name in enumerate(genome.records)}
    exons: dict[tuple[int, bool, str], list[tuple[int, int]]] = defaultdict(list)
    for feature in genome.features:
        if feature.kind == "exon" and feature.strand in ("+", "-"):
            transcript = feature.attributes.get("transcript_id") or feature.attributes.get("Parent") or ""
            exons[numbers[feature.seqid], feature.strand == "-", transcript].append((feature.start, feature.end))
    found = set()
    for (record, reverse, _), parts in exons.items():
        for (_, begin), (end, _) in itertools.pairwise(sorted(parts)):
            if begin < end:
                found.add((record, begin, reverse, ACCEPTOR if reverse else DONOR))
                found.add((record, end, reverse, DONOR if reverse else ACCEPTOR))
    return _sites(found)


def decoys(genome: Genome, sites: Sites, per_megabase: float) -> Sites:
    """Places of GT, where an intron would begin, and of AG, where it would end, that are no site; half of each.

    Chosen evenly from both strands of all sequences, the same in every run.
    """
    generator = np.random.default_rng(SEED)
    a, c, g, t = (int(genome.tokenizer.encode(letter)[0]) for letter in "ACGT")
    taken = set(zip(*(column.tolist() for column in sites[:3]), strict=True))
    # By the forward strand: GT behind a boundary and AG before it; of the other strand AC before and CT behind.
    looks = {
        (DONOR, False): (g, t, 0),
        (ACCEPTOR, False): (a, g, 2),
        (DONOR, True): (a, c, 2),
        (ACCEPTOR, True): (c, t, 0),
    }
    found = set()
    for kind in (DONOR, ACCEPTOR):
        places: list[tuple[int, int, bool]] = []
        for reverse, (record, bases) in itertools.product((False, True), enumerate(genome.bases)):
            first, second, offset = looks[kind, reverse]
            at = np.flatnonzero((bases[:-1] == first) & (bases[1:] == second)) + offset
            share = round(per_megabase * len(bases) / 4e6)
            drawn = generator.choice(at, min(2 * share, len(at)), replace=False).tolist()
            places += [(record, place, reverse) for place in drawn if (record, place, reverse) not in taken][:share]
        found |= {(*place, DECOY) for place in places}
    return _sites(found)


def _sites(found: set[tuple[int, int, bool, int]]) -> Sites:
    rows = np.array(sorted(found), np.int64).reshape(-1, 4)
    return Sites(rows[:, 0], rows[:, 1], rows[:, 2].astype(bool), rows[:, 3])


class SiteWindows(Dataset[tuple[Tensor, int]]):
    """`(ids [length], class)`: the bases around each site, from its own strand, the site in the middle."""

    def __init__(self, genome: Genome, sites: Sites, length: int) -> None:
        self.genome, self.sites, self.length = genome, sites, length

    def __len__(self) -> int:
        return len(self.sites.label)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        record, boundary, reverse, label = (column[index] for column in self.sites)
        half = self.length // 2
        ids = self.genome.bases[record][boundary - half : boundary + half].astype(np.int64)
        return torch.from_numpy((self.genome.reverse_complement(ids) if reverse else ids).copy()), int(label)


class SpliceSites:
    """Donors, acceptors and decoys with the same two letters in the middle: `(ids [B, length], classes [B])`.

    Sites belong to the split of their block, see `sinuous.genomics.datasets.genome`.

    Args:
        length: bases in a window, an even number.
        decoys_per_megabase: so that chromosome 1 of *A. thaliana* has 20,000.
        root: as of `GenomeWindows`.
        block: likewise.

    Raises:
        ValueError: if the length is odd or less than 4, or the number of decoys negative.
    """

    noun = "sites"
    num_classes = len(CLASSES)
    classes = CLASSES

    def __init__(
        self,
        length: int = 200,
        decoys_per_megabase: float = 657.3,
        root: str | os.PathLike[str] | None = None,
        block: int | None = None,
    ) -> None:
        check_sizes(**{"data.length": length})
        if length % 2 or length < 4:
            raise ValueError(f"data.length must be even and at least 4, as the site is in the middle (got {length})")
        check_range(0, 1e6, **{"data.decoys_per_megabase": decoys_per_megabase})
        self.length, self.decoys_per_megabase = length, decoys_per_megabase
        self.genome = Genome(root, block)
        self._sites: Sites | None = None

    def sites(self) -> Sites:
        """All sites that a window fits around, sorted by place."""
        if self._sites is None:
            real = introns(self.genome)
            both = zip(real, decoys(self.genome, real, self.decoys_per_megabase), strict=True)
            joined = Sites(*(np.concatenate(columns) for columns in both))
            ends = np.array([len(bases) for bases in self.genome.bases])[joined.record]
            half = self.length // 2
            joined = joined.only((joined.boundary >= half) & (joined.boundary + half <= ends))
            self._sites = joined.only(np.lexsort((joined.label, joined.boundary, joined.record)))
        return self._sites

    def split(self, name: str) -> SiteWindows:
        """Windows of `train`, `val` or `test`.

        Raises:
            FileNotFoundError: if files are missing.
            ValueError: for an unknown split, damaged files, or a genome without sites for this split.
        """
        check_split(name)
        sites = self.sites()
        numbers = (sites.boundary // self.genome.block).tolist()
        chosen = sites.only(np.array([split_of(number) == name for number in numbers], bool))
        if not len(chosen.label):
            raise ValueError(
                f"the genome has no splice site for {name}; give smaller blocks than {self.genome.block:,} bases "
                "(data.block), of which each tenth validates and tests"
            )
        return SiteWindows(self.genome, chosen, self.length)

    def facts(self) -> dict[str, Any]:
        """What weights trained on these sites remember of them."""
        return {"classes": list(self.classes), "length": self.length}

    def model_options(self) -> dict[str, Any]:
        """Keyword arguments of any model of these sites."""
        return {"head": "sequence", "num_classes": self.num_classes}

    def example(self) -> Tensor:
        return torch.full((1, self.length), int(self.genome.tokenizer.letters[0]))
