"""Chunked forms in plain torch: they run wherever torch does."""

from __future__ import annotations

import torch


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run on `device` with `dtype`, or None if it can."""
    return None
