"""What runs of denoisers of waves leave: pipelines and sounds; vocoding beside Griffin-Lim."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import sinuous
from sinuous.audio.front_ends import LogMel
from sinuous.audio.wave_denoising import Vocoding, WaveDenoising, griffin_lim, log_mel_distance

pytest.importorskip("diffusers")
pytest.importorskip("torchaudio")

import diffusers

from sinuous.audio import DiffWavePipeline
from sinuous.audio.io import read_audio


class Tones:
    """Four tones of half a second at 8 kHz."""

    noun = "tones"

    def split(self, name: str) -> list[tuple[Tensor, int]]:
        times = torch.arange(4096) / 8000
        return [(0.5 * torch.sin(2 * torch.pi * pitch * times)[None], 0) for pitch in (300, 440, 700, 1100)]


def waves() -> Tensor:
    return torch.stack([wave for wave, _ in Tones().split("test")])


def test_a_vocoder_is_trained_scored_and_heard(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = Vocoding(diffusers.DDPMScheduler(50), 8000, mel_bands=20, hop=64, window=256, clips=2, steps=2)
    model: Any = sinuous.create_model("test_diffwave", mel_bands=20, hop=64)
    batch = (waves(), torch.zeros(4))
    loss = task.loss(model, batch)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(1, rel=0.1)  # of a model that predicts nothing
    assert model.final_conv[2].conv.weight.grad.abs().max() > 0
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lines = task.report(model.train(), Tones(), [task.score(model, batch)], {"loss": 1.0}, tmp_path, "test")
    assert lines[0] == "test denoising loss 1.0000 on 4 tones"
    distances = json.loads((tmp_path / "log_mel_distance.json").read_text())["test"]
    assert f"log-mel distance {distances['made']:.2f} dB on 2 tones, of Griffin-Lim" in lines[1]
    assert distances["griffin_lim"] < distances["made"]
    files = sorted(path.name for path in (tmp_path / "waves").iterdir())
    assert files == [f"{kind}_{i}.wav" for kind in ("griffin_lim", "made", "real") for i in range(2)]
    wave, rate = read_audio(tmp_path / "waves" / "real_1.wav")
    assert rate == 8000
    torch.testing.assert_close(wave, waves()[1], rtol=0, atol=1e-4)
    again = DiffWavePipeline.from_pretrained(tmp_path / "pipeline")
    assert again.sample_rate == 8000
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.denoiser.state_dict().items())
    assert model.training


def test_a_spectrogram_reaches_the_model_as_it_is_and_the_wave_scaled() -> None:
    task = Vocoding(diffusers.DDPMScheduler(50), 8000, mel_bands=20, hop=64, window=256, scaling_factor=8)
    samples, labels, conditions = task.parts((waves(), torch.zeros(4)))
    assert torch.equal(samples, 8 * waves())
    assert labels is None
    assert conditions["mel"].shape == (4, 20, 64)
    torch.testing.assert_close(conditions["mel"], LogMel(8000, 20, 64, 256)(waves()).mT)


def test_waves_come_back_at_their_own_loudness(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = diffusers.DDIMScheduler(50, clip_sample=False)
    quiet = 0.01 * waves()[:1]
    scaled, _, _ = WaveDenoising(scheduler, 8000, scaling_factor=80).parts((quiet, torch.zeros(1)))
    model: Any = sinuous.create_model("test_diffwave")

    def noise_of(x: Tensor, steps: Tensor) -> Any:
        """What is noise in x = sqrt(ā) wave + sqrt(1 - ā) noise, if the wave is the scaled one."""
        level = scheduler.alphas_cumprod[steps].view(-1, 1, 1)
        return SimpleNamespace(sample=(x - level.sqrt() * scaled) / (1 - level).sqrt())

    monkeypatch.setattr(model, "forward", noise_of)
    pipeline = DiffWavePipeline(model, scheduler, 8000, scaling_factor=80)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(num_samples=4096, num_inference_steps=10, output_type="pt").audios
    torch.testing.assert_close(made, quiet, rtol=0, atol=1e-5)


def test_unconditional_runs_leave_waves_that_a_seed_decides(tmp_path: Path) -> None:
    model = sinuous.create_model("test_diffwave")
    for folder, seed in (("a", 0), ("b", 0), ("c", 5)):
        task = WaveDenoising(diffusers.FlowMatchEulerDiscreteScheduler(), 8000, clips=1, steps=2, seed=seed)
        lines = task.report(model, Tones(), [4], {"loss": 1.0}, tmp_path / folder, "test")
        assert "1 waves in" in lines[1]
    first, second, other = ((tmp_path / name / "waves" / "made_0.wav").read_bytes() for name in "abc")
    assert first == second != other


def test_griffin_lim_gives_back_tones_in_their_place() -> None:
    front_end, real = LogMel(8000, 64, 128, 512), waves()
    mel = front_end(real)
    made = griffin_lim(mel, front_end, real.shape[-1])
    assert made.shape == real.shape
    assert float(log_mel_distance(front_end(made), mel)) < 8
    assert float(log_mel_distance(front_end(made.flip(0)), mel)) > 12
    assert torch.equal(made, griffin_lim(mel, front_end, real.shape[-1]))
    click = torch.zeros(1, 1, 4096)
    click[..., 2000:2040] = 0.5
    heard = griffin_lim(front_end(click), front_end, 4096)[0, 0].square()
    centre = float((heard * torch.arange(4096)).sum() / heard.sum())
    assert abs(centre - 2020) < 100


def test_distances_are_in_decibels_and_deaf_below_minus_80() -> None:
    front_end = LogMel(8000, 20, 64, 256)
    noise = 0.1 * torch.randn(1, 1, 4096, generator=torch.Generator().manual_seed(0))
    assert float(log_mel_distance(front_end(noise * 10**0.5), front_end(noise))) == pytest.approx(10, abs=0.1)
    assert float(log_mel_distance(front_end(noise * 1e-5), front_end(noise * 1e-6))) == 0


def test_a_pipeline_keeps_the_scale_of_the_training(tmp_path: Path) -> None:
    task = WaveDenoising(diffusers.DDPMScheduler(50), 8000, clips=1, steps=1, scaling_factor=25)
    task.report(sinuous.create_model("test_diffwave"), Tones(), [4], {"loss": 1.0}, tmp_path, "test")
    assert DiffWavePipeline.from_pretrained(tmp_path / "pipeline").config.scaling_factor == 25


@pytest.mark.parametrize("factor", [0, -1, float("nan")])
def test_a_scale_that_is_not_positive_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match=r"task\.scaling_factor must be more than 0 and finite"):
        WaveDenoising(diffusers.DDPMScheduler(50), 8000, scaling_factor=factor)
    with pytest.raises(ValueError, match="scaling_factor must be more than 0 and finite"):
        DiffWavePipeline(sinuous.create_model("test_diffwave"), diffusers.DDPMScheduler(50), 8000, factor)


@pytest.mark.parametrize("options", [{"sample_rate": 0}, {"clips": 0}, {"steps": 0}])
def test_options_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"task.{next(iter(options))} must be at least 1"):
        WaveDenoising(diffusers.DDPMScheduler(50), **{"sample_rate": 8000, **options})
