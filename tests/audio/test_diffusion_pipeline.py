"""Waves from noise: every scheduler, clips as alone, saving and loading in another process, modes and bad input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sinuous

pytest.importorskip("diffusers")

import diffusers

from sinuous.audio import DiffWavePipeline

SCHEDULERS: dict[str, Any] = {
    "ddpm": lambda: diffusers.DDPMScheduler(200),
    "ddim": lambda: diffusers.DDIMScheduler(200),
    "dpm": lambda: diffusers.DPMSolverMultistepScheduler(200),
    "sde": lambda: diffusers.DPMSolverMultistepScheduler(200, algorithm_type="sde-dpmsolver++"),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(200),
    "euler": lambda: diffusers.EulerDiscreteScheduler(200),
    "ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(200),
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
}


def create(scheduler: str = "ddpm", **options: Any) -> Any:
    torch.manual_seed(0)
    denoiser: Any = sinuous.create_model("test_diffwave", **options)
    torch.nn.init.normal_(denoiser.final_conv[2].conv.weight, std=0.05)
    pipeline = DiffWavePipeline(denoiser, SCHEDULERS[scheduler](), sample_rate=8000)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_clip_is_what_it_is_alone(scheduler: str) -> None:
    pipeline = create(scheduler)
    options = {"num_samples": 37, "num_inference_steps": 4, "output_type": "pt"}
    together = pipeline(num_clips=2, generator=seeded(3, 4), **options).audios
    assert together.shape == (2, 1, 37)
    assert float(together.abs().max()) <= 1
    for i, seed in enumerate((3, 4)):
        (alone,) = pipeline(generator=seeded(seed)[0], return_dict=False, **options)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)
    assert not torch.allclose(together[0], together[1])


def test_modes_are_as_before() -> None:
    pipeline = create()
    pipeline.denoiser.train()
    pipeline.denoiser.norm.eval()
    seen = []
    pipeline.denoiser.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    pipeline(num_samples=8, num_inference_steps=2)
    assert seen == [False, False]
    assert pipeline.denoiser.training
    assert not pipeline.denoiser.norm.training


def test_a_saved_pipeline_gives_the_same_wave_in_another_process(tmp_path: Path) -> None:
    pipeline = create("ddim")
    wave = pipeline(num_samples=50, num_inference_steps=3, generator=seeded(1)[0]).audios
    pipeline.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved").rename(tmp_path / "moved")
    code = (
        "import sys, numpy, torch; from sinuous.audio import DiffWavePipeline; "
        "p = DiffWavePipeline.from_pretrained(sys.argv[1]); assert p.sample_rate == 8000; "
        "g = torch.Generator().manual_seed(1); "
        "numpy.save(sys.argv[2], p(num_samples=50, num_inference_steps=3, generator=g).audios)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "moved", tmp_path / "wave.npy"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # Weights are equal in every bit; how sums are vectorised differs between processes.
    again = DiffWavePipeline.from_pretrained(tmp_path / "moved").denoiser.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in pipeline.denoiser.state_dict().items())
    np.testing.assert_allclose(np.load(tmp_path / "wave.npy"), wave, rtol=0, atol=1e-6)


def test_a_vocoder_makes_as_many_samples_as_its_frames_stand_for() -> None:
    pipeline = create(mel_bands=3, hop=8)
    mel = torch.randn(2, 3, 5)
    options = {"num_inference_steps": 3, "output_type": "pt"}
    waves = pipeline(mel=mel, generator=seeded(0, 1), **options).audios
    assert waves.shape == (2, 1, 40)
    fewer = pipeline(mel=mel[1:], num_samples=33, generator=seeded(1)[0], **options).audios
    assert fewer.shape == (1, 1, 33)
    torch.testing.assert_close(pipeline(mel=mel[1:], generator=seeded(1)[0], **options).audios[0], waves[1])
    assert pipeline(mel=mel[:1], num_clips=3, **options).audios.shape == (3, 1, 40)
    assert not torch.equal(pipeline(mel=mel + 1, generator=seeded(0, 1), **options).audios, waves)


def test_noise_may_be_given_and_steps_be_watched() -> None:
    pipeline, noise, seen = create("flow"), torch.randn(1, 1, 20), []

    def watch(_: Any, number: int, step: Any, kept: dict[str, Any]) -> dict[str, Any]:
        seen.append((number, float(step)))
        return {"latents": kept["latents"] * 0}

    waves = pipeline(num_samples=20, num_inference_steps=3, latents=noise, callback_on_step_end=watch, output_type="pt")
    assert [number for number, _ in seen] == [0, 1, 2]
    assert not waves.audios.any()
    first = pipeline(num_samples=20, num_inference_steps=3, latents=noise, output_type="pt").audios
    assert torch.equal(pipeline(num_samples=20, num_inference_steps=3, latents=noise, output_type="pt").audios, first)


def test_the_noise_to_begin_with_has_the_schedulers_scale() -> None:
    pipeline, seen = create("euler"), []
    pipeline.scheduler.scale_model_input = lambda x, _: seen.append(float(x.std())) or x
    pipeline(num_samples=2000, num_inference_steps=2, generator=seeded(0)[0])
    assert pipeline.scheduler.init_noise_sigma > 2
    assert seen[0] == pytest.approx(float(pipeline.scheduler.init_noise_sigma), rel=0.1)


def test_waves_that_are_no_numbers_are_refused() -> None:
    pipeline = create()
    torch.nn.init.constant_(pipeline.denoiser.final_conv[2].conv.bias, float("nan"))
    with pytest.raises(FloatingPointError, match="not numbers"):
        pipeline(num_samples=8, num_inference_steps=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"num_clips": 0}, "num_clips must be at least 1"),
        ({"num_clips": 2, "generator": seeded(1)}, r"one for each of the 2 clips \(got 1\)"),
        ({"output_type": "wav"}, "output_type must be 'np' or 'pt'"),
        ({"latents": torch.zeros(1, 1, 9)}, r"latents must be \[1, 1, 8\]"),
        ({"eta": float("nan")}, "eta must"),
        ({"mel": torch.zeros(3, 2)}, r"mel must be \[B, bands, M\]"),
        ({"mel": torch.zeros(2, 3, 4), "num_clips": 3}, "num_clips must be that of the spectrograms"),
        ({"mel": torch.zeros(1, 3, 4), "num_samples": 33}, "at most the 32 that 4 frames of 8 stand for"),
    ],
)
def test_bad_input_is_one_sentence(options: dict[str, Any], message: str) -> None:
    pipeline = create(mel_bands=3, hop=8)
    with pytest.raises(ValueError, match=message):
        pipeline(**{"num_samples": 8, "num_inference_steps": 2, **options})
