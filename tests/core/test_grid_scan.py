"""grid_scan beyond the shared laws: two axes, four orientations, rules of stability, and paths that can be counted."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity import (
    Arguments,
    assert_close,
    cast,
    cotangents,
    draw_from,
    gradients,
    named,
    run,
    run_with_gradients,
    with_leaves,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sinuous.core.ops import dispatch, grid_scan, ssd
from sinuous.core.ops.grid_scan import bounded
from sinuous.core.ops.laws import LAWS
from sinuous.kernels.arguments import GridScan
from sinuous.kernels.torch.grid_scan import backward, forward

GRID = LAWS["grid_scan"]
SIDES = [(1, 1), (1, 9), (9, 1), (4, 8), (7, 5), (14, 14), (24, 24)]


@pytest.fixture(scope="module", params=["cpu", "torch", "recurrent"])
def form(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    reason = dispatch.unavailable("grid_scan", GRID.family.forms, name, torch.device("cpu"), torch.float64)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return name


computed = pytest.mark.parametrize("form", ["cpu", "torch"], indirect=True)


def sample(width: int, height: int, *, orientations: int = 1, mode: str = "free", states: bool = True) -> Arguments:
    generator = torch.Generator().manual_seed(17 * width + height)
    batch, heads, keys, values = 2, 2, 3, 4

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def gate(*shape: int) -> Tensor:
        return torch.sigmoid(random(batch, width, height, heads, orientations, *shape))

    transition = gate(2, 2)
    if mode == "P":
        split, decay = gate(1), gate(1)
        transition = torch.stack([split * decay, 1 - split * decay], -2).expand(*split.shape[:-1], 2, 2)
    if mode == "D":
        transition = transition * torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    arguments = {
        "q": random(batch, width, height, heads, keys),
        "k": random(batch, width, height, heads, keys),
        "v": random(batch, width, height, heads, values),
        "source": gate(2),
        "transition": transition,
        "mark": gate(2),
        "direct": torch.sigmoid(random(batch, width, height, heads)),
        "mode": mode,
    }
    if states:
        arguments["left"] = random(batch, height, heads, orientations, keys, values)
        arguments["up"] = random(batch, width, heads, orientations, keys, values)
    return arguments


def three_lines(a: Arguments) -> Tensor:
    """The published loop of one orientation, cell by cell."""
    scores, y = a["q"].shape[-1] ** -0.5 * a["q"], torch.zeros_like(a["v"])
    S, M = a["source"][..., 0, :, None, None], a["mark"][..., 0, :, None, None]
    T = a["transition"][..., 0, :, :, None, None]
    C_r: dict[tuple[int, int], Any] = {}
    C_d: dict[tuple[int, int], Any] = {}
    for i in range(y.shape[1]):
        for j in range(y.shape[2]):
            at = (slice(None), i, j)
            pair = torch.einsum("bhk,bhv->bhkv", a["k"][at], a["v"][at])
            left, up = C_r.get((i - 1, j), 0), C_d.get((i, j - 1), 0)
            t, s, m = T[at], S[at], M[at]
            C_r[i, j] = t[:, :, 0, 0] * left + t[:, :, 0, 1] * up + s[:, :, 0] * pair
            C_d[i, j] = t[:, :, 1, 0] * left + t[:, :, 1, 1] * up + s[:, :, 1] * pair
            read = m[:, :, 0] * left + m[:, :, 1] * up + a["direct"][at][..., None, None] * pair
            y[at] = torch.einsum("bhk,bhkv->bhv", scores[at], read)
    return y


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("mode", ["P", "D"])
def test_equals_the_published_loop(form: str, mode: str, sides: tuple[int, int]) -> None:
    arguments = sample(*sides, mode=mode, states=False)
    expected = {"y": three_lines(arguments)}
    assert_close({"y": grid_scan(**arguments, backend=form)}, expected, 1e-12)
    assert_close({"y": run(GRID, form, arguments)[0]}, expected, 1e-12)


@pytest.mark.parametrize("sides", [(0, 3), (3, 0), *SIDES[:-1]])
@pytest.mark.parametrize("states", [True, False])
@computed
def test_gradients_agree_on_every_grid(form: str, states: bool, sides: tuple[int, int]) -> None:
    arguments = sample(*sides, orientations=4, mode="P", states=states)
    expected = run_with_gradients(GRID, "recurrent", arguments)
    assert_close(run_with_gradients(GRID, form, arguments), expected, 1e-10)


@pytest.mark.parametrize("sides", [(1, 6), (6, 1), (4, 8), (7, 5), (14, 13)])
@computed
def test_a_single_block_agrees_too(form: str, sides: tuple[int, int]) -> None:
    inputs, leaves = with_leaves(sample(*sides, orientations=4, mode="P", states=False))
    actual, expected = ({"y": grid_scan(**inputs, backend=name)} for name in (form, "recurrent"))
    grads = cotangents(expected, seed=1)
    assert_close(actual, expected, 1e-12)
    assert_close(gradients(actual, leaves, grads), gradients(expected, leaves, grads), 1e-10)


@pytest.mark.parametrize("sides", [(30, 40), (40, 31), (1, 1100), (1100, 1)])
@pytest.mark.parametrize("form", ["cpu"], indirect=True)
def test_large_grids_and_ragged_states_pass_in_several_pieces(form: str, sides: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    arguments = sample(*sides, orientations=4, mode="P")
    for name, width in (("q", 37), ("k", 37), ("v", 19)):
        arguments[name] = torch.randn(*arguments[name].shape[:-1], width, generator=generator).double()
    for name in ("left", "up"):
        arguments[name] = torch.randn(*arguments[name].shape[:-2], 37, 19, generator=generator).double()
    arguments = {k: v[:1] if isinstance(v, Tensor) else v for k, v in arguments.items()}
    actual, expected = (run_with_gradients(GRID, name, arguments) for name in (form, "torch"))
    assert_close(actual, expected, 1e-10)


@pytest.mark.parametrize("form", ["cpu"], indirect=True)
def test_same_bits_with_any_number_of_threads(form: str) -> None:
    arguments = cast(draw_from(GRID.wide, 2, 9), torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run_with_gradients(GRID, form, arguments))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][k], other[k]) for k in other)


def part(arguments: Arguments, axis: int, piece: slice) -> Arguments:
    """The arguments of a part of the grid, but for the states on the edge between the parts."""
    along = "up" if axis == 1 else "left"
    place = (slice(None),) * axis + (piece,)
    actual = {k: v[place] if isinstance(v, Tensor) and k not in ("left", "up") else v for k, v in arguments.items()}
    return {**actual, along: arguments[along][:, piece]}


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("cut", [0, 1, 8, 11])
def test_split_along_either_side_equals_whole(form: str, cut: int, axis: int) -> None:
    inputs, leaves = with_leaves(sample(11, 11, mode="P"))
    whole = named(run(GRID, form, inputs))
    y_first, (right, down) = run(GRID, form, part(inputs, axis, slice(0, cut)))
    second = part(inputs, axis, slice(cut, None)) | ({"left": right} if axis == 1 else {"up": down})
    y_second, (right_2, down_2) = run(GRID, form, second)
    ends = (right_2, torch.cat([down, down_2], 1)) if axis == 1 else (torch.cat([right, right_2], 1), down_2)
    actual = named((torch.cat([y_first, y_second], axis), ends))
    assert_close(actual, whole, 1e-12)
    grads = cotangents(whole, seed=3)
    assert_close(gradients(actual, leaves, grads), gradients(whole, leaves, grads), 1e-12)


def test_cell_by_cell_equals_whole(form: str) -> None:
    arguments = sample(3, 4)
    y, (right, down) = run(GRID, form, arguments)
    lefts, ups = list(arguments["left"].split(1, 1)), list(arguments["up"].split(1, 1))
    for i in range(3):
        for j in range(4):
            cell = part(part(arguments, 1, slice(i, i + 1)), 2, slice(j, j + 1))
            y_cell, (lefts[j], ups[i]) = run(GRID, form, {**cell, "left": lefts[j], "up": ups[i]})
            torch.testing.assert_close(y_cell[:, 0, 0], y[:, i, j], atol=1e-12, rtol=0)
    torch.testing.assert_close((torch.cat(lefts, 1), torch.cat(ups, 1)), (right, down), atol=1e-12, rtol=0)


def flip(t: Tensor, axes: list[int]) -> Tensor:
    return t.flip(axes) if axes else t


@pytest.mark.parametrize("orientation", [0, 1, 2, 3])
def test_an_orientation_is_the_grid_turned(form: str, orientation: int) -> None:
    arguments = sample(9, 10, mode="P")
    axes = [axis for axis, bit in ((1, 1), (2, 2)) if orientation & bit]
    along_y, along_x = [1] * (orientation >= 2), [1] * (orientation % 2)
    turned = {k: flip(v, axes) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    turned |= {"left": flip(arguments["left"], along_y), "up": flip(arguments["up"], along_x)}
    y, (right, down) = run(GRID, form, turned)
    actual = named(run(GRID, form, {**arguments, "orientations": [orientation]}))
    assert_close(actual, named((flip(y, axes), (flip(right, along_y), flip(down, along_x)))), 1e-12)


def test_orientations_are_summed_and_the_direct_term_counts_once(form: str) -> None:
    arguments = sample(5, 6, orientations=4, mode="P", states=False)
    whole = grid_scan(**arguments, backend=form)
    total = torch.zeros_like(whole)
    for o in range(4):
        part = {k: arguments[k][:, :, :, :, o : o + 1] for k in ("source", "transition", "mark")}
        part["direct"] = arguments["direct"] if o == 0 else None
        total += grid_scan(**{**arguments, **part}, orientations=(o,), backend=form)
    torch.testing.assert_close(whole, total, atol=1e-12, rtol=0)


def reach(
    width: int,
    height: int,
    transition: list[list[float]],
    source: list[float],
    mode: str = "free",
    mark: tuple[float, float] = (1, 1),
) -> Tensor:
    """Amounts that a pair in the first cell adds to all cells, with keys and queries of 1."""
    one = torch.ones(1, width, height, 1, 1, dtype=torch.float64)
    v = torch.zeros_like(one)
    v[0, 0, 0] = 1
    gates = torch.tensor(source, dtype=torch.float64).expand(1, width, height, 1, 1, 2)
    T = torch.tensor(transition, dtype=torch.float64).expand(1, width, height, 1, 1, 2, 2)
    M = torch.tensor(mark, dtype=torch.float64).expand_as(gates)
    return grid_scan(one, one, v, gates, T, M, mode=mode)[0, :, :, 0, 0]


def test_free_transitions_of_one_count_paths() -> None:
    actual = reach(9, 9, [[1, 1], [1, 1]], [1, 1])
    expected = torch.tensor([[math.comb(x + y, x) for y in range(9)] for x in range(9)], dtype=torch.float64)
    expected[0, 0] = 0  # a cell sees its own pair through the direct gate only
    torch.testing.assert_close(actual, expected)


def test_diffusion_reaches_every_cell_along_one_path() -> None:
    expected = torch.ones(9, 12, dtype=torch.float64)
    expected[0, 0] = 0
    torch.testing.assert_close(reach(9, 12, [[1, 1], [1, 1]], [1, 1], mode="D"), expected)
    row = reach(9, 12, [[1, 1], [1, 1]], [1, 0], mode="D")
    assert row[1:, 0].eq(1).all()
    assert not row[:, 1:].any()


def test_propagation_keeps_the_mass_of_anti_diagonals() -> None:
    split = 0.3
    actual = reach(9, 9, [[split, split], [1 - split, 1 - split]], [split, 1 - split], mode="P")
    for x in range(9):
        for y in range(9):
            if 0 < x + y < 9:
                assert actual[x, y].item() == pytest.approx(math.comb(x + y, x) * split**x * (1 - split) ** y)


def test_the_rules_hold_for_every_transition_and_keep_those_that_obey() -> None:
    T = torch.randn(5, 4, 2, 2, dtype=torch.float64) * 3
    columns = bounded(T, "P").abs().sum(-2)
    assert (columns <= 1 + 1e-12).all()
    torch.testing.assert_close(columns, T.abs().sum(-2).clamp_max(1))
    assert bounded(T, "D").abs().max() <= 1
    assert not bounded(T, "D")[..., 1, 0].any()
    small = T / 20
    torch.testing.assert_close(bounded(small, "P"), small, atol=0, rtol=0)
    assert bounded(T, "free") is T


def mass(transition: list[list[float]], source: list[float], mode: str) -> list[float]:
    """Sums of the sizes of all states into the cells of an anti-diagonal, for those from 1 to 25."""
    edges = torch.stack([reach(26, 26, transition, source, mode, mark) for mark in ((1, 0), (0, 1))]).abs()
    return [sum(edges[:, x, d - x].sum().item() for x in range(d + 1)) for d in range(1, 26)]


def test_a_negative_decay_stays_bounded_under_propagation_and_explodes_without() -> None:
    split, decay = 0.3, -0.9
    source, T = [split, 1 - split], [[split * decay] * 2, [1 - split * decay] * 2]
    masses = mass(T, source, "P")
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(masses))
    assert mass(T, source, "free")[-1] > 10
    sizes = [[abs(t) for t in row] for row in T]
    assert mass(sizes, source, "free")[:7] == pytest.approx([1.54**d for d in range(7)])


def test_a_row_is_a_linear_attention_read_one_step_late(form: str) -> None:
    a = sample(11, 1, states=False)
    decay, source, mark = a["transition"][..., 0, 0, 0], a["source"][..., 0, 0], a["mark"][..., 0, 0]
    late = {"k": a["k"] * source[..., None], "v": a["v"], "log_decay": decay.log()}
    late = {name: t.squeeze(2).roll(1, 1).clone() for name, t in late.items()}
    late["k"][:, 0] = 0
    late["log_decay"] = torch.cat([torch.zeros_like(late["log_decay"][:, :1]), decay.log().squeeze(2)[:, :-1]], 1)
    expected = ssd((a["q"] * mark[..., None]).squeeze(2), **late).unsqueeze(2)
    assert_close({"y": grid_scan(**{**a, "direct": None}, backend=form)}, {"y": expected}, 1e-12)


def test_without_turns_rows_and_columns_are_recurrences_by_themselves(form: str) -> None:
    a = sample(6, 5, states=False)
    a["transition"] = a["transition"] * torch.eye(2)
    whole = grid_scan(**{**a, "direct": None}, backend=form)
    one_way = {"source": 0.0 * a["source"], "mark": a["mark"]}
    rows, columns = ({k: v.clone() for k, v in one_way.items()} for _ in range(2))
    rows["source"][..., 0], columns["source"][..., 1] = a["source"][..., 0], a["source"][..., 1]
    apart = []
    for axis, gates in ((2, rows), (1, columns)):
        pieces = [
            {k: v.narrow(axis, n, 1) if isinstance(v, Tensor) else v for k, v in {**a, **gates}.items()}
            for n in range(a["q"].shape[axis])
        ]
        apart.append(torch.cat([grid_scan(**{**piece, "direct": None}, backend=form) for piece in pieces], axis))
    torch.testing.assert_close(whole, apart[0] + apart[1], atol=1e-12, rtol=0)


@given(width=st.integers(0, 20), height=st.integers(0, 20), orientation=st.integers(0, 3), states=st.booleans())
@computed
def test_any_sides(form: str, width: int, height: int, orientation: int, states: bool) -> None:
    arguments = sample(width, height, mode="D", states=states) | {"orientations": [orientation]}
    assert_close(*(named(run(GRID, name, arguments)) for name in (form, "recurrent")), 1e-12)


class _Largest(TorchDispatchMode):
    """The largest result of all operations."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            self.elements = max(self.elements, t.numel() if isinstance(t, Tensor) else 0)
        return result


def test_memory_is_linear_in_the_cells_of_a_large_grid() -> None:
    def largest(side: int) -> int:
        a = sample(side, side, states=False)
        a = {k: v[:1].float() for k, v in a.items() if isinstance(v, Tensor)}
        args = GridScan(**a)
        with _Largest() as mode:
            y, *_ = forward(args)
            backward(args, (torch.ones_like(y), None, None))
        return mode.elements

    assert largest(96) <= 4.2 * largest(48)
