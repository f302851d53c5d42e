"""MambaVision: what the paper and the authors' code fix, their files, and windows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import sinuous
import sinuous.vision
from sinuous.core.mixers import MambaVisionMixer
from sinuous.core.registry import model_info
from sinuous.vision.mambavision import MambaVision, checkpoint_filter_fn

TOTALS = {
    "mambavision_t": 31_794_248,
    "mambavision_t2": 35_104_008,
    "mambavision_s": 50_140_584,
    "mambavision_b": 97_685_288,
    "mambavision_l": 227_961_048,
    "mambavision_l2": 241_554_824,
    "mambavision_l2_512": 241_554_824,
    "mambavision_l3_256": 739_570_472,
    "mambavision_l3_512": 739_570_472,
}
WINDOWS = {"mambavision_l2_512": (32, 16), "mambavision_l3_256": (16, 8), "mambavision_l3_512": (32, 16)}
ATTENTION = {"depths": (1, 1, 3, 2)}
SMALL = {"embed_dim": 8, "stem_dim": 8, "num_heads": (1, 2, 2, 4), **ATTENTION}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(**options: Any) -> MambaVision:
    return timm.create_model("test_mambavision", **{"num_classes": 10, **options}).eval()


def images(height: int = 64, width: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, height, width, dtype=dtype)


@pytest.mark.parametrize(("name", "total"), TOTALS.items())
def test_sizes_are_those_of_the_reference(name: str, total: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == total
    heads = (16, 32) if "_l" in name else (8, 16)
    for stage, window, head in zip(model.levels[2:], WINDOWS.get(name, (14, 7)), heads, strict=True):
        depth = len(stage.blocks)
        scans = [isinstance(block.mixer, MambaVisionMixer) for block in stage.blocks]
        assert scans == [i < math.ceil(depth / 2) for i in range(depth)]
        assert {block.mixer.num_heads for block in stage.blocks[math.ceil(depth / 2) :]} == {head}
        assert stage.window_size == window
    assert [m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)][:3] == [1e-4, 1e-4, 1e-5]
    assert model_info(name).license == "cc-by-nc-sa-4.0"


def published_shapes(dim: int, stem_dim: int, depths: tuple[int, ...], layer_scale: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the reference's files."""
    shapes: dict[str, tuple[int, ...]] = {}

    def affine(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def batch_norm(name: str, width: int) -> None:
        affine(name, width)
        shapes[f"{name}.running_mean"] = shapes[f"{name}.running_var"] = (width,)
        shapes[f"{name}.num_batches_tracked"] = ()

    def linear(name: str, out: int, width: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, width), (out,)

    shapes["patch_embed.conv_down.0.weight"] = (stem_dim, 3, 3, 3)
    shapes["patch_embed.conv_down.3.weight"] = (dim, stem_dim, 3, 3)
    batch_norm("patch_embed.conv_down.1", stem_dim)
    batch_norm("patch_embed.conv_down.4", dim)
    for stage, depth in enumerate(depths):
        width = dim * 2**stage
        for b in range(depth):
            block = f"levels.{stage}.blocks.{b}"
            if stage < 2:
                for i in (1, 2):
                    shapes[f"{block}.conv{i}.weight"], shapes[f"{block}.conv{i}.bias"] = (width, width, 3, 3), (width,)
                    batch_norm(f"{block}.norm{i}", width)
                continue
            affine(f"{block}.norm1", width)
            affine(f"{block}.norm2", width)
            linear(f"{block}.mlp.fc1", 4 * width, width)
            linear(f"{block}.mlp.fc2", width, 4 * width)
            if layer_scale:
                shapes[f"{block}.gamma_1"] = shapes[f"{block}.gamma_2"] = (width,)
            if b < math.ceil(depth / 2):
                half, rank = width // 2, math.ceil(width / 16)
                mixer = {
                    "in_proj.weight": (width, width),
                    "out_proj.weight": (width, width),
                    "x_proj.weight": (rank + 16, half),
                    "dt_proj.weight": (half, rank),
                    "dt_proj.bias": (half,),
                    "A_log": (half, 8),
                    "D": (half,),
                    "conv1d_x.weight": (half, 1, 3),
                    "conv1d_z.weight": (half, 1, 3),
                }
                shapes.update({f"{block}.mixer.{name}": shape for name, shape in mixer.items()})
            else:
                linear(f"{block}.mixer.qkv", 3 * width, width)
                linear(f"{block}.mixer.proj", width, width)
        if stage < 3:
            shapes[f"levels.{stage}.downsample.reduction.0.weight"] = (2 * width, width, 3, 3)
    batch_norm("norm", 8 * dim)
    linear("head", 1000, 8 * dim)
    return shapes


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("mambavision_t", (80, 32, (1, 3, 8, 4), False)), ("mambavision_b", (128, 64, (3, 3, 10, 5), True))],
)
def test_state_dict_has_the_reference_layout(name: str, sizes: Any) -> None:
    with torch.device("meta"):
        shapes = {key: tuple(t.shape) for key, t in timm.create_model(name).state_dict().items()}
    assert shapes == published_shapes(*sizes)


