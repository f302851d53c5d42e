"""ViR's retention along rows and over grids, against its equations."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sinuous.core.mixers import Mixer, build_mixer

HEADS, DIM = 3, 12
EDGES = [0, 4, 4, 11]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def mixer(name: str, **options: Any) -> Any:
    built: Mixer = build_mixer(name, DIM, num_heads=HEADS, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return built


def tokens(batch: int, length: int) -> Tensor:
    return torch.randn(batch, length, DIM, dtype=torch.float64)


def decays(heads: int = HEADS) -> Tensor:
    rates = torch.linspace(math.log(1 / 32), math.log(1 / 512), heads, dtype=torch.float64)
    return 1 - rates.exp()


def by_pairs(m: Any, x: Tensor, decay_of_pairs: Tensor, softmax: bool = False) -> Tensor:
    """Outputs from a table `[H, T, T]` of what each pair's product is multiplied by."""
    q, k, v = m.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    scores = q.shape[-1] ** -0.5 * q @ k.mT * decay_of_pairs
    scores = scores.softmax(-1) if softmax else scores
    return m.out_proj((scores @ v).transpose(1, 2).flatten(2))


def causal_decays(length: int) -> Tensor:
    n = torch.arange(length)
    ahead = n[:, None] - n
    return torch.where(ahead >= 0, decays()[:, None, None] ** ahead.clamp(min=0), 0.0)


def test_decays_are_those_of_the_paper() -> None:
    m = mixer("vir_retention")
    m.qkv.weight.data.zero_()  # then q, k, v are the biases, and outputs the sums of the decays
    m.qkv.bias.data.fill_(1.0)
    m.out_proj.weight.data.copy_(torch.eye(DIM))
    m.out_proj.bias.data.zero_()
    first, second = m(tokens(1, 2))[0]
    torch.testing.assert_close((second / first - 1)[:: DIM // HEADS], decays())
    torch.testing.assert_close(
        decays(4), torch.tensor([0.96875, 0.98760, 0.99508, 0.99805]).double(), atol=5e-6, rtol=0
    )


@pytest.mark.parametrize("mode", [None, "parallel", "chunkwise", "recurrent"])
@pytest.mark.parametrize("length", [1, 7, 64, 131])
def test_every_mode_equals_the_equation(mode: str | None, length: int) -> None:
    m, x = mixer("vir_retention", mode=mode), tokens(2, length)
    torch.testing.assert_close(m(x), by_pairs(m, x, causal_decays(length)), atol=1e-10, rtol=0)


@pytest.mark.parametrize("options", [{"mode": "parallel"}, {"softmax": True}])
def test_tables_of_pairs_keep_packed_sequences_apart(options: dict[str, Any]) -> None:
    m, x = mixer("vir_retention", **options), tokens(1, 11)
    separate = torch.cat([m(x[:, a:b]) for a, b in itertools.pairwise(EDGES)], 1)
    torch.testing.assert_close(m(x, torch.tensor(EDGES)), separate, atol=1e-12, rtol=0)


@pytest.mark.parametrize("mode", ["parallel", "chunkwise", "recurrent"])
def test_every_mode_goes_on_from_a_state(mode: str) -> None:
    m, x = mixer("vir_retention", mode=mode), tokens(2, 9)
    first, state = m.prefill(x[:, :4])
    rest, state = m.prefill(x[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, rest], 1), m(x), atol=1e-10, rtol=0)
    assert [tuple(t.shape) for t in state] == [(2, HEADS, DIM // HEADS, DIM // HEADS)]


def test_the_softmax_of_the_posted_code_sees_what_comes_after() -> None:
    m, x = mixer("vir_retention", softmax=True), tokens(2, 9)
    torch.testing.assert_close(m(x), by_pairs(m, x, causal_decays(9), softmax=True), atol=1e-12, rtol=0)
    changed = x.clone()
    changed[:, -1] += 1
    assert not torch.allclose(m(changed)[:, 0], m(x)[:, 0])
    for call in (lambda: m.prefill(x), lambda: m.initial_state(2), lambda: m.step(x[:, 0], None)):
        with pytest.raises(ValueError, match="softmax must be False for a state"):
            call()


def test_wrong_modes_are_told() -> None:
    with pytest.raises(ValueError, match=r"mode must be one of 'parallel', 'chunkwise', 'recurrent' \(got 'paralel'\)"):
        mixer("vir_retention", mode="paralel")
    with pytest.raises(ValueError, match=r"mode must be 'parallel' with softmax=True.*got 'recurrent'"):
        mixer("vir_retention", softmax=True, mode="recurrent")


@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (9, 1), (2, 2), (3, 5), (6, 4), (25, 26)])
def test_a_grid_equals_the_table_of_all_pairs(grid: tuple[int, int]) -> None:
    m, x = mixer("vir_retention_grid"), tokens(2, grid[0] * grid[1]).requires_grad_()
    row, column = (t.flatten() for t in torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij"))
    distance = (row[:, None] - row).abs() + (column[:, None] - column).abs()
    expected = by_pairs(m, x, decays()[:, None, None] ** distance)
    torch.testing.assert_close(m(x, None, grid), expected, atol=1e-10, rtol=0)
    gradient = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(torch.autograd.grad(m(x, None, grid).square().sum(), x), gradient, atol=1e-8, rtol=0)


def test_without_a_grid_the_tokens_are_one_row() -> None:
    m, x = mixer("vir_retention_grid"), tokens(2, 131)
    for grid in ((1, 131), (131, 1)):
        torch.testing.assert_close(m(x), m(x, None, grid), atol=1e-10, rtol=0)
