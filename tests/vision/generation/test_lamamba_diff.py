"""LaMamba-Diff: what the paper and the authors' code fix, at any size, and as diffusers uses a denoiser."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sinuous

pytest.importorskip("diffusers")

from sinuous.vision.generation import LaMambaDiff, models
from sinuous.vision.generation.lamamba_diff import LaMambaBlock
from sinuous.vision.generation.windows import WindowAttention


def build(seed: int = 0, **options: Any) -> Any:
    """Build the test model with no parameter at zero, so that a swapped or unused one shows."""
    torch.manual_seed(seed)
    model: Any = sinuous.create_model("test_lamamba_diff", **options)
    return stirred(model).eval()


def stirred(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def batch(height: int = 8, width: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 4, height, width, dtype=dtype), torch.tensor([3, 700]), torch.tensor([4, 10])


@pytest.mark.parametrize(
    ("name", "options", "total"),
    [
        ("lamamba_diff_xl", {}, 659_742_248),
        ("lamamba_diff_xl", {"d_state": 1}, 652_484_648),
        ("lamamba_diff_xl", {"d_state": 1, "sample_size": 64}, 653_467_688),
        ("lamamba_diff_s", {"d_state": 1}, 26_728_056),
        ("lamamba_diff_b", {"d_state": 1}, 105_312_824),
        ("lamamba_diff_l", {}, 423_977_400),
    ],
)
def test_parameters_are_those_of_the_reference_to_the_unit(name: str, options: dict[str, int], total: int) -> None:
    with torch.device("meta"):
        model = sinuous.create_model(name, **options)
    assert sum(p.numel() for p in model.parameters()) == total


@pytest.mark.parametrize(("side", "giga"), [(32, 50.37), (64, 200.83)])
def test_operations_are_those_of_the_paper(side: int, giga: float) -> None:
    """57.6 % and 61.6 % below DiT-XL/2's 118.67 and 524.58 are the paper's savings."""
    with torch.device("meta"), torch.no_grad():
        model = sinuous.create_model("lamamba_diff_xl", sample_size=side)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 4, side, side), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    assert counter.get_total_flops() / 2e9 == pytest.approx(giga, abs=0.005)


def published_shapes(dim: int, sides: int, depths: tuple[int, ...], window: int, heads: int) -> dict[str, list[int]]:
    """Names and shapes of a file of the authors' code."""
    shapes: dict[str, list[int]] = {"pos_embed": [1, sides, sides, dim]}
    widths, grids = [dim, 2 * dim, 4 * dim, 4 * dim], [sides, sides // 2, sides // 4, sides // 4]

    def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = [outputs, inputs]
        if bias:
            shapes[f"{name}.bias"] = [outputs]

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = [width]

    def block(name: str, stage: int, k: int, project: bool) -> None:
        width, side, inner = widths[stage], min(window, grids[stage]), 2 * widths[stage]
        rank, state = -(-width // 16), 2
        if project or stage < 2:
            linear(f"{name}.condition_projection", 4 * dim, width)
        for part in ("norm_swin", "norm", "norm2"):
            norm(f"{name}.{part}", width)
        shapes[f"{name}.attn.relative_position_bias_table"] = [(2 * side - 1) ** 2, heads]
        shapes[f"{name}.attn.relative_position_index"] = [side**2, side**2]
        if k % 2 and grids[stage] > window:
            shapes[f"{name}.attn_mask"] = [(grids[stage] // window) ** 2, side**2, side**2]
        linear(f"{name}.attn.qkv", width, 3 * width)
        linear(f"{name}.attn.proj", width, width)
        shapes[f"{name}.op.x_proj_weight"] = [4, rank + 2 * state, inner]
        shapes[f"{name}.op.dt_projs_weight"] = [4, inner, rank]
        shapes[f"{name}.op.dt_projs_bias"] = [4, inner]
        shapes[f"{name}.op.A_logs"] = [4 * inner, state]
        shapes[f"{name}.op.Ds"] = [4 * inner]
        norm(f"{name}.op.out_norm", inner)
        linear(f"{name}.op.in_proj", width, 2 * inner, bias=False)
        shapes[f"{name}.op.conv2d.weight"] = [inner, 1, 3, 3]
        linear(f"{name}.op.out_proj", inner, width, bias=False)
        linear(f"{name}.mlp.fc1", width, 2 * width)
        linear(f"{name}.mlp.fc2", 2 * width, width)
        linear(f"{name}.adaLN_modulation.1", width, 9 * width)

    linear("t_embedder.mlp.0", 256, 4 * dim)
    linear("t_embedder.mlp.2", 4 * dim, 4 * dim)
    shapes["y_embedder.embedding_table.weight"] = [11, 4 * dim]
    shapes["patch_embed.proj.weight"], shapes["patch_embed.proj.bias"] = [dim, 4, 1, 1], [dim]
    norm("patch_embed.norm", dim)
    for stage, depth in enumerate(depths):
        for k in range(depth):
            block(f"layers.{stage}.blocks.{k}", stage, k, project=False)
        if stage < 2:
            linear(f"layers.{stage}.downsample.reduction", 4 * widths[stage], 2 * widths[stage], bias=False)
            norm(f"layers.{stage}.downsample.norm", 4 * widths[stage])
    block("mid_layer.blocks.0", 3, 0, project=False)
    for place, stage in enumerate((3, 2, 1, 0)):
        for k in range(depths[stage] + 1):
            block(f"layers_up.{place}.blocks.{k}", stage, k, project=True)
        if stage < 2:
            linear(f"layers_up.{place}.upsample.expand", widths[stage + 1], 2 * widths[stage + 1], bias=False)
            norm(f"layers_up.{place}.upsample.norm", widths[stage])
    linear("final_up.expand", dim, dim, bias=False)
    norm("final_up.norm", dim)
    linear("final_condition_projection", 4 * dim, dim)
    linear("final_adaLN_modulation.1", dim, 2 * dim)
    linear("final_linear", dim, 8)
    return shapes


@pytest.mark.parametrize("side", [8, 16])
def test_the_authors_file_loads_its_averages_for_its_own_size_and_for_others(tmp_path: Path, side: int) -> None:
    shapes = published_shapes(16, side, (1, 2, 1, 1), 4, 2)
    averages = {name: 0.1 * torch.randn(shape) for name, shape in shapes.items()}
    torch.save({"model": {}, "ema": averages, "opt": {"state": {}}}, tmp_path / "0000100.pt")
    model: Any = sinuous.create_model("test_lamamba_diff", checkpoint_path=tmp_path / "0000100.pt", sample_size=side)
    state = model.state_dict()
    assert set(state) == {n for n in averages if not n.endswith(("relative_position_index", "attn_mask"))}
    assert all(torch.equal(tensor, averages[name]) for name, tensor in state.items())
    for other in (12, [8, 20], 6):
        there = sinuous.create_model("test_lamamba_diff", checkpoint_path=tmp_path / "0000100.pt", sample_size=other)
        height, width = (other, other) if isinstance(other, int) else other
        x, t, y = batch(height, width)
        with torch.no_grad():
            torch.testing.assert_close(there.eval()(x, t, y).sample, model.eval()(x, t, y).sample, atol=1e-5, rtol=1e-5)


def test_the_file_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"another LaMambaDiff: .* has shape"):
        models.checkpoint_filter_fn(build(embed_dim=8).state_dict(), build())
    with pytest.raises(ValueError, match="not one of this LaMambaDiff: it lacks"):
        models.checkpoint_filter_fn({"pos_embed": torch.zeros(1, 8, 8, 16)}, build())


def test_blocks_start_as_identities_and_the_output_at_zero() -> None:
    model: Any = sinuous.create_model("test_lamamba_diff")
    reference: Any = sinuous.create_model("test_lamamba_diff", zero_init_output=False)
    x, t, y = batch()
    block = next(m for m in model.modules() if isinstance(m, LaMambaBlock))
    cells = torch.randn(2, 8, 8, 16)
    assert torch.equal(block(cells, torch.randn(2, 64)), cells)
    assert model(x, t, y).sample.count_nonzero() == 0
    first, second = reference(x, t, y).sample, reference(x, t.flip(0), y.flip(0)).sample
    assert torch.equal(first, second)
    assert first.abs().mean() > 0.1


def test_starts_of_positions_and_scans_are_the_references() -> None:
    model: Any = sinuous.create_model("test_lamamba_diff", d_state=1)
    pos = model.pos_embed[0]
    angles = 3 / 10000 ** (torch.arange(4) / 4)
    torch.testing.assert_close(pos[5, 3, :8], torch.cat([angles.sin(), angles.cos()]))
    assert torch.equal(pos[5, 3, 8:], pos[3, 5, :8])
    op = model.layers[0].blocks[0].op
    assert op.A_logs.count_nonzero() == 0
    assert torch.equal(op.Ds, torch.ones_like(op.Ds))
    assert op.routes == "serpentine"
    assert op.in_proj.weight.abs().max() <= math.sqrt(6 / sum(op.in_proj.weight.shape))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 7), (9, 14), (3, 1), (16, 5)])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_any_height_and_width_run(height: int, width: int, patch_size: int) -> None:
    model = build(patch_size=patch_size)
    x, t, y = batch(height, width)
    sample = model(x, t, y).sample
    assert sample.shape == (2, 8, height, width)
    assert sample.isfinite().all()


