"""Pictures of a pipeline, each of a seed of its own, and pictures in rows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SHOWN = 96
"""Pixels that the longer side of a small picture is enlarged to, about."""


def save_rows(pictures: Tensor, path: str | os.PathLike[str], columns: int) -> None:
    """Write pictures `[N, C, h, w]` from 0 to 1 in rows as one PNG, small ones enlarged by a whole factor."""
    from torchvision.utils import make_grid, save_image

    scale = max(1, SHOWN // max(pictures.shape[-2:]))
    enlarged = pictures.cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    save_image(make_grid(enlarged, nrow=columns, padding=4, pad_value=1.0), path, format="png")


def draw(pipeline: Any, class_labels: Sequence[int], seeds: Sequence[int], batch: int = 100, **options: Any) -> Tensor:
    """Pictures `[N, C, h, w]` from 0 to 1 of a pipeline, picture i from the noise of seed i.

    Args:
        pipeline: `ClassConditionalPipeline` or `AiMPipeline`.
        class_labels: a class each.
        seeds: a seed each.
        batch: pictures that are made together.
        **options: of the pipeline's call.
    """
    parts = []
    for start in range(0, len(class_labels), batch):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch]]
        labels = list(class_labels[start : start + batch])
        parts.append(pipeline(labels, generator=generators, output_type="pt", **options).images.cpu())
    return torch.cat(parts)
