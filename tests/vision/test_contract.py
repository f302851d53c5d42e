"""Every vision backbone keeps timm's interface and the promises of the house, each family in its `test_<family>`.

What timm's own suite looks at is left to it (tests/timm_suite).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import sinuous
from sinuous.core import registry

MODELS = registry.list_models("test_*", domain="vision")
SIDES = (40, 64)

pytestmark = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(name: str, **options: Any) -> Any:
    return sinuous.create_model(name, **{"img_size": SIDES, "num_classes": 10, **options}).eval()


def images(batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, *SIDES, dtype=dtype)


def test_builds_without_memory_and_refuses_unknown_options(name: str) -> None:
    with torch.device("meta"):
        assert {p.device.type for p in build(name).parameters()} == {"meta"}
    assert {p.device.type for p in build(name, device="meta").parameters()} == {"meta"}
    assert {p.dtype for p in build(name, dtype=torch.float64).parameters()} == {torch.float64}
    with pytest.raises(TypeError, match="widht"):
        build(name, widht=3)


def test_forward_is_the_head_of_the_features(name: str) -> None:
    model, x = build(name), images()
    features = model.forward_features(x)
    assert model(x).shape == (2, 10)
    assert torch.equal(model(x), model.forward_head(features))
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    assert torch.equal(model(x), model.get_classifier()(pooled))


def test_trains_a_step(name: str) -> None:
    model, x, labels = build(name).train(), images(4), torch.tensor([3, 7, 1, 0])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(2):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert [key for key, p in model.named_parameters() if p.grad is None] == []
    assert all(p.isfinite().all() for p in model.parameters())


def test_init_weights_fills_everything_after_to_empty(name: str) -> None:
    with torch.device("meta"):
        model = build(name)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(math.nan if tensor.is_floating_point() else -7)
    model.init_weights()
    left = [key for key, t in model.state_dict().items() if not t.isfinite().all() or (t == -7).all()]
    assert left == []
    assert model(images()).isfinite().all()


def test_reset_classifier_keeps_what_it_is_not_told_to_change(name: str) -> None:
    model = build(name, dtype=torch.bfloat16).train()
    pool, x = model.global_pool, images(4, torch.bfloat16)
    model.reset_classifier(7)
    head = model.get_classifier()
    assert (model.num_classes, model.global_pool, head.training) == (7, pool, True)
    assert head.weight.dtype == torch.bfloat16
    assert model(x).shape == (4, 7)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.eval().reset_classifier(5)
    assert not model.get_classifier().training
    assert all(p.requires_grad is key.startswith(model.pretrained_cfg["classifier"]) for key, p in named(model))
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(x).shape == (4, model.head_hidden_size)
    with pytest.raises(ValueError, match="global_pool must be"):
        model.reset_classifier(5, "no such")
    for wrong in (-1, 2.0, "3", None):
        with pytest.raises(ValueError, match="num_classes must"):
            model.reset_classifier(wrong)


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters())


def test_set_input_size_to_another_aspect(name: str) -> None:
    model = build(name)
    model.set_input_size(img_size=(96, 32))
    assert model(torch.randn(2, 3, 96, 32)).shape == (2, 10)
    for wrong in (0, -8, 4.0, "8", [8], [8, -8], 1):
        with pytest.raises(ValueError, match="img_size must"):
            model.set_input_size(img_size=wrong)
    assert model(torch.randn(2, 3, 96, 32)).shape == (2, 10)


def test_intermediates_are_maps_of_the_strides_they_name(name: str) -> None:
    model, x = build(name), images()
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    assert len(maps) == len(model.feature_info)
    for tap, info in zip(maps, model.feature_info, strict=True):
        assert tap.shape == (2, info["num_chs"], *(math.ceil(side / info["reduction"]) for side in SIDES))
    (second,) = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    assert torch.equal(second, maps[1])
    features = build(name, features_only=True)(x)
    assert [tap.shape for tap in features] == [maps[i].shape for i in range(len(maps))][-len(features) :]
    with pytest.raises(ValueError, match="output_fmt must be"):
        model.forward_intermediates(x, output_fmt="no such")
    for wrong in (9, -1, [9], [-9], "all", 1.5, [0.5], ["a"]):
        for call in (model.prune_intermediate_layers, lambda i: model.forward_intermediates(x, indices=i)):
            with pytest.raises(ValueError, match=r"indices must be .*\(got"):
                call(wrong)


@pytest.mark.parametrize("keep", [0, 1, -1])
def test_pruning_leaves_no_unused_parameter(name: str, keep: int) -> None:
    model, x = build(name), images()
    keep %= len(model.feature_info)
    (tap,) = model.forward_intermediates(x, indices=[keep], intermediates_only=True)
    assert model.prune_intermediate_layers([keep], prune_norm=True) == [keep]
    (found,) = model.forward_intermediates(x, indices=[keep], intermediates_only=True)
    assert torch.equal(found, tap)
    found.square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


def test_checkpointing_changes_no_gradient(name: str) -> None:
    model, x = build(name).train(), images(4)
    model(x).square().sum().backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).square().sum().backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], msg=key)


def test_groups_for_the_optimizer_name_every_parameter(name: str) -> None:
    model = build(name)
    names = {key for key, _ in model.named_parameters()}
    assert model.no_weight_decay() <= names
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.5)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    assert len({group["lr_scale"] for group in optimizer.param_groups}) >= 4
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    kept = [key for key, p in model.named_parameters() if key in model.no_weight_decay() or p.ndim <= 1]
    assert not any(id(model.get_parameter(key)) in decayed for key in kept)


def test_half_precision_has_half_precision_results(name: str) -> None:
    model, x = build(name), images()
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(x)
    half = model.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    taps = model.forward_intermediates(x.bfloat16(), intermediates_only=True)
    assert {tap.dtype for tap in taps} == {torch.bfloat16}
    for found in (mixed, half):
        assert (found.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("training", [False, True])
def test_mixed_precision_stays_finite_for_large_inputs(name: str, training: bool) -> None:
    model, x = build(name).train(training), 20 * images(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
    assert logits.isfinite().all()
    logits.float().square().mean().backward()
    assert [key for key, p in model.named_parameters() if not p.grad.isfinite().all()] == []


def test_a_spoilt_picture_stays_alone(name: str) -> None:
    model, x = build(name), images(3)
    expected = model(x)
    x[1] = math.nan
    found = model(x)
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
    assert found[1].isnan().all()


@pytest.mark.filterwarnings("ignore:.torch.jit.script.:FutureWarning")
def test_compiles_without_a_graph_break_and_scripts(name: str) -> None:
    model, x = build(name), images()
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.jit.script(model)(x), expected)


def test_exports_for_batches_of_every_size(name: str) -> None:
    model = build(name)
    with torch.no_grad():
        exported = torch.export.export(model, (images(),), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
        for batch in (1, 3):
            x = images(batch)
            torch.testing.assert_close(exported(x), model(x))


WRONG_IMAGES: dict[str, Any] = {
    "without a batch": torch.randn(3, *SIDES),
    "with an axis more": torch.randn(1, 1, 3, *SIDES),
    "gray": torch.randn(1, 1, *SIDES),
    "channels last": torch.randn(1, *SIDES, 3),
    "bytes": torch.zeros(1, 3, *SIDES, dtype=torch.uint8),
    "float64": torch.randn(1, 3, *SIDES).double(),
    "complex": torch.zeros(1, 3, *SIDES, dtype=torch.complex64),
    "on meta": torch.zeros(1, 3, *SIDES, device="meta"),
    "smaller than a patch": torch.randn(1, 3, SIDES[0], 3),
    "None": None,
    "a list": [[0.5]],
    "an array": np.zeros((1, 3, *SIDES), dtype=np.float32),
    "a word": "cat.png",
}


@pytest.mark.parametrize("kind", WRONG_IMAGES)
def test_wrong_images_are_told(name: str, kind: str) -> None:
    model = build(name)
    for call in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(ValueError, match=r"^(images|the image|x) .*(got|has|is on)"):
            call(WRONG_IMAGES[kind])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("img_size", 1),
        ("img_size", "64"),
        ("in_chans", 0),
        ("in_chans", 3.0),
        ("num_classes", -1),
        ("global_pool", "max"),
        ("drop_rate", 2.0),
        ("drop_path_rate", -0.1),
        ("dtype", "float32"),
    ],
)
def test_wrong_options_are_named(name: str, option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{option}.*must"):
        build(name, **{option: value})


def test_a_checkpoint_of_another_size_is_refused(name: str) -> None:
    model = build(name)
    state = {key: torch.cat([t, t], -1) if t.ndim else t for key, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="the checkpoint"):
        timm.create_model(name, img_size=SIDES, pretrained=True, pretrained_cfg_overlay={"state_dict": state})
