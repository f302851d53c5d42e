"""Tasks of biological sequences: the shared ones, scored by both strands, by merged classes, by what stands before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from sinuous.core.tasks.labelling import Labelling
from sinuous.core.tasks.language_modelling import IGNORED, LanguageModelling, Masking, nats
from sinuous.genomics.datasets import MERGED_CLASSES, MERGED_INTO
from sinuous.genomics.letters import DNATokenizer, ProteinTokenizer


class GenomeModelling(LanguageModelling):
    """`LanguageModelling` of bases, scored on the other strand too.

    A second score, `bits_per_base_of_both_strands`, is the mean of the bits of a window and of its reverse complement,
    which a model that reads in one direction sees as another text.

    Args:
        unit: as of `LanguageModelling`.
        masking: likewise.
        both_strands: False scores the given strand alone, in half the time.
    """

    def __init__(self, unit: str, masking: Masking | None = None, both_strands: bool = True) -> None:
        super().__init__(unit, masking)
        self.of_both = f"{self.bits}_of_both_strands" if both_strands else None
        if self.of_both:
            self.scores[self.of_both] = MeanMetric()

    def score(self, model: nn.Module, batch: Sequence[Any]) -> int:
        if not self.of_both:
            return super().score(model, batch)
        total = 0
        for strand in (batch, (*self.other_strand(batch[0], batch[1]), *batch[2:])):
            hidden = self.hidden(strand)
            count = int((hidden[1] != IGNORED).sum())
            if count:
                bits = nats(model, hidden) / (count * math.log(2))
                self.count(self.of_both, bits, count)
                if strand is batch:
                    self.count(self.bits, bits, count)
            total += count if strand is batch else 0
        return total

    def other_strand(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and targets of the reverse complement of windows, `[B, T]` both, with `[BOS]` first or masked."""
        complement = DNATokenizer().complement.to(ids.device)
        paired = torch.where(targets == IGNORED, IGNORED, complement[targets.clamp(min=0)]).flip(1)
        if self.masking is not None:
            return complement[ids].flip(1), paired
        last = torch.where(targets[:, -1:] == IGNORED, DNATokenizer.ignored, targets[:, -1:])
        bases = complement[torch.cat([ids[:, 1:], last], 1)].flip(1)
        return torch.cat([ids[:, :1], bases[:, :-1]], 1), paired

    def report(
        self, model: nn.Module, data: Any, seen: Sequence[Any], scores: Mapping[str, float], folder: Path, split: str
    ) -> list[str]:
        lines = super().report(model, data, seen, scores, folder, split)
        if self.of_both:
            lines.append(f"{split} bits per {self.unit}, both strands averaged, {scores[self.of_both]:.4f}")
        return lines


class Annotation(Labelling):
    """`Labelling` of bases by five classes, scored by three as well: intergenic, gene and coding, of either strand.

    Three classes have the summed probability of their strands. The scores are `accuracy` and `mean_iou` of five
    classes, and `accuracy_of_merged_strands`.
    """

    MERGED = "accuracy_of_merged_strands"

    into: Tensor

    def __init__(self, num_classes: int, class_weights: Sequence[float] | None = None) -> None:
        super().__init__(num_classes, None, class_weights)
        if num_classes != len(MERGED_INTO):
            raise ValueError(
                f"task.num_classes must be {len(MERGED_INTO)}, the classes of annotation (got {num_classes}); use "
                "task=labelling for others"
            )
        self.scores[self.MERGED] = MulticlassAccuracy(len(MERGED_CLASSES), average="micro", ignore_index=IGNORED)
        self.register_buffer("into", torch.tensor(MERGED_INTO), persistent=False)

    def judge(self, logits: Tensor, labels: Tensor) -> None:
        super().judge(logits, labels)
        probabilities = logits.softmax(1)
        merged = probabilities.new_zeros(logits.shape[0], len(MERGED_CLASSES), *logits.shape[2:])
        merged.index_add_(1, self.into, probabilities)
        known = torch.where(labels == IGNORED, IGNORED, self.into[labels.clamp(min=0)])
        self.count(self.MERGED, merged.argmax(1), known)

    def report(
        self, model: nn.Module, data: Any, seen: Sequence[Any], scores: Mapping[str, float], folder: Path, split: str
    ) -> list[str]:
        lines = super().report(model, data, seen, scores, folder, split)
        return [*lines, f"{split} accuracy with strands merged, {', '.join(MERGED_CLASSES)}: {scores[self.MERGED]:.4f}"]


class ProteinModelling(LanguageModelling):
    """`LanguageModelling` of residues, scored by how many relatives stand before the protein as well.

    The scores `bits_per_residue_after_<n>` are of rows with n relatives.

    Args:
        unit: as of `LanguageModelling`.
        ladder: numbers of relatives that the data's scored rows have.
    """

    def __init__(self, unit: str, ladder: Sequence[int]) -> None:
        super().__init__(unit)
        self.start, self.ladder = ProteinTokenizer.start, tuple(ladder)
        for before in self.ladder:
            self.scores[f"{self.bits}_after_{before}"] = MeanMetric()

    def score(self, model: nn.Module, batch: Sequence[Any]) -> int:
        counted, total = batch[1] != IGNORED, 0
        before = (batch[0] == self.start).sum(1) - 1
        each = nats(model, batch, reduction="none").view(batch[1].shape)
        for number in self.ladder:
            rows = before == number
            count = int(counted[rows].sum())
            if count:
                bits = each[rows].sum() / (count * math.log(2))
                self.count(f"{self.bits}_after_{number}", bits, count)
        total = int(counted.sum())
        if total:
            self.count(self.bits, each.sum() / (total * math.log(2)), total)
        return total

    def report(
        self, model: nn.Module, data: Any, seen: Sequence[Any], scores: Mapping[str, float], folder: Path, split: str
    ) -> list[str]:
        lines = super().report(model, data, seen, scores, folder, split)
        after = {number: scores[f"{self.bits}_after_{number}"] for number in self.ladder}
        return [*lines, *(f"{split} after {n} relatives: {v:.4f}" for n, v in after.items())]
