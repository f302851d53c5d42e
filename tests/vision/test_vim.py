"""Vim as a backbone: what the paper fixes, and what timm's interface promises."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import sinuous.vision  # noqa: F401  (registers the models)
from sinuous.core import registry
from sinuous.core.patches import resize_pos_embed
from sinuous.vision.vim import Vim, checkpoint_filter_fn

TOTALS = {
    "vim_tiny_patch16_224": 7_148_008,
    "vim_tiny_patch16_stride8_224": 7_250_344,
    "vim_small_patch16_224": 25_796_584,
    "vim_small_patch16_stride8_224": 26_001_256,
    "vim_base_patch16_224": 97_598_440,
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(**kwargs: Any) -> Vim:
    return timm.create_model("test_vim", **{"num_classes": 10, **kwargs}).eval()


def images(height: int = 64, width: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, height, width, dtype=dtype)


@pytest.mark.parametrize(("name", "total"), TOTALS.items())
def test_totals_are_those_of_the_reference(name: str, total: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == total


def test_state_dict_has_the_reference_layout() -> None:
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in timm.create_model("vim_tiny_patch16_224").state_dict().items()}
    mixer = {
        "in_proj.weight": (768, 192),
        "out_proj.weight": (192, 384),
        **{f"conv1d{b}.weight": (384, 1, 4) for b in ("", "_b")},
        **{f"conv1d{b}.bias": (384,) for b in ("", "_b")},
        **{f"x_proj{b}.weight": (44, 384) for b in ("", "_b")},
        **{f"dt_proj{b}.weight": (384, 12) for b in ("", "_b")},
        **{f"dt_proj{b}.bias": (384,) for b in ("", "_b")},
        **{f"A{b}_log": (384, 16) for b in ("", "_b")},
        **{f"D{b}": (384,) for b in ("", "_b")},
    }
    block = {"norm.weight": (192,), **{f"mixer.{name}": shape for name, shape in mixer.items()}}
    assert shapes == {
        "cls_token": (1, 1, 192),
        "pos_embed": (1, 197, 192),
        "patch_embed.proj.weight": (192, 3, 16, 16),
        "patch_embed.proj.bias": (192,),
        "norm_f.weight": (192,),
        "head.weight": (1000, 192),
        "head.bias": (1000,),
        **{f"layers.{i}.{name}": shape for i in range(24) for name, shape in block.items()},
    }


def test_names_are_new_to_timm() -> None:
    code = (
        "import timm; before = set(timm.list_models()); import sinuous.vision; from sinuous.core import registry; "
        "ours = {*registry.list_models(domain='vision'), *registry.list_models(domain='video')}; "
        "assert len(ours) > 6 and not ours & before, ours & before; "
        "assert {name for name in ours if registry.find_entry(name)[2].in_timm} == set(timm.list_models()) - before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def swapped(name: str) -> str:
    """The parameter's twin of the other direction."""
    for one, other in (
        ("A_log", "A_b_log"),
        ("conv1d.", "conv1d_b."),
        ("x_proj.", "x_proj_b."),
        ("dt_proj.", "dt_proj_b."),
    ):
        if one in name:
            return name.replace(one, other)
        if other in name:
            return name.replace(other, one)
    return name[:-2] if name.endswith(".D_b") else name + "_b" if name.endswith(".D") else name


def test_swapping_directions_mirrors_the_tokens() -> None:
    model, x = build(dtype=torch.float64), torch.randn(2, 65, 32, dtype=torch.float64)

    def blocks() -> Tensor:
        return nn.Sequential(*model.layers)(x)

    expected = blocks().flip(1)
    model.load_state_dict({swapped(name): tensor.clone() for name, tensor in model.state_dict().items()})
    x = x.flip(1)
    torch.testing.assert_close(blocks(), expected, atol=1e-10, rtol=0)


