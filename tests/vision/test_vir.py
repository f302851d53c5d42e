"""ViR: against its authors' posted code, its sizes, its causality, and pictures read row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

import sinuous
from sinuous.core import registry
from sinuous.core.mixers import list_mixers, mixer_class
from sinuous.core.scan_routes import list_routes
from sinuous.core.streaming import load_state, save_state
from sinuous.vision.vir import RowsState, ViR, checkpoint_filter_fn

TOTALS = {
    "vir_small_patch16_224": 22_059_496,
    "vir_base_patch16_224": 86_585_320,
    "vir_large_patch16_224": 304_374_760,
    "vir_large_patch14_224": 304_251_880,
}
CAUSAL = [name for name in list_mixers() if mixer_class(name).causal]

# The reference file holds weights (`model.*`), two images, and in fp64 the logits of anom63931/ViR at commit d91fd8b in
# its parallel mode (`softmax`), and its tokens and logits in its recurrent one, with gradients of
# `(logits · (1, 2, 3, 4, 5)).sum()` (`grad.*`, fp32). Its chunkwise mode gave the recurrent one's tokens. It ran on a
# CPU, with decays in fp64, patch 16, width 16, two blocks, two heads and random weights.
FILE = load_file(Path(__file__).parent / "data" / "vir_reference.safetensors")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def part(prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in FILE.items() if name.startswith(prefix)}


def reference(**options: Any) -> ViR:
    sizes: dict[str, Any] = {"img_size": 48, "in_chans": 1, "num_classes": 5, "embed_dim": 16, "depth": 2}
    model = ViR(**sizes, num_heads=2, **options).eval()
    model.load_state_dict(checkpoint_filter_fn({"state_dict": part("model.")}, model))
    return model.double()


def build(**options: Any) -> Any:
    """The test model in float64, with no two parameters alike and nothing that vanishes."""
    sizes = {"img_size": (40, 24), "num_classes": 10, "dtype": torch.float64}
    model = sinuous.create_model("test_vir", **{**sizes, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def image(batch: int = 2, height: int = 40, width: int = 24) -> Tensor:
    return torch.randn(batch, 3, height, width, dtype=torch.float64)


@pytest.mark.parametrize("mode", [None, "parallel", "chunkwise", "recurrent"])
def test_every_mode_equals_the_posted_code(mode: str | None) -> None:
    model, x = reference(mode=mode), FILE["input"].double()
    torch.testing.assert_close(model.forward_features(x), FILE["tokens"], atol=1e-12, rtol=0)
    logits = model(x)
    torch.testing.assert_close(logits, FILE["logits"], atol=1e-12, rtol=0)
    (logits * torch.arange(1, 6)).sum().backward()
    gradients = part("grad.")
    assert set(gradients) == {name for name, _ in model.named_parameters()}
    for name, expected in gradients.items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        assert (gradient - expected).norm() < 1e-6 * expected.norm(), name


def test_softmax_is_the_parallel_mode_of_the_posted_code() -> None:
    x = FILE["input"].double()
    torch.testing.assert_close(reference(softmax=True)(x), FILE["softmax"], atol=1e-12, rtol=0)
    assert (FILE["softmax"] - FILE["logits"]).abs().max() > 0.01


@pytest.mark.parametrize("name", TOTALS)
def test_sizes_are_those_of_the_posted_code(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == TOTALS[name]
    info = registry.model_info(name)
    assert info.params == TOTALS[name]
    assert "2310.19731" in (info.paper or "")
    assert model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)


def test_parameters_have_the_posted_names() -> None:
    names = {key for key in build(depth=1).state_dict() if key.startswith("blocks.0.")}
    parts = ("norm1", "retention.qkv", "retention.out_proj", "norm2", "mlp.fc1", "mlp.fc2")
    linear = {f"blocks.0.{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    assert names == linear | {"blocks.0.ls1.gamma", "blocks.0.ls2.gamma"}
    without = build(depth=1, init_values=0, mixer="mamba").state_dict()
    assert not [key for key in without if "gamma" in key]
    assert "blocks.0.retention.A_log" in without


def test_tokens_depend_on_those_before_them_alone() -> None:
    model, x = build(), image(1).requires_grad_()
    tokens = model.forward_features(x)
    (of_seventh,) = torch.autograd.grad(tokens[0, 6].sum(), x, retain_graph=True)
    seen = of_seventh.abs().sum(1).unfold(1, 8, 8).unfold(2, 8, 8).sum((-2, -1)).flatten() > 0
    assert seen.tolist() == [True] * 7 + [False] * 8
    (of_class,) = torch.autograd.grad(tokens[0, 15].sum(), x)
    assert (of_class.abs().sum(1) > 0).all()
    tall = build(pos_embed=False, class_token="none")
    longer = image(1, 64)
    torch.testing.assert_close(
        tall.forward_features(longer)[:, :9], tall.forward_features(longer[:, :, :24]), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("mixer", list_mixers())
def test_any_mixer_trains_a_step(mixer: str) -> None:
    model = sinuous.create_model("test_vir", img_size=(24, 40), mixer=mixer, depth=2, num_classes=3).train()
    model(torch.randn(2, 3, 24, 40)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert isinstance(model.blocks[0].retention, mixer_class(mixer))
    assert model.blocks.causal is mixer_class(mixer).causal
    assert (model.class_token == "none") is mixer_class(mixer).reads_grid


def test_starts_as_the_posted_code_does() -> None:
    model = sinuous.create_model("test_vir", embed_dim=384, depth=1, init_values=1e-5)
    block = model.blocks[0]
    for layer in (block.retention.qkv, block.mlp.fc1):
        assert abs(layer.weight.std().item() / 0.02 - 1) < 0.05
        assert not layer.bias.any()
    assert (block.ls1.gamma == 1e-5).all()


def by_strips(model: Any, x: Tensor, cuts: list[int], **size: Any) -> tuple[list[Tensor], RowsState]:
    state, answers = model.initial_state(x.shape[0], **size), []
    for strip in x.split(cuts, 2):
        logits, state = model.prefill(strip, state)
        answers.append(logits)
    return answers, state


@pytest.mark.parametrize("cuts", [[40], [8] * 5, [24, 16], [8, 32]])
@pytest.mark.parametrize(
    "options", [{}, {"global_pool": "avg"}, {"class_token": "none"}, {"mode": "parallel"}], ids=str
)
def test_rows_of_a_picture_give_its_answer(cuts: list[int], options: dict[str, Any]) -> None:
    model, x = build(**options), image()
    answers, state = by_strips(model, x, cuts)
    torch.testing.assert_close(answers[-1], model(x), atol=1e-10, rtol=0)
    assert state.rows.tolist() == [5, 5]


@pytest.mark.parametrize("mixer", CAUSAL)
def test_rows_go_with_every_causal_mixer(mixer: str) -> None:
    model, x = build(mixer=mixer, depth=2), image()
    answers, _ = by_strips(model, x, [16, 8, 16])
    torch.testing.assert_close(answers[-1], model(x), atol=1e-10, rtol=0)


def test_the_answer_so_far_is_that_to_the_picture_so_far() -> None:
    model, x = build(pos_embed=False), image()
    answers, _ = by_strips(model, x, [8, 16, 16])
    for logits, rows in zip(answers, (8, 24, 40), strict=True):
        torch.testing.assert_close(logits, model(x[:, :, :rows]), atol=1e-10, rtol=0)


@pytest.mark.parametrize("options", [{"dynamic_img_size": True}, {"pos_embed": False}], ids=str)
def test_rows_of_pictures_of_another_size(options: dict[str, Any]) -> None:
    model, x = build(**options), image(2, 83, 53)
    assert x.shape[2] // 8 == 10
    answers, _ = by_strips(model, x[:, :, :80], [48, 32], img_size=(83, 53))
    torch.testing.assert_close(answers[-1], model(x), atol=1e-10, rtol=0)


def test_the_state_of_rows_does_not_grow_and_can_be_kept(tmp_path: Path) -> None:
    model, x = build(), image()
    shapes = []
    state = model.initial_state(2)
    for strip in x.split(8, 2):
        shapes.append([t.shape for t in torch.utils._pytree.tree_leaves(state)])
        _, state = model.prefill(strip, state)
        save_state(state, tmp_path / "picture.state")
        state = load_state(tmp_path / "picture.state")
    assert all(shape == shapes[0] for shape in shapes)
    logits, _ = model.prefill(x[:, :, :8])
    torch.testing.assert_close(logits, by_strips(model, x[:, :, :8], [8])[0][0])
    assert model.initial_state(0).rows.shape == (0,)


def test_pictures_of_a_batch_may_be_at_different_rows() -> None:
    model, x = build(), image()
    _, early = model.prefill(x[:1, :, :8])
    _, late = model.prefill(x[1:, :, :32])
    both = torch.utils._pytree.tree_map(lambda a, b: torch.cat([a, b]), early, late)
    strip = torch.cat([x[:1, :, 8:16], x[1:, :, 32:]])
    separate = [model.prefill(strip[:1], early)[0], model.prefill(strip[1:], late)[0]]
    torch.testing.assert_close(model.prefill(strip, both)[0], torch.cat(separate), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softmax": True}, r"softmax must be False .*lets every patch see all others.*call the model"),
        ({"mixer": "vir_retention_grid"}, r"mixer must be causal .*got 'vir_retention_grid', which looks at rows to"),
        ({"route": "column"}, r"route must be 'raster' .*got 'column'"),
        ({"stride": 4}, r"stride must be patch_size .*got \(4, 4\), which makes patches reach into the next strip"),
        ({"class_token": "middle"}, r"class_token must be 'tail' or 'none' .*got 'middle'"),
        ({"class_token": "head"}, r"class_token must be 'tail' or 'none' .*got 'head'"),
        ({"global_pool": ""}, r"global_pool must be 'token' or 'avg' .*got ''"),
    ],
    ids=str,
)
def test_models_that_cannot_read_by_rows_say_so(options: dict[str, Any], message: str) -> None:
    model = build(**options)
    for call in (lambda: model.initial_state(2), lambda: model.prefill(image()[:, :, :8])):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_broken_strip_is_told() -> None:
    model, x = build(), image()
    _, state = model.prefill(x[:, :, :24])
    wrong = [
        (x[:, :, :12], state, r"height of a strip must be a multiple of the patch's, 8 \(got 12\)"),
        (x[:, :, :8, :16], state, r"a strip must be as wide as the picture, 24 pixels \(got 16\)"),
        (image(2, 8, 32), state, r"a strip must be as wide as the picture, 24 pixels \(got 32\)"),
        (x[:, :, :24], state, r"a strip must have at most the 16 rows of pixels that pictures 40 high have left"),
        (x[:, :1, :8], state, r"images must have shape \[B, C, H, W\] with 3 channels"),
        (x[:, :, :4], state, "images must be at least as large as a patch of 8 x 8"),
        (x[:1, :, :8], state, r"state must be the state of the 1 pictures of this strip \(got of 2\)"),
        (x[:, :, :8], state.blocks, r"state must be the state of the 2 pictures .*got .*tuple"),
        (x[:, :, :8].float(), state, "x must have the dtype of the parameters"),
    ]
    for strip, before, message in wrong:
        with pytest.raises(ValueError, match=message):
            model.prefill(strip, before)
    for size in (4, (40, 4), (40, 24, 3), "40"):
        with pytest.raises(ValueError, match="img_size must"):
            model.initial_state(2, img_size=size)
    with pytest.raises(
        ValueError, match=r"the image has 6 x 3 patches and the model is made for 5 x 3.*dynamic_img_size"
    ):
        model.initial_state(2, img_size=(48, 24))
    with pytest.raises(ValueError, match="batch_size must be a whole number"):
        model.initial_state(-1)


@pytest.mark.parametrize("route", list_routes())
def test_every_route_trains_a_step(route: str) -> None:
    model = build(route=[route, "raster"]).train()
    model(image()).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.torch.jit.script.:FutureWarning")
@pytest.mark.parametrize("options", [{"mode": "parallel"}, {"softmax": True}, {"mode": "recurrent"}], ids=str)
def test_every_mode_compiles_and_scripts(options: dict[str, Any]) -> None:
    model, x = build(**options, depth=2), image()
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.jit.script(model)(x), expected)


def test_a_checkpoint_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="another ViR"):
        checkpoint_filter_fn(build(embed_dim=48).state_dict(), build())
    with pytest.raises(ValueError, match="only one has a class token; build the model with class_token='none'"):
        checkpoint_filter_fn(build(class_token="none").state_dict(), build())


def test_positions_are_resampled_without_a_row_for_the_class_token() -> None:
    square, wide = build(img_size=40), build(img_size=(40, 72))
    state = checkpoint_filter_fn(square.state_dict(), wide)
    assert state["pos_embed"].shape == (1, 45, 32)
    wide.load_state_dict(state)


def test_nano_takes_fashion_mnist_as_it_is() -> None:
    model = timm.create_model("vir_nano").eval()
    assert model.pretrained_cfg["input_size"] == (1, 28, 28)
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    assert timm.create_model("vir_nano", img_size=64, in_chans=3).eval()(torch.randn(1, 3, 64, 64)).shape == (1, 10)
