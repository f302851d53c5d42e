"""Hydra's mixer against the paper's matrix, written out entry by entry."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sinuous.core.mixers import Hydra
from sinuous.core.mixers.convolutions import centred_conv1d
from sinuous.core.mixers.delay import one_step_late

DIM = 12
OPTIONS = {"d_state": 5, "headdim": 4, "ngroups": 3, "d_conv": 5}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(**options: object) -> Hydra:
    """Build in float64, with no two parameters alike, so that a swapped or unused one shows."""
    mixer = Hydra(DIM, dtype=torch.float64, **{**OPTIONS, **options})
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def sequence(batch: int = 2, length: int = 11) -> Tensor:
    return torch.randn(batch, length, DIM, dtype=torch.float64)


def by_the_matrix(mixer: Hydra, x: Tensor) -> Tensor:
    """The mixer with its T × T matrix in full, for every head."""
    inner, heads, state = mixer.d_inner, mixer.nheads, mixer.d_state
    sets = mixer.ngroups * state
    z, xBC, dts = mixer.in_proj(x).split([inner, inner + 4 * sets, 2 * heads], -1)
    xBC = F.silu(mixer.conv1d(xBC.mT).mT)
    length, u = x.shape[1], xBC[..., :inner].unflatten(-1, (heads, -1))
    matrix = torch.zeros(x.shape[0], length, length, heads, dtype=x.dtype)
    for side, step in ((0, 1), (1, -1)):
        B, C = xBC[..., inner + 2 * sets * side :][..., : 2 * sets].unflatten(-1, (2, mixer.ngroups, state)).unbind(2)
        B, C = (t.repeat_interleave(heads // mixer.ngroups, 2) for t in (B, C))
        dt = F.softplus(dts[..., heads * side :][..., :heads] + mixer.dt_bias).clamp(mixer.dt_min, mixer.dt_max)
        decay = torch.exp(-dt * mixer.A_log.exp())
        for read, write in itertools.product(range(length), repeat=2):
            last = read - step  # what is read at a step was written up to the step before
            if (last - write) * step >= 0:
                between = [decay[:, t] for t in range(write + step, last + step, step)]
                decays = torch.stack(between).prod(0) if between else torch.ones_like(decay[:, 0])
                matrix[:, read, write] = (C[:, last] * B[:, write]).sum(-1) * decays * dt[:, write]
    diagonal = xBC[..., :inner] @ mixer.fc_D.weight.T + mixer.D
    matrix = matrix + torch.diag_embed(diagonal.mT).permute(0, 2, 3, 1)
    y = torch.einsum("bijh,bjhp->bihp", matrix, u).flatten(2)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5) * mixer.norm.weight
    return mixer.out_proj(y * F.silu(z))


@pytest.mark.parametrize("options", [{}, {"dt_limit": (0.4, 0.9)}, {"ngroups": 1, "bias": True, "conv_bias": False}])
def test_equals_the_quasiseparable_matrix(options: dict[str, object]) -> None:
    mixer, x = build(**options), sequence().requires_grad_()
    actual, expected = mixer(x), by_the_matrix(mixer, x)
    torch.testing.assert_close(actual, expected, atol=1e-11, rtol=0)
    inputs, weight = (x, *mixer.parameters()), torch.randn_like(x)
    gradients = [torch.autograd.grad((y * weight).sum(), inputs) for y in (actual, expected)]
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=0)


def test_a_token_alone_meets_only_the_diagonal() -> None:
    mixer, x = build(), sequence(length=1)
    expected = mixer(x)
    with torch.no_grad():
        mixer.A_log.add_(1.0)
        mixer.dt_bias.add_(1.0)
    assert torch.equal(mixer(x), expected)


def test_swapped_directions_mirror_time() -> None:
    mixer, x = build(), sequence()
    expected = mixer(x).flip(1)
    sets, heads, inner = 2 * mixer.ngroups * mixer.d_state, mixer.nheads, mixer.d_inner
    channels = torch.arange(inner + 2 * sets)
    channels = torch.cat([channels[:inner], channels[inner + sets :], channels[inner : inner + sets]])
    gates = torch.arange(inner), inner + channels, torch.arange(2 * heads).roll(heads) + 2 * inner + 2 * sets
    with torch.no_grad():
        mixer.in_proj.weight.copy_(mixer.in_proj.weight[torch.cat(gates)])
        mixer.conv1d.weight.copy_(mixer.conv1d.weight[channels].flip(-1))
        mixer.conv1d.bias.copy_(mixer.conv1d.bias[channels])
    torch.testing.assert_close(mixer(x.flip(1)), expected, atol=1e-12, rtol=0)


def test_learnt_starts_reach_every_sequence_from_both_ends() -> None:
    mixer, x = build(learnable_init_states=True), sequence(1, 13)
    edges = [0, 5, 5, 12, 13]
    separate = torch.cat([mixer(x[:, a:b]) for a, b in itertools.pairwise(edges)], 1)
    torch.testing.assert_close(mixer(x, torch.tensor(edges)), separate, atol=1e-12, rtol=0)
    (gradient,) = torch.autograd.grad(mixer(x)[:, 6].sum(), mixer.init_states)
    assert gradient.abs().amin() > 0
    with torch.no_grad():
        mixer.init_states.zero_()
    plain = build()
    plain.load_state_dict({n: t for n, t in mixer.state_dict().items() if n != "init_states"})
    torch.testing.assert_close(mixer(x), plain(x), atol=1e-12, rtol=0)
    assert mixer.no_weight_decay() == plain.no_weight_decay() | {"init_states"}


@pytest.mark.parametrize("taps", [1, 3, 7, 15])
@pytest.mark.parametrize("length", [0, 1, 2, 9])
def test_the_centred_filter_is_a_padded_convolution(taps: int, length: int) -> None:
    x = torch.randn(2, length, DIM, dtype=torch.float64)
    weight, bias = torch.randn(DIM, taps, dtype=torch.float64), torch.randn(DIM, dtype=torch.float64)
    padded = F.pad(x.mT, (taps // 2, taps // 2))
    expected = F.conv1d(padded, weight[:, None], bias, groups=DIM).mT if length else x
    torch.testing.assert_close(centred_conv1d(x, weight, bias, None), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", [(2, 6), (1, 6, 3), (1, 6, 2, 3), (2, 0, 3), (2, 1, 3)])
@pytest.mark.parametrize("reverse", [False, True])
def test_one_step_late_is_a_shift(shape: tuple[int, ...], reverse: bool) -> None:
    y = torch.randn(shape)
    expected = torch.zeros(shape)
    if reverse:
        expected[:, :-1] = y[:, 1:]
    else:
        expected[:, 1:] = y[:, :-1]
    assert torch.equal(one_step_late(y, None, reverse), expected)


@pytest.mark.parametrize("reverse", [False, True])
def test_one_step_late_keeps_even_a_nan_of_a_packed_neighbour_away(reverse: bool) -> None:
    edges, y = [0, 0, 2, 3, 3, 6], torch.randn(1, 6, 2, 3)
    y[:, 2] = math.nan
    actual = one_step_late(y, torch.tensor(edges), reverse)
    for a, b in itertools.pairwise(edges):
        expected = one_step_late(y[:, a:b], None, reverse)
        torch.testing.assert_close(actual[:, a:b], expected, atol=0, rtol=0, equal_nan=True)


def test_has_the_published_names_and_shapes() -> None:
    mixer = Hydra(64, learnable_init_states=True, ngroups=2)
    assert {name: tuple(t.shape) for name, t in mixer.state_dict().items()} == {
        "in_proj.weight": (2 * 128 + 2 * 2 * 2 * 64 + 2 * 2, 64),
        "conv1d.weight": (128 + 2 * 2 * 2 * 64, 1, 7),
        "conv1d.bias": (128 + 2 * 2 * 2 * 64,),
        "init_states": (2, 64, 64),
        "dt_bias": (2,),
        "A_log": (2,),
        "D": (2,),
        "fc_D.weight": (2, 128),
        "norm.weight": (128,),
        "out_proj.weight": (64, 128),
    }


def test_starts_as_published() -> None:
    mixer = Hydra(1024, headdim=8, learnable_init_states=True)
    dt = F.softplus(mixer.dt_bias)
    assert 1e-3 - 1e-6 <= dt.min() < 2e-3
    assert 0.05 < dt.max() <= 0.1 + 1e-6
    assert not mixer.A_log.any()
    assert not mixer.init_states.any()
    assert torch.equal(mixer.D, torch.ones(256))
    bound = 1 / math.sqrt(2048)
    assert 0.99 * bound < mixer.fc_D.weight.abs().max() <= bound


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_conv": 4}, "d_conv must be odd, at least 1 and at most 15"),
        ({"d_conv": 17}, "d_conv must be odd, at least 1 and at most 15"),
        ({"headdim": 5}, "headdim must divide expand · dim = 24"),
        ({"headdim": 6, "ngroups": 3}, "ngroups must divide the 4 heads"),
        ({"d_state": 0}, "d_state must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Hydra(DIM, **{**OPTIONS, **options})
