"""HViR: convolutions, then retention over the map."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

import sinuous
from sinuous.core import registry
from sinuous.core.mixers import ViRRetentionGrid
from sinuous.vision.hvir import HViR


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", ["hvir_tiny", "hvir_small"])
def test_sizes_build_and_give_maps_of_four_strides(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, features_only=True)
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    width = 64 if name == "hvir_tiny" else 96
    assert model.feature_info.channels() == [width, 2 * width, 4 * width, 8 * width]
    info = registry.model_info(name)
    assert info.params == {"hvir_tiny": 22_052_872, "hvir_small": 56_453_928}[name]
    assert "2310.19731" in (info.paper or "")


def test_the_last_two_stages_retain_over_the_grid() -> None:
    model = sinuous.create_model("test_hvir")
    mixers = [name for name, module in model.named_modules() if isinstance(module, ViRRetentionGrid)]
    assert mixers == ["layers.2.blocks.0.retention", "layers.2.blocks.1.retention", "layers.3.blocks.0.retention"]


def test_retention_lets_every_cell_of_the_map_see_all_others() -> None:
    model = HViR(embed_dim=4, stem_dim=4, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), init_values=1.0).double().eval()
    x = torch.randn(1, 3, 96, 160, dtype=torch.float64, requires_grad=True)
    maps = model.forward_intermediates(x, intermediates_only=True)
    (of_corner,) = torch.autograd.grad(maps[2][0, :, 0, 0].sum(), x, retain_graph=True)
    assert of_corner[0, :, -16:, -16:].any()
    (of_convolutions,) = torch.autograd.grad(maps[1][0, :, 0, 0].sum(), x)
    assert not of_convolutions[0, :, -16:, -16:].any()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("depths", (1, 1, 1), "depths must have one number for each of the 4 stages"),
        ("num_heads", (1, 1, 3, 4), "dim must be a positive multiple of the number of heads"),
        ("num_heads", (1, 1, 0, 4), "num_heads must be at least 1"),
        ("init_values", -1.0, "init_values must"),
        ("mlp_ratio", -1.0, "mlp_ratio must"),
    ],
)
def test_a_wrong_option_is_named(option: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sinuous.create_model("test_hvir", **{option: value})
