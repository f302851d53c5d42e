"""Classification of pictures: the shared task, with a page of predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sinuous.core.tasks.classification import Classification
from sinuous.vision.drawing import prediction_grid


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
