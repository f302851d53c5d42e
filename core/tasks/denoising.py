"""Denoising: diffusion models and flow matching, by the configuration of a diffusers scheduler.

    x_t = sqrt(ā_t) x + sqrt(1 - ā_t) n         t uniform over the scheduler's steps, ā from its betas
    epsilon        n                            the target, by the scheduler's `prediction_type`
    sample         x
    v_prediction   sqrt(ā_t) n - sqrt(1 - ā_t) x

    x_σ = (1 - σ) x + σ n                       σ logistic-normal, moved by the scheduler's `shift`; t = σ T
    flow           n - x

x are samples, n is normal noise, T the scheduler's number of training steps. A scheduler without betas, such as
`FlowMatchEulerDiscreteScheduler`, is one of flow matching. The model is any `model(x_t, t, **conditions)` that returns
a tensor or has it in `.sample`. One that returns twice the channels learns the variance of diffusion's steps, too: the
bound of `sinuous.core.tasks.learned_variance` times T / 1000 is added, as in IDDPM. Schedulers are objects that one is
given: diffusers is not imported here.

Source: Ho, Jain and Abbeel (arXiv 2006.11239), equation 14; Salimans and Ho (2202.00512), appendix D, for v; Esser et
al. (2403.03206), section 3.1, for flows; Hang et al. (2303.09556), equation 10, for min-SNR weights; Nichol and
Dhariwal (2102.09672), equation 16, for the sum of both losses.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from sinuous.core.checks import check_choice, check_positive, check_range, check_sizes, described
from sinuous.core.data import Data
from sinuous.core.norms import at_least_fp32
from sinuous.core.tasks.learned_variance import bound
from sinuous.core.tasks.task import Task

PREDICTIONS = ("epsilon", "sample", "v_prediction")


def denoising_loss(
    model: nn.Module,
    images: Tensor,
    class_labels: Tensor | None,
    scheduler: Any,
    *,
    noise: Tensor | None = None,
    timesteps: Tensor | None = None,
    min_snr_gamma: float | None = None,
    generator: torch.Generator | None = None,
    **conditions: Any,
) -> Tensor:
    """Mean squared error of a model's prediction for each sample, `[B]`, in at least fp32; with the variational bound,
    if the model learns variances.

    Args:
        model: called with noisy samples, steps `[B]`, `class_labels` unless they are None, and the conditions.
        images: clean samples `[B, C, ...]`: pictures, or clips of sound.
        class_labels: `[B]`, or None for a model that takes none.
        scheduler: of diffusers; its configuration says what the model predicts.
        noise: like `images`; normal if absent.
        timesteps: `[B]`; drawn if absent.
        min_snr_gamma: γ, the largest weight of a step in terms of its signal-to-noise ratio: min(SNR, γ) / SNR for
            epsilon, over SNR + 1 for v, times 1 for samples. None weighs all steps alike. The bound is not weighed.
        generator: from which noise and steps are drawn, on its device.
        **conditions: further arguments of the model, such as a mel spectrogram.

    Raises:
        ValueError: if the scheduler predicts something else, noise or steps have another shape, a step is not the
            scheduler's, γ is not positive or is given for flow matching, the output has another shape than the
            target, or learned variances are not those between two bounds.
    """
    check_positive(min_snr_gamma=min_snr_gamma)
    flow = is_flow(scheduler)
    if flow and min_snr_gamma is not None:
        raise ValueError(f"min_snr_gamma weighs steps of diffusion, not of a flow (got {min_snr_gamma}); leave it out")
    noise = _normal(images.shape, generator).to(images) if noise is None else noise
    if noise.shape != images.shape:
        raise ValueError(f"noise must have the samples' shape {list(images.shape)} (got {list(noise.shape)})")
    steps = draw_timesteps(scheduler, len(images), generator) if timesteps is None else timesteps
    _check_steps(steps, scheduler, len(images))
    steps = steps.to(images.device)
    noisy, target, weight = (_flow if flow else _diffusion)(images, noise, steps, scheduler, min_snr_gamma)
    labels = {} if class_labels is None else {"class_labels": class_labels}
    output = model(noisy, steps, **labels, **conditions)
    prediction = at_least_fp32(output if isinstance(output, Tensor) else output.sample)
    learns_variance = not flow and prediction.shape[1:2] == (2 * target.shape[1],)
    prediction, share = prediction.chunk(2, 1) if learns_variance else (prediction, None)
    if prediction.shape != target.shape:
        twice = "" if flow else ", or twice as many to learn variances"
        raise ValueError(
            f"the model must return as many channels as the samples have, {list(target.shape)}{twice} (got "
            f"{list(prediction.shape)}); build it with out_channels={target.shape[1]}"
        )
    losses = (prediction - at_least_fp32(target)).square().flatten(1).mean(1) * weight
    if share is None:
        return losses
    if scheduler.config.get("variance_type") == "learned":
        raise ValueError("variance_type must be 'learned_range' to learn variances (got 'learned')")
    scale: float = scheduler.config.num_train_timesteps / 1000
    return losses + scale * bound(at_least_fp32(images), at_least_fp32(noisy), prediction, share, steps, scheduler)


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler of diffusers is one of flow matching.

    Raises:
        ValueError: if it is neither that nor one whose objective is known here.
    """
    prediction = scheduler.config.get("prediction_type", "flow_prediction")
    if prediction == "flow_prediction" or not hasattr(scheduler, "alphas_cumprod"):
        return True
    check_choice("the scheduler's prediction_type", prediction, PREDICTIONS)
    return False


