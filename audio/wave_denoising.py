"""Tasks of waves from noise: what a run draws at its end, and vocoding beside Griffin-Lim."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinuous.audio.front_ends import FLOOR, LogMel
from sinuous.audio.io import write_audio
from sinuous.core.checks import check_positive, check_sizes
from sinuous.core.extras import package
from sinuous.core.tasks.denoising import Denoising

DECIBELS = 40.0
"""Of a unit of `LogMel`."""
QUIET = (-80 / 10 + 6) / 4
"""Below this, in units of `LogMel`, distances see no difference: -80 dB."""


def log_mel_distance(first: Tensor, second: Tensor) -> Tensor:
    """Mean absolute difference in dB of two spectrograms of `LogMel`, what is below -80 dB being taken for -80 dB."""
    difference = first.clamp(min=QUIET) - second.clamp(min=QUIET)
    return DECIBELS * difference.abs().mean()


class WaveDenoising(Denoising):
    """`Denoising` of waves `[B, C, T]`, which leaves a pipeline and some waves in the folder of the run.

    Args:
        scheduler: as of `Denoising`.
        sample_rate: samples a second of the waves.
        clips: waves that a report draws.
        steps: of each, from noise to wave; all of the scheduler's if absent.
        seed: of clip i is that plus i.
        scaling_factor: waves are multiplied by it before noise of unit variance is added, as latents are in diffusers.
            A quiet recording as it is drowns in nearly every step, and a vocoder learns to do without its spectrogram;
            1/rms gives it the noise's size. Schedulers then need `clip_sample=False`.
        **options: further arguments of `Denoising`.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        scheduler: Any,
        sample_rate: int,
        clips: int = 4,
        steps: int | None = None,
        seed: int = 0,
        scaling_factor: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(scheduler, **options)
        check_positive(**{"task.scaling_factor": scaling_factor})
        check_sizes(
            **{"task.sample_rate": sample_rate, "task.clips": clips, "task.steps": 1 if steps is None else steps}
        )
        self.sample_rate, self.clips, self.steps, self.seed = sample_rate, clips, steps, seed
        self.scaling_factor = scaling_factor

    def parts(self, batch: Sequence[Any]) -> tuple[Tensor, Tensor | None, Mapping[str, Any]]:
        samples, labels, conditions = super().parts(batch)
        return self.scaling_factor * samples, labels, conditions

    def report(
        self, model: nn.Module, data: Any, seen: Sequence[Any], scores: Mapping[str, float], folder: Path, split: str
    ) -> list[str]:
        lines = super().report(model, data, seen, scores, folder, split)
        real = self.examples(model, data.split(split))
        made = self.draw(model, real, folder)
        names = self.write({"made": made}, folder / "waves")
        return [*lines, f"{len(made)} waves in {folder / 'waves'}: {', '.join(names)}"]

    def examples(self, model: nn.Module, split: Any) -> Tensor:
        """The first waves of a split, where the model is."""
        count = min(self.clips, len(split))
        return torch.stack([split[i][0] for i in range(count)]).to(next(model.parameters()).device)

    def draw(self, model: nn.Module, real: Tensor, folder: Path, mel: Tensor | None = None) -> Tensor:
        """As many waves as `real` has, of its length; the pipeline goes into `folder`."""
        from sinuous.audio.diffusion_pipeline import DiffWavePipeline

        # Of another step than training's: the scheduler of the task keeps its own.
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        pipeline = DiffWavePipeline(model, scheduler, self.sample_rate, self.scaling_factor)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.save_pretrained(folder / "pipeline")
        waves: Tensor = pipeline(
            num_samples=real.shape[-1],
            num_clips=len(real),
            num_inference_steps=self.steps or scheduler.config.num_train_timesteps,
            generator=[torch.Generator().manual_seed(self.seed + i) for i in range(len(real))],
            mel=mel,
            output_type="pt",
        ).audios
        return waves

    def write(self, waves: Mapping[str, Tensor], folder: Path) -> list[str]:
        """Write waves `[B, C, T]` as files NAME_NUMBER.wav; returns the names."""
        folder.mkdir(parents=True, exist_ok=True)
        names = []
        for name, batch in waves.items():
            for number, wave in enumerate(batch):
                names.append(f"{name}_{number}.wav")
                write_audio(folder / names[-1], wave.cpu(), self.sample_rate)
        return names


