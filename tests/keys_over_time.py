"""Keys of every size for a softmax over time, and how gradients of such keys are compared."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

INF = float("inf")

KEYS: dict[str, Callable[[Tensor], Tensor]] = {
    "mild": lambda x: x,
    "strong": lambda x: 30 * x,
    "extreme": lambda x: 1e4 * x,
    "extreme and close": lambda x: 1e4 + x,
    "far below": lambda x: -1e4 + x,
    "rising": lambda x: x + 20 * torch.arange(x.shape[1], dtype=x.dtype)[:, None, None],
    "falling": lambda x: x - 20 * torch.arange(x.shape[1], dtype=x.dtype)[:, None, None],
    "half without weight": lambda x: torch.where(x > 0, x, -INF),
    "late start": lambda x: x.masked_fill(torch.arange(x.shape[1])[:, None, None] < 70, -INF),
    "never": lambda x: torch.full_like(x, -INF),
}


def joined(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the gradient of z, which is one more key, among those of the keys: by itself it may be next to nothing."""
    z = found.pop("initial_state.1")
    return {**found, "k": torch.cat([found["k"].double(), z.double()[:, None]], 1)}