def test_reads_the_authors_file_and_its_sizes(tmp_path: Path) -> None:
    shapes = published_shapes(8, 8, (1, 1, 3, 2), True)
    shapes.update({"head.weight": (7, 64), "head.bias": (7,)})
    state = {name: torch.rand(shape) if shape else torch.tensor(5) for name, shape in shapes.items()}
    torch.save({"epoch": 3, "arch": "mamba_vision_B", "state_dict": state}, tmp_path / "mambavision.pth.tar")
    model: Any = sinuous.create_model("mambavision_b", checkpoint_path=tmp_path / "mambavision.pth.tar", **SMALL)
    assert model.num_classes == 7
    loaded = model.state_dict()
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_the_file_of_another_variant_is_refused() -> None:
    with pytest.raises(ValueError, match=r"another MambaVision: .* has shape"):
        checkpoint_filter_fn(build(mlp_ratio=4.0).state_dict(), build())
    with_scales, without = (timm.create_model(f"mambavision_{size}", **SMALL) for size in "bt")
    with pytest.raises(ValueError, match=r"not one of this MambaVision: it lacks"):
        checkpoint_filter_fn(without.state_dict(), with_scales)


@pytest.mark.parametrize("sides", [(61, 37), (64, 96), (5, 200)])
def test_maps_of_any_size_are_padded_axis_by_axis(sides: tuple[int, int]) -> None:
    """The map of a stage with windows is that of the map padded by hand, whose rest is cut off."""
    model = build(**ATTENTION)
    taps = model.forward_intermediates(images(*sides), intermediates_only=True)
    shapes = [tuple(math.ceil(side / stride) for side in sides) for stride in (4, 8, 16, 32)]
    assert [tuple(tap.shape[2:]) for tap in taps] == shapes
    stage, x = model.levels[2], torch.randn(2, 32, *shapes[2])
    height, width = shapes[2]
    below, right = -height % 3, -width % 3
    padded = nn.functional.pad(x, [0, right, 0, below])
    torch.testing.assert_close(stage.features(padded)[:, :, :height, :width], stage.features(x))
    assert padded.shape[2] - height in (0, 1, 2)
    corner = stage.blocks(padded[:, :, :3, :3].flatten(2).mT).mT.unflatten(2, [3, 3])
    rows, columns = min(3, height), min(3, width)
    torch.testing.assert_close(stage.features(x)[:, :, :rows, :columns], corner[:, :, :rows, :columns])


def test_windows_do_not_see_each_other() -> None:
    stage, x = build(**ATTENTION).levels[2], torch.randn(1, 32, 6, 6)
    expected = stage.features(x)
    x[:, :, 4, 1] = math.nan  # in the window below the first
    found = stage.features(x)
    assert found[:, :, 3:, :3].isnan().any()
    found[:, :, 3:, :3] = expected[:, :, 3:, :3]
    assert torch.equal(found, expected)


def test_windows_are_a_matter_of_the_input() -> None:
    model, x = build(), images(64, 96)
    expected = build(window_size=(8, 8, 2, 2))
    expected.load_state_dict(model.state_dict())
    before = model(x)
    model.set_input_size(img_size=(64, 96), window_size=2)
    assert model.patch_embed.img_size == (64, 96)
    assert torch.equal(model(x), expected(x))
    assert not torch.allclose(model(x), before, atol=1e-6)
    assert model._model_args["window_size"] == (2, 2, 2, 2)
    model.set_input_size(window_size=(8, 8, 3, 2))
    assert model.patch_embed.img_size == (64, 96)
    assert torch.equal(model(x), before)
    for wrong in (0, 2.0, "2", (2, 2), (2, 2, 2, 0)):
        with pytest.raises(ValueError, match="window_size must"):
            model.set_input_size(window_size=wrong)
    assert torch.equal(model(x), before)


@pytest.mark.filterwarnings("ignore:.torch.jit.script.:FutureWarning")
def test_attention_compiles_scripts_and_exports() -> None:
    model, x = build(**ATTENTION), images(40, 64)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(x[:1]), expected[:1])
    scripted = torch.jit.script(model)
    for sides in ((40, 64), (61, 37)):
        x = images(*sides)
        torch.testing.assert_close(scripted(x), model(x))


def test_starts_as_the_reference_does() -> None:
    model = timm.create_model("mambavision_b", depths=(1, 1, 2, 2))
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "dt_proj" not in name}
    assert all(m.weight.std().item() == pytest.approx(0.02, rel=0.05) for m in linear.values())
    assert not any(m.bias.any() for m in linear.values() if m.bias is not None)
    assert torch.equal(model.levels[3].blocks[1].gamma_2, torch.full((1024,), 1e-5))
    assert not hasattr(model.levels[0].blocks[0].ls, "gamma")
    assert {"levels.2.blocks.0.mixer.A_log", "levels.2.blocks.0.mixer.D"} <= model.no_weight_decay()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("depths", (1, 1, 1), "depths must have one number for each of the 4 stages"),
        ("num_heads", (1, 2, 3, 4), "num_heads must divide dim 32"),
        ("num_heads", (1, 2), "num_heads must have one number for each of the 4 stages"),
        ("window_size", 0, "window_size must be at least 1"),
        ("window_size", (8, 8), "window_size must have one number for each of the 4 stages"),
        ("window_size", "8", "window_size must be"),
        ("embed_dim", 0, "embed_dim must be at least 1"),
        ("stem_dim", 8.0, "stem_dim must be a whole number"),
        ("mlp_ratio", 0.0, "mlp_ratio must be more than 0"),
        ("init_values", 0.0, "init_values must be more than 0"),
        ("conv_init_values", -1.0, "conv_init_values must be more than 0"),
    ],
)
def test_a_wrong_option_is_named(option: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**ATTENTION, **{option: value}) if option != "depths" else build(depths=value)


def test_nano_takes_small_gray_pictures() -> None:
    model = timm.create_model("mambavision_nano").eval()
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    assert sum(p.numel() for p in model.parameters()) <= 1_000_000
    assert timm.create_model("mambavision_nano", img_size=64, in_chans=3).eval()(images()).shape == (2, 10)
