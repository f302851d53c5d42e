"""From samples to features of frames: learned filters, mel bands in decibels, or their cepstrum.

    wave       convolutions with strides s_1, s_2, each with a layer norm and a GELU behind it; frames of about 2 ms
    log_mel    10 log10(M |STFT|²), M mel filters, windows of 25 ms every 10 ms
    mfcc       the discrete cosine transform of log_mel over its bands

Frame j of a clip of T samples is centred on samples j h to (j + 1) h, h being the samples of a frame; there are
ceil(T / h) of them. Every clip stands in silence: in front of it and behind it lie zeros, in a batch as well as alone,
whatever the padding holds. So frames are those of the clip alone, and a clip may be shorter than a window.

Mel filters and cosines are torchaudio's, imported on first use.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinuous.core import norms
from sinuous.core.checks import check_sizes
from sinuous.core.extras import package

WINDOW, HOP = 0.025, 0.010
"""Seconds of a window of the spectrum, and between two of them."""

FLOOR = 1e-10
"""Added to powers: what is 100 dB below full scale is silence."""


def frames_of(samples: Tensor, hop: int) -> Tensor:
    """Number of frames, `ceil(samples / hop)`."""
    return torch.div(samples + (hop - 1), hop, rounding_mode="floor")


def silence_behind(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Set `x`, `[B, C, T]`, to zero from `lengths` `[B]` on, whatever is there."""
    if lengths is None:
        return x
    beyond = torch.arange(x.shape[-1], device=x.device) >= lengths.unsqueeze(1)
    return x.masked_fill(beyond.unsqueeze(1), 0.0)


