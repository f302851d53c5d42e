"""Pictures in rows."""

from __future__ import annotations

import os

from torch import Tensor

SHOWN = 96
"""Pixels that the longer side of a small picture is enlarged to, about."""


def save_rows(pictures: Tensor, path: str | os.PathLike[str], columns: int) -> None:
    """Write pictures `[N, C, h, w]` from 0 to 1 in rows as one PNG, small ones enlarged by a whole factor."""
    from torchvision.utils import make_grid, save_image

    scale = max(1, SHOWN // max(pictures.shape[-2:]))
    enlarged = pictures.cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    save_image(make_grid(enlarged, nrow=columns, padding=4, pad_value=1.0), path, format="png")
