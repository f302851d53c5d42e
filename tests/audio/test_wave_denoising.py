"""What runs of denoisers of waves leave: pipelines and sounds; vocoding beside Griffin-Lim."""

from __future__ import annotations

import json
from pathlib import Path
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


def test_a_spectrogram_reaches_the_model() -> None:
    task = Vocoding(diffusers.DDPMScheduler(50), 8000, mel_bands=20, hop=64, window=256)
    samples, labels, conditions = task.parts((waves(), torch.zeros(4)))
    assert labels is None
    assert conditions["mel"].shape == (4, 20, 64)
    torch.testing.assert_close(conditions["mel"], LogMel(8000, 20, 64, 256)(samples).mT)


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


@pytest.mark.parametrize("options", [{"sample_rate": 0}, {"clips": 0}, {"steps": 0}])
def test_options_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"task.{next(iter(options))} must be at least 1"):
        WaveDenoising(diffusers.DDPMScheduler(50), **{"sample_rate": 8000, **options})
