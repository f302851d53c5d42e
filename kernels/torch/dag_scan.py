"""The recurrence over a directed acyclic graph, level by level.

Edges that leave nodes of one depth are a level, and depend on edges of earlier levels alone. The backward pass makes
the states again and walks the levels from the last.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sinuous.kernels.precision import working_dtype

Level = tuple[Tensor, Tensor, Tensor]
"""Edges, line edges into them, and the place of each such line edge's target among the edges."""


def depths(edges: Tensor, nodes: int) -> list[int] | None:
    """Number of edges of the longest path to each node; `None` where the graph has a cycle."""
    tails, heads = edges.tolist()
    leaving: list[list[int]] = [[] for _ in range(nodes)]
    waiting = [0] * nodes
    for tail, head in zip(tails, heads, strict=True):
        leaving[tail].append(head)
        waiting[head] += 1
    depth, ready = [0] * nodes, [node for node in range(nodes) if waiting[node] == 0]
    for node in ready:
        for head in leaving[node]:
            depth[head] = max(depth[head], depth[node] + 1)
            waiting[head] -= 1
            if waiting[head] == 0:
                ready.append(head)
    return depth if len(ready) == nodes else None


def levels(edges: Tensor, line_edges: Tensor, depth: Tensor) -> list[Level]:
    """Edges by the depth of the node that they leave."""
    if edges.shape[1] == 0:
        return []
    of_edge = depth[edges[0]]
    of_line = of_edge[line_edges[1]]
    count = int(of_edge.max()) + 1
    parts = [of.argsort(stable=True).split(torch.bincount(of, minlength=count).tolist()) for of in (of_edge, of_line)]
    place = torch.empty_like(of_edge)
    for members in parts[0]:
        place[members] = torch.arange(members.numel(), device=edges.device)
    return [(members, lines, place[line_edges[1, lines]]) for members, lines in zip(*parts, strict=True)]


def _states(
    by_level: Sequence[Level],
    k: Tensor,
    v: Tensor,
    edges: Tensor,
    line_edges: Tensor,
    source: Tensor,
    transition: Tensor,
) -> Tensor:
    states = k.new_zeros(edges.shape[1], *k.shape[1:], v.shape[2])
    for members, lines, place in by_level:
        tails = edges[0, members]
        fresh = (source[members].unsqueeze(-1) * k[tails]).unsqueeze(-1) * v[tails].unsqueeze(-2)
        handed_on = transition[lines, :, None, None] * states[line_edges[0, lines]]
        states[members] = fresh.index_add_(0, place, handed_on)
    return states


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edges: Tensor,
    line_edges: Tensor,
    source: Tensor,
    transition: Tensor,
    mark: Tensor,
    direct: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    dtype = working_dtype(q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, values = q.to(dtype) * scale, k.to(dtype), v.to(dtype)
    source, transition, mark = source.to(dtype), transition.to(dtype), mark.to(dtype)
    depth = torch.tensor(depths(edges, q.shape[0]), dtype=torch.int64, device=q.device)
    states = _states(levels(edges, line_edges, depth), k, values, edges, line_edges, source, transition)
    read = mark.unsqueeze(-1) * (q[edges[1]].unsqueeze(-2) @ states).squeeze(-2)
    y = torch.zeros_like(values).index_add_(0, edges[1], read)
    if direct is not None:
        y += (direct.to(dtype) * (q * k).sum(-1)).unsqueeze(-1) * values
    return y.to(v.dtype), depth.to(dtype)


def backward(
    grads: Sequence[Tensor | None],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edges: Tensor,
    line_edges: Tensor,
    source: Tensor,
    transition: Tensor,
    mark: Tensor,
    direct: Tensor | None,
    scale: float | None,
    depth: Tensor,
) -> list[Tensor | None]:
    dtype = working_dtype(q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = q.to(dtype) * scale, k.to(dtype), v.to(dtype)
    source, transition, mark = source.to(dtype), transition.to(dtype), mark.to(dtype)
    dy = torch.zeros_like(v) if grads[0] is None else grads[0].to(dtype)
    tails, heads = edges
    by_level = levels(edges, line_edges, depth.long())
    states = _states(by_level, k, v, edges, line_edges, source, transition)

    q_h, dy_h = q[heads], dy[heads]
    from_states = (states @ dy_h.unsqueeze(-1)).squeeze(-1)
    d_mark = (q_h * from_states).sum(-1)
    dq = torch.zeros_like(q).index_add_(0, heads, mark.unsqueeze(-1) * from_states)
    d_states = (mark.unsqueeze(-1) * q_h).unsqueeze(-1) * dy_h.unsqueeze(-2)
    d_transition = torch.zeros_like(transition)
    for _, lines, _ in reversed(by_level):
        before, after = line_edges[:, lines]
        d_transition[lines] = (d_states[after] * states[before]).sum((-2, -1))
        d_states.index_add_(0, before, transition[lines, :, None, None] * d_states[after])

    k_t, v_t = k[tails], v[tails]
    by_value = (d_states @ v_t.unsqueeze(-1)).squeeze(-1)
    by_key = (k_t.unsqueeze(-2) @ d_states).squeeze(-2)
    d_source = (k_t * by_value).sum(-1)
    dk = torch.zeros_like(k).index_add_(0, tails, source.unsqueeze(-1) * by_value)
    dv = torch.zeros_like(v).index_add_(0, tails, source.unsqueeze(-1) * by_key)
    d_direct = None
    if direct is not None:
        match, pull = (q * k).sum(-1), (v * dy).sum(-1)
        d_direct, weight = match * pull, (direct.to(dtype) * pull).unsqueeze(-1)
        dq += weight * k
        dk += weight * q
        dv += (direct.to(dtype) * match).unsqueeze(-1) * dy
    return [dq * scale, dk, dv, d_source, d_transition, d_mark, d_direct]
