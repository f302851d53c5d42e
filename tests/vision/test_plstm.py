"""pLSTM-Vis: what the paper fixes, and the authors' state dictionaries."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import sinuous
import sinuous.vision
from sinuous.vision.plstm import PLSTMVis

TOTALS = {
    ("plstm_vis_tiny_patch16_224", 224): 6_314_404,
    ("plstm_vis_tiny_patch16_224", 192): 6_304_420,
    ("plstm_vis_small_patch16_224", 224): 23_272_288,
    ("plstm_vis_base_patch16_224", 224): 89_121_496,
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(**options: Any) -> PLSTMVis:
    return timm.create_model("test_plstm_vis", **{"num_classes": 10, "dtype": torch.float64, **options}).eval()


def image(height: int = 64, width: int = 64) -> Tensor:
    return torch.randn(2, 3, height, width, dtype=torch.float64)


@pytest.mark.parametrize(("name", "side"), TOTALS)
def test_totals_are_those_of_the_reference(name: str, side: int) -> None:
    model = timm.create_model(name, img_size=side, device="meta")
    assert sum(p.numel() for p in model.parameters()) == TOTALS[name, side]


def reference_state(dim: int = 32, heads: int = 2, classes: int = 10, grid: tuple[int, int] = (8, 8)) -> dict[str, Any]:
    """A state dictionary of two super-blocks, by the reference's names, with random entries."""
    gates, width = 4 * heads, dim // heads

    def mixer(sources: tuple[str, ...], transitions: tuple[str, ...], marks: tuple[str, ...]) -> dict[str, Any]:
        shapes = {
            "direct.bias": (heads, 1, 1, 1, 1),
            "mhnorm.scale": (heads, width),
            "outprojection.weight": (dim, dim),
        }
        for name in ("query", "key", "value_"):
            shapes |= {f"{name}.weight": (heads, width, 1, 1, dim), f"{name}.bias": (heads, width, 1)}
        for name in (*sources, *marks):
            shapes |= {f"{name}.weight": (1, gates, 1, 1, 1, dim // gates), f"{name}.bias": (gates, 1, 1, 1)}
        for name in transitions:
            shapes |= {
                f"{name}.eigenvalues_weight": (1, gates, 1, dim // gates),
                f"{name}.eigenvalues_bias": (gates, 1),
            }
        return shapes

    tilt = {"orientation_bias": (4, heads), "orientation_weight": (4, heads, dim)}
    mixers = (
        {**tilt, **mixer(("source",), ("transition",), ("mark",))},
        mixer(("source_r", "source_d"), ("transition_r", "transition_d", "transition_rd"), ("mark_l", "mark_u")),
    )
    block = {
        **{f"{name}.scale": (dim,) for name in ("norm", "norm2", "scale1", "scale2")},
        **{"upproj.weight": (4 * dim, dim), "upproj.bias": (4 * dim,)},
        **{"downproj.weight": (dim, 4 * dim), "downproj.bias": (dim,)},
    }
    shapes = {
        "patch_embed.proj.weight": (dim, 3, 8, 8),
        "patch_embed.proj.bias": (dim,),
        "pos_embed.embed": (1, *grid, dim),
        "norm.scale": (dim,),
        "head.weight": (classes, 4 * dim),
        "head.bias": (classes,),
    }
    for i in range(2):
        for b, parts in enumerate(mixers):
            prefix = f"block_stack.blocks.{i}.block{b}"
            shapes |= {f"{prefix}.{name}": shape for name, shape in block.items()}
            shapes |= {f"{prefix}.interaction_module.{name}": shape for name, shape in parts.items()}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def loaded(tmp_path: Any, state: dict[str, Any], **options: Any) -> PLSTMVis:
    torch.save(state, tmp_path / "theirs.pth")
    path = tmp_path / "theirs.pth"
    model = sinuous.create_model("test_plstm_vis", checkpoint_path=path, **{"init_values": 1.0, **options})
    assert isinstance(model, PLSTMVis)
    return model.eval()


def test_the_authors_state_dict_loads_into_layers_by_twos(tmp_path: Any) -> None:
    theirs = reference_state()
    ours = loaded(tmp_path, {"model": theirs}).state_dict()
    assert ours["pos_embed"].equal(theirs["pos_embed.embed"].reshape(1, 64, 32))
    assert ours["norm.weight"].equal(theirs["norm.scale"])
    for i in range(4):
        block, layer = f"block_stack.blocks.{i // 2}.block{i % 2}", f"layers.{i}"
        for their_name, our_name in (
            ("norm.scale", "norm.weight"),
            ("norm2.scale", "norm2.weight"),
            ("scale1.scale", "ls1.gamma"),
            ("scale2.scale", "ls2.gamma"),
            ("upproj.weight", "mlp.fc1.weight"),
            ("downproj.bias", "mlp.fc2.bias"),
            ("interaction_module.query.weight", "mixer.query.weight"),
            ("interaction_module.mhnorm.scale", "mixer.mhnorm.scale"),
        ):
            assert ours[f"{layer}.{our_name}"].equal(theirs[f"{block}.{their_name}"])
        if i % 2 == 0:
            flat = theirs[f"{block}.interaction_module.orientation_bias"].flatten()
            for corner in range(4):
                for head in range(2):
                    assert ours[f"{layer}.mixer.orientation_bias"][corner, head] == flat[4 * head + corner]


def test_the_authors_positions_are_resampled_by_their_own_grid(tmp_path: Any) -> None:
    theirs = reference_state(grid=(4, 16))
    with torch.no_grad():
        theirs["pos_embed.embed"].copy_(torch.arange(4.0).view(1, 4, 1, 1).expand(1, 4, 16, 32))
    rows = loaded(tmp_path, theirs, img_size=(64, 64)).pos_embed.unflatten(1, (8, 8))
    torch.testing.assert_close(rows, rows[:, :, :1].expand_as(rows), atol=1e-4, rtol=0)
    assert rows[0, :, 0, 0].diff().gt(-1e-3).all()
    assert rows[0, 7, 0, 0] - rows[0, 0, 0, 0] > 2.5


def test_gates_without_weights_in_the_authors_file_are_constants(tmp_path: Any) -> None:
    theirs = reference_state()
    for name in [n for n in theirs if any(f"{gate}" in n for gate in (".source", ".mark")) and n.endswith(".weight")]:
        del theirs[name]
    model = loaded(tmp_path, theirs)
    assert not any(layer.mixer.get_parameter(f"{name}").any() for layer in model.layers for name, _ in weights(layer))
    theirs.pop("norm.scale")
    with pytest.raises(ValueError, match="the checkpoint"):
        loaded(tmp_path, theirs)


def weights(layer: Any) -> list[tuple[str, Tensor]]:
    parts = ("source", "mark", "transition")
    return [(n, p) for n, p in layer.mixer.named_parameters() if n.startswith(parts) and n.endswith("weight")]


def test_the_head_reads_the_corners_of_the_grid() -> None:
    model = build(img_size=(24, 40))
    tokens = torch.arange(15.0, dtype=torch.float64).view(1, 15, 1).expand(1, 15, 32)
    pooled = model.forward_head(tokens, pre_logits=True).unflatten(1, (4, 32))
    assert pooled[0, :, 0].tolist() == [0, 10, 4, 14]
    assert model.head.in_features == model.head_hidden_size == 128
    model.reset_classifier(7, "avg")
    assert model.head.in_features == model.head_hidden_size == 32
    for classes, width in ((5, 32), (0, 128)):
        model.reset_classifier(classes, "corners")
        assert (model.num_features, model.head_hidden_size) == (width, 128)


def test_corners_are_those_of_the_picture_where_every_size_runs() -> None:
    model, x = build(dynamic_img_size=True), image(40, 24)
    tokens = model.forward_features(x)
    expected = torch.cat([tokens[:, i] for i in (0, 12, 2, 14)], 1)
    torch.testing.assert_close(model(x), model.head(expected))
    torch.testing.assert_close(model.forward_head(tokens, grid=[5, 3]), model(x))
    with pytest.raises(ValueError, match=r"corners of 15 tokens need their grid \(got 8 x 8\)"):
        model.forward_head(tokens)


def test_modes_are_taken_in_turn() -> None:
    assert [layer.mixer.propagates for layer in build().layers] == [True, False, True, False]
    assert [layer.mixer.propagates for layer in build(modes=("D",), depth=3).layers] == [False] * 3
    assert [layer.mixer.propagates for layer in build(modes=("P", "P", "D")).layers] == [True, True, False, True]
    options = {"stable": False, "mixer_options": {"chirality": "R"}}
    assert [(m.smallest, m.left_turns) for m in (layer.mixer for layer in build(**options).layers)] == [(-1, False)] * 4
    for wrong in ((), ("P", "X"), ("PD",)):
        with pytest.raises(ValueError, match="modes must"):
            build(modes=wrong)


def test_other_mixers_have_no_modes() -> None:
    model = build(mixer="gla", modes=("D",), mixer_options={"num_heads": 4}, route=["raster", "column"])
    assert model(image()).shape == (2, 10)
    assert model.forward_packed(list(image())).shape == (2, 10)
    with pytest.raises(TypeError, match="chirality"):
        build(mixer="gla", mixer_options={"chirality": "R"})


def test_starts_small() -> None:
    model = timm.create_model("plstm_vis_nano", num_classes=100, embed_dim=128, init_values=1e-4)
    layer = model.layers[1]
    for weight, n in (
        (model.patch_embed.proj.weight, 4),
        (model.pos_embed, 128),
        (layer.mlp.fc1.weight, 128),
        (layer.mlp.fc2.weight, 512),
        (layer.mixer.outprojection.weight, 128),
        (layer.mixer.value_.weight, 128),
        (layer.mixer.source_r.weight, 8),
    ):
        assert weight.std().item() == pytest.approx((2 / (5 * n)) ** 0.5, rel=0.1)
    assert 1e-5 < model.head.weight.std() < 2.5e-5
    assert layer.ls1.gamma.eq(1e-4).all()
    for bias in (model.patch_embed.proj.bias, layer.mlp.fc1.bias, layer.mlp.fc2.bias, model.head.bias):
        assert not bias.any()
    still = timm.create_model("plstm_vis_nano", gate_weights=False)
    assert not any(weight.any() for layer in still.layers for _, weight in weights(layer))


def test_saved_models_come_back(tmp_path: Any) -> None:
    model = build(modes=("D", "P"), stable=False, dtype=torch.float32)
    sinuous.save(model, tmp_path / "model")
    again, x = sinuous.load(tmp_path / "model").eval(), image().float()
    assert torch.equal(again(x), model(x))
