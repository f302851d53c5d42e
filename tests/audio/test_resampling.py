"""Waves at another rate: torchaudio's values for any two rates, in little memory."""

from __future__ import annotations

import math

import pytest
import torch

from sinuous.audio import resampling
from sinuous.audio.resampling import resample

torchaudio = pytest.importorskip("torchaudio")


def tone(rate: int, seconds: float, hertz: float = 440.0) -> torch.Tensor:
    return torch.sin(2 * math.pi * hertz * torch.arange(round(rate * seconds)) / rate)[None]


@pytest.mark.parametrize(("rate", "to"), [(48000, 8000), (8000, 48000), (441, 320), (11025, 8000), (7, 5), (3, 160)])
def test_sample_by_sample_is_what_torchaudio_computes(rate: int, to: int) -> None:
    wave = torch.randn(2, 3, 1001, dtype=torch.float64)
    expected = torchaudio.functional.resample(wave, rate, to)
    shared = math.gcd(rate, to)
    alone = resampling._sample_by_sample(wave, rate // shared, to // shared, expected.shape[-1])
    torch.testing.assert_close(alone, expected, rtol=0, atol=1e-12)
    assert torch.equal(resample(wave, rate, to), expected)


@pytest.mark.parametrize(("rate", "to"), [(44101, 8000), (8001, 8000), (16001, 16000), (1234, 44101), (192001, 16000)])
def test_rates_with_no_small_ratio_keep_a_tone(rate: int, to: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "package", lambda *_: pytest.fail("its filter would be huge"))
    made = resample(tone(rate, 0.2, 200.0), rate, to)
    assert made.shape[-1] == -(-round(rate * 0.2) * to // rate)
    inner = slice(to // 20, -to // 20)  # away from the silence on both sides
    torch.testing.assert_close(made[:, inner], tone(to, 0.3, 200.0)[:, : made.shape[-1]][:, inner], rtol=0, atol=2e-2)


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    wave = torch.randn(1, 3000)
    whole = resample(wave, 8001, 8000)
    monkeypatch.setattr(resampling, "BLOCK", 100)
    assert torch.equal(resample(wave, 8001, 8000), whole)


@pytest.mark.parametrize(("rate", "to"), [(48000, 8000), (8000, 8001)])
def test_lengths_are_rounded_up_and_gradients_flow(rate: int, to: int) -> None:
    wave = torch.randn(2, 100, dtype=torch.float64, requires_grad=True)
    made = resample(wave, rate, to)
    assert made.shape == (2, -(-100 * to // rate))
    assert made.dtype == torch.float64
    made.sum().backward()
    assert wave.grad is not None
    assert bool((wave.grad != 0).any())
    assert resample(torch.zeros(2, 0), rate, to).shape == (2, 0)


def test_the_same_rate_gives_the_wave_itself() -> None:
    wave = torch.randn(1, 10)
    assert resample(wave, 8000, 8000) is wave


def test_wrong_calls_are_refused() -> None:
    wave = torch.randn(1, 10)
    with pytest.raises(ValueError, match="to_rate must be at least 1"):
        resample(wave, 8000, 0)
    with pytest.raises(ValueError, match="from_rate must be a whole number"):
        resample(wave, 8000.5, 8000)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="wave must be a tensor of float32"):
        resample(wave.long(), 8000, 16000)
    with pytest.raises(ValueError, match="more than memory has room for"):
        resample(wave.expand(100_000, 10), 1, 8000)
