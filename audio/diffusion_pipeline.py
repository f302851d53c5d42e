"""Waves from noise: a denoiser and any scheduler of diffusers, as a diffusers pipeline.

    pipeline = DiffWavePipeline(sinuous.create_model("diffwave_sashimi"), DDPMScheduler(200), sample_rate=16000)
    waves = pipeline(num_samples=16000, num_clips=4, num_inference_steps=200).audios
    pipeline.save_pretrained(folder);   DiffWavePipeline.from_pretrained(folder)

The denoiser is called `(sample [B, C, T], timestep [B])`, a vocoder with `mel` as well. Importing this
imports diffusers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from diffusers.pipelines.pipeline_utils import AudioPipelineOutput, DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from sinuous.audio import diffwave  # noqa: F401  (diffusers loads parts from modules that are imported alone)
from sinuous.core.checks import check_choice, check_positive, check_range, check_sizes, described
from sinuous.core.modes import evaluating

Generators = torch.Generator | Sequence[torch.Generator] | None


class DiffWavePipeline(DiffusionPipeline):
    """Draws waves, of nothing but noise or of a mel spectrogram.

    Args:
        denoiser: a `DiffWaveSashimi`, a `DiffWaveWaveNet`, or any model that is called alike.
        scheduler: of diffusers, of diffusion or of a flow.
        sample_rate: samples a second of the waves, which the pipeline keeps and nothing reads.
        scaling_factor: what the denoiser makes is divided by it; that of the training.

    Raises:
        ValueError: if `scaling_factor` is not above 0.
    """

    model_cpu_offload_seq = "denoiser"

    def __init__(self, denoiser: Any, scheduler: Any, sample_rate: int = 16000, scaling_factor: float = 1.0) -> None:
        super().__init__()
        check_positive(scaling_factor=scaling_factor)
        self.register_modules(denoiser=denoiser, scheduler=scheduler)
        self.register_to_config(sample_rate=sample_rate, scaling_factor=scaling_factor)

    @property
    def sample_rate(self) -> int:
        return int(self.config.sample_rate)

    @torch.no_grad()
    def __call__(
        self,
        num_samples: int | None = None,
        num_clips: int = 1,
        num_inference_steps: int = 50,
        generator: Generators = None,
        mel: Tensor | None = None,
        latents: Tensor | None = None,
        eta: float = 0.0,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any] | None] | None = None,
    ) -> Any:
        """Draw waves.

        Args:
            num_samples: T. With a spectrogram, as many as its frames stand for unless fewer are asked for; else
                a second.
            num_clips: B.
            num_inference_steps: steps from noise to wave, each one call of the denoiser.
            generator: of the noise, also of that of the steps; or one for each clip, which is then what it is alone.
            mel: `[B, bands, M]`, or `[1, bands, M]` for all clips.
            latents: `[B, C, T]`, the noise to begin with, of unit variance.
            eta: η of DDIM's noise, for schedulers that have it.
            output_type: `"np"` or `"pt"`.
            return_dict: False for a tuple.
            callback_on_step_end: called with the pipeline, the number of the step, the step and
                `{"latents": …}`; what it returns replaces them.

        Returns:
            `.audios` `[B, C, T]`, over the pipeline's `scaling_factor` and within ±1.

        Raises:
            ValueError: if an argument is out of range or has another shape.
            FloatingPointError: if the waves are not numbers.
        """
        check_choice("output_type", output_type, ("np", "pt"))
        check_sizes(num_inference_steps=num_inference_steps, num_clips=num_clips)
        check_range(0, 1, eta=eta)
        hop = getattr(self.denoiser.config, "hop", None)
        if mel is not None:
            mel, num_clips, num_samples = _of_mel(mel, hop, num_clips, num_samples)
        num_samples = self.sample_rate if num_samples is None else num_samples
        check_sizes(num_samples=num_samples)
        if isinstance(generator, Sequence) and len(generator) != num_clips:
            raise ValueError(f"generator must be one, or one for each of the {num_clips} clips (got {len(generator)})")
        shape = (num_clips, self.denoiser.config.in_channels, num_samples)
        if latents is not None and latents.shape != shape:
            raise ValueError(f"latents must be {list(shape)} (got {described(latents)}); give noise of that shape")
        device = next(self.denoiser.parameters()).device
        if latents is None:
            several = list(generator) if isinstance(generator, Sequence) else generator
            latents = randn_tensor(shape, generator=several, device=device, dtype=torch.float32)
        with evaluating(self.denoiser):
            waves = self._denoise(
                latents.to(device, torch.float32),
                None if mel is None else mel.to(device),
                num_inference_steps,
                {"eta": eta, "generator": list(generator) if isinstance(generator, Sequence) else generator},
                callback_on_step_end,
            )
        if not bool(waves.isfinite().all()):
            raise FloatingPointError(
                "the waves are not numbers: the denoiser or the scheduler diverged; try more steps, another scheduler, "
                "or fp32"
            )
        waves = (waves / self.config.scaling_factor).clamp(-1, 1).cpu()
        audios = waves.numpy() if output_type == "np" else waves
        self.maybe_free_model_hooks()
        return AudioPipelineOutput(audios=cast("Any", audios)) if return_dict else (audios,)

    def _denoise(
        self,
        x: Tensor,
        mel: Tensor | None,
        num_inference_steps: int,
        options: dict[str, Any],
        callback: Callable[..., dict[str, Any] | None] | None,
    ) -> Tensor:
        scheduler = self.scheduler
        scheduler.set_timesteps(num_inference_steps, device=x.device)
        x = x * getattr(scheduler, "init_noise_sigma", 1.0)
        scale = getattr(scheduler, "scale_model_input", lambda x, _: x)  # flows have none
        known = inspect.signature(scheduler.step).parameters
        options = {name: value for name, value in options.items() if name in known}
        conditions = {} if mel is None else {"mel": mel}
        with self.progress_bar(total=len(scheduler.timesteps)) as bar:
            for i, step in enumerate(scheduler.timesteps):
                output = self.denoiser(scale(x, step), step.expand(len(x)), **conditions).sample
                x = scheduler.step(output.float(), step, x, **options).prev_sample
                if callback is not None:
                    x = (callback(self, i, step, {"latents": x}) or {}).get("latents", x)
                bar.update()
        return x


def _of_mel(mel: Tensor, hop: int | None, num_clips: int, num_samples: int | None) -> tuple[Tensor, int, int]:
    """The spectrogram of every clip, the number of clips and that of samples."""
    if hop is None or mel.ndim != 3:
        raise ValueError(f"mel must be [B, bands, M], for a denoiser that has a hop (got {described(mel)})")
    if num_clips not in (1, len(mel)) and len(mel) != 1:
        raise ValueError(f"num_clips must be that of the spectrograms, {len(mel)} (got {num_clips}); leave it out")
    count, most = max(num_clips, len(mel)), hop * mel.shape[2]
    if num_samples is not None and num_samples > most:
        raise ValueError(
            f"num_samples must be at most the {most} that {mel.shape[2]} frames of {hop} stand for (got {num_samples})"
        )
    return mel.expand(count, -1, -1), count, most if num_samples is None else num_samples
