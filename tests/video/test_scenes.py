"""SceneTiling cuts where scenes meet, of a whole film and as frames come."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sinuous.video.scenes import scene_cuts, stream_scene_cuts


def scenes(*lengths: int, noise: float = 0.0) -> Tensor:
    torch.manual_seed(0)
    rows = torch.cat([torch.randn(1, 16).expand(length, -1) for length in lengths])
    return rows + noise * torch.randn(rows.shape)


def test_equal_frames_have_no_cut() -> None:
    same = scenes(20)
    assert scene_cuts(same) == list(stream_scene_cuts(same)) == []
    assert scene_cuts(same[:1]) == scene_cuts(same[:0]) == list(stream_scene_cuts(same[:1])) == []


def test_two_constant_halves_have_one_cut_at_the_joint() -> None:
    halves = scenes(9, 11)
    assert scene_cuts(halves) == list(stream_scene_cuts(halves)) == [9]
    assert scene_cuts(-5 * halves) == [9]


def test_noisy_scenes_are_told_apart_by_their_depth() -> None:
    film = scenes(12, 7, 15, 10, noise=0.05)
    assert scene_cuts(film) == [12, 19, 34]
    assert set(stream_scene_cuts(film, alpha=2.0)) >= {12, 19, 34}
    assert scene_cuts(film, alpha=20.0) == []
    # A slow change is a valley without sides: its depth is measured from its peaks and is small.
    turn = torch.linspace(0, 1.5, 30)
    assert scene_cuts(torch.stack([turn.cos(), turn.sin()], 1), alpha=1.0) == []


def test_depths_are_those_of_the_paper() -> None:
    """By hand: similarities .9 .5 .8 .1 .7 .95 have depths 0 .35 0 .775 .125 0, of mean .208 and deviation .282."""
    angle = torch.tensor([0.0, 0.9, 0.5, 0.8, 0.1, 0.7, 0.95]).double()
    angle[1:] = torch.arccos(angle[1:])
    turn = angle.cumsum(0)
    rows = torch.stack([turn.cos(), turn.sin()], 1)
    assert scene_cuts(rows, alpha=1.0) == [4]
    assert scene_cuts(rows, alpha=0.4) == [2, 4]
    assert scene_cuts(rows, alpha=0.6) == [4]


def test_the_stream_says_a_cut_when_its_frame_has_come() -> None:
    seen = []

    def frames() -> object:
        for number, row in enumerate(scenes(9, 11)):
            seen.append(number)
            yield row

    assert next(stream_scene_cuts(frames())) == 9
    assert seen == list(range(10))


@pytest.mark.parametrize("wrong", [torch.randn(2, 2, 2), [[1.0]], torch.full((4, 2), torch.nan)])
def test_wrong_features_are_told(wrong: object) -> None:
    with pytest.raises(ValueError, match="features must be"):
        scene_cuts(wrong)
    with pytest.raises(ValueError, match="features must be"):
        list(stream_scene_cuts([wrong]))
