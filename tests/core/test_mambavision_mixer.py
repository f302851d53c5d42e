"""MambaVision's mixer against its equations, and the attention that stands beside it in windows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor

from sinuous.core.mixers import MambaVisionMixer, build_mixer


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def mixer(**options: object) -> MambaVisionMixer:
    built = build_mixer("mambavision", 12, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    assert isinstance(built, MambaVisionMixer)
    return built


def by_steps(m: MambaVisionMixer, u: Tensor) -> Tensor:
    """The equations of the module's docstring, token by token."""
    x, z = m.in_proj(u).mT.chunk(2, 1)
    x, z = F.silu(m.conv1d_x(x)), F.silu(m.conv1d_z(z))
    rank = m.dt_proj.in_features
    r, B, C = m.x_proj(x.mT).split([rank, m.A_log.shape[1], m.A_log.shape[1]], -1)
    delta = F.softplus(r @ m.dt_proj.weight.T + 2 * m.dt_proj.bias)
    h, ys = torch.zeros(u.shape[0], *m.A_log.shape, dtype=u.dtype), []
    for t in range(u.shape[1]):
        x_t, d_t = x[:, :, t], delta[:, t]
        h = torch.exp(-d_t[..., None] * m.A_log.exp()) * h + (d_t * x_t)[..., None] * B[:, t, None]
        ys.append((h * C[:, t, None]).sum(-1) + m.D * x_t)
    return m.out_proj(torch.cat([torch.stack(ys, 1), z.mT], -1))


@pytest.mark.parametrize(
    "options", [{}, {"d_state": 3, "d_conv": 5, "expand": 2, "dt_rank": 2}, {"bias": True, "conv_bias": True}]
)
def test_equals_its_equations(options: dict[str, object]) -> None:
    m, u = mixer(**options), torch.randn(3, 11, 12, dtype=torch.float64)
    torch.testing.assert_close(m(u), by_steps(m, u), atol=1e-12, rtol=0)


def test_has_the_published_names_and_shapes() -> None:
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in build_mixer("mambavision", 320).state_dict().items()}
    assert shapes == {
        "in_proj.weight": (320, 320),
        "x_proj.weight": (36, 160),
        "dt_proj.weight": (160, 20),
        "dt_proj.bias": (160,),
        "A_log": (160, 8),
        "D": (160,),
        "conv1d_x.weight": (160, 1, 3),
        "conv1d_z.weight": (160, 1, 3),
        "out_proj.weight": (320, 320),
    }


def test_step_sizes_start_in_their_range_though_the_bias_counts_twice() -> None:
    dt = F.softplus(2 * build_mixer("mambavision", 512).dt_proj.bias)
    assert 1e-3 - 1e-6 <= dt.min() < 2e-3
    assert 0.05 < dt.max() <= 0.1 + 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expand": 0.75}, r"expand · dim must be even, as it is cut in halves \(got 9\)"),
        ({"d_conv": 2}, "d_conv must be odd"),
        ({"d_state": 0}, "d_state must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixer(**options)


def test_vit_attention_equals_timms() -> None:
    ours = build_mixer("vit_attention", 24, num_heads=3, dtype=torch.float64)
    theirs = Attention(24, num_heads=3, qkv_bias=True, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="num_heads must divide dim 24"):
        build_mixer("vit_attention", 24, num_heads=5)
