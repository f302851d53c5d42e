"""Task of pictures from noise: a run leaves a diffusers pipeline, a sheet of what it draws, and scores of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sinuous.core.checks import check_range, check_sizes
from sinuous.core.tasks.denoising import Denoising
from sinuous.vision.io import MODES


class PictureDenoising(Denoising):
    """`Denoising` of pictures `[B, C, h, w]` from -1 to 1, which leaves a pipeline and a sheet in the run's folder.

    The sheet, `samples_SPLIT.png`, has a row for each of the first `rows` classes. Picture i of a row is drawn from
    seed + i, so that rows begin from the same noise. With a judge, more pictures are drawn, of all classes in turn, and
    `picture_scores.json` holds what `sinuous.vision.generation.scores` finds of them beside the pictures of the split.
    Of latents nothing is drawn. Steps and scale of the guidance are the pipeline's defaults.

    Args:
        scheduler: as of `Denoising`.
        num_classes: likewise.
        rows: of the sheet, a class each.
        columns: of the sheet.
        steps: of each picture.
        guidance_scale: of each picture.
        seed: of the first column, and of the first picture that is scored.
        judge: name of a classifier of the data, by which pictures are scored; None scores none.
        pictures: that are scored.
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
        judge: str | None = None,
        pictures: int = 1000,
        **options: Any,
    ) -> None:
        super().__init__(scheduler, num_classes, **options)
        check_sizes(**{"task.rows": rows, "task.columns": columns, "task.steps": steps, "task.pictures": pictures})
        check_range(0, float("inf"), **{"task.guidance_scale": guidance_scale})
        self.rows, self.columns = min(rows, num_classes), columns
        self.drawing: dict[str, Any] = {"guidance_scale": guidance_scale, "num_inference_steps": steps}
        self.seed = seed
        self.judge, self.pictures = judge, pictures

    def report(
        self, model: Any, data: Any, seen: Sequence[Any], scores: Mapping[str, float], folder: Path, split: str
    ) -> list[str]:
        from sinuous.vision.generation.drawing import save_rows
        from sinuous.vision.generation.pipelines import ClassConditionalPipeline

        lines = super().report(model, data, seen, scores, folder, split)
        # Of another step than training's: the scheduler of the task keeps its own.
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        names = dict(enumerate(data.classes))
        pipeline: Any = ClassConditionalPipeline(model, scheduler, id2label=names, defaults=self.drawing)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.save_pretrained(folder / "pipeline")
        if model.config.in_channels not in MODES:
            return [*lines, f"the pipeline in {folder / 'pipeline'}; it draws with the VAE that made these latents"]
        labels = [label for label in range(self.rows) for _ in range(self.columns)]
        seeds = [self.seed + column for _ in range(self.rows) for column in range(self.columns)]
        pictures = self._draw(pipeline, labels, seeds)
        sheet = folder / f"samples_{split}.png"
        save_rows(pictures, sheet, self.columns)
        lines.append(
            f"{len(pictures)} pictures of {self.rows} classes in {sheet}, the pipeline in {folder / 'pipeline'}"
        )
        if self.judge is not None:
            lines.append(self._scored(pipeline, data.split(split), self.judge, folder, split))
        return lines

    def _draw(self, pipeline: Any, labels: Sequence[int], seeds: Sequence[int]) -> Tensor:
        from sinuous.vision.generation.drawing import draw

        return draw(pipeline, labels, seeds, **self.drawing)

    def _scored(self, pipeline: Any, real: Any, judge: str, folder: Path, split: str) -> str:
        """A line on scores, which go into `folder`. The run is over: where there can be none, the line says why."""
        from sinuous.vision.generation.scores import score

        labels = torch.arange(self.pictures) % (self.num_classes or 1)
        made = 2 * self._draw(pipeline, labels.tolist(), range(self.seed, self.seed + self.pictures)) - 1
        try:
            values = score(made, labels, real=torch.stack([real[i][0] for i in range(len(real))]), judge=judge)
        except ValueError as error:
            return f"{split} pictures are not scored: {error}"
        path = folder / "picture_scores.json"
        path.write_text(json.dumps({split: values}, indent=2) + "\n")
        told = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        return f"{split} {self.pictures} pictures beside {len(real):,} real ones: {told}"