def test_a_wide_image_has_a_wide_grid_and_its_class_token_in_the_middle() -> None:
    model = build(img_size=(64, 96), patch_size=16)
    assert model.patch_embed.grid_size == (4, 6)
    assert model.pos_embed.shape == (1, 25, 32)
    x = images(64, 96)
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 25, 32)
    assert model(x).shape == (2, 10)
    assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens[:, 12])


def test_the_class_row_of_the_positions_belongs_to_the_class_token() -> None:
    """Moving `cls_token` and its row of `pos_embed` against each other leaves their sum, and the output, as it was."""
    model, x = build(), images()
    expected = model(x)
    shift = torch.randn(32)
    with torch.no_grad():
        model.cls_token.add_(shift)
        model.pos_embed[:, 32].sub_(shift)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=0)


def test_patches_overlap_where_the_stride_is_smaller() -> None:
    with torch.device("meta"):
        model = timm.create_model("vim_tiny_patch16_stride8_224")
    assert model.patch_embed.grid_size == (27, 27)
    assert model.pos_embed.shape[1] == 730
    assert model.feature_info[0]["reduction"] == 8


def test_drop_path_rises_from_zero_and_only_in_training() -> None:
    model = build(drop_path_rate=0.3)
    rates = [getattr(layer.drop_path, "drop_prob", 0.0) for layer in model.layers]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    x = torch.randn(32, 3, 64, 64)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("mixer", ["vim_pair", "mamba"])
def test_init_weights_fills_everything_after_to_empty(mixer: str) -> None:
    with torch.device("meta"):
        model = build(mixer=mixer)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(math.nan)
    model.init_weights()
    assert [name for name, t in model.state_dict().items() if not t.isfinite().all()] == []
    assert model(images()).isfinite().all()


def test_initial_values_are_those_of_the_reference() -> None:
    model = timm.create_model("vim_tiny_patch16_224", depth=6, num_classes=100)
    mixer = model.layers[3].mixer
    bound = 384**-0.5 / math.sqrt(6)
    assert 0.98 * bound < mixer.out_proj.weight.abs().max() <= bound
    for parameter in (model.pos_embed, model.head.weight):
        assert parameter.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.patch_embed.proj.weight.std().item() == pytest.approx((3 * 16 * 16) ** -0.5, rel=0.05)
    assert not model.head.bias.any()
    assert not model.patch_embed.proj.bias.any()
    assert torch.equal(mixer.D_b, torch.ones(384))
    assert torch.nn.functional.softplus(mixer.dt_proj_b.bias).max() <= 0.1 + 1e-6
    reference = build(mixer_options={"backward_dt_init": "reference"}).layers[0].mixer
    assert not reference.dt_proj_b.bias.any()


@pytest.mark.parametrize("pool", ["token", "avg", ""])
def test_reset_classifier_keeps_what_it_is_not_told_to_change(pool: str) -> None:
    model = build(global_pool=pool, dtype=torch.bfloat16).train()
    model.reset_classifier(7)
    assert model.global_pool == pool
    assert model.head.training
    assert model.head.weight.dtype == torch.bfloat16
    shape = (2, 65, 7) if pool == "" else (2, 7)
    assert model(images().bfloat16()).shape == shape
    for p in model.parameters():
        p.requires_grad_(False)
    model.eval().reset_classifier(5, "avg")
    assert not model.head.training
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(images().bfloat16()).shape == (2, 32)
    with pytest.raises(ValueError, match="global_pool must be one of"):
        model.reset_classifier(5, "max")


def test_reset_classifier_on_the_meta_device() -> None:
    model = build(device="meta")
    model.reset_classifier(3)
    assert model.head.weight.device.type == "meta"


def test_avg_pool_leaves_the_class_token_out() -> None:
    model, x = build(global_pool="avg"), images()
    tokens = model.forward_features(x)
    expected = torch.cat([tokens[:, :32], tokens[:, 33:]], 1).mean(1)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), expected)


