"""dag_scan beyond the shared laws: sums over paths, grids and rows as graphs, edges in any order, parts apart."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from sinuous.core.ops import dag_scan, gla, grid_scan

FORMS = ["torch", "recurrent"]
every_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def line_graph(edges: Tensor) -> Tensor:
    pairs = [(i, j) for i, j in itertools.product(range(edges.shape[1]), repeat=2) if edges[1, i] == edges[0, j]]
    return torch.tensor(pairs, dtype=torch.int64).view(-1, 2).T


def sample(edges: Tensor, nodes: int, heads: int = 2, keys: int = 3, values: int = 4) -> dict[str, Any]:
    line_edges = line_graph(edges)
    return {
        "q": normal(nodes, heads, keys),
        "k": normal(nodes, heads, keys),
        "v": normal(nodes, heads, values),
        "edges": edges,
        "line_edges": line_edges,
        "source": normal(edges.shape[1], heads),
        "transition": normal(line_edges.shape[1], heads),
        "mark": normal(edges.shape[1], heads),
        "direct": normal(nodes, heads),
    }


GRAPH = torch.tensor([[0, 2, 0, 1, 3, 3, 1, 4, 0], [2, 3, 1, 3, 4, 5, 4, 5, 2]])  # with two edges from 0 to 2


@every_form
def test_a_node_reads_the_sum_over_all_paths_to_it(form: str) -> None:
    a = sample(GRAPH, 6)
    tails, heads = GRAPH.tolist()
    of_pair = {tuple(pair): n for n, pair in enumerate(a["line_edges"].T.tolist())}
    weight = torch.zeros(6, 6, 2, dtype=torch.float64)  # to, from

    def walk(start: int, edge: int, carried: Tensor) -> None:
        weight[heads[edge], start] += carried * a["mark"][edge]
        for following in range(len(tails)):
            if (edge, following) in of_pair:
                walk(start, following, carried * a["transition"][of_pair[edge, following]])

    for edge, tail in enumerate(tails):
        walk(tail, edge, a["source"][edge])
    weight += torch.diag_embed(a["direct"].T).movedim(0, 2)
    scores = torch.einsum("nhk,mhk->nmh", a["q"], a["k"]) * 3**-0.5
    expected = torch.einsum("nmh,mhv->nhv", scores * weight, a["v"])
    torch.testing.assert_close(dag_scan(**a, backend=form), expected, atol=1e-12, rtol=0)


@every_form
@pytest.mark.parametrize("sides", [(1, 1), (4, 3), (1, 6), (5, 1), (3, 7)])
def test_a_grid_is_a_graph(form: str, sides: tuple[int, int]) -> None:
    """Outputs and gradients are those of grid_scan, whose gates lie with the cells."""
    width, height = sides
    cells = (1, width, height, 2)
    inputs = {name: normal(*cells, 3) for name in ("q", "k", "v")} | {"direct": normal(*cells)}
    gates = {"source": normal(*cells, 1, 2), "transition": normal(*cells, 1, 2, 2), "mark": normal(*cells, 1, 2)}
    leaves = {name: t.requires_grad_() for name, t in (inputs | gates).items()}
    edges, kinds = [], []
    for x, y in itertools.product(range(width), range(height)):
        for kind, (right, down) in enumerate(((1, 0), (0, 1))):
            if x + right < width and y + down < height:
                edges.append((x * height + y, (x + right) * height + y + down))
                kinds.append(kind)
    order = torch.randperm(len(edges))
    graph = torch.tensor(edges, dtype=torch.int64).view(-1, 2).T[:, order]
    kind = torch.tensor(kinds, dtype=torch.int64)[order]
    lines = line_graph(graph)
    flat = {name: t[0].flatten(0, 1) for name, t in leaves.items()}  # [cells, heads, …]
    (tails, heads), (before, after) = graph, lines
    y = dag_scan(
        flat["q"], flat["k"], flat["v"], graph, lines, flat["source"][tails, :, 0, kind],
        flat["transition"][tails[after], :, 0, kind[after], kind[before]], flat["mark"][heads, :, 0, kind],
        flat["direct"], backend=form,
    )  # fmt: skip
    expected = grid_scan(**leaves, mode="free")
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(y, expected[0].flatten(0, 1), atol=1e-10, rtol=0)
    cotangent = torch.randn_like(y)
    found = torch.autograd.grad(y, list(leaves.values()), cotangent)
    wanted = torch.autograd.grad(expected[0].flatten(0, 1), list(leaves.values()), cotangent)
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=0)


def test_a_path_is_gated_linear_attention() -> None:
    """With S = M = 1 and D = 1, and T the decay at the node between two edges."""
    q, k, v, log_decay = normal(9, 2, 3), normal(9, 2, 3), normal(9, 2, 4), -normal(9, 2).exp()
    edges = torch.stack([torch.arange(8), torch.arange(1, 9)])
    lines = torch.stack([torch.arange(7), torch.arange(1, 8)])
    decay = log_decay.exp()
    mark, ones = decay[1:], torch.ones(8, 2, dtype=torch.float64)
    y = dag_scan(q, k, v, edges, lines, ones, decay[1:8], mark, torch.ones(9, 2, dtype=torch.float64))
    row = log_decay.unsqueeze(-1).expand(9, 2, 3)
    expected = gla(q[None], k[None], v[None], row[None])
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(y, expected[0], atol=1e-10, rtol=0)


@every_form
def test_the_order_of_edges_and_of_nodes_is_free(form: str) -> None:
    a = sample(GRAPH, 6)
    expected = dag_scan(**a, backend=form)
    nodes, edges, lines = torch.randperm(6), torch.randperm(9), torch.randperm(a["line_edges"].shape[1])
    moved = {name: a[name][nodes] for name in ("q", "k", "v", "direct")}
    moved |= {name: a[name][edges] for name in ("source", "mark")}
    moved["transition"] = a["transition"][lines]
    moved["edges"] = nodes.argsort()[a["edges"][:, edges]].int()
    moved["line_edges"] = edges.argsort()[a["line_edges"][:, lines]].int()
    torch.testing.assert_close(dag_scan(**moved, backend=form), expected[nodes], atol=1e-12, rtol=0)


def test_pairs_that_are_left_out_hand_nothing_on() -> None:
    a = sample(GRAPH, 6)
    closed = a | {"transition": a["transition"].clone()}
    closed["transition"][::2] = 0
    pruned = a | {"transition": a["transition"][1::2], "line_edges": a["line_edges"][:, 1::2]}
    torch.testing.assert_close(dag_scan(**pruned), dag_scan(**closed), atol=1e-13, rtol=0)
    alone = a | {"transition": a["transition"][:0], "line_edges": a["line_edges"][:, :0]}
    assert not torch.allclose(dag_scan(**alone), dag_scan(**a))


@every_form
def test_nodes_that_are_no_number_reach_those_behind_them_alone(form: str) -> None:
    a = sample(GRAPH, 6)
    a["v"][3] = torch.nan
    y = dag_scan(**a, backend=form)
    assert y[[3, 4, 5]].isnan().all()
    assert y[[0, 1, 2]].isfinite().all()


def test_graphs_without_edges_or_nodes() -> None:
    for nodes in (0, 4):
        a = sample(torch.zeros(2, 0, dtype=torch.int64), nodes)
        expected = (a["direct"] * (a["q"] * a["k"]).sum(-1) * 3**-0.5)[..., None] * a["v"]
        torch.testing.assert_close(dag_scan(**a), expected)


def test_a_chain_of_many_nodes_takes_one_pass() -> None:
    nodes = 20_000
    edges = torch.stack([torch.arange(nodes - 1), torch.arange(1, nodes)])
    lines = torch.stack([torch.arange(nodes - 2), torch.arange(1, nodes - 1)])
    ones = torch.ones(nodes, 1, 1)
    y = dag_scan(ones, ones, ones, edges, lines, ones[1:, :, 0], ones[2:, :, 0], ones[1:, :, 0])
    assert y.flatten().tolist() == list(range(nodes))


def test_a_cycle_is_refused() -> None:
    for edges in ([[0, 1, 2], [1, 2, 0]], [[0, 1], [1, 1]]):
        a = sample(torch.tensor(edges), 3)
        with pytest.raises(ValueError, match="edges must be those of a graph without cycles"):
            dag_scan(**a)
