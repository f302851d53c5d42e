"""Windows of waves: whole ones that follow each other, moved in training alone."""

from __future__ import annotations

import pytest
import torch

from sinuous.audio.datasets import WaveWindows
from sinuous.audio.datasets.waves import WaveSpans


def test_windows_follow_each_other_and_short_waves_end_in_silence() -> None:
    spans = WaveSpans([torch.arange(1.0, 11), torch.arange(1.0, 3)], 4)
    assert [spans[i][0].tolist() for i in range(len(spans))] == [[[1, 2, 3, 4]], [[5, 6, 7, 8]], [[1, 2, 0, 0]]]
    assert {spans[i][1] for i in range(len(spans))} == {0}


def test_training_windows_move_and_stay_whole() -> None:
    spans = WaveSpans([torch.arange(1.0, 11)], 4, moved=True)
    torch.manual_seed(0)
    starts = {int(spans[1][0][0, 0]) for _ in range(100)}
    assert starts == {5, 6, 7}


def test_hold_music_is_windowed_by_its_splits() -> None:
    data = WaveWindows(length=8000)
    assert data.sample_rate == 8000
    assert data.facts() == {"sample_rate": 8000}
    test = data.split("test")
    assert len(test) == sum(len(wave) // 8000 for wave in data.source.waves("test"))
    wave, _ = test[0]
    assert wave.shape == data.example()[0].shape == (1, 8000)
    assert torch.equal(wave[0], data.source.waves("test")[0][:8000])
    assert torch.equal(test[0][0], test[0][0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "hold music"}, "data.name must be one of 'hold_music'"),
        ({"length": 0}, "data.length must be at least 1"),
    ],
)
def test_bad_options_are_told(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WaveWindows(**options)  # type: ignore[arg-type]