class LearnedFilters(nn.Module):
    """Strided convolutions of the samples, without biases; each output is normed over its filters, which takes the
    loudness away: waves of speech are so far below full scale that nothing is learned from them as they are.

    Source: Baevski et al., "wav2vec 2.0" (arXiv:2006.11477), section 2, the feature encoder.

    Args:
        sample_rate: samples a second.
        embed_dim: number of filters, of both layers.
        strides: samples, then steps, from one output to the next; windows are four strides wide. Frames are of about
            2 ms if absent.

    Attributes:
        hop: samples of a frame.
        num_features: of a frame.
    """

    def __init__(self, sample_rate: int, embed_dim: int, strides: tuple[int, ...] | None = None, **dd: Any) -> None:
        super().__init__()
        strides = (4, max(1, round(sample_rate / 2000))) if strides is None else tuple(strides)
        check_sizes(**{f"strides[{i}]": stride for i, stride in enumerate(strides)})
        widths = (1, *[embed_dim] * len(strides))
        self.convs = nn.ModuleList(
            nn.Conv1d(inside, outside, 4 * stride, stride, bias=False, **dd)
            for inside, outside, stride in zip(widths[:-1], widths[1:], strides, strict=True)
        )
        self.norms = nn.ModuleList(norms.LayerNorm(embed_dim, **dd) for _ in strides)
        self.strides, self.hop, self.num_features = strides, math.prod(strides), embed_dim

    def init_weights(self) -> None:
        for layer in (*self.convs, *self.norms):
            layer.reset_parameters()  # type: ignore[operator]

    def forward(self, wave: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Frames `[B, F, num_features]` of waves `[B, 1, T]`; those behind `lengths` hold nothing of use."""
        x = silence_behind(wave, lengths).to(next(self.parameters()).dtype)
        for conv, norm, stride in zip(self.convs, self.norms, self.strides, strict=True):
            x = F.gelu(norm(conv(_framed(x, 4 * stride, stride)).mT)).mT
            lengths = None if lengths is None else frames_of(lengths, stride)
            x = silence_behind(x, lengths)
        return x.mT


class LogMel(nn.Module):
    """Power in mel bands, in units of 40 dB around -60 dB: `(log10(M |STFT|² + 1e-10) + 6) / 4`.

    Windows are Hann's, divided by their sum: a sine of full scale has a peak of 1/4.

    Args:
        sample_rate: samples a second.
        num_bands: mel bands from 0 to half the rate.
        hop: samples of a frame; those of 10 ms if absent.
        window: samples of a window, at least those of a frame; those of 25 ms if absent.

    Attributes:
        num_features: of a frame.

    Raises:
        ValueError: if a size is less than 1, or the window is shorter than a frame.
    """

    def __init__(
        self, sample_rate: int, num_bands: int = 40, hop: int | None = None, window: int | None = None
    ) -> None:
        super().__init__()
        check_sizes(sample_rate=sample_rate, num_bands=num_bands)
        self.sample_rate, self.num_bands = sample_rate, num_bands
        self.hop = max(1, round(HOP * sample_rate)) if hop is None else hop
        self.window = max(self.hop, round(WINDOW * sample_rate)) if window is None else window
        check_sizes(hop=self.hop)
        if self.window < self.hop:
            raise ValueError(f"window must have at least the {self.hop} samples of a frame (got {self.window})")
        self.num_features = num_bands

    @property
    def size(self) -> int:
        """Length of the Fourier transform: at least twice the window, so that low bands are not empty."""
        return int(2 ** math.ceil(math.log2(2 * self.window)))

    def init_weights(self) -> None:
        pass

    def forward(self, wave: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Frames `[B, F, num_features]` of waves `[B, 1, T]`; those behind `lengths` hold nothing of use."""
        x = _framed(silence_behind(wave, lengths), self.window, self.hop).squeeze(1)
        x = x if x.dtype == torch.float64 else x.float()
        taper = torch.hann_window(self.window, dtype=x.dtype, device=x.device)
        frames = x.unfold(-1, self.window, self.hop) * (taper / taper.sum())
        power = torch.fft.rfft(frames, self.size).abs().square()
        filters = _mel_filters(self.size // 2 + 1, self.num_bands, self.sample_rate).to(power)
        return (torch.log10(power @ filters + FLOOR) + 6) / 4


class Cepstrum(LogMel):
    """Mel-frequency cepstral coefficients: the orthonormal cosine transform of `LogMel` over its bands.

    Args:
        sample_rate: samples a second.
        num_bands: mel bands from 0 to half the rate.
        num_coefficients: how many of the lowest are kept.
        hop: as of `LogMel`.
        window: likewise.

    Raises:
        ValueError: if there are more coefficients than bands.
    """

    def __init__(
        self,
        sample_rate: int,
        num_bands: int = 40,
        num_coefficients: int = 20,
        hop: int | None = None,
        window: int | None = None,
    ) -> None:
        super().__init__(sample_rate, num_bands, hop, window)
        check_sizes(num_coefficients=num_coefficients)
        if num_coefficients > num_bands:
            raise ValueError(
                f"num_coefficients must not be more than the {num_bands} bands (got {num_coefficients}); give more "
                "num_bands, or fewer coefficients"
            )
        self.num_features = num_coefficients

    def forward(self, wave: Tensor, lengths: Tensor | None = None) -> Tensor:
        bands = super().forward(wave, lengths)
        return bands @ _cosines(self.num_features, self.num_bands).to(bands)


def _framed(x: Tensor, window: int, hop: int) -> Tensor:
    """Pad `x`, `[..., T]`, so that windows every `hop` are centred on ceil(T / hop) frames, at least one."""
    frames = max(1, -(-x.shape[-1] // hop))
    before = (window - hop) // 2
    return F.pad(x, (before, (frames - 1) * hop + window - before - x.shape[-1]))


@functools.lru_cache(maxsize=16)
def _mel_filters(bins: int, bands: int, sample_rate: int) -> Tensor:
    """`[bins, bands]`, on the HTK scale."""
    functional = package("torchaudio.functional", "audio")
    with torch.device("cpu"), torch.inference_mode(False):
        filters: Tensor = functional.melscale_fbanks(bins, 0.0, sample_rate / 2, bands, sample_rate)
    return filters


@functools.lru_cache(maxsize=16)
def _cosines(coefficients: int, bands: int) -> Tensor:
    """`[bands, coefficients]`."""
    functional = package("torchaudio.functional", "audio")
    with torch.device("cpu"), torch.inference_mode(False):
        cosines: Tensor = functional.create_dct(coefficients, bands, norm="ortho")
    return cosines
