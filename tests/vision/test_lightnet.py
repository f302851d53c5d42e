"""LightNet: its additive positions against their sum written out, its sizes, pictures and clips."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sinuous
import sinuous.vision
from sinuous.vision.lightnet import MDTPE, LightNet

TOTALS = {
    "lightnet_tiny_patch16_224": 6_358_510,
    "lightnet_small_patch16_224": 23_480_308,
    "lightnet_base_patch16_224": 90_016_768,
}
CLIPS = {"img_size": (4, 32, 48), "patch_size": (2, 8, 8)}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(**options: Any) -> LightNet:
    model = sinuous.create_model("test_lightnet", **{"num_classes": 10, "dtype": torch.float64, **options})
    assert isinstance(model, LightNet)
    return model.eval()


def clip(frames: int = 4, height: int = 32, width: int = 48) -> Tensor:
    return torch.randn(2, 3, frames, height, width, dtype=torch.float64)


@pytest.mark.parametrize(("name", "total"), TOTALS.items())
def test_totals(name: str, total: int) -> None:
    model = sinuous.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == total
    assert [layer.mixer.num_heads for layer in model.layers] == [model.embed_dim // 64] * 12


@pytest.mark.parametrize("grid", [[5], [3, 4], [2, 3, 2], [1, 6], [4, 1, 3]])
def test_additive_positions_are_decaying_sums_along_each_axis(grid: list[int]) -> None:
    positions = MDTPE(12, 3, axes=len(grid), dtype=torch.float64)
    for parameter in positions.parameters():
        torch.nn.init.normal_(parameter)
    cells = torch.randn(2, *grid, 12, dtype=torch.float64)
    expected = torch.zeros_like(cells)
    for s, axis in enumerate(positions.axes):
        gain = (axis.q * axis.k).view(3, 4).sum(1)
        decay = torch.sigmoid(axis.decay)
        lines = cells.movedim(s + 1, 1).unflatten(-1, (3, 4))
        sums = []
        for n in range(grid[s]):
            terms = [decay[:, None] ** (n - j) * lines[:, j] for j in range(n + 1)]
            sums.append(gain[:, None] * sum(terms))
        y = torch.stack(sums, 1)
        y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * axis.norm.scale
        expected = expected + (y.flatten(-2) @ axis.proj.weight.T).movedim(1, s + 1)
    found = positions(cells.flatten(1, -2), grid)
    torch.testing.assert_close(found, expected.flatten(1, -2), atol=1e-11, rtol=0)


def test_additive_positions_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="grid must have 2 sides"):
        MDTPE(8, 2)(torch.zeros(1, 6, 8), [6])
    with pytest.raises(ValueError, match="grid must have as many cells"):
        MDTPE(8, 2)(torch.zeros(1, 6, 8), [2, 4])
    with pytest.raises(ValueError, match="dim must be a positive multiple"):
        MDTPE(8, 3)
    with pytest.raises(ValueError, match="axes must be at least 1"):
        MDTPE(8, 2, axes=0)


def test_positions_alone_tell_the_places_of_patches() -> None:
    """Without learned positions, a model tells a picture from one with its patches in another order."""
    model, x = build(pos_embed=False, img_size=16), torch.randn(1, 3, 16, 16, dtype=torch.float64)
    moved = x.flip(-1).unflatten(-1, (2, 8)).flip(-1).flatten(-2)  # patches swapped left and right, each as it was
    assert not torch.allclose(model(x), model(moved))
    for layer in model.layers:
        layer.mixer.rotate = False
    for axis in model.mdtpe.axes:
        torch.nn.init.zeros_(axis.proj.weight)
    torch.testing.assert_close(model(x), model(moved))


def test_three_sides_make_a_model_of_clips() -> None:
    model, x = build(**CLIPS), clip()
    assert model.patch_embed.grid_size == (2, 4, 6)
    assert model(x).shape == (2, 10)
    assert model.pos_embed.shape == (1, 48, 32)
    (maps,) = model.forward_intermediates(x, 1, intermediates_only=True)
    assert maps.shape == (2, 32, 2, 4, 6)
    with pytest.raises(ValueError, match=r"images must have shape \[B, C, T, H, W\]"):
        model(x[:, :, 0])
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_clips_of_other_sizes_and_models_of_clips_that_are_saved(tmp_path: Any) -> None:
    any_size = build(**CLIPS, dynamic_img_size=True)
    assert any_size(clip(6, 16, 24)).shape == (2, 10)
    model = build(**CLIPS, dtype=torch.float32)
    model.set_input_size((6, 16, 24))
    x = clip(6, 16, 24).float()
    sinuous.save(model, tmp_path / "clips")
    again = sinuous.load(tmp_path / "clips").eval()
    assert torch.equal(again(x), model(x))
    cube = build(img_size=8, patch_size=(2, 4, 4), mixer="gla")
    assert cube(clip(8, 8, 8)).shape == (2, 10)


def test_clips_are_read_by_mixers_of_rows_and_exported() -> None:
    for options in ({}, {"mixer": "mamba2"}):
        model = build(**CLIPS, **options, depth=1)
        dynamic = ({0: torch.export.Dim("batch", min=1, max=16)},)
        exported = torch.export.export(model, (clip(),), dynamic_shapes=dynamic).module()
        x = torch.cat([clip(), clip()])
        torch.testing.assert_close(exported(x), model(x))
    with pytest.raises(ValueError, match="grid must have 2 sides for this mixer"):
        build(**CLIPS, mixer="ss2d")(clip())
    with pytest.raises(ValueError, match="route is for pictures"):
        build(**CLIPS, mixer="gla", route="column")


def test_heads_are_handed_on() -> None:
    model = build(num_heads=4)
    assert {layer.mixer.num_heads for layer in model.layers} == {4}
    assert model.layers[0].mixer.q_proj.weight.shape == (32, 32)
    assert model.mdtpe.axes[0].heads == [4, 8]
    assert build(mixer="gla").mdtpe.axes[0].heads == [1, 32]
