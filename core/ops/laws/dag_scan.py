"""The laws of dag_scan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sinuous.core.ops.dag_scan import FAMILY, dag_scan
from sinuous.core.ops.laws.declaration import Arguments, Laws, Sample


def of_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edges: Tensor,
    line_edges: Tensor,
    source: Tensor,
    transition: Tensor,
    mark: Tensor,
    direct: Tensor | None = None,
    *,
    scale: float | None = None,
    return_state: bool = False,
    backend: str | None = None,
) -> Any:
    """Call `dag_scan` on a batch of graphs that are alike, `[B, N, …]` each, as one graph of B parts.

    Source: pLSTM (arXiv 2506.11997), section 3.
    """
    batch, nodes = q.shape[:2]
    rows = torch.arange(batch, device=q.device).unsqueeze(1)
    parts = (edges.unsqueeze(1) + nodes * rows).flatten(1), (line_edges.unsqueeze(1) + edges.shape[1] * rows).flatten(1)
    q, k, v, source, transition, mark = (t.flatten(0, 1) for t in (q, k, v, source, transition, mark))
    direct = None if direct is None else direct.flatten(0, 1)
    y = dag_scan(q, k, v, *parts, source, transition, mark, direct, scale=scale, backend=backend)
    y = y.unflatten(0, (batch, nodes))
    return (y, ()) if return_state else y


def _graph(nodes: int) -> tuple[Tensor, Tensor]:
    """A path and, from 5 nodes on, an edge past one of its nodes, so that there are as many edges, and pairs of them,
    as nodes; the last edge comes first."""
    edges = [(n, n + 1) for n in range(nodes - 1)]
    lines = [(n, n + 1) for n in range(nodes - 2)]
    if nodes >= 5:
        lines += [(0, len(edges)), (len(edges), 3)]
        edges.append((1, 3))
    moved = len(edges) - 1 - torch.tensor(lines, dtype=torch.int64).view(-1, 2).T
    return torch.tensor(edges, dtype=torch.int64).view(-1, 2).T.flip(1), moved


def sample_of(
    heads: int, keys: int, values: int, *, full: bool = False, graph: Callable[[int], tuple[Tensor, Tensor]] = _graph
) -> Sample:
    def sample(random: Callable[..., Tensor], batch: int, length: int, sequences: int) -> Arguments:
        edges, line_edges = graph(length)
        count, lines = edges.shape[1], line_edges.shape[1]
        arguments: Arguments = {
            "q": random(batch, length, heads, keys),
            "k": random(batch, length, heads, keys),
            "v": random(batch, length, heads, values),
            "edges": edges,
            "line_edges": line_edges,
            "source": torch.sigmoid(random(batch, count, heads)),
            "transition": torch.tanh(random(batch, lines, heads)) / 2,
            "mark": torch.sigmoid(random(batch, count, heads)),
        }
        if full:
            arguments |= {"direct": random(batch, length, heads), "scale": 0.7}
        return arguments

    return sample


# A graph has no time axis to split, reverse or pack along. Its states live on the edges, of which there may be many
# more than nodes, and the levels keep them all: tests/core/test_dag_scan.py has the laws of graphs.
LAWS = Laws(
    family=FAMILY,
    call=of_rows,
    variants={"plain": sample_of(2, 4, 6), "full": sample_of(2, 5, 4, full=True), "small": sample_of(1, 1, 1)},
    wide=sample_of(3, 64, 48, full=True),
    time=("q", "k", "v", "edges", "line_edges", "source", "transition", "mark", "direct"),
    holds=frozenset({"isolation"}),
    state="E K V",
    parallel_cost="(2 E + L) K V / N, level by level",
    step_cost="(2 E + L) K V / N",
    refusals={
        r"q must have shape \[N, H, K\]": lambda a: {**a, "q": a["q"][..., None]},
        r"k must have shape \[10, 2, 5\]": lambda a: {**a, "k": a["k"][..., :3]},
        r"v must have shape \[10, 2, V\]": lambda a: {**a, "v": a["v"][:, :, :1]},
        r"edges must be int32 or int64 of shape \[2, pairs\]": lambda a: {**a, "edges": a["edges"].double()},
        r"edges must be pairs of nodes, \(from, to\), from 0 to 9": lambda a: {**a, "edges": a["edges"] + 7},
        r"edges must be those of a graph without cycles": lambda a: {
            **a,
            "edges": torch.cat([a["edges"][:, 1:], a["edges"][:, 1:2].flip(0)], 1),
            "line_edges": a["line_edges"][:, :0],
            "transition": a["transition"][:, :0],
        },
        r"line_edges must be pairs of edges": lambda a: {**a, "line_edges": a["line_edges"] + 7},
        r"line_edges must join edges that meet at a node": lambda a: {**a, "line_edges": a["line_edges"].flip(0)},
        r"source must have shape \[10, 2\]": lambda a: {**a, "source": a["source"][..., :1]},
        r"transition must have shape \[10, 2\]": lambda a: {**a, "transition": a["transition"][..., :1]},
        r"mark must have shape \[10, 2\]": lambda a: {**a, "mark": a["mark"][..., :1]},
        r"direct must have shape \[10, 2\]": lambda a: {**a, "direct": a["direct"][..., :1]},
    },
)
