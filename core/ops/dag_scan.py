r"""Linear recurrence over a directed acyclic graph: matrix states on its edges.

An edge e leaves node n; the edges e' that enter n may hand their states on to it. H_n is what node n reads:

    C_e = S_e k_n v_nᵀ + Σ_{e'} T_{e'e} C_{e'}                         C ∈ R^{K×V} on each edge, for each head
    y_n = scale · (Σ_e M_e C_e + D_n k_n v_nᵀ)ᵀ q_n                    the sum over edges that enter n

The source S, transition T, mark M and direct D depend on the input alone, so that the recurrence is linear in the
states. T lives on the edges of the line graph, pairs (e', e) of edges that follow each other; pairs that are left out
hand nothing on. A node sees its own pair through D only. Between two nodes the weights of all paths are summed: states
stay bounded where Σ_e |T_{e'e}| ≤ 1 for every e' (propagation), or where the line graph joins no two edges in more than
one way and |T| ≤ 1 (diffusion).

A path is a gated linear attention, and a grid `grid_scan`, whose four orientations are four graphs.

Source: pLSTM, Pöppel et al. (arXiv 2506.11997), section 3.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sinuous.core.ops.checks import check_shape
from sinuous.core.ops.family import Family, define
from sinuous.core.ops.operators import operators
from sinuous.core.ops.public import public
from sinuous.kernels.arguments import DAGScan
from sinuous.kernels.precision import working_dtype
from sinuous.kernels.torch.dag_scan import depths


def recurrent(args: DAGScan) -> tuple[Tensor, Tensor]:
    """Run the definition edge by edge; autograd differentiates it to any order."""
    dtype = working_dtype(args.q.dtype)
    scale = args.q.shape[-1] ** -0.5 if args.scale is None else args.scale
    q, k, values = args.q.to(dtype) * scale, args.k.to(dtype), args.v.to(dtype)
    source, transition, mark = (t.to(dtype) for t in (args.source, args.transition, args.mark))
    tails, heads = args.edges.tolist()
    entering: list[list[tuple[int, int]]] = [[] for _ in tails]  # of each edge, (line edge, edge before it)
    for line, (before, after) in enumerate(args.line_edges.T.tolist()):
        entering[after].append((line, before))
    ys = list(torch.zeros_like(values).unbind(0))
    if args.direct is not None:
        ys = list(((args.direct.to(dtype) * (q * k).sum(-1)).unsqueeze(-1) * values).unbind(0))
    depth = depths(args.edges, q.shape[0]) or []
    states: dict[int, Tensor] = {}
    for edge in sorted(range(len(tails)), key=lambda edge: depth[tails[edge]]):
        tail, head = tails[edge], heads[edge]
        state = source[edge, :, None, None] * k[tail].unsqueeze(-1) * values[tail].unsqueeze(-2)
        for line, before in entering[edge]:
            state = state + transition[line, :, None, None] * states[before]
        states[edge] = state
        ys[head] = ys[head] + mark[edge].unsqueeze(-1) * (q[head].unsqueeze(-2) @ state).squeeze(-2)
    return (torch.stack(ys) if ys else values).to(args.v.dtype), torch.tensor(depth, dtype=dtype, device=q.device)


def _check(args: DAGScan) -> None:
    q, k, v, edges, line_edges = args.q, args.k, args.v, args.edges, args.line_edges
    if q.ndim != 3:
        raise ValueError(f"q must have shape [N, H, K] (got {list(q.shape)}); axis 0 are the nodes")
    nodes, heads = q.shape[:2]
    check_shape("k", k, tuple(q.shape), "keys are shaped like queries, [N, H, K]")
    if v.ndim != 3 or v.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"v must have shape [{nodes}, {heads}, V], with the nodes and heads of q (got {list(v.shape)})"
        )
    _check_pairs("edges", edges, nodes, "nodes, (from, to)")
    _check_pairs("line_edges", line_edges, edges.shape[1], "edges, (edge in, edge out)")
    check_shape("source", args.source, (edges.shape[1], heads), "one for each edge and head, [E, H]")
    check_shape("mark", args.mark, (edges.shape[1], heads), "one for each edge and head, [E, H]")
    check_shape("transition", args.transition, (line_edges.shape[1], heads), "one for each line edge and head, [L, H]")
    check_shape("direct", args.direct, (nodes, heads), "one for each node and head, [N, H]")
    apart = (edges[1, line_edges[0]] != edges[0, line_edges[1]]).nonzero()
    if apart.numel():
        line = int(apart[0])
        before, after = line_edges[:, line].tolist()
        raise ValueError(
            f"line_edges must join edges that meet at a node (got edges {before} and {after} in column {line}, "
            f"{edges[:, before].tolist()} and {edges[:, after].tolist()}); give (edge in, edge out)"
        )
    if depths(edges, nodes) is None:
        raise ValueError(
            f"edges must be those of a graph without cycles (got a cycle among {edges.shape[1]} edges); turn some "
            "around, for example from the smaller to the larger index"
        )


def _check_pairs(name: str, pairs: Tensor, count: int, meaning: str) -> None:
    if pairs.dtype not in (torch.int32, torch.int64) or pairs.ndim != 2 or pairs.shape[0] != 2:
        raise ValueError(
            f"{name} must be int32 or int64 of shape [2, pairs] (got {pairs.dtype} of shape {list(pairs.shape)}): "
            f"pairs of {meaning}"
        )
    if pairs.numel() and (int(pairs.min()) < 0 or int(pairs.max()) >= count):
        raise ValueError(
            f"{name} must be pairs of {meaning}, from 0 to {count - 1} (got {int(pairs.min())} to {int(pairs.max())})"
        )


def _fake(args: DAGScan) -> tuple[Tensor]:
    return (torch.empty(args.v.shape, dtype=args.v.dtype, device=args.v.device),)


def _depth(args: DAGScan) -> tuple[int, ...]:
    return (args.q.shape[0],)


def _multiply_adds(args: Any) -> int:
    count: int = (2 * args.edges[1] + args.line_edges[1]) * math.prod(args.q[1:]) * args.v[2]
    return count


FAMILY = Family(
    name="dag_scan",
    arguments=DAGScan,
    outputs=("y",),
    saved={"depth": _depth},
    integers=("edges", "line_edges"),
    forms=("torch", "recurrent"),
    fake=_fake,
    check=_check,
    recurrent=recurrent,
    options={},
    multiply_adds=_multiply_adds,
    time_axes=0,
)
define(FAMILY)


@public
def dag_scan(
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
    backend: str | None = None,
) -> Tensor:
    r"""Linear recurrence over a directed acyclic graph: `C_e = S_e k vᵀ + Σ T_{e'e} C_{e'}` on the edges, with k and v
    of the node that e leaves, and `y_n = scale · (Σ M_e C_e + D k vᵀ)ᵀ q` over the edges that enter node n.

    Several graphs are one graph whose parts do not touch.

    Args:
        q: queries `[N, H, K]`, one for each node.
        k: keys, shaped like q.
        v: values `[N, H, V]`.
        edges: int64 or int32 `[2, E]`, the nodes (from, to) of each edge, in any order. Edges may be parallel.
        line_edges: int64 or int32 `[2, L]`, pairs (edge in, edge out) of which the first ends where the second begins.
        source: S, `[E, H]`.
        transition: T, `[L, H]`.
        mark: M, `[E, H]`.
        direct: D, `[N, H]`; 0 if absent.
        scale: factor of the queries; K^-1/2 if absent.
        backend: `recurrent` or `torch`; the fastest that can run if absent.

    Returns:
        y `[N, H, V]` in the dtype of v, differentiable in every tensor of real numbers.

    Raises:
        ValueError: for a wrong shape, dtype, device or range, naming the argument, for line edges that do not meet at a
            node, and for a graph with a cycle.

    Source: pLSTM (arXiv 2506.11997), section 3.
    """
    return operators.dag_scan(q, k, v, edges, line_edges, source, transition, mark, direct, scale, backend or "")[0]
