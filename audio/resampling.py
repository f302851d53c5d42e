"""Another sampling rate by band-limited interpolation, as torchaudio computes it, for any two whole rates."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.core.checks import check_sizes, described
from sinuous.core.extras import package

ZEROS, ROLLOFF = 6, 0.99
"""Zero crossings of the interpolating sinc on either side, and where it cuts off, as a share of the lower rate's half;
both as torchaudio has them."""
LARGEST_FILTER = 2**22
"""Numbers in torchaudio's filter, at most: it has every phase of the two rates, times the samples of a whole period."""
MOST_SAMPLES = 2**31
"""That a result may have: 8 GB of float32."""
BLOCK = 2**20


def resample(wave: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Interpolate waves at another rate, `[..., T]` to `[..., ceil(T · to_rate / from_rate)]`.

    Sample j of the result lies at t = j · from_rate / to_rate,

        y[j] = c Σ_i x[i] sinc(c (i - t)) cos²(π c (i - t) / 12),   |c (i - t)| < 6,   c = 0.99 min(1, to / from),

    silence standing before and behind the wave: torchaudio's `resample`. It serves where its filter is small, which is
    so for all usual rates. Its filter for 44,101 to 8,000 Hz would have 353 million numbers; such pairs of rates are
    interpolated sample by sample, by the same equation.

    Args:
        wave: of float32 or float64.
        from_rate: samples per second of `wave`.
        to_rate: samples per second of the result.

    Raises:
        ValueError: if a rate is no whole number of at least 1, the wave is none of floats, or the result would have
            more than 2^31 samples.
        ModuleNotFoundError: if the extra `audio` is missing.
    """
    check_sizes(from_rate=from_rate, to_rate=to_rate)
    if not isinstance(wave, Tensor) or wave.dtype not in (torch.float32, torch.float64) or not wave.ndim:
        raise ValueError(f"wave must be a tensor of float32 or float64, [..., T] (got {described(wave)})")
    if from_rate == to_rate:
        return wave
    length = -(-wave.shape[-1] * to_rate // from_rate)
    if length * math.prod(wave.shape[:-1]) > MOST_SAMPLES:
        raise ValueError(
            f"{wave.shape[-1]:,} samples at {from_rate:,} Hz would be {length:,} at {to_rate:,} Hz, more than memory "
            "has room for; give a shorter part, or a lower rate"
        )
    if not wave.numel():
        return wave.new_zeros(*wave.shape[:-1], length)
    shared = math.gcd(from_rate, to_rate)
    period, phases = from_rate // shared, to_rate // shared
    if phases * (period + 2 * _reach(period, phases)) <= LARGEST_FILTER:
        resampled: Tensor = package("torchaudio.functional", "audio").resample(wave, from_rate, to_rate)
        return F.pad(resampled, (0, length - resampled.shape[-1]))  # it counts in float32: long waves end a little off
    return _sample_by_sample(wave, period, phases, length)


def _reach(period: int, phases: int) -> int:
    """Samples on either side of a place that its value depends on."""
    return math.ceil(ZEROS * period / (min(period, phases) * ROLLOFF))


def _sample_by_sample(wave: Tensor, period: int, phases: int, length: int) -> Tensor:
    """Interpolate with the taps of each place computed anew, in blocks, so that memory does not grow with the rates."""
    reach, cutoff = _reach(period, phases), ROLLOFF * min(1.0, phases / period)
    padded = F.pad(wave, (reach, reach + 1))
    taps = torch.arange(-reach, reach + 1, device=wave.device)
    parts = []
    block = max(1, BLOCK // (len(taps) * math.prod(wave.shape[:-1])))
    for start in range(0, length, block):
        places = torch.arange(start, min(start + block, length), device=wave.device) * period
        whole = places.div(phases, rounding_mode="floor")  # in whole numbers, so that long waves keep time
        offsets = (taps - ((places - whole * phases).double() / phases)[:, None]) * cutoff
        window = (offsets.clamp(-ZEROS, ZEROS) * (math.pi / (2 * ZEROS))).cos().square()
        weights = (torch.sinc(offsets) * window * cutoff).to(wave.dtype)
        near = padded[..., whole[:, None] + taps + reach]
        parts.append((near * weights).sum(-1))
    return torch.cat(parts, -1)
