"""VMamba: what the paper fixes, and the authors' files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import sinuous
import sinuous.vision
from sinuous.vision.vmamba import VMamba, checkpoint_filter_fn

TOTALS = {
    "vmamba_vanilla_tiny": 22_893_448,
    "vmamba_vanilla_small": 44_417_416,
    "vmamba_vanilla_base": 76_254_056,
    "vmamba_tiny_s2l5": 30_705_832,
    "vmamba_small_s2l15": 50_147_752,
    "vmamba_base_s2l15": 88_557_800,
    "vmamba_tiny_s1l8": 30_249_064,
    "vmamba_small_s1l20": 49_012_840,
    "vmamba_base_s1l20": 86_614_504,
}
VANILLA = {"d_state": 16, "gate": True, "conv_bias": True, "mlp_ratio": 0.0, "stem": "patch", "downsample": "merge"}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(**options: Any) -> VMamba:
    return timm.create_model("test_vmamba", **{"num_classes": 10, **options}).eval()


def images(height: int = 64, width: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, height, width, dtype=dtype)


@pytest.mark.parametrize(("name", "total"), TOTALS.items())
def test_totals_are_those_of_the_reference(name: str, total: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == total


def published_shapes(depths: tuple[int, ...], dim: int, expand: int, vanilla: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the reference's files."""
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    if vanilla:
        shapes.update({"patch_embed.0.weight": (dim, 3, 4, 4), "patch_embed.0.bias": (dim,)})
        norm("patch_embed.2", dim)
    else:
        half = dim // 2
        shapes.update({"patch_embed.0.weight": (half, 3, 3, 3), "patch_embed.0.bias": (half,)})
        shapes.update({"patch_embed.5.weight": (dim, half, 3, 3), "patch_embed.5.bias": (dim,)})
        norm("patch_embed.2", half)
        norm("patch_embed.7", dim)
    for stage, depth in enumerate(depths):
        width = dim * 2**stage
        inner, rank, state = expand * width, -(-width // 16), 16 if vanilla else 1
        for block in (f"layers.{stage}.blocks.{b}" for b in range(depth)):
            norm(f"{block}.norm", width)
            norm(f"{block}.op.out_norm", inner)
            mixer = {
                "in_proj.weight": (inner * (2 if vanilla else 1), width),
                "conv2d.weight": (inner, 1, 3, 3),
                "x_proj_weight": (4, rank + 2 * state, inner),
                "dt_projs_weight": (4, inner, rank),
                "dt_projs_bias": (4, inner),
                "A_logs": (4 * inner, state),
                "Ds": (4 * inner,),
                "out_proj.weight": (width, inner),
                **({"conv2d.bias": (inner,)} if vanilla else {}),
            }
            shapes.update({f"{block}.op.{name}": shape for name, shape in mixer.items()})
            if not vanilla:
                norm(f"{block}.norm2", width)
                shapes.update({f"{block}.mlp.fc1.weight": (4 * width, width), f"{block}.mlp.fc1.bias": (4 * width,)})
                shapes.update({f"{block}.mlp.fc2.weight": (width, 4 * width), f"{block}.mlp.fc2.bias": (width,)})
        if stage < 3 and vanilla:
            shapes[f"layers.{stage}.downsample.reduction.weight"] = (2 * width, 4 * width)
            norm(f"layers.{stage}.downsample.norm", 4 * width)
        elif stage < 3:
            shapes[f"layers.{stage}.downsample.1.weight"] = (2 * width, width, 3, 3)
            shapes[f"layers.{stage}.downsample.1.bias"] = (2 * width,)
            norm(f"layers.{stage}.downsample.3", 2 * width)
    norm("classifier.norm", 8 * dim)
    shapes.update({"classifier.head.weight": (1000, 8 * dim), "classifier.head.bias": (1000,)})
    return shapes


@pytest.mark.parametrize(
    ("name", "depths", "expand"),
    [
        ("vmamba_vanilla_tiny", (2, 2, 9, 2), 2),
        ("vmamba_tiny_s2l5", (2, 2, 5, 2), 2),
        ("vmamba_tiny_s1l8", (2, 2, 8, 2), 1),
    ],
)
def test_state_dict_has_the_reference_layout(name: str, depths: tuple[int, ...], expand: int) -> None:
    with torch.device("meta"):
        shapes = {key: tuple(t.shape) for key, t in timm.create_model(name).state_dict().items()}
    assert shapes == published_shapes(depths, 96, expand, "vanilla" in name)


def of_older_code(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file as the reference's code of January 2024 wrote it."""
    older = {}
    for name, tensor in state.items():
        name = name.replace("patch_embed.0.", "patch_embed.proj.").replace("patch_embed.2.", "patch_embed.norm.")
        name = name.replace(".op.", ".self_attention.").removeprefix("classifier.")
        older[re.sub(r"(blocks\.\d+)\.norm\.", r"\1.ln_1.", name)] = tensor
    return older


def with_convolutions(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file with linear layers as 1 x 1 convolutions, as the reference's code wrote it for a while."""
    linear = re.compile(r"(in_proj|out_proj|fc1|fc2|reduction)\.weight$")
    return {name: t[:, :, None, None] if linear.search(name) else t for name, t in state.items()}


@pytest.mark.parametrize("vanilla", [True, False])
@pytest.mark.parametrize("written", [dict, of_older_code, with_convolutions])
def test_reads_the_authors_file_and_its_sizes(tmp_path: Path, vanilla: bool, written: Any) -> None:
    options: dict[str, Any] = {"mlp_ratio": 4.0, "expand": 2.0, **(VANILLA if vanilla else {})}
    shapes = published_shapes((1, 1, 1, 1), 8, 2, vanilla)
    shapes.update({"classifier.head.weight": (7, 64), "classifier.head.bias": (7,)})
    state = {name: 0.1 * torch.randn(shape) for name, shape in shapes.items()}
    torch.save({"model": written(state), "epoch": 262, "max_accuracy": 82.5}, tmp_path / "vssm.pth")
    model: Any = sinuous.create_model("test_vmamba", checkpoint_path=tmp_path / "vssm.pth", **options)
    assert model.num_classes == 7
    loaded = model.state_dict()
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_the_file_of_another_variant_is_refused() -> None:
    with pytest.raises(ValueError, match=r"another VMamba: .* has shape"):
        checkpoint_filter_fn(build(expand=2.0).state_dict(), build())
    with pytest.raises(ValueError, match=r"not one of this VMamba: it lacks"):
        checkpoint_filter_fn(build(mlp_ratio=0.0).state_dict(), build())


@pytest.mark.parametrize("options", [{}, VANILLA], ids=["new", "vanilla"])
def test_swapping_rows_and_columns_transposes_the_picture(options: dict[str, Any]) -> None:
    """Routes 0 and 1, and 2 and 3, are each other's transposes, and so are the filters."""
    model, x = build(dtype=torch.float64, **options), images(48, 64, torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    expected = model(x)
    state = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds")):
            tensor = tensor.unflatten(0, [4, -1])[[1, 0, 3, 2]].flatten(0, 1).reshape(tensor.shape)
        elif tensor.ndim == 4:
            tensor = tensor.mT
        elif "downsample.norm" in name or "reduction" in name:  # the four cells of a square, (0,0) (1,0) (0,1) (1,1)
            tensor = tensor.unflatten(-1, [4, -1])[..., [0, 2, 1, 3], :].flatten(-2)
        state[name] = tensor.clone()
    model.load_state_dict(state)
    torch.testing.assert_close(model(x.mT), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("options", [{"stem": "conv"}, {"downsample": "merge"}])
def test_odd_sides_are_rounded_up(options: dict[str, Any]) -> None:
    model = build(**options)
    taps = model.forward_intermediates(images(61, 37), intermediates_only=True)
    assert [tuple(tap.shape[2:]) for tap in taps] == [(16, 10), (8, 5), (4, 3), (2, 2)]
    assert model(images(4, 5)).shape == (2, 10)


@pytest.mark.filterwarnings("ignore:.torch.jit.script.:FutureWarning")
def test_the_first_versions_compile_to_torchscript() -> None:
    model, x = build(**VANILLA), images(61, 37)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def test_a_patch_stem_leaves_out_what_is_no_patch() -> None:
    model, x = build(stem="patch"), images(61, 38)
    taps = model.forward_intermediates(x, intermediates_only=True)
    assert [tuple(tap.shape[2:]) for tap in taps] == [(15, 9), (8, 5), (4, 3), (2, 2)]
    assert torch.equal(model(x), model(x[:, :, :60, :36]))


def test_starts_as_the_reference_does() -> None:
    model = timm.create_model("vmamba_tiny_s1l8", depths=(1, 1, 1, 1))
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(linear) == 17
    assert all(m.weight.std().item() == pytest.approx(0.02, rel=0.05) for m in linear)
    assert not any(m.bias.any() for m in linear if m.bias is not None)
    assert "layers.2.blocks.0.op.A_logs" in model.no_weight_decay()
    rates = [block.drop_path for layer in build(drop_path_rate=0.3).layers for block in layer.blocks]
    assert [getattr(rate, "drop_prob", 0.0) for rate in rates] == pytest.approx([0.0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("depths", (1, 1, 1), "depths must have one number for each of the 4 stages"),
        ("depths", (1, 1, 0, 1), "depths must be at least 1"),
        ("embed_dim", 9, "embed_dim must be even"),
        ("embed_dim", 0, "embed_dim must be at least 1"),
        ("d_state", 0, "d_state must be at least 1"),
        ("expand", -1.0, "expand must"),
        ("mlp_ratio", -1.0, "mlp_ratio must"),
        ("gate", 1, "gate must be True or False"),
        ("conv_bias", "no", "conv_bias must be True or False"),
        ("stem", "v2", "stem must be 'conv' or 'patch'"),
        ("downsample", "v3", "downsample must be 'conv' or 'merge'"),
    ],
)
def test_a_wrong_option_is_named(option: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**{option: value})


def test_nano_takes_small_gray_pictures() -> None:
    model = timm.create_model("vmamba_nano").eval()
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    assert sum(p.numel() for p in model.parameters()) <= 1_000_000
    assert timm.create_model("vmamba_nano", img_size=64, in_chans=3).eval()(images()).shape == (2, 10)