class Vocoding(WaveDenoising):
    """`WaveDenoising` of models that are told the mel spectrogram of the wave; reported beside Griffin-Lim.

    The report's score is the log-mel distance of what is drawn from what was spoken or played, see `log_mel_distance`.

    Args:
        scheduler: as of `Denoising`.
        sample_rate: samples a second of the waves.
        mel_bands: of the spectrogram.
        hop: samples of one of its frames.
        window: samples that a frame is computed from.
        **options: further arguments of `WaveDenoising`.
    """

    def __init__(
        self, scheduler: Any, sample_rate: int, mel_bands: int = 80, hop: int = 256, window: int = 1024, **options: Any
    ) -> None:
        super().__init__(scheduler, sample_rate, **options)
        self.mel = LogMel(sample_rate, mel_bands, hop, window)

    def parts(self, batch: Sequence[Any]) -> tuple[Tensor, Tensor | None, Mapping[str, Any]]:
        samples = batch[0]
        return self.scaling_factor * samples, None, {"mel": self.mel(samples).mT}

    def report(
        self, model: nn.Module, data: Any, seen: Sequence[Any], scores: Mapping[str, float], folder: Path, split: str
    ) -> list[str]:
        lines = Denoising.report(self, model, data, seen, scores, folder, split)
        real = self.examples(model, data.split(split))
        mel = self.mel(real)
        waves = {"real": real.cpu(), "made": self.draw(model, real, folder, mel.mT)}
        waves["griffin_lim"] = griffin_lim(mel.cpu(), self.mel, real.shape[-1])
        self.write(waves, folder / "waves")
        mel = mel.cpu()
        distances = {
            name: float(log_mel_distance(self.mel(wave), mel)) for name, wave in waves.items() if name != "real"
        }
        (folder / "log_mel_distance.json").write_text(json.dumps({split: distances}, indent=2) + "\n")
        return [
            *lines,
            f"{split} log-mel distance {distances['made']:.2f} dB on {len(real)} {data.noun}, of Griffin-Lim "
            f"{distances['griffin_lim']:.2f} dB; waves in {folder / 'waves'}",
        ]


def griffin_lim(mel: Tensor, front_end: LogMel, length: int, iterations: int = 32, seed: int = 0) -> Tensor:
    """Waves `[B, 1, length]` of spectrograms `[B, M, bands]` of a `LogMel`, by torchaudio's Griffin-Lim.

    The spectrum of a frame is the least squares' of its bands; phases start at random.

    Source: Griffin and Lim, "Signal estimation from modified short-time Fourier transform" (1984).
    """
    transforms = package("torchaudio.transforms", "audio")
    taper = torch.hann_window(front_end.window)
    power = (10 ** (4 * mel.float() - 6) - FLOOR).clamp(min=0) * taper.sum() ** 2
    spectrum = transforms.InverseMelScale(front_end.size // 2 + 1, front_end.num_bands, front_end.sample_rate)
    samples = mel.shape[1] * front_end.hop
    invert = transforms.GriffinLim(
        front_end.size, iterations, front_end.window, front_end.hop, power=2.0, length=samples
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        waves: Tensor = invert(F.pad(spectrum(power.mT), (0, 1)))  # it has a frame on either end
    # Its frames are centred on their first sample, ours on their middle.
    late = F.pad(waves, (front_end.hop // 2, 0))[..., :length]
    return late.clamp(-1, 1).unsqueeze(1)