def draw_timesteps(scheduler: Any, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Steps to train at, `[count]`: whole numbers, all as likely; or, of a flow, real ones, σ T with σ = sigmoid of a
    normal number, moved by the scheduler's `shift` s to s σ / (1 + (s - 1) σ)."""
    total = scheduler.config.num_train_timesteps
    device = "cpu" if generator is None else generator.device
    if not is_flow(scheduler):
        return torch.randint(total, (count,), generator=generator, device=device)
    sigma = torch.sigmoid(_normal((count,), generator))
    shift = scheduler.config.get("shift", 1.0)
    moved: Tensor = total * (shift * sigma / (1 + (shift - 1) * sigma))
    return moved


def _normal(shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    return torch.randn(tuple(shape), generator=generator, device="cpu" if generator is None else generator.device)


def _check_steps(steps: Tensor, scheduler: Any, count: int) -> None:
    if steps.shape != (count,):
        raise ValueError(f"timesteps must be one for each of the {count} samples (got {described(steps)})")
    last = scheduler.config.num_train_timesteps - (not is_flow(scheduler))
    if count and not 0 <= float(steps.min()) <= float(steps.max()) <= last:
        raise ValueError(
            f"timesteps must lie between 0 and {last}, as the scheduler has them (got {float(steps.min()):g} to "
            f"{float(steps.max()):g})"
        )


def _flow(
    x: Tensor, noise: Tensor, steps: Tensor, scheduler: Any, gamma: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    sigma = (at_least_fp32(steps) / scheduler.config.num_train_timesteps).view(-1, *[1] * (x.ndim - 1)).to(x)
    return (1 - sigma) * x + sigma * noise, noise - x, steps.new_ones(len(x), dtype=torch.float32)


def _diffusion(
    x: Tensor, noise: Tensor, steps: Tensor, scheduler: Any, gamma: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    kept = scheduler.alphas_cumprod.to(x.device)[steps]  # ā
    signal, spread = (part.sqrt().view(-1, *[1] * (x.ndim - 1)).to(x) for part in (kept, 1 - kept))
    prediction = scheduler.config.prediction_type
    target = {"epsilon": noise, "sample": x, "v_prediction": signal * noise - spread * x}[prediction]
    weight = torch.ones_like(kept)
    if gamma is not None:
        # Written so that a step without signal, SNR = 0, has a weight, too.
        ratio = kept / (1 - kept)
        weight = {
            "epsilon": (gamma / ratio).clamp(max=1),
            "sample": ratio.clamp(max=gamma),
            "v_prediction": ratio.clamp(max=gamma) / (ratio + 1),
        }[prediction]
    return signal * x + spread * noise, target, weight


class Denoising(Task):
    """Trains a model `(x, timestep, …)` by `denoising_loss`, scored by that loss on held-out samples.

    Batches are `(samples, labels)`, or `(samples, labels, {name: condition})`; the labels reach the model where
    `num_classes` says how many classes there are. Validation draws the same noise and steps for the same batch, and
    never drops a label.

    Args:
        scheduler: of diffusers, see `denoising_loss`.
        num_classes: K; the id K stands for no class. None leaves labels out.
        class_dropout: probability with which a sample loses its class in training, so that guidance can be used. There
            is one draw for a sample, here and not in the model.
        min_snr_gamma: as of `denoising_loss`, in training alone.
        draws: noise and steps of a sample that validation and test average over.

    Raises:
        ValueError: if a number is out of its range.
    """

    takes: ClassVar[type] = Data

    def __init__(
        self,
        scheduler: Any,
        num_classes: int | None = None,
        class_dropout: float = 0.1,
        min_snr_gamma: float | None = None,
        draws: int = 1,
    ) -> None:
        super().__init__({"loss": MeanMetric()})
        check_range(0, 1, **{"task.class_dropout": class_dropout})
        check_positive(**{"task.min_snr_gamma": min_snr_gamma})
        check_sizes(**{"task.draws": draws}, **({} if num_classes is None else {"task.num_classes": num_classes}))
        is_flow(scheduler)
        self.scheduler, self.num_classes, self.draws = scheduler, num_classes, draws
        self.class_dropout, self.min_snr_gamma = class_dropout, min_snr_gamma

    def loss(self, model: nn.Module, batch: Sequence[Any]) -> Tensor:
        samples, labels, conditions = self.parts(batch)
        if labels is not None and self.num_classes is not None and self.class_dropout:
            dropped = torch.rand(len(labels)).to(labels.device) < self.class_dropout
            labels = torch.where(dropped, self.num_classes, labels)
        losses = denoising_loss(model, samples, labels, self.scheduler, min_snr_gamma=self.min_snr_gamma, **conditions)
        return losses.mean()

    def score(self, model: nn.Module, batch: Sequence[Any]) -> int:
        """Update the score; returns the number of samples."""
        samples, labels, conditions = self.parts(batch)
        seed = zlib.crc32(samples.detach().float().cpu().numpy().tobytes())
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.draws):
            losses = denoising_loss(model, samples, labels, self.scheduler, generator=generator, **conditions)
            self.count("loss", losses)
        return len(samples)

    def parts(self, batch: Sequence[Any]) -> tuple[Tensor, Tensor | None, Mapping[str, Any]]:
        """Samples, the labels that the model is told, and its conditions."""
        samples, labels, *more = batch
        return samples, None if self.num_classes is None else labels, more[0] if more else {}

    def report(
        self, model: nn.Module, data: Any, seen: Sequence[Any], scores: Mapping[str, float], folder: Path, split: str
    ) -> list[str]:
        return [f"{split} denoising loss {scores['loss']:.4f} on {sum(seen):,} {data.noun}"]
