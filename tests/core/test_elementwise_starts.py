"""Starts of the mixers over `linear_scan`: published names, shapes and counts, distributions, options refused."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sinuous.core import mixers
from sinuous.core.hippo import normal_part


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_lru_starts_in_its_ring_with_the_gain_undone() -> None:
    mixer: Any = mixers.build_mixer("lru", 8, d_state=20_000, r_min=0.9, r_max=0.999, max_phase=0.3)
    radius, angle = torch.exp(-torch.exp(mixer.nu_log)), torch.exp(mixer.theta_log)
    assert 0.9 - 1e-5 <= radius.min() < 0.901
    assert 0.998 < radius.max() <= 0.999 + 1e-5
    # Uniform by area: the mean of r² lies in the middle, and its variance is that of a uniform distribution.
    low, high = 0.81, 0.999**2
    assert (radius.square().mean() - (low + high) / 2).abs() < 3 * (high - low) / math.sqrt(12 * 20_000)
    assert 0 < angle.min() < 0.001
    assert 0.299 < angle.max() <= 0.3
    torch.testing.assert_close(torch.exp(2 * mixer.gamma_log), 1 - radius.square(), atol=2e-6, rtol=1e-3)
    assert (mixer.B_re.square().mean() * 16 - 1).abs() < 0.02
    assert (mixer.C_re.square().mean() * 20_000 - 1).abs() < 0.02


def test_rg_lru_starts_in_its_ring() -> None:
    mixer: Any = mixers.build_mixer("rg_lru", 1024)
    radius = torch.exp(-F.softplus(mixer.rg_lru.a_param))
    assert 0.9 - 1e-4 <= radius.min() < 0.905
    assert 0.994 < radius.max() <= 0.999 + 1e-4
    assert (radius.square().mean() - (0.81 + 0.999**2) / 2).abs() < 4 * (0.999**2 - 0.81) / math.sqrt(12 * 1024)
    assert mixer.rg_lru.input_gate.w.shape == (4, 256, 256)
    assert (mixer.rg_lru.input_gate.w.square().mean() * 256 - 1).abs() < 0.02
    assert not mixer.rg_lru.input_gate.b.any()
    assert not mixer.linear_x.bias.any()


@pytest.mark.parametrize("size", [2, 7, 16])
def test_s5_starts_from_the_normal_part_of_hippo(size: int) -> None:
    eigenvalues, vectors = normal_part("legs", size)
    hippo = torch.zeros(size, size, dtype=torch.float64)
    for n, k in itertools.product(range(size), range(size)):
        hippo[n, k] = -math.sqrt((2 * n + 1) * (2 * k + 1)) if n > k else -(n + 1) if n == k else 0
    half = torch.sqrt(torch.arange(size, dtype=torch.float64) + 0.5)
    normal = (hippo + half.outer(half)).to(vectors.dtype)
    torch.testing.assert_close(vectors @ torch.diag(eigenvalues) @ vectors.mH, normal, atol=1e-12, rtol=0)
    torch.testing.assert_close(vectors.mH @ vectors, torch.eye(size, dtype=vectors.dtype), atol=1e-12, rtol=0)


def test_s5_steps_lie_in_their_range_and_blocks_repeat() -> None:
    mixer: Any = mixers.build_mixer("s5", 16, d_state=512, blocks=8, dt_min=0.002, dt_max=0.05)
    step = torch.exp(mixer.log_step)
    assert 0.002 - 1e-6 <= step.min() < 0.0024
    assert 0.042 < step.max() <= 0.05 + 1e-6
    assert torch.equal(mixer.Lambda_im, mixer.Lambda_im[:32].repeat(8))
    assert (mixer.Lambda_re == -0.5).all()
    assert (mixer.C.square().sum(-1).mean() * 512 - 2).abs() < 0.3  # two parts of variance 1 / P, turned


SHAPES: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "hgrn": (
        {"expand": 2, "use_short_conv": True},
        {
            "i_proj.weight": (64, 32),
            "f_proj.weight": (64, 32),
            "g_proj.weight": (64, 32),
            "i_conv1d.weight": (64, 1, 4),
            "f_conv1d.weight": (64, 1, 4),
            "g_norm.weight": (64,),
            "o_proj.weight": (32, 64),
        },
    ),
    "lru": (
        {"d_state": 8},
        {
            "nu_log": (8,),
            "theta_log": (8,),
            "gamma_log": (8,),
            "B_re": (8, 32),
            "B_im": (8, 32),
            "C_re": (32, 8),
            "C_im": (32, 8),
            "D": (32,),
            "out1.weight": (32, 32),
            "out1.bias": (32,),
            "out2.weight": (32, 32),
            "out2.bias": (32,),
        },
    ),
    "s5": (
        {"d_state": 16},
        {
            "Lambda_re": (8,),
            "Lambda_im": (8,),
            "B": (8, 32, 2),
            "C": (32, 8, 2),
            "D": (32,),
            "log_step": (8, 1),
            "out2.weight": (32, 32),
            "out2.bias": (32,),
        },
    ),
    "gate_loop": (
        {"expand": 2, "sub_ln": True},
        {
            "to_qkv.weight": (192, 32),
            "to_a.0.weight": (128, 32),
            "to_a.0.bias": (128,),
            "maybe_sub_ln.weight": (64,),
            "maybe_sub_ln.bias": (64,),
            "to_gates.0.weight": (64, 32),
            "to_out.weight": (32, 64),
        },
    ),
    "rg_lru": (
        {"lru_width": 64, "num_heads": 4},
        {
            "linear_y.weight": (64, 32),
            "linear_y.bias": (64,),
            "linear_x.weight": (64, 32),
            "linear_x.bias": (64,),
            "linear_out.weight": (32, 64),
            "linear_out.bias": (32,),
            "conv_1d.w": (4, 64),
            "conv_1d.b": (64,),
            "rg_lru.a_param": (64,),
            "rg_lru.input_gate.w": (4, 16, 16),
            "rg_lru.input_gate.b": (4, 16),
            "rg_lru.a_gate.w": (4, 16, 16),
            "rg_lru.a_gate.b": (4, 16),
        },
    ),
    "min_gru": ({"expand": 2}, {"to_hidden_and_gate.weight": (128, 32), "to_out.weight": (32, 64)}),
    "min_lstm": ({}, {"to_hidden_and_f_i_gate.weight": (96, 32)}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_published_names_and_shapes(name: str) -> None:
    options, shapes = SHAPES[name]
    mixer = mixers.build_mixer(name, 32, **options)
    assert {key: tuple(t.shape) for key, t in mixer.state_dict().items()} == shapes


COUNTS = [
    # RecurrentGemma 2B's block of width 2560: three matrices with biases, gates of 10 blocks, a convolution and Λ.
    ("rg_lru", 2560, {"num_heads": 10}, 3 * (2560**2 + 2560) + 2 * (10 * 256**2 + 2560) + 5 * 2560 + 2560),
    ("hgrn", 1024, {}, 4 * 1024**2 + 1024),
    ("min_gru", 384, {"expand": 1.5}, 3 * 384 * 576),
    ("lru", 64, {"d_state": 128, "activation": "none"}, 4 * 64 * 128 + 3 * 128 + 64),
    ("s5", 64, {"d_state": 128, "activation": "none"}, 4 * 64 * 64 + 3 * 64 + 64),
]


@pytest.mark.parametrize(("name", "dim", "options", "count"), COUNTS, ids=str)
def test_parameters_count_as_published(name: str, dim: int, options: dict[str, Any], count: int) -> None:
    mixer = mixers.build_mixer(name, dim, device="meta", **options)
    assert sum(p.numel() for p in mixer.parameters()) == count


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hgrn", {"lower_bound": 1.0}, r"lower_bound must lie in \[0, 1\) \(got 1.0\)"),
        ("hgrn", {"expand": 0.01}, "d_inner must be at least 1 .got 0."),
        ("min_gru", {"expand": 2, "proj_out": False}, "expand=2 makes 48 channels of 24; leave out proj_out"),
        ("min_lstm", {"use_short_conv": True, "conv_size": 0}, "conv_size must be at least 1 .got 0."),
        ("gate_loop", {"transition": "real"}, "transition must be 'polar' or 'cartesian' .got 'real'."),
        (
            "rg_lru",
            {"num_heads": 5},
            "lru_width must be a positive multiple of the number of heads .got 24 and 5 heads.",
        ),
        ("rg_lru", {"r_max": 1.0}, "r_min and r_max must be 0 < r_min < r_max < 1 .got 0.9 and 1.0."),
        ("lru", {"r_min": 0.5, "r_max": 0.5}, "r_min and r_max must be 0 ≤ r_min < r_max ≤ 1 .got 0.5 and 0.5."),
        ("lru", {"activation": "relu"}, "activation must be one of 'full_glu', .*'none' .got 'relu'."),
        (
            "s5",
            {"d_state": 10, "blocks": 2},
            "a block must be even for conjugate pairs .got 5.; or give conj_sym=False",
        ),
        ("s5", {"d_state": 10, "blocks": 3}, "d_state must be a positive multiple"),
        ("s5", {"discretization": "euler"}, "discretization must be 'zoh' or 'bilinear' .got 'euler'."),
        ("s5", {"C_init": "zeros"}, "C_init must be one of 'trunc_standard_normal', .* .got 'zeros'."),
        ("s5", {"dt_min": 1.0}, "dt_min and dt_max must be 0 < dt_min ≤ dt_max .got 1.0 and 0.1."),
    ],
)
def test_options_that_cannot_be_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixers.build_mixer(name, 24, **options)
