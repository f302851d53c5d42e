"""VideoMamba: the authors' numbers, counts and files, the three scans, and clips as input.

data/videomamba_reference.safetensors holds weights (`model.*`, fp32), two clips (`input`), the logits, and gradients of
`(logits · (1, 2, 3, 4, 5)).sum()` (`grad.*`). They were made with OpenGVLab/VideoMamba at commit f3427e4: the
`VisionMamba` of its video_sm with img_size (24, 40), patches of 8, 4 frames in tubelets of 2, width 16, depth 3, state
4 and 5 classes, on a CPU in fp64. Its fused CUDA function was replaced by its own plain-torch scan, raised to fp64, and
its fused norms by their equation. Random weights, moved away from their initial values so that no term vanishes.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sinuous
import sinuous.video
from sinuous.video.videomamba import VideoMamba, checkpoint_filter_fn

FILE = load_file(Path(__file__).parent / "data" / "videomamba_reference.safetensors")
SIZES = {"img_size": (24, 40), "patch_size": 8, "num_frames": 4, "tubelet_size": 2, "embed_dim": 16, "depth": 3}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def part(prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in FILE.items() if name.startswith(prefix)}


def reference(dtype: torch.dtype = torch.float64) -> VideoMamba:
    model = VideoMamba(**SIZES, num_classes=5, mixer_options={"d_state": 4}).eval()
    model.load_state_dict(checkpoint_filter_fn({"model": part("model.")}, model))
    return model.to(dtype)


def build(**options: Any) -> VideoMamba:
    """A small model whose weights are all in use, in fp64."""
    sizes = {"img_size": (24, 16), "num_frames": 3, "depth": 2, "num_classes": 5, "dtype": torch.float64}
    model: VideoMamba = sinuous.create_model("test_videomamba", **{**sizes, **options}).eval()
    with torch.no_grad():
        for parameter in (model.temporal_pos_embedding, model.cls_token):
            if parameter is not None:
                parameter.normal_()
    return model


def clips(model: VideoMamba, batch: int = 2) -> Tensor:
    return torch.randn(batch, model.in_chans, *model.patch_embed.img_size, dtype=model.head.weight.dtype)


# The file keeps gradients in fp32.
@pytest.mark.parametrize(("dtype", "bound", "grad_bound"), [(torch.float64, 1e-10, 1e-7), (torch.float32, 1e-6, 1e-5)])
def test_logits_and_gradients_are_the_authors(dtype: torch.dtype, bound: float, grad_bound: float) -> None:
    model = reference(dtype)
    logits = model(FILE["input"].to(dtype))
    assert (logits - FILE["logits"]).abs().max() < bound
    (logits * torch.arange(1, 6, dtype=dtype)).sum().backward()
    gradients = part("grad.")
    assert set(gradients) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        # Zero for the scan from the start in the last block, which the class token does not read.
        assert (parameter.grad - gradients[name]).norm() <= grad_bound * gradients[name].norm(), name


COUNTS = {  # 400 classes with 8 and 64 frames, 174 classes with 8 frames, and the model of images with 1,000 classes
    "videomamba_tiny": (7_033_744, 7_044_496, 6_990_126, 7_148_008),
    "videomamba_small": (25_568_656, 25_590_160, 25_481_646, 25_796_584),
    "videomamba_middle": (73_875_856, 73_908_112, 73_745_454, 74_217_448),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_the_authors_to_the_unit(name: str) -> None:
    def count(**options: Any) -> int:
        with torch.device("meta"):
            model = timm.create_model(name, **options)
        parts = dict(model.named_parameters())
        picture = options.get("num_frames") == 1  # which has no positions in time
        return sum(p.numel() for p in parts.values()) - picture * parts["temporal_pos_embedding"].numel()

    image = {"num_classes": 1000, "num_frames": 1}
    assert (count(), count(num_frames=64), count(num_classes=174), count(**image)) == COUNTS[name]
    if name == "videomamba_small":
        assert count(**image, embed_dim=768) == 97_598_440


def test_names_are_new_to_timm_and_build_there() -> None:
    code = (
        "import timm; before = set(timm.list_models()); import sinuous.video; from sinuous.core import registry; "
        "ours = {name for name in registry.list_models(domain='video') if 'videomamba' in name}; "
        "assert len(ours) == 5 and not ours & before; "
        "assert ours <= set(timm.list_models()); print(timm.create_model('test_videomamba', num_frames=2).num_frames)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr


def mirrored(model: VideoMamba) -> VideoMamba:
    """The same model with the two directions of every block exchanged."""
    state = model.state_dict()
    swapped = dict(state)
    pairs = (("conv1d.", "conv1d_b."), ("x_proj.", "x_proj_b."), ("dt_proj.", "dt_proj_b."), (".A_log", ".A_b_log"))
    for name in state:
        for one, other in pairs:
            if one in name:
                twin = name.replace(one, other)
                swapped[name], swapped[twin] = state[twin], state[name]
        if name.endswith("mixer.D"):
            swapped[name], swapped[f"{name}_b"] = state[f"{name}_b"], state[name]
    other = build(depth=len(model.stack))
    other.load_state_dict(swapped)
    return other


def test_reading_from_the_other_end_is_exchanging_the_directions() -> None:
    model = build()
    x = torch.randn(2, 19, 32, dtype=torch.float64)
    torch.testing.assert_close(mirrored(model).stack(x.flip(1)).flip(1), model.stack(x), rtol=1e-12, atol=1e-12)
    assert (mirrored(model).stack(x) - model.stack(x)).abs().max() > 1e-3


def test_the_class_token_reads_every_frame_through_the_scan_from_the_end() -> None:
    model, x = build(), None
    x = clips(model)
    before = model(x)
    for frame in range(3):
        changed = x.clone()
        changed[:, :, frame] += 1
        assert (model(changed) - before).abs().min() > 1e-9
    with torch.no_grad():
        for block in model.stack:
            block.mixer.conv1d_b.weight.zero_()
            block.mixer.conv1d_b.bias.zero_()
    assert torch.equal(model(x), model(torch.randn_like(x)))


def test_features_are_all_tokens_and_the_head_reads_the_first() -> None:
    model = build()
    x = clips(model)
    features = model.forward_features(x)
    assert features.shape == (2, 1 + 3 * 3 * 2, 32)
    assert torch.equal(model(x), model.head(features[:, 0]))
    model.reset_classifier(5, "avg")
    assert torch.equal(model(x), model.head(model.forward_features(x)[:, 1:].mean(1)))


@pytest.mark.parametrize("scan", ["temporal_first", "spatiotemporal"])
def test_scans_visit_the_tokens_in_their_orders(scan: str) -> None:
    model, plain = build(scan=scan), build()
    plain.load_state_dict(model.state_dict())
    x = clips(model)
    stream, grid = plain._embed(x)
    assert grid == [3, 3, 2]
    through_time = [0] + [1 + frame * 6 + cell for cell in range(6) for frame in range(3)]
    back = torch.tensor(through_time).argsort()
    for number, block in enumerate(plain.stack):
        if scan == "temporal_first" or number % 2 == 1:
            stream = block(stream[:, through_time])[:, back]
        else:
            stream = block(stream)
    torch.testing.assert_close(model.forward_features(x), plain.norm_f(stream), rtol=1e-12, atol=1e-12)
    assert (model(x) - plain(x)).abs().max() > 1e-4


def test_a_clip_of_another_length_is_told_with_both_numbers() -> None:
    model = build()
    with pytest.raises(ValueError, match=r"3 frames \(got 5\).*num_frames=5"):
        model(torch.randn(1, 3, 5, 24, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"shape \[B, C, T, H, W\] with 3 channels"):
        model(torch.randn(1, 3, 24, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match="set_input_size"):
        model(torch.randn(1, 3, 3, 32, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match="multiple of tubelet_size=2"):
        build(num_frames=3, tubelet_size=2)
    with pytest.raises(ValueError, match="scan must be"):
        build(scan="diagonal")


def test_positions_are_resampled_for_another_number_of_frames_and_size() -> None:
    model = build()
    time = model.temporal_pos_embedding.detach()
    places = model.pos_embed.detach()
    model.set_input_size(num_frames=6)
    expected = nn.functional.interpolate(time.mT, size=6, mode="linear", align_corners=False).mT
    torch.testing.assert_close(model.temporal_pos_embedding.detach(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(model.pos_embed, places)
    assert model(clips(model)).shape == (2, 5)
    model.set_input_size(img_size=(32, 32), num_frames=2)
    assert model.pos_embed.shape == (1, 17, 32)
    assert torch.equal(model.pos_embed[:, 0], places[:, 0])
    assert model(torch.randn(1, 3, 2, 32, 32, dtype=torch.float64)).shape == (1, 5)
    dynamic = build(dynamic_img_size=True)
    fixed = build()
    fixed.load_state_dict(dynamic.state_dict())
    fixed.set_input_size(img_size=(32, 24))
    x = clips(fixed)
    torch.testing.assert_close(dynamic(x), fixed(x), rtol=1e-6, atol=1e-6)


def test_files_of_another_number_of_frames_load(tmp_path: Path) -> None:
    path = tmp_path / "theirs.pth"
    torch.save({"model": part("model."), "epoch": 49}, path)
    options = {**SIZES, "num_frames": 8, "mixer_options": {"d_state": 4}, "checkpoint_path": path}
    model = sinuous.create_model("test_videomamba", **options)
    assert (model.num_classes, model.num_frames) == (5, 8)
    time = part("model.")["temporal_pos_embedding"]
    expected = nn.functional.interpolate(time.mT, size=4, mode="linear", align_corners=False).mT
    assert torch.equal(model.temporal_pos_embedding, expected)
    gray = sinuous.create_model("test_videomamba", **{**options, "num_frames": 4, "in_chans": 1})
    colour = reference(torch.float32)
    x = torch.randn(1, 1, 4, 24, 40)
    torch.testing.assert_close(gray(x), colour(x.expand(-1, 3, -1, -1, -1)), rtol=1e-5, atol=1e-6)


def image_file(model: VideoMamba, path: Path) -> VideoMamba:
    """A model of one frame, and its weights as those of a model of images."""
    one: VideoMamba = build(num_frames=1, num_classes=7)
    with torch.no_grad():
        one.temporal_pos_embedding.zero_()
    state = {name: tensor for name, tensor in one.state_dict().items() if name != "temporal_pos_embedding"}
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].squeeze(2)
    save_file(state, path)
    return one


def test_an_image_model_inflates_at_the_middle_of_the_tubelet_without_its_head(tmp_path: Path) -> None:
    path = tmp_path / "image.safetensors"
    one = image_file(build(), path)
    options = {"img_size": (24, 16), "depth": 2, "num_classes": 4, "dtype": torch.float64, "checkpoint_path": path}
    with pytest.warns(UserWarning, match="random weights, which must be trained"):
        model = sinuous.create_model("test_videomamba", num_frames=3, tubelet_size=3, **options).eval()
    assert model.head.weight.shape == (4, 32)
    x = clips(model)
    torch.testing.assert_close(model.forward_features(x), one.forward_features(x[:, :, 1:2]), rtol=1e-11, atol=1e-11)
    with pytest.warns(UserWarning, match="random weights, which must be trained"):
        frames = sinuous.create_model("test_videomamba", num_frames=2, **options).eval()
    x = clips(frames)
    first, picture = frames._embed(x)[0][:, 1:7], one._embed(x[:, :, :1])[0][:, 1:]
    torch.testing.assert_close(first, picture, rtol=1e-12, atol=1e-12)


def test_nothing_else_is_left_out_of_a_file() -> None:
    model = build()
    state = model.state_dict()
    for wrong in (
        {**state, "layers.0.mixer.extra": torch.zeros(1)},
        {k: v for k, v in state.items() if "norm_f" not in k},
    ):
        with pytest.raises(ValueError, match="the checkpoint is not one of this VideoMamba"):
            checkpoint_filter_fn(wrong, model)
    with pytest.raises(ValueError, match="another VideoMamba"):
        checkpoint_filter_fn(build(embed_dim=48).state_dict(), model)
    with pytest.raises(ValueError, match="not resampled in time"):
        checkpoint_filter_fn(build(num_frames=4, tubelet_size=2).state_dict(), model)
    with pytest.raises(ValueError, match="class_token='none'"):
        checkpoint_filter_fn(build(class_token="none").state_dict(), model)


@pytest.mark.parametrize("mixer", ["mamba2", "lightnet_noncausal"])
def test_other_mixers_take_the_place_of_the_pair(mixer: str) -> None:
    model = build(mixer=mixer)
    logits = model(clips(model))
    assert logits.shape == (2, 5)
    logits.sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_saved_models_come_back(tmp_path: Path) -> None:
    model = build(scan="spatiotemporal")
    model.set_input_size(num_frames=4)
    sinuous.save(model, tmp_path / "kept")
    again = sinuous.load(tmp_path / "kept").eval()
    x = torch.randn(1, 3, 4, 24, 16)
    torch.testing.assert_close(again.double()(x.double()), model(x.double()), rtol=1e-6, atol=1e-6)
