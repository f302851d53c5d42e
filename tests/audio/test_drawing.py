"""Spectrograms show tones where they are, whatever the length, and silence is nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("matplotlib")

from sinuous.audio import drawing

RATE = 8000


@pytest.mark.parametrize("seconds", [0.5, 9.0, 70.0])
def test_a_tone_is_where_it_sounds(seconds: float) -> None:
    t = torch.arange(round(RATE * seconds), dtype=torch.float64) / RATE
    wave = torch.where(t < seconds / 2, torch.sin(2 * torch.pi * 1000 * t), torch.sin(2 * torch.pi * 3000 * t))
    decibels = drawing.spectrogram(wave, RATE)
    rows, columns = decibels.shape
    assert columns <= drawing.COLUMNS + 1
    assert decibels.max() == pytest.approx(0)
    assert decibels.min() >= -drawing.RANGE
    loudest = decibels.argmax(0) * RATE / 2 / (rows - 1)
    place = (np.arange(columns) + 0.5) / columns
    assert np.abs(loudest[(place > 0.05) & (place < 0.45)] - 1000).max() < 20
    assert np.abs(loudest[(place > 0.55) & (place < 0.95)] - 3000).max() < 20


def test_sounds_beside_each_other_have_one_scale() -> None:
    loud = torch.sin(torch.arange(4000) * 0.5)
    most = drawing.loudest_of(loud / 100, loud, rate=RATE)
    assert drawing.spectrogram(loud, RATE, most).max() == pytest.approx(0)
    assert drawing.spectrogram(loud / 100, RATE, most).max() == pytest.approx(-40, abs=0.01)


@pytest.mark.parametrize("rest", [1, 300, 1000])
def test_a_recording_of_any_length_is_drawn_beside(rest: int, tmp_path: Path) -> None:
    wave, bits = torch.rand(2000) - 0.5, torch.rand(2000)
    recording = (wave[: 1000 + rest], bits[: 1000 + rest])
    drawing.draw_continuation(wave, RATE, 1000, bits, "a title", tmp_path / "alone.png")
    drawing.draw_continuation(wave, RATE, 1000, bits, "a title", tmp_path / "beside.png", recording)
    alone, beside = (Image.open(tmp_path / name).size for name in ("alone.png", "beside.png"))
    assert beside[0] == alone[0]
    assert beside[1] > alone[1] + 200


@pytest.mark.parametrize("samples", [1, 7, 4000])
def test_silence_and_short_sounds_are_drawn(samples: int, tmp_path: Path) -> None:
    silent = torch.zeros(samples)
    assert np.isfinite(drawing.spectrogram(silent, RATE)).all()
    bits = torch.full((samples,), torch.nan)
    drawing.draw_continuation(silent, RATE, samples // 2, bits, "silence", tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").stat().st_size > 1000
