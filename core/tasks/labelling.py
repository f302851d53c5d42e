"""Labelling: a label for each position, in one axis (bases of a genome) or two (pixels of a picture)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from sinuous.core.data import PositionLabels
from sinuous.core.tasks.language_modelling import IGNORED
from sinuous.core.tasks.task import Task, apply


class MeanIoU(MulticlassConfusionMatrix):
    """Mean over classes of intersection / union, of those classes that occur in labels or predictions.

    torchmetrics' Jaccard index can leave out positions, but not a class whose positions count as mistakes of others.

    Args:
        num_classes: K.
        left_out: a class that the mean leaves out, such as the background; None leaves out none.
    """

    def __init__(self, num_classes: int, left_out: int | None = None, **options: Any) -> None:
        super().__init__(num_classes, **options)
        self.left_out = left_out

    def compute(self) -> Tensor:
        counts = super().compute().double()
        both = counts.diagonal()
        either = counts.sum(0) + counts.sum(1) - both
        counted = either > 0
        if self.left_out is not None:
            counted[self.left_out] = False
        mean: Tensor = (both[counted] / either[counted]).mean()
        return mean.float()


class Labelling(Task):
    """Cross entropy of logits with labels, of which those of -100 do not count.

    Logits are `[B, T, K]` for labels `[B, T]`, or, as segmentation models give them, `[B, K, H, W]` for `[B, H, W]`.
    Scores are the accuracy over positions and the mean intersection over union.

    Args:
        num_classes: K.
        background: a class that the mean intersection over union leaves out; None leaves out none.
        class_weights: factors of the loss, one for each class; None weighs all alike.

    Raises:
        ValueError: if there are not as many weights as classes, or `background` is no class; of a batch, if labels are
            no classes or are not of the model's positions.
    """

    takes: ClassVar[type] = PositionLabels

    class_weights: Tensor | None

    def __init__(
        self, num_classes: int, background: int | None = None, class_weights: Sequence[float] | None = None
    ) -> None:
        super().__init__(
            {
                "accuracy": MulticlassAccuracy(num_classes, average="micro", ignore_index=IGNORED),
                "mean_iou": MeanIoU(num_classes, background, ignore_index=IGNORED),
            }
        )
        if background is not None and not 0 <= background < num_classes:
            raise ValueError(f"task.background must lie between 0 and {num_classes - 1} (got {background})")
        if class_weights is not None and len(class_weights) != num_classes:
            raise ValueError(
                f"task.class_weights must have one number for each of the {num_classes} classes "
                f"(got {len(class_weights)})"
            )
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)

    def loss(self, model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        logits, labels = self._logits(model, batch), batch[1]
        if not bool((labels != IGNORED).any()):  # where torch's mean over nothing is NaN
            return logits.sum() * 0
        return F.cross_entropy(logits, labels, self.class_weights, ignore_index=IGNORED)

    def score(self, model: nn.Module, batch: Sequence[Tensor]) -> int:
        """Update the scores; returns the number of positions that counted."""
        self.judge(self._logits(model, batch), batch[1])
        return int((batch[1] != IGNORED).sum())

    def judge(self, logits: Tensor, labels: Tensor) -> None:
        """Update the scores by logits with their classes on axis 1."""
        for name in ("accuracy", "mean_iou"):
            self.count(name, logits.argmax(1), labels)

    def _logits(self, model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        logits, labels = _classes_second(apply(model, batch), batch[1]), batch[1]
        positions = (*logits.shape[:1], *logits.shape[2:])
        if positions != labels.shape:
            raise ValueError(
                f"labels must have one entry for each of the model's positions, {list(positions)} (got "
                f"{list(labels.shape)}); give pictures or sequences with labels of the same size"
            )
        counted = labels[labels != IGNORED]
        if counted.numel() and not (int(counted.min()) >= 0 and int(counted.max()) < logits.shape[1]):
            strangers = sorted(set(counted.unique().tolist()) - set(range(logits.shape[1])))
            raise ValueError(
                f"labels must be classes from 0 to {logits.shape[1] - 1}, or {IGNORED} for what does not count (got "
                f"{', '.join(map(str, strangers[:5]))}); correct the labels, or give the model more classes"
            )
        return logits

    def report(
        self, model: nn.Module, data: Any, seen: Sequence[Any], scores: Mapping[str, float], folder: Path, split: str
    ) -> list[str]:
        accuracy, iou = scores["accuracy"], scores["mean_iou"]
        return [f"{split} accuracy {accuracy:.4f}, mean IoU {iou:.4f} on {sum(seen):,} {data.unit}s"]


def _classes_second(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits with their classes on axis 1, where torch's cross entropy wants them."""
    return logits.mT if labels.ndim == 2 else logits