def whole_attention(attention: WindowAttention, x: Tensor, seen: Tensor) -> Tensor:
    """Every cell to the cells that `seen` lets it see, with the bias of its relative place."""
    height, width, dim = x.shape[1:]
    q, k, v = attention.qkv(x.flatten(1, 2)).unflatten(-1, [3, attention.num_heads, -1]).permute(2, 0, 3, 1, 4)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], -1)
    apart = places[:, None] - places[None]
    table = attention.relative_position_bias_table.unflatten(0, attention.table_sides)
    reach = [(side + 1) // 2 - 1 for side in attention.table_sides]
    inside = (apart.abs() <= torch.tensor(reach)).all(-1) & seen
    shifted = (apart + torch.tensor(reach)).clamp(min=0)
    rows, columns = (shifted[..., axis].clamp(max=attention.table_sides[axis] - 1) for axis in (0, 1))
    scores = q @ k.mT * (dim // attention.num_heads) ** -0.5 + table[rows, columns].permute(2, 0, 1)
    weights = scores.masked_fill(~inside, -torch.inf).softmax(-1)
    return attention.proj((weights @ v).transpose(1, 2).flatten(2)).unflatten(1, [height, width])


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("height", "width"), [(4, 4), (8, 8), (7, 10), (4, 6), (9, 4)])
def test_windows_are_cut_shifted_and_padded_as_a_mask_over_the_whole_map_says(
    height: int, width: int, shifted: bool
) -> None:
    torch.manual_seed(0)
    attention: Any = stirred(WindowAttention(8, 2, 4, (8, 8), shifted)).double()
    nn.init.normal_(attention.relative_position_bias_table)
    x = torch.randn(2, height, width, 8, dtype=torch.float64)
    windows = []
    for side in (height, width):
        shift = 2 if shifted and side > 4 else 0
        whole = side + -side % 4
        place = (torch.arange(side) - shift) % whole
        windows.append(place // 4 + 100 * (torch.arange(side) < shift))
    label = (windows[0][:, None] * 1000 + windows[1][None]).flatten()
    expected = whole_attention(attention, x, label[:, None] == label[None])
    torch.testing.assert_close(attention(x), expected, atol=1e-10, rtol=1e-10)


def test_steps_and_classes_may_be_numbers_or_absent() -> None:
    model = build()
    x, _, _ = batch()
    with torch.no_grad():
        null = model(x, torch.tensor([5, 5]), torch.tensor([10, 10])).sample
        assert torch.equal(model(x, 5).sample, null)
        assert torch.equal(model(x, torch.tensor(5.0), torch.tensor([10, 1000])).sample, null)
        assert torch.equal(model(x).sample, model(x, torch.zeros(2), torch.full((2,), 10)).sample)
        assert not torch.allclose(model(x, 5, torch.tensor([1, 2])).sample, null)
        assert torch.equal(model(x, 5, return_dict=False)[0], null)
    for wrong, message in [
        ({"hidden_states": torch.zeros(2, 3, 8, 8)}, r"hidden_states must have shape \[B, 4, h, w\]"),
        ({"hidden_states": x, "timestep": torch.zeros(3)}, r"timestep must have shape \[2\]"),
        ({"hidden_states": x, "class_labels": torch.zeros(2, 1)}, r"class_labels must have shape \[2\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(**wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads must divide embed_dim 16"),
        ({"depths": [2]}, "at least two stages"),
        ({"sample_size": [8, 8, 8]}, "one number or a height and a width"),
        ({"embed_dim": 0}, "embed_dim must be at least 1"),
        ({"mixer": "ss2e"}, "there is no mixer 'ss2e'; did you mean 'ss2d'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sinuous.create_model("test_lamamba_diff", **options)


def test_the_config_holds_what_pipelines_ask_for() -> None:
    model: Any = LaMambaDiff(sample_size=8, in_channels=3, embed_dim=16, depths=(1, 1), num_heads=2, num_classes=5)
    assert (model.config.sample_size, model.config.in_channels, model.config.out_channels) == (8, 3, 6)
    again = LaMambaDiff.from_config(model.config)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_saved_by_diffusers_and_by_us_it_comes_back_equal(tmp_path: Path) -> None:
    model, (x, t, y) = build(), batch()
    model.save_pretrained(tmp_path / "theirs")
    sinuous.save(model, tmp_path / "ours")
    for again in (LaMambaDiff.from_pretrained(tmp_path / "theirs"), sinuous.load(tmp_path / "ours")):
        assert torch.equal(again.eval()(x, t, y).sample, model(x, t, y).sample)


def test_half_precision_keeps_decays_and_steps_in_single(tmp_path: Path) -> None:
    model, (x, t, y) = build(), batch()
    model.save_pretrained(tmp_path)
    half = LaMambaDiff.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).eval()
    kept = {n.rpartition(".")[2] for n, p in half.named_parameters() if p.dtype == torch.float32}
    assert kept == {"A_logs", "Ds", "dt_projs_bias"}
    expected = model(x, t, y).sample
    assert (half(x.bfloat16(), t, y).sample - expected).abs().mean() < 0.03 * expected.abs().mean()
    assert model.half()(x.half(), t, y).sample.isfinite().all()


def test_checkpointing_changes_no_gradient() -> None:
    model, (x, t, y) = build(), batch()
    gradients = []
    for switch in (model.disable_gradient_checkpointing, model.enable_gradient_checkpointing):
        switch()
        loss = model.train()(x, t, y).sample.square().mean()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("mixer", ["mamba", "hydra", "vit_attention"])
def test_another_mixer_visits_the_map_along_both_serpentines_in_turn(mixer: str) -> None:
    model = build(mixer=mixer)
    x, t, y = batch(8, 6)
    model(x, t, y).sample.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    routes = [block.route for block in model.modules() if isinstance(block, LaMambaBlock)]
    assert set(routes[::2]) == {"serpentine"} or set(routes[::2]) == {"column_serpentine"}
    assert len(set(routes)) == 2
    block = model.layers[0].blocks[0]
    changed = block._mix(torch.randn(1, 4, 4, 16)).shape
    assert changed == (1, 4, 4, 16)


@pytest.mark.slow
def test_compiles_whole_and_exports() -> None:
    model, (x, t, y) = build(depths=[1, 1], window_size=4), batch()
    expected = model(x, t, y).sample
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, t, y).sample, expected)
    program = torch.export.export(model, (x, t, y), {"return_dict": False})
    torch.testing.assert_close(program.module()(x, t, y, return_dict=False)[0], expected)
