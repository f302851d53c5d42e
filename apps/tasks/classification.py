"""Image classification: cross entropy, accuracy, label smoothing and mixing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from sinuous.apps.data_module import LabelledImages, Splits
from sinuous.apps.pictures import prediction_grid
from sinuous.apps.tasks.task import Task


class Classification(Task):
    """Trains a model `images -> logits` on labels.

    Args:
        model: images to logits.
        num_classes: number of classes.
        smoothing: label smoothing ε: the target is 1 - ε + ε/K for the label and ε/K elsewhere.
        mixing: timm's `Mixup`, which mixes pictures and labels within a batch.
        **options: of `Task`.

    Raises:
        ValueError: if `smoothing` is not in [0, 1).
    """

    takes: ClassVar[type[Splits]] = LabelledImages

    def __init__(
        self,
        model: nn.Module,
        *,
        num_classes: int,
        smoothing: float = 0.0,
        mixing: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        if not 0 <= smoothing < 1:
            raise ValueError(f"task.smoothing must be in [0, 1) (got {smoothing})")
        self.smoothing, self.mixing = smoothing, mixing
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.predictions: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        if self.mixing is not None:
            images, labels = self.mixing(images, labels)
        loss = F.cross_entropy(self.model(images), labels, label_smoothing=self.smoothing)
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._score("val", *batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        logits = self._score("test", *batch)
        probability, predicted = logits.float().softmax(-1).max(-1)
        self.predictions.append(torch.stack([predicted.double(), probability.double(), batch[1].double()], 1).cpu())

    def report(self, data: LabelledImages, folder: Path, split: str, title: str) -> list[str]:
        """What the last test found, in lines, with a page of predictions drawn into `folder`."""
        accuracy, loss = (float(self.trainer.callback_metrics[f"test/{name}"]) for name in ("accuracy", "loss"))
        pictures, predictions = data.split(split), torch.cat(self.predictions)
        page = prediction_grid(
            predictions,
            lambda index: pictures[index][0],
            pictures.classes,
            data.mean,
            data.std,
            f"{title}, accuracy {accuracy:.2%}",
            folder / "predictions.png",
        )
        return [
            f"{split} accuracy {accuracy:.4f}, loss {loss:.4f} on {len(predictions):,} images",
            f"predictions: {page}",
        ]

    def on_test_start(self) -> None:
        self.predictions = []

    def _score(self, split: str, images: Tensor, labels: Tensor) -> Tensor:
        logits: Tensor = self.evaluated(images)
        self.accuracy(logits, labels)
        self.log(f"{split}/accuracy", self.accuracy, on_step=False, on_epoch=True, prog_bar=True)
        loss = F.cross_entropy(logits.float(), labels)
        self.log(f"{split}/loss", loss, on_step=False, on_epoch=True, batch_size=len(labels), sync_dist=True)
        return logits
