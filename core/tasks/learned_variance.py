r"""The variational bound, by which a denoiser of 2 C channels learns the variance of a step.

    q(x_{t-1} | x_t, x) = N(m(x), β̃_t)           m(x) = (√ā_{t-1} β_t x + √α_t (1 - ā_{t-1}) x_t) / (1 - ā_t)
    p(x_{t-1} | x_t)    = N(m(x̂), σ²)            log σ² = f log β_t + (1 - f) log β̃_t
    L_t = KL(q, p),   L_0 = -log p(x | x_1)      in bits a dimension; L_0 of a picture of 8 bits from -1 to 1

x̂ is what the first C channels predict of x, and 2 f - 1 the last C; β̃_t = β_t (1 - ā_{t-1}) / (1 - ā_t), and in log
σ² that of the second step stands for that of the first, which is 0. The bound of T steps is the mean of T L_t.

Source: Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (arXiv 2102.09672), equations 4 to 8
and 15.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

BIN = 2 / 255
"""Between two of the 256 values of a picture from -1 to 1."""


def bound(x: Tensor, noisy: Tensor, prediction: Tensor, share: Tensor, steps: Tensor, scheduler: Any) -> Tensor:
    """L_t of each sample, `[B]`, in bits a dimension.

    Args:
        x: clean samples `[B, C, ...]`.
        noisy: x_t.
        prediction: by the scheduler's `prediction_type`; no gradient goes into it.
        share: 2 f - 1.
        steps: t, whole numbers `[B]`.
        scheduler: of diffusers, with betas.
    """
    kept = scheduler.alphas_cumprod.to(x.device).double()
    before = torch.cat([kept.new_ones(1), kept[:-1]])  # ā_{t-1}
    beta = 1 - kept / before
    posterior = beta * (1 - before) / (1 - kept)
    of_x, of_noisy = before.sqrt() * beta / (1 - kept), (kept / before).sqrt() * (1 - before) / (1 - kept)
    least = torch.cat([posterior[1:2], posterior[1:]]).log()

    def at(values: Tensor) -> Tensor:
        return values[steps].view(-1, *[1] * (x.ndim - 1))

    predicted = _clean(noisy, prediction.detach(), at(kept), scheduler.config.prediction_type)
    mean = at(of_x) * predicted + at(of_noisy) * noisy
    part = (share.double() + 1) / 2
    log_variance = part * at(beta.log()) + (1 - part) * at(least)
    apart = (at(of_x) * (x - predicted)).square()
    divergence = 0.5 * (log_variance - at(least) - 1 + (at(least) - log_variance).exp() + apart / log_variance.exp())
    first = at(torch.arange(len(kept), device=x.device)) == 0
    bits = torch.where(first, -_log_likelihood(x, mean, log_variance), divergence) / math.log(2)
    return bits.flatten(1).mean(1).to(prediction.dtype)


def _clean(noisy: Tensor, prediction: Tensor, kept: Tensor, kind: str) -> Tensor:
    """x̂ of a prediction."""
    if kind == "sample":
        return prediction.double()
    if kind == "v_prediction":
        return kept.sqrt() * noisy - (1 - kept).sqrt() * prediction
    return (noisy - (1 - kept).sqrt() * prediction) / kept.sqrt()


def _log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Of the value of 256 that each x is, under a normal distribution; the outer two reach to infinity."""
    spread = (0.5 * log_variance).exp()
    above = torch.special.ndtr((x - mean + BIN / 2) / spread)
    below = torch.special.ndtr((x - mean - BIN / 2) / spread)
    above, below = torch.where(x > 1 - BIN / 2, 1.0, above), torch.where(x < BIN / 2 - 1, 0.0, below)
    return (above - below).clamp(min=1e-12).log()
