"""Recurrences over a grid: heads of 64 channels, on the grid nearest to a square, from all four corners.

The same grid is a graph too, read from one corner.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sinuous.apps.bench.op_cases.contract import Case, Inputs, Peer, Prepared, Shape, leaves, lstm
from sinuous.core import ops
from sinuous.core.ops.dag_scan import FAMILY as DAG_SCAN_FAMILY
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


def grid_graph(width: int, height: int) -> tuple[Tensor, Tensor]:
    """Edges to the right and down between the cells of a grid, cell (x, y) at x · height + y, and all pairs of edges
    that follow each other."""
    cells = torch.arange(width * height).view(width, height)
    right = torch.stack([cells[:-1].flatten(), cells[1:].flatten()])
    down = torch.stack([cells[:, :-1].flatten(), cells[:, 1:].flatten()])
    edges = torch.cat([right, down], 1)
    number = torch.full((2, width, height), -1)  # of the edges that leave a cell
    number[0, :-1] = torch.arange(right.shape[1]).view(width - 1, height)
    number[1, :, :-1] = right.shape[1] + torch.arange(down.shape[1]).view(width, height - 1)
    after = number.flatten(1)[:, edges[1]]
    lines = torch.stack([torch.arange(edges.shape[1]).expand_as(after), after]).flatten(1)
    return edges, lines[:, lines[1] >= 0]


def _graph_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    channels = min(CHANNELS, shape.dim)
    heads = max(shape.dim // channels, 1)
    high = max(side for side in range(1, math.isqrt(shape.length) + 1) if shape.length % side == 0)
    edges, line_edges = grid_graph(high, shape.length // high)
    rows = torch.arange(shape.batch).unsqueeze(1)
    parts = {
        "edges": (edges.unsqueeze(1) + shape.length * rows).flatten(1).to(device),
        "line_edges": (line_edges.unsqueeze(1) + edges.shape[1] * rows).flatten(1).to(device),
    }
    counts = shape.batch * shape.length, parts["edges"].shape[1], parts["line_edges"].shape[1]

    def normal(count: int, *size: int) -> Tensor:
        return torch.randn(count, heads, *size, generator=generator)

    arguments = {
        "q": normal(counts[0], channels),
        "k": normal(counts[0], channels),
        "v": normal(counts[0], channels),
        "source": normal(counts[1]).sigmoid(),
        "transition": normal(counts[2]).sigmoid() / 2,
        "mark": normal(counts[1]).sigmoid(),
        "direct": normal(counts[0]).sigmoid(),
    }
    return {**leaves({name: t.to(device, dtype) for name, t in arguments.items()}), **parts}


def _dag_scan(backend: str, **inputs: Any) -> Tensor:
    y = ops.dag_scan(**inputs, backend=backend)
    assert isinstance(y, Tensor)
    return y


def _nodes_in_a_row(inputs: Inputs) -> Prepared:
    return lstm({"x": inputs["q"].unsqueeze(0)})


DAG_SCAN = Case(
    family=DAG_SCAN_FAMILY,
    make=_graph_inputs,
    run=_dag_scan,
    peers=(Peer("nn.LSTM", "torch", _nodes_in_a_row, same_function=False),),
    versus="nn.LSTM",
)
