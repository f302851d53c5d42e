"""VMamba's mixer against its four scans, each run along its route."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sinuous.core.mixers import SS2D
from sinuous.core.ops import selective_scan
from sinuous.core.scan_routes import CROSS, Route, scan_route

DIM = 10


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(**options: object) -> SS2D:
    """Build in float64, with no two parameters alike, so that a swapped or unused one shows."""
    mixer = SS2D(DIM, dtype=torch.float64, **{"d_state": 3, "dt_rank": 2, **options})
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def cells(grid: tuple[int, int], batch: int = 2) -> Tensor:
    return torch.randn(batch, grid[0] * grid[1], DIM, dtype=torch.float64)


def by_routes(mixer: SS2D, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """One scan for each route, over the cells in the order of the route."""
    inner, state = mixer.d_inner, mixer.d_state
    x, z = mixer.in_proj(x).split([inner, mixer.in_proj.out_features - inner], -1)
    x = F.silu(mixer.conv2d(x.mT.unflatten(2, grid)).flatten(2).mT)
    y = torch.zeros_like(x)
    if mixer.routes == "cross":
        routes = [scan_route(name, *grid) for name in CROSS]
    else:
        forward = [scan_route(name, *grid) for name in ("serpentine", "column_serpentine")]
        routes = [r for f in forward for r in (f, Route(f.order.flip(0), len(f.order) - 1 - f.inverse))]
    for k, route in enumerate(routes):
        along = route.to_sequence(x)
        dt, B, C = (along @ mixer.x_proj_weight[k].T).split(
            [mixer.x_proj_weight.shape[1] - 2 * state, state, state], -1
        )
        rows = slice(k * inner, (k + 1) * inner)
        scanned = selective_scan(
            along,
            dt @ mixer.dt_projs_weight[k].T,
            -mixer.A_logs[rows].exp(),
            B,
            C,
            D=mixer.Ds[rows],
            dt_bias=mixer.dt_projs_bias[k],
            backend="recurrent",
        )
        y = y + route.to_cells(scanned)
    y = F.layer_norm(y, [inner], mixer.out_norm.weight, mixer.out_norm.bias)
    return mixer.out_proj(y * F.silu(z) if mixer.gate else y)


@pytest.mark.parametrize(
    "options",
    [{}, {"gate": False, "conv_bias": False, "bias": True}, {"d_conv": 5, "expand": 1}, {"routes": "serpentine"}],
)
@pytest.mark.parametrize("grid", [(4, 5), (1, 7), (6, 1)])
def test_equals_four_scans_along_their_routes(grid: tuple[int, int], options: dict[str, object]) -> None:
    mixer, x = build(**options), cells(grid).requires_grad_()
    actual, expected = mixer(x, grid=grid), by_routes(mixer, x, grid)
    torch.testing.assert_close(actual, expected, atol=1e-11, rtol=0)
    inputs, weight = (x, *mixer.parameters()), torch.randn_like(x)
    gradients = [torch.autograd.grad((y * weight).sum(), inputs) for y in (actual, expected)]
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=0)


@pytest.mark.parametrize("d_conv", [1, 3, 7])
def test_without_a_grid_the_tokens_are_one_row(d_conv: int) -> None:
    mixer, x = build(d_conv=d_conv), cells((1, 13))
    torch.testing.assert_close(mixer(x), mixer(x, grid=(1, 13)), atol=1e-12, rtol=0)


@pytest.mark.parametrize("routes", ["cross", "serpentine"])
def test_packed_sequences_are_rows(routes: str) -> None:
    mixer, x, edges = build(routes=routes), cells((1, 13), 1), [0, 5, 5, 12, 13]
    separate = [mixer(x[:, a:b], grid=(1, b - a)) for a, b in itertools.pairwise(edges) if b > a]
    torch.testing.assert_close(mixer(x, torch.tensor(edges)), torch.cat(separate, 1), atol=1e-12, rtol=0)


def test_swapped_axes_transpose_the_grid() -> None:
    mixer, x = build(), cells((4, 5))
    expected = mixer(x, grid=(4, 5)).unflatten(1, (4, 5)).transpose(1, 2).flatten(1, 2)
    with torch.no_grad():
        for name in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds"):
            parameter = getattr(mixer, name)
            routes = parameter.reshape(4, -1, *parameter.shape[1:])
            parameter.copy_(routes[[1, 0, 3, 2]].reshape(parameter.shape))
        mixer.conv2d.weight.copy_(mixer.conv2d.weight.mT.clone())
    turned = x.unflatten(1, (4, 5)).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(mixer(turned, grid=(5, 4)), expected, atol=1e-12, rtol=0)


def test_every_cell_of_a_grid_sees_every_other() -> None:
    mixer, x = build(), cells((3, 4), 1).requires_grad_()
    (gradient,) = torch.autograd.grad(mixer(x, grid=(3, 4))[0, 5].sum(), x)
    assert gradient.abs().sum(-1).amin() > 0


@pytest.mark.filterwarnings("ignore:.torch.jit.script.:FutureWarning")
def test_scripts_and_compiles_with_a_grid() -> None:
    mixer, x = build(), cells((3, 4))
    torch.compiler.reset()
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, grid=(3, 4)), mixer(x, grid=(3, 4)))
    torch.testing.assert_close(torch.jit.script(mixer)(x, None, (3, 4)), mixer(x, grid=(3, 4)))


def test_has_the_published_names_and_shapes() -> None:
    assert {name: tuple(t.shape) for name, t in SS2D(96).state_dict().items()} == {
        "in_proj.weight": (384, 96),
        "conv2d.weight": (192, 1, 3, 3),
        "conv2d.bias": (192,),
        "x_proj_weight": (4, 6 + 32, 192),
        "dt_projs_weight": (4, 192, 6),
        "dt_projs_bias": (4, 192),
        "A_logs": (4 * 192, 16),
        "Ds": (4 * 192,),
        "out_norm.weight": (192,),
        "out_norm.bias": (192,),
        "out_proj.weight": (96, 192),
    }
    later = SS2D(96, d_state=1, expand=1, gate=False, conv_bias=False).state_dict()
    assert later["in_proj.weight"].shape == (96, 96)
    assert "conv2d.bias" not in later


def test_starts_as_published() -> None:
    mixer = SS2D(128)
    dt = F.softplus(mixer.dt_projs_bias)
    assert 1e-3 - 1e-6 <= dt.min() < 2e-3
    assert 0.05 < dt.max() <= 0.1 + 1e-6
    torch.testing.assert_close(mixer.A_logs.exp(), torch.arange(1.0, 17).expand(4 * 256, 16))
    assert torch.equal(mixer.Ds, torch.ones(4 * 256))
    assert 0.99 * 8**-0.5 < mixer.dt_projs_weight.abs().max() <= 8**-0.5
    assert 0.99 * 256**-0.5 < mixer.x_proj_weight.abs().max() <= 256**-0.5
    assert mixer.no_weight_decay() == {"A_logs", "Ds"}


def test_a_grid_that_does_not_fit_is_refused() -> None:
    mixer, x = build(), cells((3, 4), 1)
    with pytest.raises(ValueError, match=r"as many cells as there are tokens, 12 \(got 3 x 5\)"):
        mixer(x, grid=(3, 5))
    with pytest.raises(ValueError, match=r"packed sequences .* have no grid"):
        mixer(x, torch.tensor([0, 12]), (3, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"d_conv": 2}, "d_conv must be odd"), ({"d_state": 0}, "d_state must be"), ({"dt_rank": 0}, "dt_rank must be")],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SS2D(DIM, **options)


def test_serpentines_compile_and_export_at_any_size() -> None:
    mixer = build(routes="serpentine")
    compiled = torch.compile(mixer, fullgraph=True, backend="eager", dynamic=True)
    for grid in ((4, 5), (3, 3), (7, 2)):
        x = cells(grid)
        torch.testing.assert_close(compiled(x, grid=grid), mixer(x, grid=grid))
    program = torch.export.export(mixer, (x,), {"grid": list(grid)})
    torch.testing.assert_close(program.module()(x, grid=list(grid)), mixer(x, grid=grid))
    assert mixer(cells((0, 3)), grid=(0, 3)).shape == (2, 0, DIM)


def test_serpentine_weights_are_not_those_of_the_cross() -> None:
    mixer, x = build(routes="serpentine"), cells((4, 5))
    assert (mixer(x, grid=(4, 5)) - by_routes(build(), x, (4, 5))).abs().max() > 1e-3
    with pytest.raises(ValueError, match="routes must be 'cross' or 'serpentine'"):
        SS2D(DIM, routes="zigzag")
