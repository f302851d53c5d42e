"""Recurrences over a grid: heads of 64 channels, on the grid nearest to a square, from all four corners.

The same grid is a graph too, read from one corner.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sinuous.apps.bench.op_cases.contract import Case, Inputs, Peer, Prepared, Shape, heads_of, leaves, lstm
from sinuous.core.ops.grid_scan import ORIENTATIONS
from sinuous.core.ops.laws import dag_scan, grid_scan
from sinuous.core.ops.laws.declaration import Sample


def _high(length: int) -> int:
    """The shorter side of the grid nearest to a square."""
    return max(side for side in range(1, math.isqrt(length) + 1) if length % side == 0)


class GridCase(Case):
    """Axis 1 of the laws' sample is a side of the grid."""

    def make(self, shape: Shape, device: torch.device) -> Inputs:
        high = _high(shape.length)
        arguments = self.laws.at_size(self.sample(shape), shape.batch, high, device=device)
        return leaves({name: arguments[name] for name in self.uses})


def _sample(shape: Shape) -> Sample:
    heads, channels = heads_of(shape)
    wide = shape.length // _high(shape.length)
    return grid_scan.sample_of(wide, heads, channels, channels, ORIENTATIONS, mode="P", full=True)


def _row_by_row(inputs: Inputs) -> Prepared:
    return lstm({"x": inputs["q"].flatten(1, 2)})


GRID_SCAN = GridCase(
    laws=grid_scan.LAWS,
    sample=_sample,
    uses=("q", "k", "v", "source", "transition", "mark", "direct"),
    peers=(Peer("nn.LSTM", "torch", _row_by_row, same_function=False),),
    versus="nn.LSTM",
)


def grid_graph(cells: int) -> tuple[Tensor, Tensor]:
    """Edges to the right and down between the cells of a grid, and all pairs of edges that follow each other."""
    width = _high(cells)
    height = cells // width
    numbers = torch.arange(cells).view(width, height)
    right = torch.stack([numbers[:-1].flatten(), numbers[1:].flatten()])
    down = torch.stack([numbers[:, :-1].flatten(), numbers[:, 1:].flatten()])
    edges = torch.cat([right, down], 1)
    number = torch.full((2, width, height), -1)  # of the edges that leave a cell
    number[0, :-1] = torch.arange(right.shape[1]).view(width - 1, height)
    number[1, :, :-1] = right.shape[1] + torch.arange(down.shape[1]).view(width, height - 1)
    after = number.flatten(1)[:, edges[1]]
    lines = torch.stack([torch.arange(edges.shape[1]).expand_as(after), after]).flatten(1)
    return edges, lines[:, lines[1] >= 0]


def _graph_sample(shape: Shape) -> Sample:
    heads, channels = heads_of(shape)
    return dag_scan.sample_of(heads, channels, channels, full=True, graph=grid_graph)


DAG_SCAN = Case(
    laws=dag_scan.LAWS,
    sample=_graph_sample,
    uses=("q", "k", "v", "edges", "line_edges", "source", "transition", "mark", "direct"),
    peers=(Peer("nn.LSTM", "torch", lstm, same_function=False),),
    versus="nn.LSTM",
)
