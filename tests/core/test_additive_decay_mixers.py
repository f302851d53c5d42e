"""LightNet and Aaren against their equations, written with softmaxes over time."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.core import mixers
from sinuous.core.mixers import positions

DIM = 24


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(name: str, **options: object) -> mixers.Mixer:
    mixer = mixers.build_mixer(name, DIM, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer


def weights(mixer: mixers.Mixer) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in mixer.named_parameters()}


def out(w: dict[str, Tensor], x: Tensor, o: Tensor) -> Tensor:
    """o_proj of the norm over all heads, gated."""
    gate = F.silu(x @ w["g_proj.0.weight"].T @ w["g_proj.1.weight"].T)
    normed = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-6) * w["g_norm.weight"]
    return (normed * gate) @ w["o_proj.weight"].T


def streams(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x @ w[f"{n}_proj.weight"].T for n in "qkv")
    return q, k, v


def causal_convolution(x: Tensor, weight: Tensor) -> Tensor:
    taps = weight.shape[-1]
    padded = F.pad(x, (0, 0, taps - 1, 0))
    return torch.stack([(padded[:, t : t + taps] * weight[:, 0].T).sum(1) for t in range(x.shape[1])], 1)


@pytest.mark.parametrize("options", [{"num_heads": 3, "expand_ratio": 5}, {"num_heads": 2, "use_short_conv": True}])
def test_lightnet_is_a_softmax_over_the_past(options: dict[str, object]) -> None:
    mixer, x = build("lightnet", **options), torch.randn(2, 9, DIM, dtype=torch.float64)
    w, heads = weights(mixer), int(str(options["num_heads"]))
    parts = streams(w, x)
    if "use_short_conv" in options:
        named = zip("qkv", parts, strict=True)
        parts = tuple(causal_convolution(t, w[f"{n}_conv1d.weight"]) for n, t in named)
    q, k, v = (t.unflatten(-1, [heads, -1]) for t in parts)
    o = []
    for t in range(9):
        share = torch.softmax(k[:, : t + 1], 1)
        memory = torch.einsum("bshk,bshv->bhkv", share, v[:, : t + 1])
        o.append(torch.einsum("bhk,bhkv->bhv", F.silu(q[:, t]), memory).flatten(1) / math.sqrt(q.shape[-1]))
    torch.testing.assert_close(mixer(x), out(w, x, torch.stack(o, 1)), atol=1e-11, rtol=0)


GRIDS = [((3, 4), 6), ((2, 6), 5), ((1, 12), 4), (None, 4), ((12,), 5), ((2, 3, 2), 8), ((2, 2, 3), 7), ((1, 3, 4), 2)]


@pytest.mark.parametrize(("grid", "keys"), GRIDS)
def test_lightnet_of_a_grid_knows_distances_along_each_axis(grid: tuple[int, ...] | None, keys: int) -> None:
    """Each product of a query and a key, channel by channel, times the cosine of the angle between their cells."""
    mixer, x = build("lightnet_noncausal", num_heads=2, expand_ratio=keys), torch.randn(2, 12, DIM, dtype=torch.float64)
    w = weights(mixer)
    q, k, v = (t.unflatten(-1, [2, -1]) for t in streams(w, x))
    sides = (1, 12) if grid is None else grid
    per_axis, angle = math.ceil(keys / len(sides)), torch.zeros(12, 12, keys, dtype=torch.float64)
    places = list(itertools.product(*(range(side) for side in sides)))
    for i, here in enumerate(places):
        for j, there in enumerate(places):
            for c in range(keys):
                steps = here[c // per_axis] - there[c // per_axis]
                angle[i, j, c] = steps * 10000 ** (-2 * (c % per_axis) / keys)
    scores = torch.einsum("bihc,bjhc,ijc->bhij", F.silu(q), torch.softmax(k, 1), angle.cos()) / math.sqrt(keys)
    o = torch.einsum("bhij,bjhv->bihv", scores, v).flatten(2)
    torch.testing.assert_close(mixer(x, grid=grid), out(w, x, o), atol=1e-11, rtol=0)


@pytest.mark.parametrize("name", ["lightnet", "lightnet_noncausal"])
def test_a_constant_for_all_keys_of_a_channel_changes_nothing(name: str) -> None:
    options = {"num_heads": 2, "expand_ratio": 5}
    mixer, x = build(name, **options), torch.randn(2, 9, DIM, dtype=torch.float64)
    expected = mixer(x)
    mixer.k_proj.bias = torch.nn.Parameter(torch.randn(10, dtype=torch.float64))
    torch.testing.assert_close(mixer(x), expected, atol=1e-12, rtol=0)


def test_the_first_step_of_lightnet_is_its_value_times_the_sum_of_its_query() -> None:
    mixer, x = build("lightnet", num_heads=2, expand_ratio=5), torch.randn(2, 1, DIM, dtype=torch.float64)
    w = weights(mixer)
    q, _, v = (t.unflatten(-1, [2, -1]) for t in streams(w, x))
    o = F.silu(q).sum(-1, keepdim=True) * v / math.sqrt(5)
    torch.testing.assert_close(mixer(x), out(w, x, o.flatten(2)), atol=1e-12, rtol=0)


def test_lightnet_of_a_grid_without_phases_does_not_know_the_order() -> None:
    x, order = torch.randn(2, 12, DIM, dtype=torch.float64), torch.randperm(12)
    plain, rotated = build("lightnet_noncausal", rotate=False), build("lightnet_noncausal")
    torch.testing.assert_close(plain(x[:, order]), plain(x)[:, order], atol=1e-12, rtol=0)
    assert (rotated(x[:, order]) - rotated(x)[:, order]).abs().max() > 1e-3


def test_lightnet_of_a_grid_refuses_what_does_not_fill_it() -> None:
    mixer, x = build("lightnet_noncausal"), torch.randn(1, 12, DIM, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"as many cells as there are tokens, 12 \(got 3 x 5\)"):
        mixer(x, grid=(3, 5))
    with pytest.raises(ValueError, match="packed sequences"):
        mixer(x, torch.tensor([0, 12]), (3, 4))


def test_the_last_step_of_lightnet_sees_what_all_see_without_phases() -> None:
    causal, free = (
        build("lightnet", num_heads=2),
        build("lightnet_noncausal", num_heads=2, expand_ratio=128, rotate=False),
    )
    free.load_state_dict(causal.state_dict())
    x = torch.randn(2, 17, DIM, dtype=torch.float64)
    torch.testing.assert_close(free(x)[:, -1], causal(x)[:, -1], atol=1e-12, rtol=0)


def test_phases_are_those_of_each_packed_sequence() -> None:
    q = torch.zeros(1, 7, 1, 6, dtype=torch.float64)
    packed = positions.phases(q, torch.tensor([0, 4, 7]), None, 100.0)
    alone = [positions.phases(q[:, :n], None, None, 100.0) for n in (4, 3)]
    assert torch.equal(packed, torch.cat(alone, 1))


def test_lightnet_has_the_published_names_and_shapes() -> None:
    shapes = {n: tuple(t.shape) for n, t in mixers.LightNet(256, use_short_conv=True).state_dict().items()}
    assert shapes == {
        "q_proj.weight": (256, 256),
        "k_proj.weight": (256, 256),
        "v_proj.weight": (256, 256),
        "q_conv1d.weight": (256, 1, 4),
        "k_conv1d.weight": (256, 1, 4),
        "v_conv1d.weight": (256, 1, 4),
        "g_proj.0.weight": (128, 256),
        "g_proj.1.weight": (256, 128),
        "g_norm.weight": (256,),
        "o_proj.weight": (256, 256),
    }
    assert mixers.LightNet(256).memory_shape == (2, 128, 128)
    assert mixers.LightNet(64, num_heads=4).memory_shape == (4, 128, 16)
    assert mixers.LightNet(64, num_heads=4, expand_ratio=None).memory_shape == (4, 16, 16)


def test_lightnet_needs_heads_or_their_size() -> None:
    with pytest.raises(ValueError, match="one of num_heads and expand_ratio"):
        mixers.LightNet(64, expand_ratio=None)
    with pytest.raises(ValueError, match="dim must be a positive multiple"):
        mixers.LightNet(64, num_heads=5)


def test_aaren_is_attention_of_one_query() -> None:
    mixer, x = build("aaren", num_heads=3), torch.randn(2, 9, DIM, dtype=torch.float64)
    w = weights(mixer)
    heads = [3, DIM // 3]
    query = (w["q_proj.weight"] @ w["query"]).unflatten(-1, heads).expand(2, 1, 3, -1).transpose(1, 2)
    k, v = (t.unflatten(-1, heads).transpose(1, 2) for t in streams({**w, "q_proj.weight": w["k_proj.weight"]}, x)[1:])
    o = [F.scaled_dot_product_attention(query, k[:, :, :t], v[:, :, :t]) for t in range(1, 10)]
    expected = torch.cat(o, 2).transpose(1, 2).flatten(2) @ w["o_proj.weight"].T
    torch.testing.assert_close(mixer(x), expected, atol=1e-12, rtol=0)


def test_the_state_of_aaren_is_that_of_the_paper() -> None:
    """Equations of section 3.1: the maximum m, the denominator u and the numerator w, all relative to e^m."""
    mixer, x = build("aaren", num_heads=1), torch.randn(1, 30, DIM, dtype=torch.float64)
    w = weights(mixer)
    s = 4 * (x[0] @ w["k_proj.weight"].T @ (w["q_proj.weight"] @ w["query"])) / math.sqrt(DIM)
    with torch.no_grad():
        mixer.query.mul_(4)
    m, u, numerator = -torch.inf, torch.zeros((), dtype=torch.float64), torch.zeros(DIM, dtype=torch.float64)
    for s_t, v_t in zip(s, x[0] @ w["v_proj.weight"].T, strict=True):
        highest = max(m, float(s_t))
        u = u * math.exp(m - highest) + math.exp(s_t - highest)
        numerator = numerator * math.exp(m - highest) + v_t * math.exp(s_t - highest)
        m = highest
    state = mixer.prefill(x)[1]
    torch.testing.assert_close(state.mean.flatten(), numerator / u, atol=1e-12, rtol=0)
    torch.testing.assert_close(state.log_weight.flatten(), (m + u.log()).reshape(1), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["lightnet", "aaren"])
def test_a_state_begins_without_weight(name: str) -> None:
    mixer, x = build(name), torch.randn(2, 5, DIM, dtype=torch.float64)
    state = mixer.initial_state(2)
    assert torch.isneginf(state.log_weight).all()
    assert torch.equal(mixer.prefill(x, state)[0], mixer(x))