def test_set_input_size_to_another_aspect() -> None:
    model = build()
    before, middle = model.pos_embed.detach().clone(), 32
    model.pos_embed.requires_grad_(False)
    model.set_input_size((40, 96))
    assert model.pos_embed.shape == (1, 61, 32)
    assert not model.pos_embed.requires_grad
    assert torch.equal(model.pos_embed[:, 30], before[:, middle])
    assert model(images(40, 96)).shape == (2, 10)
    with pytest.raises(ValueError, match=r"(8, 8)|patch"):
        model.set_input_size((4, 96))
    assert model(images(40, 96)).shape == (2, 10)


def test_set_input_size_to_another_patch_size() -> None:
    model = build()
    model.set_input_size(patch_size=16)
    assert model.patch_embed.grid_size == (4, 4)
    assert model.feature_info[0]["reduction"] == 16
    assert model(images()).shape == (2, 10)


def test_a_constant_grid_of_positions_stays_constant_round_the_class_row() -> None:
    positions = torch.ones(1, 13, 4)
    positions[:, 6] = 9
    resized = resize_pos_embed(positions, [3, 4], [5, 6], "middle")
    assert resized.shape == (1, 31, 4)
    torch.testing.assert_close(resized[:, 15], torch.full((1, 4), 9.0))
    torch.testing.assert_close(torch.cat([resized[:, :15], resized[:, 16:]], 1), torch.ones(1, 30, 4))


def test_dynamic_img_size_equals_set_input_size() -> None:
    dynamic, x = build(dynamic_img_size=True), images(48, 80)
    fixed = build()
    fixed.load_state_dict(dynamic.state_dict())
    fixed.set_input_size((48, 80))
    torch.testing.assert_close(dynamic(x), fixed(x))
    assert [f.shape for f in dynamic.forward_intermediates(x, intermediates_only=True)] == [(2, 32, 6, 10)] * 4


def test_an_image_of_another_size_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"set_input_size.*dynamic_img_size"):
        build()(images(64, 96))


def test_an_image_smaller_than_a_patch_is_refused() -> None:
    with pytest.raises(ValueError, match="patch"):
        build(img_size=4)
    with pytest.raises(ValueError, match="patch"):
        build(dynamic_img_size=True)(images(4, 64))


def test_unknown_keywords_and_names_are_refused() -> None:
    with pytest.raises(TypeError, match="widht"):
        build(widht=3)
    with pytest.raises(TypeError, match="d_stat"):
        build(mixer_options={"d_stat": 3})
    with pytest.raises(ValueError, match="did you mean 'mamba'"):
        build(mixer="mambo")
    with pytest.raises(ValueError, match="global_pool"):
        build(global_pool="max")


def test_half_precision_and_autocast() -> None:
    model, x = build(), images()
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(x)
    half = model.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    for found in (mixed, half):
        assert (found.float() - expected).norm() < 0.02 * expected.norm()
    assert {f.dtype for f in model.forward_intermediates(x.bfloat16(), intermediates_only=True)} == {torch.bfloat16}


def test_the_residual_stream_is_fp32_in_a_bf16_model() -> None:
    model, seen = build(dtype=torch.bfloat16), []
    for layer in model.layers:
        layer.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
        layer.mixer.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    model(images().bfloat16())
    assert seen == [torch.bfloat16, torch.float32] * 4


