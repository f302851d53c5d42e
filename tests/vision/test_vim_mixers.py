"""Vim with other mixers than its own: published sizes, place in depth, the grid, and where the class token stands."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from sinuous.core import mixers
from sinuous.core.patches import resize_pos_embed
from sinuous.vision.vim import Vim, checkpoint_filter_fn

GRID_MIXERS = [name for name in mixers.list_mixers() if mixers.mixer_class(name).reads_grid]
PLACES = {"head": 0, "middle": 20, "tail": 40}  # among 5 x 8 patches


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(**kwargs: Any) -> Vim:
    return timm.create_model("test_vim", **{"num_classes": 10, "img_size": (40, 64), **kwargs}).eval()


def images(height: int = 40, width: int = 64) -> Tensor:
    return torch.randn(2, 3, height, width)


@pytest.mark.parametrize("name", mixers.list_mixers())
def test_a_mixer_keeps_its_published_sizes_unless_told_otherwise(name: str) -> None:
    own = {"d_state": 8} if name == "vim_pair" else {}  # test_vim's, of Vim's own mixer
    with torch.device("meta"):
        mixer = build(mixer=name, depth=1).layers[0].mixer
        alone = mixers.build_mixer(name, 32, **own)
    found = mixer.past if isinstance(mixer, mixers.Bidirectional) else mixer
    assert {k: v.shape for k, v in found.state_dict().items()} == {k: v.shape for k, v in alone.state_dict().items()}


def test_vims_own_mixer_has_the_sizes_of_the_paper() -> None:
    with torch.device("meta"):
        mixer = Vim(depth=1).layers[0].mixer
    assert mixer.A_log.shape == (2 * 192, 16)
    assert mixer.conv1d.kernel_size == (4,)


def test_sizes_reach_the_mixers_that_have_them_and_others_refuse() -> None:
    model = build(mixer="mamba", d_state=4, d_conv=3, expand=1)
    assert model.layers[0].mixer.past.A_log.shape == (32, 4)
    assert model.layers[0].mixer.past.conv1d.kernel_size == (3,)
    for size in ({"d_state": 4}, {"d_conv": 4}):
        with pytest.raises(TypeError, match=f"'gla' has no option {next(iter(size))}; it has"):
            build(mixer="gla", **size)


def test_mixers_know_their_place_and_share() -> None:
    model = build(mixer="rwkv7")
    assert [block.mixer.future.block_index for block in model.layers] == [0, 1, 2, 3]
    assert [block.mixer.past.v_lora is None for block in model.layers] == [True, False, False, False]
    x = images()
    expected = model(x)
    with torch.no_grad():
        for block in model.layers:  # which start at zero, and would hide the values
            for side in (block.mixer.past, block.mixer.future):
                side.o_proj.weight.normal_(std=0.1)
        changed = model(x)
        model.layers[0].mixer.past.v_proj.weight.mul_(2)
    assert not torch.allclose(changed, expected)
    first = model.layers[0].mixer.past.v_proj.weight
    (grad,) = torch.autograd.grad(model(x).square().sum(), first)
    assert grad.any()


@pytest.mark.parametrize("name", GRID_MIXERS)
def test_grid_mixers_are_told_the_grid_of_the_image(name: str) -> None:
    model, x = build(mixer=name), images()
    assert model.class_token == "none"
    assert model.global_pool == "avg"
    assert model.pos_embed.shape == (1, 40, 32)
    assert "cls_token" not in model.state_dict()
    row = model._finish(model.layers(model._embed(x)[0]))
    grids: list[Any] = []
    model.layers.register_forward_pre_hook(lambda _m, inputs: grids.append(inputs[2]))
    tokens = model.forward_features(x)
    assert grids == [[5, 8]]
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens.mean(1))
    assert not torch.allclose(tokens, row, atol=1e-4)


def test_a_model_with_a_class_token_tells_no_grid() -> None:
    model, grids = build(), []
    model.layers.register_forward_pre_hook(lambda _m, inputs: grids.append(inputs[2]))
    model(images())
    assert grids == [None]


@pytest.mark.parametrize("name", ["vim_pair", *GRID_MIXERS])
def test_a_model_without_a_class_token_keeps_timms_promises(name: str) -> None:
    model, x = build(mixer=name, class_token="none"), images()
    assert model.num_prefix_tokens == 0
    assert "cls_token" not in model.no_weight_decay()
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    assert [m.shape for m in maps] == [(2, 32, 5, 8)] * 4
    (tokens,) = model.forward_intermediates(
        x, indices=[3], norm=True, stop_early=True, output_fmt="NLC", intermediates_only=True
    )
    torch.testing.assert_close(tokens, final)
    model.init_weights()
    model.reset_classifier(5)
    assert model.global_pool == "avg"
    assert model(x).shape == (2, 5)
    with pytest.raises(ValueError, match="global_pool='token' reads the class token and the model has none"):
        model.reset_classifier(5, "token")
    assert model.prune_intermediate_layers([1], prune_norm=True) == [1]
    assert model.forward_intermediates(x, [1], intermediates_only=True)[0].shape == (2, 32, 5, 8)


@pytest.mark.parametrize("name", ["vim_pair", "ss2d"])
def test_positions_are_resampled_without_a_class_token(name: str) -> None:
    dynamic, x = build(mixer=name, class_token="none", dynamic_img_size=True), images(48, 80)
    fixed = build(mixer=name, class_token="none")
    fixed.load_state_dict(dynamic.state_dict())
    fixed.set_input_size((48, 80))
    assert fixed.pos_embed.shape == (1, 60, 32)
    torch.testing.assert_close(dynamic(x), fixed(x))
    large = build(mixer=name, class_token="none", img_size=(48, 80))
    square = build(mixer=name, class_token="none", img_size=64)
    large.load_state_dict(checkpoint_filter_fn({"model": square.state_dict()}, large))
    square.set_input_size((48, 80))
    torch.testing.assert_close(large(x), square(x))
    constant = resize_pos_embed(torch.ones(1, 12, 4), [3, 4], [5, 6], "none")
    torch.testing.assert_close(constant, torch.ones(1, 30, 4))


@pytest.mark.parametrize("place", PLACES)
def test_the_class_token_stands_where_it_is_asked_for(place: str) -> None:
    model, x, row = build(class_token=place), images(), PLACES[place]
    assert model.num_prefix_tokens == (1 if place == "head" else 0)
    expected, tokens = model(x), model.forward_features(x)
    assert tokens.shape == (2, 41, 32)
    assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens[:, row])
    patches = torch.cat([tokens[:, :row], tokens[:, row + 1 :]], 1)
    (tap,) = model.forward_intermediates(x, 1, norm=True, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(tap, patches)
    shift = torch.randn(32)
    with torch.no_grad():  # the token and its row of the positions count by their sum alone
        model.cls_token.add_(shift)
        model.pos_embed[:, row].sub_(shift)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=0)
    before = model.pos_embed.detach().clone()
    model.set_input_size((48, 80))
    assert torch.equal(model.pos_embed[:, {"head": 0, "middle": 30, "tail": 60}[place]], before[:, row])
    assert model(images(48, 80)).shape == (2, 10)


@pytest.mark.filterwarnings("ignore:.torch.jit.script.:FutureWarning")
@pytest.mark.parametrize("options", [{"class_token": "head"}, {"class_token": "none"}, {"mixer": "ss2d"}])
def test_compiles_scripts_and_exports(options: dict[str, Any]) -> None:
    model, x = build(dynamic_img_size=True, **options), images()
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    scripted = torch.jit.script(model)
    for size in ((40, 64), (48, 80)):
        x = images(*size)
        torch.testing.assert_close(scripted(x), model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixer": "ss2d", "class_token": "middle"}, "'none' for mixer 'ss2d', which reads the patches as a grid"),
        ({"mixer": "ss2d", "global_pool": "token"}, "reads the class token and the model has none; use 'avg' or ''"),
        ({"class_token": "none", "global_pool": "token"}, "reads the class token and the model has none"),
        ({"class_token": "centre"}, "class_token must be one of 'middle', 'head', 'tail', 'none' .got 'centre'"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_a_checkpoint_with_a_class_token_is_not_for_a_model_without() -> None:
    with_token, without = build(), build(class_token="none")
    for state, model, value in ((with_token, without, "'middle'"), (without, with_token, "'none'")):
        with pytest.raises(ValueError, match=f"only one has a class token; build the model with class_token={value}"):
            checkpoint_filter_fn(state.state_dict(), model)
