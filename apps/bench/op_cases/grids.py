"""Recurrences over a grid: heads of 64 channels, all four corners, on the grid nearest to a square."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sinuous.apps.bench.op_cases.contract import Case, Inputs, Peer, Prepared, Shape, leaves, lstm
from sinuous.core import ops
from sinuous.core.ops.grid_scan import FAMILY as GRID_SCAN_FAMILY
from sinuous.core.ops.grid_scan import ORIENTATIONS

CHANNELS = 64


def _inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    channels = min(CHANNELS, shape.dim)
    high = max(side for side in range(1, math.isqrt(shape.length) + 1) if shape.length % side == 0)
    cells = (shape.batch, high, shape.length // high, max(shape.dim // channels, 1))

    def normal(*size: int) -> Tensor:
        return torch.randn(*cells, *size, generator=generator)

    arguments = {
        "q": normal(channels),
        "k": normal(channels),
        "v": normal(channels),
        "source": normal(ORIENTATIONS, 2).sigmoid(),
        "transition": normal(ORIENTATIONS, 2, 2).tanh(),
        "mark": normal(ORIENTATIONS, 2).sigmoid(),
        "direct": normal().sigmoid(),
    }
    return leaves({name: t.to(device, dtype) for name, t in arguments.items()})


def _grid_scan(backend: str, **inputs: Any) -> Tensor:
    y = ops.grid_scan(**inputs, backend=backend)
    assert isinstance(y, Tensor)
    return y.flatten(1, 2)


def _row_by_row(inputs: Inputs) -> Prepared:
    return lstm({"x": inputs["q"].flatten(1, 2)})


GRID_SCAN = Case(
    family=GRID_SCAN_FAMILY,
    make=_inputs,
    run=_grid_scan,
    peers=(Peer("nn.LSTM", "torch", _row_by_row, same_function=False),),
    versus="nn.LSTM",
)
