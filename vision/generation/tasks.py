"""Task of pictures from noise: a run leaves a diffusers pipeline and a sheet of what it draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sinuous.core.checks import check_range, check_sizes
from sinuous.core.tasks.denoising import Denoising


class PictureDenoising(Denoising):
    """`Denoising` of pictures `[B, C, h, w]` from -1 to 1, which leaves a pipeline and a sheet in the run's folder.

    The sheet, `samples_SPLIT.png`, has a row for each of the first `rows` classes. Picture i of a row is drawn from
    seed + i, so that rows begin from the same noise.

    Args:
        scheduler: as of `Denoising`.
        num_classes: likewise.
        rows: of the sheet, a class each.
        columns: of the sheet.
        steps: of each picture.
        guidance_scale: of each picture.
        seed: of the first column.
        **options: further arguments of `Denoising`.

    Raises:
        ValueError: if a number is out of its range.
    """

    def __init__(
        self,
        scheduler: Any,
        num_classes: int,
        rows: int = 10,
        columns: int = 10,
        steps: int = 20,
        guidance_scale: float = 1.5,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(scheduler, num_classes, **options)
        check_sizes(**{"task.rows": rows, "task.columns": columns, "task.steps": steps})
        check_range(0, float("inf"), **{"task.guidance_scale": guidance_scale})
        self.rows, self.columns = min(rows, num_classes), columns
        self.steps, self.guidance_scale, self.seed = steps, guidance_scale, seed

    def report(
        self, model: nn.Module, data: Any, seen: Sequence[Any], scores: Mapping[str, float], folder: Path, split: str
    ) -> list[str]:
        from sinuous.vision.generation.drawing import save_rows
        from sinuous.vision.generation.pipelines import ClassConditionalPipeline

        lines = super().report(model, data, seen, scores, folder, split)
        # Of another step than training's: the scheduler of the task keeps its own.
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        pipeline: Any = ClassConditionalPipeline(model, scheduler, id2label=dict(enumerate(data.classes)))
        pipeline.set_progress_bar_config(disable=True)
        pipeline.save_pretrained(folder / "pipeline")
        labels = [label for label in range(self.rows) for _ in range(self.columns)]
        seeds = [self.seed + column for _ in range(self.rows) for column in range(self.columns)]
        pictures = pipeline(
            labels,
            guidance_scale=self.guidance_scale,
            num_inference_steps=self.steps,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
        ).images
        sheet = folder / f"samples_{split}.png"
        save_rows(pictures, sheet, self.columns)
        return [
            *lines,
            f"{len(pictures)} pictures of {self.rows} classes in {sheet}, the pipeline in {folder / 'pipeline'}",
        ]
