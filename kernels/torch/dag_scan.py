"""The recurrence over a directed acyclic graph, level by level.

Edges that leave nodes of one depth are a level, and depend on edges of earlier levels alone. The backward pass makes
the states again and walks the levels from the last.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sinuous.kernels.arguments import DAGScan
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


def _levels(edges: Tensor, line_edges: Tensor, depth: Tensor) -> list[Level]:
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


def _wide(args: DAGScan) -> tuple[DAGScan, float]:
    """The arguments in the precision of the states, their queries scaled, and the scale."""
    dtype = working_dtype(args.q.dtype)
    scale = args.q.shape[-1] ** -0.5 if args.scale is None else args.scale
    names = ("k", "v", "source", "transition", "mark", "direct")
    wide = {name: t.to(dtype) for name in names if (t := getattr(args, name)) is not None}
    return args._replace(q=args.q.to(dtype) * scale, **wide), scale


def _states(args: DAGScan, by_level: Sequence[Level]) -> Tensor:
    k, v, edges, transition = args.k, args.v, args.edges, args.transition
    states = k.new_zeros(edges.shape[1], *k.shape[1:], v.shape[2])
    for members, lines, place in by_level:
        tails = edges[0, members]
        fresh = (args.source[members].unsqueeze(-1) * k[tails]).unsqueeze(-1) * v[tails].unsqueeze(-2)
        handed_on = transition[lines, :, None, None] * states[args.line_edges[0, lines]]
        states[members] = fresh.index_add_(0, place, handed_on)
    return states


def forward(args: DAGScan) -> tuple[Tensor, Tensor]:
    """`(y, depth)`; see sinuous.core.ops.dag_scan."""
    (wide, _), heads = _wide(args), args.edges[1]
    depth = torch.tensor(depths(args.edges, args.q.shape[0]), dtype=torch.int64, device=args.q.device)
    states = _states(wide, _levels(args.edges, args.line_edges, depth))
    read = wide.mark.unsqueeze(-1) * (wide.q[heads].unsqueeze(-2) @ states).squeeze(-2)
    y = torch.zeros_like(wide.v).index_add_(0, heads, read)
    if wide.direct is not None:
        y += (wide.direct * (wide.q * wide.k).sum(-1)).unsqueeze(-1) * wide.v
    return y.to(args.v.dtype), depth.to(y.dtype)


def backward(args: DAGScan, grads: Sequence[Tensor | None], depth: Tensor) -> list[Tensor | None]:
    """Gradients of q, k, v, source, transition, mark and direct."""
    args, scale = _wide(args)
    q, k, v, source, transition = args.q, args.k, args.v, args.source, args.transition
    dy = torch.zeros_like(v) if grads[0] is None else grads[0].to(v.dtype)
    tails, heads = args.edges
    by_level = _levels(args.edges, args.line_edges, depth.long())
    states = _states(args, by_level)

    q_h, dy_h = q[heads], dy[heads]
    from_states = (states @ dy_h.unsqueeze(-1)).squeeze(-1)
    d_mark = (q_h * from_states).sum(-1)
    dq = torch.zeros_like(q).index_add_(0, heads, args.mark.unsqueeze(-1) * from_states)
    d_states = (args.mark.unsqueeze(-1) * q_h).unsqueeze(-1) * dy_h.unsqueeze(-2)
    d_transition = torch.zeros_like(transition)
    for _, lines, _ in reversed(by_level):
        before, after = args.line_edges[:, lines]
        d_transition[lines] = (d_states[after] * states[before]).sum((-2, -1))
        d_states.index_add_(0, before, transition[lines, :, None, None] * d_states[after])

    k_t, v_t = k[tails], v[tails]
    by_value = (d_states @ v_t.unsqueeze(-1)).squeeze(-1)
    by_key = (k_t.unsqueeze(-2) @ d_states).squeeze(-2)
    d_source = (k_t * by_value).sum(-1)
    dk = torch.zeros_like(k).index_add_(0, tails, source.unsqueeze(-1) * by_value)
    dv = torch.zeros_like(v).index_add_(0, tails, source.unsqueeze(-1) * by_key)
    d_direct = None
    if args.direct is not None:
        match, pull = (q * k).sum(-1), (v * dy).sum(-1)
        d_direct, weight = match * pull, (args.direct * pull).unsqueeze(-1)
        dq += weight * k
        dk += weight * q
        dv += (args.direct * match).unsqueeze(-1) * dy
    return [dq * scale, dk, dv, d_source, d_transition, d_mark, d_direct]
