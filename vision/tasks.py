"""Tasks of pictures: the shared ones with pages of predictions and masks, and distillation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from timm.layers import get_device_dtype, trunc_normal_
from torch import Tensor, nn
from torchmetrics import MeanMetric

from sinuous.core.checks import check_range
from sinuous.core.tasks.classification import Classification
from sinuous.core.tasks.labelling import Labelling
from sinuous.core.tasks.task import Task
from sinuous.vision import distillation
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
            predicted = model(x.to(next(model.parameters()).device)).argmax(1).cpu()
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))
        page = mask_grid(
            [MaskedPicture(*row) for row in zip(x * std + mean, predicted, masks, strict=True)],
            data.classes,
            f"{split.capitalize()} set, mean IoU {scores['mean_iou']:.3f}",
            folder / "masks.png",
        )
        return [*super().report(model, data, seen, scores, folder, split), f"masks: {page}"]


class Distillation(Task):
    """Trains an isotropic student by an isotropic teacher, L_activation + λ L_masked (arXiv 2504.00037).

    The teacher reads whole pictures; labels are not used. Scores are the two losses and their sum, with the same masks
    each time. Model, optimizer and exported weights are the student's; the mask token, and the projection where widths
    differ, belong to the task.

    Args:
        teacher: a model of ours or timm's with as many patches as the student: its name, with its weights' tag, or the
            model itself. It is frozen.
        teacher_options: of a teacher that is named, such as `img_size`.
        masked: share of the patches that the student does not see.
        mask_weight: λ.
        stages: number of equal parts of the depth at whose ends tokens are compared.

    Raises:
        ValueError: for an unknown teacher (naming the nearest), models that are not isotropic or have too few blocks,
            or a number out of its range.
    """

    def __init__(
        self,
        teacher: str | nn.Module,
        teacher_options: Mapping[str, Any] | None = None,
        masked: float = 0.75,
        mask_weight: float = 1.0,
        stages: int = 4,
    ) -> None:
        super().__init__({name: MeanMetric() for name in ("loss", "activation_loss", "masked_loss")})
        if not 0 < masked < 1:
            raise ValueError(f"task.masked must lie between 0 and 1, both excluded (got {masked})")
        check_range(0, math.inf, mask_weight=mask_weight)
        if isinstance(teacher, str):
            teacher = distillation.load_teacher(teacher, **(teacher_options or {}))
        distillation.check_isotropic("teacher", teacher, stages)
        # In a list: no part of checkpoints, of averages or of what is put into training mode.
        self._teacher = [teacher.eval().requires_grad_(False)]
        self.masked, self.mask_weight, self.stages = masked, mask_weight, stages

    def prepare(self, model: nn.Module) -> None:
        distillation.check_isotropic("student", model, self.stages)
        width, teacher_width = (int(cast("Any", m).num_features) for m in (model, self._teacher[0]))
        dd = get_device_dtype(model)
        self.mask_token = nn.Parameter(trunc_normal_(torch.empty(width, **dd), std=0.02))
        same = width == teacher_width
        self.project = nn.Identity() if same else nn.Linear(width, teacher_width, **dd)

    def _losses(self, model: nn.Module, x: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        self._teacher[0] = self._teacher[0].to(x.device)
        with torch.no_grad():
            teacher_stages, teacher_output = distillation.stages_and_output(self._teacher[0], x, self.stages)
        mask = distillation.random_mask(len(x), teacher_output.shape[1], self.masked, generator).to(x.device)
        with distillation.masked_patches(model, mask, self.mask_token):
            student_stages, output = distillation.stages_and_output(model, x, self.stages)
        visible = [
            [distillation.visible(tokens, mask) for tokens in stages] for stages in (teacher_stages, student_stages)
        ]
        masked = distillation.masked_loss(teacher_output, self.project(output), mask)
        return distillation.activation_loss(*visible), masked

    def loss(self, model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        activation, masked = self._losses(model, batch[0], None)
        return activation + self.mask_weight * masked

    def score(self, model: nn.Module, batch: Sequence[Tensor]) -> int:
        """Update the scores; returns the number of pictures."""
        activation, masked = self._losses(model, batch[0], torch.Generator().manual_seed(0))
        count = len(batch[0])
        self.count("loss", activation + self.mask_weight * masked, count)
        self.count("activation_loss", activation, count)
        self.count("masked_loss", masked, count)
        return count
