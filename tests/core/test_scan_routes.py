from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from sinuous.core.scan_routes import (
    CROSS,
    Route,
    list_routes,
    scan_route,
    sum_to_cells,
    to_cells,
    to_sequence,
    to_sequences,
)

SIDES = st.integers(1, 12)


def cells(route: Route, width: int) -> list[tuple[int, int]]:
    return [divmod(i, width) for i in route.order.tolist()]


def is_bijection(route: Route, height: int, width: int) -> bool:
    x = torch.randn(2, height * width, 3)
    whole = torch.equal(route.order.sort().values, torch.arange(height * width))
    sequence = route.to_sequence(x)
    return whole and torch.equal(sequence, x[:, route.order]) and torch.equal(route.to_cells(sequence), x)


@pytest.mark.parametrize("name", list_routes())
@given(height=SIDES, width=SIDES, window=st.integers(1, 5))
@example(height=1, width=1, window=2)
@example(height=1, width=7, window=2)
@example(height=7, width=1, window=2)
@example(height=3, width=5, window=2)
def test_bijection_and_inverse(name: str, height: int, width: int, window: int) -> None:
    assert is_bijection(scan_route(name, height, width, window=window), height, width)


@given(height=SIDES, width=SIDES)
@example(height=3, width=5)
def test_cross_is_four_bijections_and_two_pairs_of_opposites(height: int, width: int) -> None:
    routes = [scan_route(name, height, width) for name in CROSS]
    assert all(is_bijection(route, height, width) for route in routes)
    assert torch.equal(routes[0].order.flip(0), routes[2].order)
    assert torch.equal(routes[1].order.flip(0), routes[3].order)
    assert cells(routes[1], width)[:height] == [(row, 0) for row in range(height)]


@pytest.mark.parametrize("name", list_routes())
@given(height=SIDES, width=SIDES)
@example(height=3, width=5)
def test_following_a_route_by_name_equals_following_its_indices(name: str, height: int, width: int) -> None:
    route, x = scan_route(name, height, width), torch.randn(2, height * width, 3)
    sequence = to_sequence(x, name, height, width)
    assert torch.equal(sequence, route.to_sequence(x))
    assert torch.equal(to_cells(sequence, name, height, width), x)


@given(height=st.integers(0, 6), width=st.integers(0, 6), batch=st.integers(0, 3))
@example(height=3, width=4, batch=2)
def test_several_routes_at_once_equal_one_after_the_other(height: int, width: int, batch: int) -> None:
    routes = ("serpentine", "column_serpentine", "hilbert")
    x = torch.randn(batch, height * width, 3, dtype=torch.float64, requires_grad=True)
    sequences = to_sequences(x, routes, height, width)
    expected = torch.stack([to_sequence(x, name, height, width) for name in routes], 2)
    assert torch.equal(sequences, expected)
    back = sum_to_cells(sequences.square(), routes, height, width)
    apart = sum(to_cells(expected[:, :, k].square(), name, height, width) for k, name in enumerate(routes))
    torch.testing.assert_close(back, apart)
    gradients = [torch.autograd.grad(y.sin().sum(), x)[0] for y in (back, apart)]
    torch.testing.assert_close(*gradients)


