"""A class for each pixel over any backbone: sizes, maps, pyramids, gradients, one experiment from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torchvision.ops import FeaturePyramidNetwork

import sinuous as package
import sinuous.vision
from sinuous.apps import cli
from sinuous.vision.segmentation import Segmenter, feature_maps

SMALL_VIT = {"embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": 32}

BACKBONES: list[tuple[str, dict[str, Any]]] = [
    ("test_vim", {"img_size": 32}),
    ("vit_tiny_patch16_224", SMALL_VIT),
    ("vit_small_patch14_reg4_dinov2", {**SMALL_VIT, "img_size": 28}),  # with prefix tokens
    ("test_convnext", {}),
    ("test_resnet", {}),
    ("test_mambaout", {}),  # maps [B, h, w, D]
    ("test_maxvit", {}),  # of one size only
]

# Those of ours that are registered.
BACKBONES += [
    (name, {"img_size": 32})
    for name in ("test_vir", "test_lightnet", "test_plstm_vis", "test_vmamba", "test_mambavision")
    if timm.is_model(name)
]
STAGED = [name for name in ("test_convnext", "test_vmamba", "test_mambavision", "test_hvir") if timm.is_model(name)]


@pytest.mark.parametrize(("backbone", "options"), BACKBONES, ids=[name for name, _ in BACKBONES])
def test_every_pixel_of_any_size_gets_logits_and_every_parameter_a_gradient(
    backbone: str, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = Segmenter(backbone, 5, decoder_dim=16, **options).eval()
    for size in ((32, 32), (33, 47), (1, 1)):
        logits = model(torch.randn(2, 3, *size))
        assert logits.shape == (2, 5, *size)
        assert logits.isfinite().all()
    model.train()(torch.randn(2, 3, 64, 48)).square().sum().backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None}
    assert idle <= {name for name in idle if name.startswith("backbone.")}, "the whole decoder learns"
    assert len(idle) <= 8, "of the backbone, at most what lies behind its last map"


@pytest.mark.parametrize("name", ["test_vim", "vit_tiny_patch16_224"])
def test_isotropic_models_give_four_maps_of_one_stride_a_quarter_apart(name: str) -> None:
    maps, only_size = feature_maps(
        name, img_size=32, depth=8, embed_dim=32, **({"num_heads": 2} if "vit" in name else {})
    )
    info: Any = maps.feature_info
    assert only_size is None
    assert info.module_name() == [f"{'layers' if name == 'test_vim' else 'blocks'}.{i}" for i in (1, 3, 5, 7)]
    stride = info.reduction()[0]
    assert info.reduction() == [stride] * 4
    assert [m.shape[2:] for m in maps(torch.zeros(1, 3, 32, 32))] == [(32 // stride, 32 // stride)] * 4


@pytest.mark.parametrize("name", STAGED)
def test_torchvisions_pyramid_runs_over_staged_maps(name: str) -> None:
    maps, _ = feature_maps(name)
    info: Any = maps.feature_info
    assert info.reduction() == [4, 8, 16, 32]
    staged = maps(torch.randn(2, 3, 64, 96))
    assert [tuple(m.shape[2:]) for m in staged] == [(64 // s, 96 // s) for s in (4, 8, 16, 32)]
    levels = dict(zip(map(str, info.reduction()), staged, strict=True))
    pyramid = FeaturePyramidNetwork(info.channels(), 24)(levels)
    shapes = {str(s): (2, 24, 64 // s, 96 // s) for s in (4, 8, 16, 32)}
    assert {key: tuple(level.shape) for key, level in pyramid.items()} == shapes
    sum(level.mean() for level in pyramid.values()).backward()
    assert Segmenter(name, 3, decoder_dim=8).reductions == [4, 8, 16, 32]


def test_options_reach_the_backbone_and_weights_come_with_it() -> None:
    model: Any = Segmenter("test_vim", 2, img_size=32, mixer="ss2d", out_indices=(0, 2))
    assert len(model.laterals) == 2
    assert "SS2D" in {type(module).__name__ for module in model.modules()}
    known = package.create_model("vim_nano", pretrained=True).state_dict()
    taught: Any = Segmenter("vim_nano", 11, in_chans=1, pretrained=True, img_size=64)
    weight = taught.backbone.state_dict()["model.layers.3.mixer.in_proj.weight"]
    assert torch.equal(weight, known["layers.3.mixer.in_proj.weight"])


def test_pictures_of_a_batch_do_not_mix() -> None:
    torch.manual_seed(0)
    model = Segmenter("test_vim", 3, decoder_dim=8, img_size=32).train()
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-5)


def test_any_number_of_pictures_is_exported() -> None:
    torch.manual_seed(0)
    model = Segmenter("test_vim", 3, decoder_dim=8, img_size=32).eval()
    sizes = {"x": {0: torch.export.Dim("pictures")}}
    program = torch.export.export(model, (torch.randn(2, 3, 40, 24),), dynamic_shapes=sizes)
    x = torch.randn(5, 3, 40, 24)
    assert torch.equal(program.module()(x), model(x))


def test_weight_decay_spares_what_the_backbone_says() -> None:
    for backbone in ("test_vim", "test_convnext"):
        model = Segmenter(backbone, 3)
        assert model.no_weight_decay() <= set(dict(model.named_parameters()))
    assert "backbone.model.pos_embed" in Segmenter("test_vim", 3, img_size=32).no_weight_decay()


def test_checkpointed_blocks_change_no_gradient() -> None:
    torch.manual_seed(0)
    model, x = Segmenter("test_vim", 3, decoder_dim=8, img_size=32), torch.randn(1, 3, 32, 32)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append(model.laterals[0].weight.grad.clone())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "vim_nanno"}, "there is no backbone 'vim_nanno'; did you mean 'vim_nano'"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"decoder_dim": 0}, "decoder_dim must be at least 1"),
        ({"in_chans": 1.5}, "in_chans must be a whole number"),
        ({"img_size": 4}, "img_size must be at least patch_size"),
        ({"mixer": "vim_pear"}, "vim_pear"),
    ],
)
def test_wrong_options_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Segmenter(**{"backbone": "test_vim", "num_classes": 3, **options})


def test_an_option_that_the_backbone_lacks_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="sizes_of_patches"):
        Segmenter("test_vim", 3, sizes_of_patches=4)


@pytest.mark.parametrize("shape", [(1, 1, 32, 32), (3, 32, 32), (1, 3, 0, 32)])
def test_what_is_no_batch_of_pictures_is_told(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"pictures must have shape \[B, C, H, W\] with 3 channels"):
        Segmenter("test_vim", 3, img_size=32)(torch.zeros(shape))


def test_a_segmenter_is_saved_and_loaded_by_its_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = package.create_model(
        "segmenter", backbone="test_vim", num_classes=4, in_chans=3, decoder_dim=8, img_size=32
    ).eval()
    package.save(model, tmp_path / "kept")
    again = package.load(tmp_path / "kept").eval()
    x = torch.randn(1, 3, 40, 24)
    assert torch.equal(again(x), model(x))
    assert isinstance(again, nn.Module)


def test_the_experiment_trains_scores_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SINUOUS_OUT", str(tmp_path))
    small = ["model.backbone=test_vim", "model.decoder_dim=8", "data.batch_size=4", "data.eval_batch_size=4"]
    words = [
        "experiment=vision/collage",
        "debug=fast",
        "trainer=cpu",
        *small,
        "data.lengths={train: 16, val: 8, test: 8}",
    ]
    assert cli.main(["train", *words]) == 0
    (scores,) = tmp_path.rglob("scores.json")
    assert set(json.loads(scores.read_text())["test"]) == {"accuracy", "mean_iou"}
    (page,) = tmp_path.rglob("masks.png")
    assert page.stat().st_size > 5_000
    (best,) = tmp_path.rglob("best.safetensors")
    again = ["eval", "experiment=vision/collage", "trainer=cpu", *small, f"checkpoint_path={best}", "data.eval_limit=4"]
    assert cli.main(again) == 0
    assert "mean IoU" in capsys.readouterr().out


def test_the_mean_leaves_out_the_background() -> None:
    from sinuous.vision.tasks import Segmentation

    masks = torch.zeros(1, 4, 4, dtype=torch.long)
    masks[0, 0] = 1
    predicted = masks.clone()
    predicted[0, 1, :2] = 1  # two pixels of background taken for class 1
    logits = nn.functional.one_hot(predicted, 3).movedim(-1, 1).float()
    task = Segmentation(3, background=0)
    task.score(nn.Identity(), (logits, masks))
    mean_iou: Any = task.scores["mean_iou"]
    assert float(mean_iou.compute()) == pytest.approx(4 / 6)
