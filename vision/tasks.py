"""Classification and segmentation of pictures: the shared tasks, with pages of predictions and masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from sinuous.core.tasks.classification import Classification
from sinuous.core.tasks.labelling import Labelling
from sinuous.vision.drawing import MaskedPicture, mask_grid, prediction_grid


class PictureClassification(Classification):
    """`Classification` that draws the first pictures of a tested split, and its surest mistakes, as a PNG."""

    def report(
        self, model: nn.Module, data: Any, seen: Sequence[Any], scores: Mapping[str, float], folder: Path, split: str
    ) -> list[str]:
        pictures = data.split(split)
        page = prediction_grid(
            torch.cat(list(seen)),
            lambda index: pictures[index][0],
            data.classes,
            data.mean,
            data.std,
            f"{split.capitalize()} set, accuracy {scores['accuracy']:.2%}",
            folder / "predictions.png",
        )
        return [*super().report(model, data, seen, scores, folder, split), f"predictions: {page}"]


class Segmentation(Labelling):
    """`Labelling` of pixels that draws the masks of the first pictures of a tested split as a PNG."""

    PICTURES: ClassVar[int] = 12

    def report(
        self, model: nn.Module, data: Any, seen: Sequence[Any], scores: Mapping[str, float], folder: Path, split: str
    ) -> list[str]:
        pairs = data.split(split)
        pictures, masks = zip(*(pairs[i] for i in range(min(self.PICTURES, len(pairs)))), strict=True)
        x = torch.stack(pictures)
        with torch.no_grad():
            found = model(x.to(next(model.parameters()).device)).argmax(1).cpu()
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))
        page = mask_grid(
            [MaskedPicture(*row) for row in zip(x * std + mean, found, masks, strict=True)],
            data.classes,
            f"{split.capitalize()} set, mean IoU {scores['mean_iou']:.3f}",
            folder / "masks.png",
        )
        return [*super().report(model, data, seen, scores, folder, split), f"masks: {page}"]