def test_intermediates_end_in_forward_features_and_drop_the_class_token() -> None:
    model, x = build(), images()
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    assert [m.shape for m in maps] == [(2, 32, 8, 8)] * 4
    _, (normed,) = model.forward_intermediates(x, indices=1, norm=True)
    without = torch.cat([final[:, :32], final[:, 33:]], 1)
    torch.testing.assert_close(normed.flatten(2).mT, without)
    (tokens,) = model.forward_intermediates(x, indices=[1], stop_early=True, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(tokens, maps[1].flatten(2).mT)
    with pytest.raises(ValueError, match="output_fmt"):
        model.forward_intermediates(x, output_fmt="NHWC")


def test_features_only_gives_four_maps() -> None:
    features = build(features_only=True)
    assert features.feature_info.channels() == [32] * 4
    assert features.feature_info.reduction() == [8] * 4
    assert [f.shape for f in features(images())] == [(2, 32, 8, 8)] * 4
    with torch.device("meta"):
        tiny = timm.create_model("vim_tiny_patch16_224", features_only=True)
    assert [info["module"] for info in tiny.feature_info.get_dicts()] == [f"layers.{i}" for i in (5, 11, 17, 23)]


def test_pruning_leaves_no_unused_parameter() -> None:
    model = build()
    assert model.prune_intermediate_layers([1], prune_norm=True) == [1]
    (tap,) = model.forward_intermediates(images(), indices=[1], intermediates_only=True)
    tap.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_checkpointing_changes_no_gradient() -> None:
    model, x = build().train(), images()
    model(x).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_groups_for_the_optimizer_name_every_parameter() -> None:
    from timm.optim import create_optimizer_v2

    model = build()
    names = {n for n, _ in model.named_parameters()}
    assert model.no_weight_decay() <= names
    assert "layers.0.mixer.A_b_log" in model.no_weight_decay()
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.5)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(names)
    assert {g["lr_scale"] for g in optimizer.param_groups} == {0.5**k for k in range(6)}
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert not any(id(p) in decayed for n, p in model.named_parameters() if n in model.no_weight_decay())


@pytest.mark.parametrize("mixer", ["vim_pair", "mamba"])
def test_compiles_without_a_graph_break_and_scripts(mixer: str) -> None:
    model, x = build(mixer=mixer), images()
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.jit.script(model)(x), expected)


def test_dynamic_img_size_compiles_and_scripts() -> None:
    model = build(dynamic_img_size=True)
    scripted = torch.jit.script(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    # torch cannot differentiate antialiased interpolation to a symbolic size.
    with torch.no_grad():
        for x in (images(), images(48, 80)):
            torch.testing.assert_close(scripted(x), model(x))
            torch.testing.assert_close(compiled(x), model(x))


def test_another_mixer_sees_both_directions() -> None:
    model = build(mixer="mamba", d_state=4)
    assert model.layers[0].mixer.past.A_log.shape == (64, 4)
    x = images().requires_grad_()
    (grad,) = torch.autograd.grad(model(x).square().sum(), x)
    assert grad[:, :, 0, 0].any()
    assert grad[:, :, -1, -1].any()


def test_authors_checkpoint_loads_without_renaming() -> None:
    model, x = build(), images()
    state = {"model": {k: v.clone() for k, v in model.state_dict().items()}, "epoch": 3, "optimizer": {}}
    other = build()
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(checkpoint_filter_fn(state, other))
    assert torch.equal(other(x), model(x))


def test_a_checkpoint_of_another_size_is_resampled_round_the_middle() -> None:
    small, large = build(), build(img_size=96)
    state = checkpoint_filter_fn({"model": small.state_dict()}, large)
    assert torch.equal(state["pos_embed"][:, 72], small.pos_embed[:, 32])
    large.load_state_dict(state)
    small.set_input_size(96)
    torch.testing.assert_close(large(x := images(96, 96)), small(x))


def test_a_checkpoint_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="another Vim"):
        checkpoint_filter_fn(build(embed_dim=48).state_dict(), build())


def test_registry_knows_paper_and_size() -> None:
    info = registry.model_info("vim_tiny_patch16_224")
    assert info.params == TOTALS["vim_tiny_patch16_224"]
    assert info.input_size == (3, 224, 224)
    assert "2401.09417" in (info.paper or "")


def test_nano_takes_fashion_mnist_as_it_is() -> None:
    model = timm.create_model("vim_nano").eval()
    assert model.pretrained_cfg["input_size"] == (1, 28, 28)
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    assert timm.create_model("vim_nano", img_size=64, in_chans=3).eval()(images()).shape == (2, 10)
