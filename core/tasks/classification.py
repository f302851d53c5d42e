"""Classification: one label for each example, be it a picture, a clip, a wave or a sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from sinuous.core.data import LabelledData
from sinuous.core.tasks.task import Task, apply


class Classification(Task):
    """Cross entropy of logits `[B, K]` with labels `[B]`, scored by accuracy and by the plain cross entropy in nats.

    Args:
        num_classes: K.
        smoothing: label smoothing ε: the target is 1 - ε + ε/K for the label and ε/K elsewhere.
        mixing: `mixing(inputs, labels) -> (inputs, labels)`, such as timm's `Mixup`, which mixes examples and labels
            within a batch.

    Raises:
        ValueError: if `smoothing` is not in [0, 1).
    """

    takes: ClassVar[type] = LabelledData

    def __init__(
        self,
        num_classes: int,
        smoothing: float = 0.0,
        mixing: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        super().__init__({"accuracy": MulticlassAccuracy(num_classes, average="micro"), "loss": MeanMetric()})
        if not 0 <= smoothing < 1:
            raise ValueError(f"task.smoothing must be in [0, 1) (got {smoothing})")
        self.smoothing, self.mixing = smoothing, mixing

    def loss(self, model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        inputs, labels, *packed = batch
        if self.augment and self.mixing is not None:
            try:
                inputs, labels = self.mixing(inputs, labels)
            except AssertionError as error:  # timm's Mixup mixes pairs
                raise ValueError(
                    f"task.mixing cannot mix a batch of {len(inputs)} ({error}); give an even data.batch_size"
                ) from error
        logits = apply(model, (inputs, labels, *packed))
        return F.cross_entropy(logits, labels, label_smoothing=self.smoothing if self.augment else 0.0)

    def score(self, model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        """Update the scores; returns `[B, 3]`: the predicted class, its probability, and the label."""
        labels = batch[1]
        logits = apply(model, batch).float()
        self.count("accuracy", logits, labels)
        self.count("loss", F.cross_entropy(logits, labels), len(labels))
        probability, predicted = logits.softmax(-1).max(-1)
        return torch.stack([predicted.double(), probability.double(), labels.double()], 1)

    def report(
        self, model: nn.Module, data: Any, seen: Sequence[Any], scores: Mapping[str, float], folder: Path, split: str
    ) -> list[str]:
        count = sum(len(rows) for rows in seen)
        accuracy, loss = scores["accuracy"], scores["loss"]
        return [f"{split} accuracy {accuracy:.4f}, loss {loss:.4f} on {count:,} {data.noun}"]
