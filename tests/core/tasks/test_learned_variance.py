"""Learned variances: the bound against integrals of densities over a fine grid, and where its gradients go."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sinuous.core.tasks.denoising import denoising_loss

diffusers = pytest.importorskip("diffusers")

GRID = torch.linspace(-6, 6, 40_001, dtype=torch.float64)


class Parts(nn.Module):
    """A prediction and a share, whatever the noisy samples are."""

    def __init__(self, prediction: Tensor, share: Tensor | None) -> None:
        super().__init__()
        self.prediction = nn.Parameter(prediction)
        self.share = None if share is None else nn.Parameter(share)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.prediction if self.share is None else torch.cat([self.prediction, self.share], 1)


def scheduler_for(kind: str) -> Any:
    return diffusers.DDPMScheduler(20, beta_start=0.01, beta_end=0.3, prediction_type=kind, clip_sample=False)


def normal(x: Tensor, mean: float, variance: float) -> Tensor:
    return torch.exp(-((x - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)


def posterior(noisy: float, clean: float, before: float, step: float) -> Tensor:
    """Density of x_{t-1} on the grid by Bayes' rule: what leads to x_t, times what comes of x."""
    product = normal(torch.tensor(noisy), math.sqrt(step) * GRID, 1 - step) * normal(  # type: ignore[arg-type]
        GRID, math.sqrt(before) * clean, 1 - before
    )
    return product / torch.trapezoid(product, GRID)


def moments(density: Tensor) -> tuple[float, float]:
    mean = float(torch.trapezoid(GRID * density, GRID))
    return mean, float(torch.trapezoid((GRID - mean) ** 2 * density, GRID))


def predicted_clean(kind: str, noisy: float, prediction: float, kept: float) -> float:
    signal, spread = math.sqrt(kept), math.sqrt(1 - kept)
    return {
        "epsilon": (noisy - spread * prediction) / signal,
        "sample": prediction,
        "v_prediction": signal * noisy - spread * prediction,
    }[kind]


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_the_bound_is_that_of_numerical_integration(kind: str) -> None:
    scheduler, generator = scheduler_for(kind), torch.Generator().manual_seed(0)
    steps = torch.tensor([1, 7, 19])
    x, noise, prediction, share = (torch.randn(3, 1, 2, dtype=torch.float64, generator=generator) for _ in range(4))
    x, share = x.tanh(), share.tanh()
    options: dict[str, Any] = {"noise": noise, "timesteps": steps}
    with torch.no_grad():
        both = denoising_loss(Parts(prediction, share), x, None, scheduler, **options)
        plain = denoising_loss(Parts(prediction, None), x, None, scheduler, **options)
    kept = scheduler.alphas_cumprod.double()
    bits = torch.zeros(3, 2, dtype=torch.float64)
    for row, t in enumerate(steps.tolist()):
        before, step = float(kept[t - 1]), float(kept[t] / kept[t - 1])
        for column in range(2):
            clean, noisy = float(x[row, 0, column]), scheduler.add_noise(x, noise, steps)[row, 0, column].item()
            true = posterior(noisy, clean, before, step)
            guess = predicted_clean(kind, noisy, float(prediction[row, 0, column]), float(kept[t]))
            mean, least = moments(posterior(noisy, guess, before, step))
            f = (float(share[row, 0, column]) + 1) / 2
            ours = normal(GRID, mean, (1 - step) ** f * least ** (1 - f))
            ratio = torch.where(true > 1e-250, true * (true.clamp(min=1e-300) / ours.clamp(min=1e-300)).log2(), 0.0)
            bits[row, column] = torch.trapezoid(ratio, GRID)
    torch.testing.assert_close(both - plain, 20 / 1000 * bits.mean(1), rtol=1e-5, atol=1e-8)


def test_the_first_step_is_the_mass_of_a_value_of_eight_bits() -> None:
    scheduler = scheduler_for("sample")
    x = (
        torch.tensor([-1.0, -0.2, 1.0], dtype=torch.float64)
        .mul(255 / 2)
        .round()
        .mul(2 / 255)
        .clamp(-1, 1)
        .view(1, 1, 3)
    )
    prediction, share = torch.tensor([[[-0.9, -0.1, 0.7]]]).double(), torch.tensor([[[0.0, 1.0, -1.0]]]).double()
    options: dict[str, Any] = {"noise": torch.zeros_like(x), "timesteps": torch.tensor([0])}
    with torch.no_grad():
        both = denoising_loss(Parts(prediction, share), x, None, scheduler, **options)
        plain = denoising_loss(Parts(prediction, None), x, None, scheduler, **options)
    kept = scheduler.alphas_cumprod.double()
    beta, least = 1 - float(kept[0]), float((1 - kept[1] / kept[0]) * (1 - kept[0]) / (1 - kept[1]))
    bits = []
    for value, mean, part in zip(x.flatten(), prediction.flatten(), share.flatten(), strict=True):
        f = (float(part) + 1) / 2
        low = -60.0 if value < -0.999 else float(value) - 1 / 255
        high = 60.0 if value > 0.999 else float(value) + 1 / 255
        line = torch.linspace(low, high, 200_001, dtype=torch.float64)
        density = normal(line, float(mean), beta**f * least ** (1 - f))
        bits.append(-math.log2(float(torch.trapezoid(density, line))))
    assert float(both - plain) == pytest.approx(20 / 1000 * sum(bits) / 3, rel=1e-4)


def test_the_bound_trains_the_share_alone() -> None:
    x, steps = torch.randn(4, 1, 5), torch.tensor([0, 3, 10, 19])
    options: dict[str, Any] = {"noise": torch.randn_like(x), "timesteps": steps}
    both, plain = Parts(torch.zeros_like(x), torch.zeros_like(x)), Parts(torch.zeros_like(x), None)
    for model in (both, plain):
        denoising_loss(model, x.tanh(), None, scheduler_for("epsilon"), **options).sum().backward()
    torch.testing.assert_close(both.prediction.grad, plain.prediction.grad)
    assert both.share is not None
    assert both.share.grad is not None
    assert bool((both.share.grad.abs().flatten(1).amax(1) > 0).all())