def test_routes_at_once_are_differentiated_in_every_way() -> None:
    def there_and_back(x: Tensor) -> Tensor:
        sequences = to_sequences(x, ("serpentine", "column_serpentine"), 2, 3)
        return sum_to_cells(sequences.square(), ("serpentine", "column_serpentine"), 2, 3)

    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(there_and_back, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(there_and_back, x)
    rows = torch.func.vmap(there_and_back)(torch.stack([x, 2 * x]))
    torch.testing.assert_close(rows, torch.stack([there_and_back(x), there_and_back(2 * x)]))
    for op in (torch.ops.sinuous.take_orders, torch.ops.sinuous.sum_orders):
        order = torch.stack([torch.randperm(6), torch.randperm(6)], 1)
        cells = x if op is torch.ops.sinuous.take_orders else torch.randn(2, 6, 2, 3, requires_grad=True)
        torch.library.opcheck(op.default, (cells, order, order.argsort(0)))


def test_the_plain_routes_copy_at_most_once() -> None:
    x = torch.randn(1, 12, 2)
    assert to_sequence(x, "raster", 3, 4) is x
    assert to_cells(x, "raster", 3, 4) is x
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        to_sequence(x, "column", 3, 4)
    assert sum(event.name == "aten::copy_" for event in profile.events()) == 1


@pytest.mark.parametrize("name", list_routes())
def test_a_route_by_name_compiles(name: str) -> None:
    def there_and_back(x: torch.Tensor) -> torch.Tensor:
        return to_cells(2 * to_sequence(x, name, 3, 5), name, 3, 5)

    torch.compiler.reset()
    x = torch.randn(2, 15, 3)
    assert torch.equal(torch.compile(there_and_back, fullgraph=True, backend="aot_eager")(x), 2 * x)


def test_orders_on_a_small_grid() -> None:
    orders = {name: scan_route(name, 2, 3).order.tolist() for name in list_routes()}
    assert orders["raster"] == [0, 1, 2, 3, 4, 5]
    assert orders["reversed"] == [5, 4, 3, 2, 1, 0]
    assert orders["column"] == [0, 3, 1, 4, 2, 5]
    assert orders["column_reversed"] == [5, 2, 4, 1, 3, 0]
    assert orders["serpentine"] == [0, 1, 2, 5, 4, 3]
    assert orders["column_serpentine"] == [3, 0, 1, 4, 5, 2]
    assert orders["windows"] == [0, 1, 3, 4, 2, 5]


def test_hilbert_on_a_square_is_hilberts_curve() -> None:
    assert cells(scan_route("hilbert", 2, 2), 2) == [(0, 0), (1, 0), (1, 1), (0, 1)]
    quarters = [(row // 4, column // 4) for row, column in cells(scan_route("hilbert", 8, 8), 8)]
    assert all(len(set(quarters[k : k + 16])) == 1 for k in range(0, 64, 16))


@given(height=SIDES, width=SIDES)
@example(height=3, width=5)
@example(height=1, width=9)
def test_neighbours_in_time_are_neighbours_in_space(height: int, width: int) -> None:
    """One step along an axis; the curve takes one diagonal where its ends are of one colour and its cells even."""
    must = max(height, width) % 2 == 1 and min(height, width) % 2 == 0 and min(height, width) > 2
    for name, diagonals in (("serpentine", 0), ("column_serpentine", 0), ("hilbert", int(must))):
        path = cells(scan_route(name, height, width), width)
        steps = [(abs(a - c), abs(b - d)) for (a, b), (c, d) in itertools.pairwise(path)]
        assert max(map(max, steps), default=1) == 1
        assert sum(step == (1, 1) for step in steps) == diagonals


def test_a_route_made_without_data_leaves_the_next_one_whole() -> None:
    with torch.device("meta"):
        assert scan_route("hilbert", 5, 9).order.is_meta
    first = scan_route("hilbert", 5, 9)
    expected = first.order.clone()
    assert not expected.is_meta
    first.order.zero_()
    assert torch.equal(scan_route("hilbert", 5, 9).order, expected)
    assert scan_route("raster", 0, 4).order.shape == (0,)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="did you mean 'hilbert'"):
        scan_route("hilbertt", 2, 2)
    with pytest.raises(ValueError, match="did you mean 'serpentine'"):
        to_sequence(torch.zeros(1, 4, 1), "serpentin", 2, 2)
    with pytest.raises(ValueError, match="window must be at least 1"):
        scan_route("windows", 2, 2, window=0)
    with pytest.raises(ValueError, match="height must be 0 or more"):
        scan_route("raster", -1, 2)
