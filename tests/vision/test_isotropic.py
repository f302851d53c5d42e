"""Isotropic backbones: the order in which blocks visit the patches, pictures of several sizes in one row, any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sinuous
import sinuous.vision
from sinuous.core import mixers
from sinuous.core.isotropic import Isotropic
from sinuous.core.patches import class_row, resize_pos_embed, with_class_token, without_class_token
from sinuous.core.registry import list_models
from sinuous.core.scan_routes import list_routes, row_order, scan_route

FAMILIES = [
    name
    for name in list_models("test_*", domain="vision")
    if isinstance(sinuous.create_model(name, device="meta"), Isotropic)
]
SIZES = [(40, 64), (64, 24), (16, 8), (48, 48)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(name: str, **kwargs: Any) -> Any:
    options = {"img_size": (40, 64), "patch_size": 8, "num_classes": 10, "dtype": torch.float64, **kwargs}
    return sinuous.create_model(name, **options).eval()


def image(height: int = 40, width: int = 64, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, dtype=torch.float64)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_route_is_the_model_on_patches_in_that_order(name: str) -> None:
    model, x = build(name, mixer="gla", route="hilbert"), image()
    raster = build(name, mixer="gla")
    raster.load_state_dict(model.state_dict())
    stream, _ = raster._embed(x)
    patches, place = without_class_token(stream, raster.class_token), raster.class_token
    visited = scan_route("hilbert", 5, 8).to_sequence(patches)
    if place != "none":
        token = raster.cls_token.expand(2, -1, -1)
        if raster.pos_class_token != "none":
            token = token + raster.pos_embed[:, 20:21]
        visited = with_class_token(visited, token, place)
    tokens = raster._finish(raster.stack(visited))
    expected = scan_route("hilbert", 5, 8).to_cells(without_class_token(tokens, place))
    (maps,) = model.forward_intermediates(x, 1, norm=True, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(maps, expected)
    assert not torch.allclose(model(x), raster(x))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("mixer", ["gla", "rwkv7"])
def test_routes_are_taken_in_turn_and_maps_stay_in_raster_order(name: str, mixer: str) -> None:
    routes = ["raster", "column", "serpentine"]
    model, x = build(name, mixer=mixer, route=routes), image()
    for parameter in model.parameters():  # some projections start at zero, and would hide the order
        torch.nn.init.normal_(parameter, std=0.1)
    blocks = list(model.stack)
    stream, grid = model._embed(x)
    row = -1 if model.class_token == "none" else class_row(40, model.class_token)
    expected, shared = [], ()
    for i, block in enumerate(blocks):
        order, step = row_order(routes[i % 3], 5, 8, row)
        if block.shares:
            stream, *shared = block(stream[:, order], None, None, *(t[:, order] for t in shared))
            shared = [t[:, step] for t in shared]
        else:
            stream = block(stream[:, order], None, None)
        stream = stream[:, step]
        expected.append(without_class_token(stream, model.class_token).mT.unflatten(2, tuple(grid)))
    maps = model.forward_intermediates(x, intermediates_only=True)
    torch.testing.assert_close(maps, expected)


@pytest.mark.parametrize("route", list_routes())
@pytest.mark.parametrize("row", [-1, 0, 7, 15])
def test_the_class_token_keeps_its_place_in_every_order(route: str, row: int) -> None:
    order, step = row_order(route, 3, 5, row)
    assert torch.equal(order[step], torch.arange(15 + (row >= 0)))
    if row >= 0:
        assert order[row] == row


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("mixer", ["default", "mamba2", "rwkv7", "softmax_attention"])
@pytest.mark.parametrize("route", ["raster", ["windows", "reversed"]])
def test_packed_pictures_are_the_separate_calls(name: str, mixer: str, route: str | list[str]) -> None:
    if mixer == "default":
        if mixers.mixer_class(build(name).stack.pattern[0]).reads_grid:
            pytest.skip("its own mixer reads a grid")
        model = build(name, dynamic_img_size=True, route=route)
    else:
        model = build(name, mixer=mixer, dynamic_img_size=True, route=route)
    pictures = [image(*size, batch=1)[0] for size in SIZES]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        found = model.forward_packed(pictures)
        expected = torch.cat([model(picture[None]) for picture in pictures])
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_pictures_that_cannot_be_are_refused(name: str) -> None:
    grids = build(name, mixer="plstm_grid", dynamic_img_size=True)
    with pytest.raises(ValueError, match="mixer 'plstm_grid' reads the patches of a picture as a grid, and pictures"):
        grids.forward_packed([image()[0]])
    model = build(name, mixer="mamba2")
    with pytest.raises(ValueError, match=r"build the model with dynamic_img_size=True"):
        model.forward_packed([image()[0], image(64, 24)[0]])
    with pytest.raises(ValueError, match=r"images must be a list of tensors \[C, H, W\]"):
        model.forward_packed(image())
    assert model.forward_packed([]).shape == (0, 10)


@pytest.mark.parametrize("name", FAMILIES)
def test_without_positions_every_size_runs(name: str) -> None:
    model = build(name, pos_embed=False)
    assert model.pos_embed is None
    assert "pos_embed" not in model.no_weight_decay()
    for size in SIZES:
        assert model(image(*size)).shape == (2, 10)
        maps = model.forward_intermediates(image(*size), 1, intermediates_only=True)
        assert maps[0].shape[2:] == (size[0] // 8, size[1] // 8)
    assert (model.cls_token is not None) == (build(name).cls_token is not None)
    model.set_input_size((24, 32))
    model.init_weights()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("mixer", mixers.list_mixers())
def test_every_mixer_trains_a_step_on_images_that_are_not_square(name: str, mixer: str) -> None:
    model = build(name, mixer=mixer, depth=2, dtype=torch.float32).train()
    x, labels = image().float(), torch.tensor([3, 7])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):  # layers behind a projection that starts at zero get no gradient in the first step
        loss = torch.nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert {key for key, parameter in model.named_parameters() if parameter.grad is None} == set()
    assert model.patch_embed.proj.weight.grad.any()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("route", list_routes())
def test_every_route_trains_a_step(name: str, route: str) -> None:
    model = build(name, mixer="mamba", route=route, dtype=torch.float32).train()
    model(image().float()).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_route_that_does_nothing_or_is_unknown_is_told(name: str) -> None:
    with pytest.warns(UserWarning, match="mixer 'ss2d' reads a grid in its own order"):
        model = build(name, mixer="ss2d", route="column")
    assert model(image()).isfinite().all()
    with pytest.raises(ValueError, match="there is no scan route 'serpentin'; did you mean 'serpentine'"):
        build(name, route="serpentin")


@pytest.mark.parametrize("name", FAMILIES)
def test_routes_compile_and_export_with_any_batch(name: str) -> None:
    model, x = build(name, mixer="mamba", route=["raster", "hilbert"], depth=2), image()
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    more = image(batch=5)
    torch.testing.assert_close(exported(more), model(more))


def test_positions_of_clips_are_resampled_in_space_and_time() -> None:
    constant = resize_pos_embed(torch.ones(1, 24, 4), [2, 3, 4], [5, 6, 2], "none")
    torch.testing.assert_close(constant, torch.ones(1, 60, 4))
    rising = torch.arange(4.0).view(1, 4, 1, 1).expand(1, 4, 6, 2).reshape(1, 24, 2)
    wide = resize_pos_embed(rising, [4, 2, 3], [4, 4, 6], "none").unflatten(1, (4, 24))
    torch.testing.assert_close(wide, torch.arange(4.0).view(1, 4, 1, 1).expand(1, 4, 24, 2))
