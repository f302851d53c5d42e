"""Pipelines: diffusers' own and ours make the same pictures, under every scheduler, each from noise of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sinuous

diffusers = pytest.importorskip("diffusers")

from sinuous.vision.generation import ClassConditionalPipeline, LaMambaDiff, load_pipeline  # noqa: E402

NAMES = {0: "T-shirt, top", 1: "trouser", 7: "sneaker"}


@pytest.fixture(scope="module")
def denoiser() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embed_dim": 8, "depths": (1, 1), "bottleneck_depth": 1, "num_heads": 2, "d_state": 1}
    model = LaMambaDiff(sample_size=8, num_classes=10, window_size=4, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def vae() -> Any:
    torch.manual_seed(0)
    sides = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.AutoencoderKL(**sides, **blocks).eval()


def ddim(**options: Any) -> Any:
    return diffusers.DDIMScheduler(clip_sample=False, **options)


SCHEDULERS = {
    "ddim": ddim,
    "ddpm": lambda: diffusers.DDPMScheduler(clip_sample=False),
    "dpm++": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "v": lambda: ddim(prediction_type="v_prediction"),
    "flow": diffusers.FlowMatchEulerDiscreteScheduler,
    "learned": lambda: diffusers.DDPMScheduler(clip_sample=False, variance_type="learned_range"),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm++", "unipc", "euler"])
def test_diffusers_own_pipeline_runs_unchanged(denoiser: Any, vae: Any, name: str) -> None:
    pipeline = quiet(diffusers.DiTPipeline(denoiser, vae, SCHEDULERS[name]()))
    first, second = (
        pipeline([3, 5], num_inference_steps=3, generator=seeded(), output_type="np").images for _ in range(2)
    )
    assert first.shape == (2, 16, 16, 3)
    if name != "ddpm":  # whose steps draw noise that the pipeline hands no generator
        assert (first == second).all()


@pytest.mark.parametrize("name", ["ddim", "dpm++", "unipc"])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_ours_makes_the_pictures_of_diffusers_pipeline(
    denoiser: Any, vae: Any, name: str, guidance_scale: float
) -> None:
    options: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": guidance_scale, "output_type": "np"}
    theirs = quiet(diffusers.DiTPipeline(denoiser, vae, SCHEDULERS[name]()))([3, 5], generator=seeded(), **options)
    ours = quiet(ClassConditionalPipeline(denoiser, SCHEDULERS[name](), vae))([3, 5], generator=seeded(), **options)
    torch.testing.assert_close(torch.tensor(ours.images), torch.tensor(theirs.images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_picture_of_a_batch_is_the_one_made_alone(denoiser: Any, name: str) -> None:
    pipeline = quiet(ClassConditionalPipeline(denoiser, SCHEDULERS[name]()))
    options: dict[str, Any] = {"num_inference_steps": 4, "eta": 1.0, "output_type": "latent"}
    whole = pipeline([1, None, 7], generator=[seeded(k) for k in range(3)], **options).images
    for k, label in enumerate((1, None, 7)):
        alone = pipeline(label, generator=seeded(k), **options).images
        torch.testing.assert_close(whole[k : k + 1], alone, atol=1e-4, rtol=1e-4)


class Perfect(nn.Module):
    """Of data that are all one picture: the noise in x, or the velocity away from the picture."""

    def __init__(self, picture: Tensor, scheduler: Any) -> None:
        super().__init__()
        self.picture, self.scheduler, self.calls, self.dtype = picture, scheduler, 0, torch.float64
        self.device = torch.device("cpu")
        self.config = diffusers.configuration_utils.FrozenDict(
            sample_size=4, in_channels=1, out_channels=1, num_classes=10
        )

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> Any:
        self.calls += 1
        if hasattr(self.scheduler, "alphas_cumprod"):
            kept = self.scheduler.alphas_cumprod.double()[timestep.long()].view(-1, 1, 1, 1)
            out = (x - kept.sqrt() * self.picture) / (1 - kept).sqrt()
        else:
            out = (x - self.picture) / (timestep.double().view(-1, 1, 1, 1) / 1000)
        return diffusers.models.modeling_outputs.Transformer2DModelOutput(sample=out)


@pytest.mark.parametrize("name", ["ddim", "flow"])
def test_a_perfect_denoiser_arrives_at_the_picture_in_one_call_a_step(name: str) -> None:
    scheduler, picture = SCHEDULERS[name](), torch.rand(1, 1, 4, 4, dtype=torch.float64)
    model = Perfect(picture, scheduler)
    pipeline = quiet(ClassConditionalPipeline(model, scheduler))
    images = pipeline([1, 2], num_inference_steps=20, generator=seeded(), output_type="latent").images
    torch.testing.assert_close(images, picture.expand(2, -1, -1, -1), atol=2e-2, rtol=0)
    assert model.calls == 20


def test_guidance_of_equal_rows_changes_nothing_and_scale_one_is_the_class(denoiser: Any) -> None:
    pipeline = quiet(ClassConditionalPipeline(denoiser, ddim()))
    options: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent"}
    none = pipeline(None, guidance_scale=7.0, generator=seeded(), **options).images
    assert torch.equal(none, pipeline(None, guidance_scale=1.0, generator=seeded(), **options).images)
    plain = pipeline(3, guidance_scale=1.0, generator=seeded(), **options).images
    near = pipeline(3, guidance_scale=1.0 + 1e-6, generator=seeded(), **options).images
    torch.testing.assert_close(near, plain, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain, pipeline(3, guidance_scale=4.0, generator=seeded(), **options).images, atol=1e-3)


def test_modes_sizes_callbacks_and_kinds_of_output(denoiser: Any, vae: Any) -> None:
    pipeline = quiet(ClassConditionalPipeline(denoiser, ddim(), vae, NAMES))
    seen: list[bool] = []

    def watch(pipe: Any, step: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(pipe.transformer.training)
        return tensors

    denoiser.train()
    options: dict[str, Any] = {"num_inference_steps": 2, "callback_on_step_end": watch, "height": 20, "width": 12}
    images = pipeline("sneaker", **options).images
    assert (images[0].size, seen, denoiser.training) == ((12, 20), [False, False], True)
    denoiser.eval()
    assert pipeline(["top", 1], output_type="pt", num_inference_steps=1).images.shape == (2, 3, 16, 16)
    assert pipeline(7, output_type="np", num_inference_steps=1, return_dict=False)[0].shape == (1, 16, 16, 3)
    first = torch.randn(1, 4, 8, 8)
    given = [pipeline(7, latents=first, num_inference_steps=1, output_type="latent").images for _ in range(2)]
    assert torch.equal(*given)


def test_saved_moved_and_loaded_in_a_fresh_process_it_makes_the_same_bits(
    denoiser: Any, vae: Any, tmp_path: Path
) -> None:
    pipeline = quiet(ClassConditionalPipeline(denoiser, ddim(), vae, NAMES))
    pipeline.save_pretrained(tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "moved")
    expected = pipeline("sneaker", num_inference_steps=2, generator=seeded(), output_type="pt").images
    torch.save(expected, tmp_path / "expected.pt")
    code = (
        "import sys, torch\n"
        "from sinuous.vision.generation import load_pipeline\n"
        "pipe = load_pipeline(sys.argv[1] + '/moved')\n"
        "pipe.set_progress_bar_config(disable=True)\n"
        "images = pipe('sneaker', num_inference_steps=2, generator=torch.Generator().manual_seed(0), "
        "output_type='pt').images\n"
        "assert torch.equal(images, torch.load(sys.argv[1] + '/expected.pt'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_a_vae_it_is_saved_too(denoiser: Any, tmp_path: Path) -> None:
    ClassConditionalPipeline(denoiser, ddim(), id2label=NAMES).save_pretrained(tmp_path)
    again = load_pipeline(tmp_path)
    assert (again.vae, again.labels["trouser"]) == (None, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_labels": "snaeker"}, r"there is no class 'snaeker'; did you mean 'sneaker'"),
        ({"class_labels": 10}, r"a class must be from 0 to 9 \(got 10\)"),
        ({"class_labels": []}, "at least one class"),
        ({"class_labels": 1.5}, "a number, a name or None"),
        ({"height": 15}, "height must be a multiple of 2 for this VAE"),
        ({"width": 0}, "width must be at least 1"),
        ({"generator": [torch.Generator()] * 2}, r"one for each of the 1 pictures \(got 2\)"),
        ({"generator": 3}, "generator must be a torch.Generator"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, r"latents must be a tensor of shape \[1, 4, 8, 8\]"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be a finite number"),
        ({"eta": 2.0}, "eta must lie between 0 and 1"),
        ({"output_type": "jpg"}, "output_type must be one of 'pil', 'np', 'pt', 'latent'"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(
    denoiser: Any, vae: Any, options: dict[str, Any], message: str
) -> None:
    pipeline = quiet(ClassConditionalPipeline(denoiser, ddim(), vae, NAMES))
    with pytest.raises(ValueError, match=message):
        pipeline(**{"class_labels": 7, "num_inference_steps": 1, **options})


def test_learned_variance_needs_its_channels_and_pictures_that_are_not_finite_are_none(denoiser: Any) -> None:
    narrow = LaMambaDiff(sample_size=8, out_channels=4, embed_dim=8, depths=(1, 1), num_heads=2, d_state=1)
    with pytest.raises(ValueError, match="needs a denoiser of 8 output channels"):
        ClassConditionalPipeline(narrow, SCHEDULERS["learned"]())(1)
    broken = LaMambaDiff.from_config(denoiser.config)
    nn.init.constant_(broken.final_linear.bias, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        quiet(ClassConditionalPipeline(broken, ddim()))(1, num_inference_steps=1)


def test_a_decoder_that_overflows_gives_no_black_picture(denoiser: Any, vae: Any) -> None:
    broken = diffusers.AutoencoderKL.from_config(vae.config)
    nn.init.constant_(broken.decoder.conv_out.bias, float("inf"))
    with pytest.raises(ValueError, match="the decoded pictures are not finite"):
        quiet(ClassConditionalPipeline(denoiser, ddim(), broken))(1, num_inference_steps=1)


@pytest.mark.parametrize("sides", [(28, 28), (20, 36), (13, 7)])
def test_ten_classes_of_any_sides_under_guidance(sides: tuple[int, int]) -> None:
    sizes: dict[str, Any] = {"embed_dim": 8, "depths": (1, 1), "bottleneck_depth": 1, "num_heads": 2, "d_state": 1}
    model = LaMambaDiff(sample_size=28, in_channels=1, out_channels=1, num_classes=10, patch_size=4, **sizes)
    pipeline = quiet(ClassConditionalPipeline(model, SCHEDULERS["flow"]()))
    options: dict[str, Any] = {"guidance_scale": 4.0, "num_inference_steps": 2, "output_type": "pt"}
    pictures = pipeline(list(range(10)), height=sides[0], width=sides[1], **options).images
    assert pictures.shape == (10, 1, *sides)
    assert 0 <= float(pictures.min()) < float(pictures.max()) <= 1


def test_folders_that_are_no_pipelines_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not there"):
        load_pipeline(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no model_index\.json"):
        load_pipeline(tmp_path)
    for content, message in (("{", "names no pipeline"), (json.dumps({"_class_name": "os"}), "neither ours nor")):
        (tmp_path / "model_index.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_pipeline(tmp_path)


def test_listing_models_imports_no_diffusers() -> None:
    code = "import sys, sinuous, sinuous.vision; sinuous.list_models(); assert 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert sinuous.model_info("lamamba_diff_s").domain == "generation"
