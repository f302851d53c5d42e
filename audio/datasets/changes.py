"""Random changes of a wave in training that leave its class as it is: pitch, colour, loudness, noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.audio.io import resample
from sinuous.core.checks import check_range

STEPS = 160
"""Rates are changed by n / 160, whose resampling filters are small: within a tenth of a half tone."""


@dataclass(frozen=True)
class WaveChanges:
    """Changes a wave `[C, T]`, drawn anew by torch's generator at each call; it stays as long as it was.

        y_t = g (x_t - b x_{t-1}) + noise                    x at another pitch; b and g uniform in their ranges

    Args:
        pitch: half tones up or down, at most 12. All frequencies move, those of an instrument's body as well.
        tilt: b lies within ±tilt, less than 1; positive ones are brighter, negative ones duller.
        gain: decibels up or down, at most.
        noise: white noise lies at least so many decibels below the wave, and up to 40 more; None for none.

    Raises:
        ValueError: if a number is out of its range.
    """

    pitch: float = 0.0
    tilt: float = 0.0
    gain: float = 0.0
    noise: float | None = None

    def __post_init__(self) -> None:
        check_range(0, 12, **{"changes.pitch": self.pitch})
        check_range(0, 0.99, **{"changes.tilt": self.tilt})
        check_range(0, float("inf"), **{"changes.gain": self.gain, "changes.noise": self.noise})

    def __call__(self, wave: Tensor) -> Tensor:
        length = wave.shape[-1]
        if self.pitch:
            steps = round(STEPS * 2 ** (-_within(self.pitch) / 12))
            wave = resample(wave, STEPS, steps)[..., :length]
            wave = F.pad(wave, (0, length - wave.shape[-1]))
        if self.tilt:
            wave = wave - _within(self.tilt) * F.pad(wave[..., :-1], (1, 0))
        if self.gain:
            wave = wave * 10 ** (_within(self.gain) / 20)
        if self.noise is not None:
            below = self.noise + 40 * float(torch.rand(()))
            wave = wave + torch.randn_like(wave) * (wave.square().mean().sqrt() * 10 ** (-below / 20))
        return wave


def _within(most: float) -> float:
    """A random number between -most and most."""
    return most * (2 * float(torch.rand(())) - 1)
