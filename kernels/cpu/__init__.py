"""C kernels, compiled on first use."""

from __future__ import annotations

import torch


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run on `device` with `dtype`, or None if it can."""
    return "not built yet"
