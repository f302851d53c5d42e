"""Mixers with a matrix state: what is published about them, their equations written out, and their options."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from matrix_mixer_equations import EQUATIONS, rms
from torch import Tensor, nn
from torch.nn import functional as F

from sinuous.core import mixers, norms
from sinuous.core.mixers.feature_maps import build_feature_map, features
from sinuous.core.ops.family import FAMILIES

DIM = 24
LENGTH = 70  # more than the chunk of any op
FAMILY = (
    "mamba2", "linear_attention", "retention", "simple_gla", "gla", "hgrn2", "gsa", "rwkv6", "delta_net",
    "gated_delta_net", "delta_product", "gated_delta_product", "mlstm", "mlstm_large",
)  # fmt: skip
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in FAMILY),
    ("mamba2", {"d_state": 6, "headdim": 8, "ngroups": 2, "norm_before_gate": True, "bias": True}),
    ("mamba2", {"d_state": 6, "headdim": 8, "d_ssm": 32, "rmsnorm": False, "conv_bias": False}),
    ("mamba2", {"d_state": 6, "headdim": 12, "dt_limit": (0.02, 0.05), "norm_eps": 0.1}),
    ("linear_attention", {"feature_map": "dpfp", "num_kv_heads": 2, "output_norm": "rms"}),
    ("linear_attention", {"feature_map": "hedgehog", "norm_q": True, "norm_k": True}),
    ("linear_attention", {"feature_map": "elementwise_product", "normalize": False, "tie_feature_map_qk": True}),
    ("retention", {"num_kv_heads": 2, "use_short_conv": True, "feature_map": "elu"}),
    ("retention", {"use_output_gate": False, "rope_theta": 100.0}),
    ("simple_gla", {"num_kv_heads": 1, "use_short_conv": False, "feature_map": "relu"}),
    ("gla", {"num_kv_heads": 2, "use_short_conv": True, "conv_bias": True, "use_output_gate": False}),
    ("gla", {"clamp_min": -0.03, "feature_map": "swish", "expand_v": 2.0}),
    ("hgrn2", {"num_heads": 3, "use_short_conv": True, "conv_bias": True, "lower_bound": 0.4}),
    ("hgrn2", {"num_heads": 2, "channel_bounds": True}),
    ("gsa", {"num_slots": 5, "num_kv_heads": 2, "use_short_conv": True, "feature_map": "t2r", "scale": 0.5}),
    ("rwkv6", {"num_heads": 3, "expand_k": 0.5, "expand_v": 2.0, "proj_low_rank_dim": 3, "gate_low_rank_dim": 5}),
    ("delta_net", {"use_gate": True, "allow_neg_eigval": True, "conv_bias": True}),
    ("delta_net", {"use_beta": False, "qk_activation": "elu", "qk_norm": "sum", "use_short_conv": False}),
    ("gated_delta_net", {"num_heads": 2, "num_v_heads": 6, "head_dim": 5, "use_gate": False}),
    ("gated_delta_net", {"num_heads": 2, "head_dim": 5, "output_gate_activation": "sigmoid"}),
    ("gated_delta_product", {"num_householder": 3, "num_heads": 2, "num_v_heads": 4, "use_short_conv": False}),
    ("delta_product", {"num_householder": 1, "use_output_gate": False, "allow_neg_eigval": False}),
    ("mlstm", {"round_up_to": 16, "num_heads": 2, "qkv_block_size": 8, "bias": True, "input_activation": "sigmoid"}),
    ("mlstm_large", {"gate_soft_cap": None, "bias": True, "input_activation": "sigmoid", "v_dim_factor": 2.0}),
]
EVERY_VARIANT = pytest.mark.parametrize(
    ("name", "options"), VARIANTS, ids=[f"{name}-{'-'.join(options)}" for name, options in VARIANTS]
)


def build(name: str, options: dict[str, Any]) -> mixers.Mixer:
    """Build in float64, with no two parameters alike, and without bounds of denominators that the equations lack."""
    mixer = mixers.build_mixer(name, DIM, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        if isinstance(mixer, mixers.HGRN2) and mixer.bounds is not None:
            mixer.bounds.copy_(torch.rand(DIM)).masked_fill_(torch.arange(DIM) < 2, 0)
    if name.startswith("mlstm"):
        mixer.eps = 0.0  # type: ignore[assignment]
    return mixer


def sequence(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randn(batch, length, DIM, dtype=torch.float64)


@EVERY_VARIANT
def test_a_mixer_is_its_equation(name: str, options: dict[str, Any]) -> None:
    mixer, x = build(name, options), sequence()
    torch.testing.assert_close(mixer(x), EQUATIONS[name](mixer, x), atol=1e-9, rtol=1e-9)


@EVERY_VARIANT
def test_options_keep_the_contract(name: str, options: dict[str, Any]) -> None:
    mixer, x = build(name, options), sequence(length=9)
    whole = mixer(x)
    y, state = mixer.prefill(x[:, :4])
    assert [t.shape for t in state] == [t.shape for t in mixer.initial_state(2)]
    steps = [y]
    for x_t in x[:, 4:].unbind(1):
        y_t, state = mixer.step(x_t, state)
        steps.append(y_t[:, None])
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-10, rtol=0)
    edges = [0, 3, 3, 9]
    packed = mixer(x[:1], cu_seqlens=torch.tensor(edges))
    separate = torch.cat([mixer(x[:1, a:b]) for a, b in itertools.pairwise(edges)], 1)
    torch.testing.assert_close(packed, separate, atol=1e-10, rtol=0)
    mixer.init_weights()
    assert mixer(x).isfinite().all()


@EVERY_VARIANT
@pytest.mark.filterwarnings("ignore:.torch.jit.script.:FutureWarning")
def test_options_script_and_trace(name: str, options: dict[str, Any]) -> None:
    mixer, x = build(name, options), sequence(length=5)
    traced = torch.fx.symbolic_trace(mixer, concrete_args={"cu_seqlens": None, "grid": None})
    torch.testing.assert_close(traced(x), mixer(x))
    torch.testing.assert_close(torch.jit.script(mixer)(x), mixer(x))


# What is published.

QKVO = {"q_proj.weight": (16, 16), "k_proj.weight": (16, 16), "v_proj.weight": (16, 16), "o_proj.weight": (16, 16)}
CONVS = {f"{name}_conv1d.weight": (16, 1, 4) for name in "qkv"}
DELTA = {"q_proj.weight": (12, 16), "q_conv1d.weight": (12, 1, 4), "o_proj.weight": (16, 24), "o_norm.weight": (8,)}
FORGET = {"a_proj.weight": (3, 16), "A_log": (3,), "dt_bias": (3,)}
PUBLISHED: list[tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]] = [
    ("mamba2", {"d_state": 8, "headdim": 4, "ngroups": 2, "d_ssm": 24}, {
        "in_proj.weight": (16 + 48 + 32 + 6, 16), "conv1d.weight": (56, 1, 4), "conv1d.bias": (56,), "dt_bias": (6,),
        "A_log": (6,), "D": (6,), "norm.weight": (24,), "out_proj.weight": (16, 32)}),
    ("linear_attention", {"feature_map": "hedgehog", "output_norm": "rms"}, {
        **QKVO, "norm.weight": (4,), "feature_map_q.layer.weight": (4, 4), "feature_map_q.layer.bias": (4,),
        "feature_map_k.layer.weight": (4, 4), "feature_map_k.layer.bias": (4,)}),
    ("retention", {"expand_v": 1, "use_short_conv": True}, {
        **QKVO, **CONVS, "g_proj.weight": (16, 16), "g_norm_swish_gate.weight": (4,)}),
    ("retention", {"expand_v": 1, "use_output_gate": False}, {**QKVO, "g_norm.weight": (4,)}),
    ("simple_gla", {}, {**QKVO, **CONVS, "g_proj.weight": (16, 16), "g_norm_swish_gate.weight": (4,),
                        "gk_proj.weight": (4, 16), "gk_proj.bias": (4,)}),
    ("gla", {"expand_k": 1}, {**QKVO, "g_proj.weight": (16, 16), "g_norm_swish_gate.weight": (4,),
                              "gk_proj.0.weight": (16, 16), "gk_proj.1.weight": (16, 16), "gk_proj.1.bias": (16,)}),
    ("hgrn2", {"num_heads": 2, "use_short_conv": True}, {
        **{f"{n}_proj.weight": (16, 16) for n in "qfio"}, **{f"{n}_conv1d.weight": (16, 1, 4) for n in "qfi"},
        "g_norm.weight": (16,)}),
    ("gsa", {"num_slots": 3, "use_short_conv": True}, {
        **QKVO, **CONVS, "f_proj.weight": (12, 16), "g_norm.weight": (16,)}),
    ("rwkv6", {"num_heads": 2, "proj_low_rank_dim": 3, "gate_low_rank_dim": 5}, {
        "x_proj.0.linear.weight": (15, 16), "x_proj.0.mu": (16,), "x_proj.2.weight": (16, 15), "x_bias": (5, 16),
        **{f"{n}_proj.linear.weight": (16, 16) for n in "rkvg"}, "w_proj.linear.lora.0.weight": (5, 16),
        "w_proj.linear.lora.2.weight": (16, 5), "w_proj.linear.lora.2.bias": (16,), "bonus": (2, 8),
        "g_norm.weight": (16,), "g_norm.bias": (16,), "o_proj.weight": (16, 16)}),
    ("delta_net", {"use_gate": True}, {
        **QKVO, **CONVS, "b_proj.weight": (4, 16), "g_proj.weight": (16, 16), "o_norm.weight": (4,)}),
    ("gated_delta_net", {"num_heads": 3}, {
        **DELTA, **FORGET, "k_proj.weight": (12, 16), "v_proj.weight": (24, 16), "k_conv1d.weight": (12, 1, 4),
        "v_conv1d.weight": (24, 1, 4), "b_proj.weight": (3, 16), "g_proj.weight": (24, 16)}),
    *((name, {"num_heads": 3}, {
        **DELTA, **forget, "k_proj.weight": (24, 16), "v_proj.weight": (48, 16), "k_conv1d.weight": (24, 1, 4),
        "v_conv1d.weight": (48, 1, 4), "b_proj.weight": (6, 16), "g_proj.weight": (24, 16)})
      for name, forget in (("delta_product", {}), ("gated_delta_product", FORGET))),
    ("mlstm", {}, {
        "proj_up.weight": (128, 16), **{f"{n}_proj.weight": (16, 4, 4) for n in "qkv"},
        "conv1d.conv.weight": (64, 1, 4), "conv1d.conv.bias": (64,),
        "mlstm_cell.igate.weight": (4, 192), "mlstm_cell.igate.bias": (4,),
        "mlstm_cell.fgate.weight": (4, 192), "mlstm_cell.fgate.bias": (4,), "mlstm_cell.outnorm.weight": (64,),
        "learnable_skip": (64,), "proj_down.weight": (16, 64)}),
    ("mlstm_large", {}, {
        "q.weight": (8, 16), "k.weight": (8, 16), "v.weight": (16, 16), "ogate_preact.weight": (16, 16),
        **{f"{n}gate_preact.{kind}": shape for n in "if" for kind, shape in (("weight", (4, 16)), ("bias", (4,)))},
        "multihead_norm.weight": (16,), "out_proj.weight": (16, 16)}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "shapes"), PUBLISHED)
def test_names_and_shapes_are_the_published_ones(
    name: str, options: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> None:
    actual = mixers.build_mixer(name, 16, **options).state_dict()
    assert {key: tuple(t.shape) for key, t in actual.items()} == shapes


@pytest.mark.parametrize("name", ["gla", "retention", "linear_attention", "simple_gla", "gsa", "delta_net", "rwkv6"])
def test_widths_that_are_nearly_whole_are_rounded(name: str) -> None:
    assert int(200 * 0.29) == 57
    mixer = mixers.build_mixer(name, 200, num_heads=29, expand_k=0.29, expand_v=0.29)
    assert mixer.output_weights() == {"o_proj.weight"}
    assert mixer.get_parameter("o_proj.weight").shape == (200, 58)


def count(name: str, dim: int, **options: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in mixers.build_mixer(name, dim, **options).parameters())


def test_counts_are_those_of_the_published_models() -> None:
    tokens, width, mlp = 50_304 * 4096, 4096, 3 * 4096 * 10_944
    assert 2 * tokens + width + 32 * (count("mlstm_large", width, num_heads=8) + mlp + 2 * width) == 6_865_424_896
    assert 4 * (count("mlstm", 256, num_heads=1) + 256) + 256 + 2 * 37 * 256 == 1_644_296  # Chem-xLSTM
    for depth, total in ((5, 2_097_960), (9, 3_771_208)):  # DNA-xLSTM of mLSTM
        assert depth * (count("mlstm", 256, bias=True) + 256) + 256 + 2 * 12 * 256 == total
    mamba2_130m = 24 * (count("mamba2", 768) + 768) + 768 + 50_288 * 768
    assert mamba2_130m == 128_989_632
    small = 4 * (1536 * 2 + 3072) + 6 * 2048 * 2 + 12 + 512  # convolutions, α and β, A and dt, the norm
    assert count("gated_delta_net", 2048) == 6 * 2048**2 + small


def test_mamba2_starts_as_published() -> None:
    mixer = mixers.Mamba2(256, headdim=2)
    A, dt = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert 1 <= A.min() < 2
    assert 15 < A.max() <= 16
    assert 1e-3 - 1e-6 <= dt.min() < 2e-3
    assert 0.05 < dt.max() <= 0.1 + 1e-6
    assert torch.equal(mixer.D, torch.ones(256))
    assert mixer.no_weight_decay() == {"A_log", "D", "dt_bias"}


def test_gated_delta_net_starts_as_published() -> None:
    mixer = mixers.GatedDeltaNet(256, num_heads=128, head_dim=2)
    A, dt = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert 0 < A.min() < 1
    assert 15 < A.max() <= 16
    assert 1e-3 - 1e-6 <= dt.min() < 2e-3
    assert dt.max() <= 0.1 + 1e-6
    assert mixer.no_weight_decay() == {"A_log", "dt_bias"}
    assert mixers.DeltaProduct(24).no_weight_decay() == set()


def test_the_gate_of_gated_delta_net_is_silu_or_a_sigmoid() -> None:
    gates = {
        name: mixers.GatedDeltaNet(DIM, output_gate_activation=name).o_norm for name in ("silu", "swish", "sigmoid")
    }
    assert [norm.sigmoid for norm in gates.values()] == [False, False, True]


def test_mlstm_starts_as_published() -> None:
    mixer, large = mixers.MLSTM(128, num_heads=4, num_blocks=3), mixers.MLSTMLarge(128, num_heads=4)
    cell = mixer.mlstm_cell
    for forget in (cell.fgate, large.fgate_preact):
        torch.testing.assert_close(forget.bias, torch.tensor([3.0, 4, 5, 6]))
        assert not forget.weight.any()
    assert not cell.igate.weight.any()
    assert 0 < cell.igate.bias.abs().max() < 0.5
    assert torch.equal(large.igate_preact.bias, torch.full((4,), -10.0))
    assert not cell.outnorm.weight.any()
    assert torch.equal(large.multihead_norm.weight, torch.ones(128))
    assert mixer.proj_up.weight.detach().std() == pytest.approx(math.sqrt(2 / (5 * 128)), rel=0.05)
    assert mixer.q_proj.weight.detach().std() == pytest.approx(math.sqrt(2 / (5 * 128)), rel=0.1)
    assert mixer.proj_down.weight.detach().std() == pytest.approx(2 / 3 / math.sqrt(128), rel=0.05)


def test_rwkv6_spreads_with_depth_as_published() -> None:
    first, last = (mixers.RWKV6(128, relative_depth=depth) for depth in (0, 1))
    channel = torch.arange(128) / 128
    torch.testing.assert_close(first.x_proj["0"].mu, 1 - channel)
    torch.testing.assert_close(first.x_bias[0], 1 - channel.sqrt())
    torch.testing.assert_close(last.x_bias[3], torch.full((128,), -0.3))
    for mixer, power in ((first, 0.7), (last, 2.0)):
        decay = mixer.w_proj.linear.lora["2"].bias
        torch.testing.assert_close(decay, -6 + 5 * (torch.arange(128) / 127) ** power)
    torch.testing.assert_close(first.bonus.flatten()[:4], torch.tensor([0.0, 0.1, -0.1, 0.0]))
    assert last.bonus.flatten()[0] == 1
    assert not first.w_proj.linear.lora["0"].weight.any()


@pytest.mark.parametrize("name", ["gla", "simple_gla", "gsa"])
def test_gates_begin_by_forgetting_little(name: str) -> None:
    mixer, x = mixers.build_mixer(name, 64), torch.randn(2, 9, 64)
    logits = mixer.f_proj(x) if name == "gsa" else mixer.gk_proj(x)
    decay = torch.sigmoid(logits) ** (1 / mixer.gate_logit_normalizer)
    assert decay.mean() > 0.9


def test_retention_starts_with_the_published_gains() -> None:
    mixer = mixers.Retention(64, expand_v=1)
    for layer, gain in ((mixer.q_proj, 2**-2.5), (mixer.g_proj, 2**-2.5), (mixer.o_proj, 0.5)):
        assert layer.weight.detach().std() == pytest.approx(gain / 8, rel=0.05)


# Options that say something about the memory.


@pytest.mark.parametrize("name", ["delta_net", "gated_delta_net", "gated_delta_product", "delta_product"])
@pytest.mark.parametrize(("allowed", "eigenvalue"), [(True, -1.0), (False, 0.0)])
def test_negative_eigenvalues_reflect(name: str, allowed: bool, eigenvalue: float) -> None:
    """The part of the state along a key is multiplied by 1 - β, with β at its greatest and nothing to write."""
    one = {"num_householder": 1} if "product" in name else {}
    mixer = mixers.build_mixer(
        name, DIM, num_heads=1, use_short_conv=False, allow_neg_eigval=allowed, dtype=torch.float64, **one
    )
    x = sequence(1, 1)
    with torch.no_grad():
        mixer.v_proj.weight.zero_()
        mixer.b_proj.weight.copy_(50 * x[0] / x.square().sum())
        if "gated" in name:
            mixer.A_log.fill_(-math.inf)
    key = F.normalize(F.silu(mixer.k_proj(x[0, 0])), dim=-1)
    before = mixer.initial_state(1)
    before = before._replace(memory=torch.randn_like(before.memory))
    _, after = mixer.prefill(x, before)
    torch.testing.assert_close(key @ after.memory[0, 0], eigenvalue * key @ before.memory[0, 0], atol=1e-4, rtol=1e-4)
    if not allowed:
        return
    _, twice = mixer.prefill(x, after)
    torch.testing.assert_close(twice.memory, before.memory, atol=1e-3, rtol=1e-3)


def test_a_lower_bound_keeps_that_much() -> None:
    mixer = mixers.HGRN2(DIM, num_heads=2, lower_bound=0.6, dtype=torch.float64)
    before = mixer.initial_state(1)._replace(memory=torch.full((1, 2, 12, 12), 1e6, dtype=torch.float64))
    _, after = mixer.prefill(-100 * sequence(1, 3).abs(), before)
    assert after.memory.min() >= 0.6**3 * 1e6 * 0.99


def test_memory_of_mlstm_is_written_little_at_the_start() -> None:
    mixer = mixers.MLSTMLarge(DIM)
    x = torch.randn(1, 20, DIM)
    _, state = mixer.prefill(x)
    assert (state.n * state.m.exp()[..., None]).abs().max() < 20 * math.exp(-8)


@pytest.mark.parametrize(("cap", "greatest"), [(15.0, 15.0), (None, math.inf)])
def test_a_cap_bounds_the_gates(cap: float | None, greatest: float) -> None:
    mixer = mixers.MLSTMLarge(DIM, gate_soft_cap=cap, input_gate_bias=100.0)
    _, state = mixer.prefill(torch.randn(1, 1, DIM))
    assert (state.m <= greatest).all()
    assert (state.m > 14.9).all()


@pytest.mark.parametrize("kind", ["elu", "relu", "t2r", "hedgehog", "dpfp", "elementwise_product", "swish", "identity"])
def test_feature_maps_have_the_stated_width_and_sign(kind: str) -> None:
    phi, x = build_feature_map(kind, 6, {}), torch.randn(50, 6)
    assert phi(x).shape == (50, features(kind, 6))
    if kind in ("elu", "relu", "t2r", "hedgehog", "dpfp"):
        assert phi(x).min() >= 0
    else:
        assert phi(x).min() < 0


def test_hedgehog_starts_as_a_softmax() -> None:
    mixer, x = mixers.LinearAttention(DIM, feature_map="hedgehog"), torch.randn(5, 6)
    torch.testing.assert_close(mixer.feature_map_q(x), torch.cat([2 * x, -2 * x], -1).softmax(-1))


def test_norms_of_heads_and_groups() -> None:
    x, z = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4, 6)
    norm = norms.MultiHeadLayerNorm(4, 6, bias=True, weight_from_one=True)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    expected = F.group_norm(x.flatten(2).flatten(0, 1), 4, 1 + norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(norm(x), expected.view(2, 3, 24))
    gated = norms.GatedRMSNorm(6, group_size=3, norm_before_gate=False)
    nn.init.normal_(gated.weight)
    torch.testing.assert_close(gated(x, z), rms(x * F.silu(z), gated, 3))
    assert norms.GatedRMSNorm(6)(x.bfloat16(), z.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mamba2", {"headdim": 7}, "headdim must divide d_ssm = 48 .got 7."),
        ("mamba2", {"headdim": 16, "ngroups": 2}, "ngroups must divide the 3 heads"),
        ("mamba2", {"d_ssm": 100}, "d_ssm must be at most expand · dim = 48"),
        ("mamba2", {"A_init_range": (0, 16)}, "A_init_range must be two positive numbers"),
        ("mamba2", {"d_state": 0}, "d_state must be at least 1"),
        ("linear_attention", {"num_heads": 5}, "width of the keys must be a positive multiple .* 24 and 5 heads"),
        ("linear_attention", {"num_kv_heads": 3}, "num_heads must be a positive multiple"),
        ("linear_attention", {"feature_map": "cosine"}, "feature_map must be one of .*hedgehog"),
        ("linear_attention", {"feature_map": "identity"}, "normalize=True needs features that are never negative"),
        ("linear_attention", {"output_norm": "layer"}, "output_norm must be 'none' or 'rms'"),
        ("retention", {"num_heads": 8}, "must be even, to be rotated in pairs .got 3."),
        ("retention", {"feature_map": "t2r"}, "feature_map must be one of 'identity', 'elu', 'relu', 'swish'"),
        ("simple_gla", {"conv_size": 0}, "conv_size must be at least 1"),
        ("gla", {"clamp_min": 0.5}, "clamp_min bounds a logarithm"),
        ("hgrn2", {"lower_bound": 1.0}, "lower_bound must be at least 0 and less than 1"),
        ("hgrn2", {"num_heads": 5}, "dim must be a positive multiple"),
        ("gsa", {"num_slots": 0}, "num_slots must be at least 1"),
        ("rwkv6", {"relative_depth": 2}, "relative_depth must be in .0, 1."),
        ("delta_net", {"qk_activation": "gelu"}, "qk_activation must be one of 'silu', 'relu', 'elu', 'identity'"),
        ("delta_net", {"qk_norm": "l1"}, "qk_norm must be 'l2' or 'sum'"),
        ("gated_delta_net", {"output_gate_activation": "gelu"}, "output_gate_activation must be one of .*'sigmoid'"),
        ("gated_delta_net", {"num_heads": 0}, "num_heads must be at least 1"),
        ("gated_delta_net", {"num_heads": 4, "num_v_heads": 6}, "num_v_heads must be a positive multiple"),
        ("gated_delta_product", {"num_householder": 0}, "num_householder must be at least 1"),
        ("mlstm", {"input_activation": "relu"}, "input_activation must be 'exp' or 'sigmoid'"),
        ("mlstm", {"forget_bias": (3.0,)}, r"forget_bias must be two numbers, .* \(got \[3.0\]\)"),
        ("mlstm", {"qkv_block_size": 5}, "width of a block-diagonal layer must be a positive multiple"),
        ("mlstm_large", {"num_heads": 5}, "width of the keys must be a positive multiple"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixers.build_mixer(name, DIM, **options)


@pytest.mark.parametrize("name", ["mlstm", "mlstm_large"])
def test_the_cell_of_xlstm_has_its_published_eps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[float] = []
    operator = torch.ops.sinuous.mlstm

    def noted(*arguments: Any, **named: Any) -> Any:
        received.append(FAMILIES["mlstm"].bind(*arguments, **named)[0].eps)
        return operator(*arguments, **named)

    monkeypatch.setattr(torch.ops.sinuous, "mlstm", noted)
    mixers.build_mixer(name, DIM)(torch.randn(2, 5, DIM))
    assert received == [1e-6]
