"""Made clips: what one frame says, what order says, and that a seed says everything."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_films import make_clip
from torch import nn

from sinuous.video.datasets import LENGTHS, LabelledClips, MovingClips, NeedleFrames, NeedleInVideo
from sinuous.vision.datasets import fashion_mnist


class Few:
    """The first 400 pictures of a split."""

    def __init__(self, split: str) -> None:
        self.whole = fashion_mnist(split)
        self.classes = self.whole.classes

    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> Any:
        return self.whole[index]


few = functools.cache(Few)


def pictures(split: str) -> Any:
    return few(split)


def moving(split: str = "train", **options: Any) -> MovingClips:
    return MovingClips(split, pictures=pictures, **options)


def needle(split: str = "train", num_frames: int = 16, **options: Any) -> NeedleInVideo:
    return NeedleInVideo(split, num_frames, pictures=pictures, **options)


def fit(x: torch.Tensor, y: torch.Tensor, classes: int, steps: int = 150) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(64), nn.ReLU(), nn.Linear(64, classes))
    model(x[:1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        some = torch.randint(len(x), (128,))
        loss = nn.functional.cross_entropy(model(x[some]), y[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def stacked(data: Any, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    clips, labels = zip(*(data[i] for i in range(count)), strict=True)
    return torch.stack(clips).float() / 255, torch.tensor(labels)


def test_one_frame_tells_no_direction() -> None:
    x, y = stacked(moving(), 1500)
    test_x, test_y = stacked(moving("test"), 600)
    for frame in (0, 7):
        model = fit(x[:, :, frame], y, 16)
        assert (model(test_x[:, :, frame]).argmax(1) == test_y).float().mean() <= 0.15


def test_the_order_of_frames_tells_the_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    data = moving("val", num_frames=3)
    monkeypatch.setattr(data, "background", lambda rng, frames: np.zeros((frames, 32, 32), np.uint8))
    for index in range(40):
        clip, label = data[index]
        first, second = torch.fft.fft2(clip[0, 0].double()), torch.fft.fft2(clip[0, 1].double())
        place = int(torch.fft.ifft2(second * first.conj()).real.argmax())
        shift = [(side + 16) % 32 - 16 for side in divmod(place, 32)]
        way, speed = data.classes[label].rsplit(" ", 1)
        assert shift == [data.SPEEDS[speed] * step for step in data.DIRECTIONS[way]]
    assert len(set(data.classes)) == 16
    many = moving(length=800)
    counts = Counter(many[i][1] for i in range(800))
    assert len(counts) == 16
    assert max(counts.values()) < 90


def test_needles_are_two_kinds_in_two_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    data = needle(length=300)
    monkeypatch.setattr(data, "background", lambda rng, frames: np.full((frames, 32, 32), 100, np.uint8))
    labels = Counter()
    for index in range(300):
        clip, label = data[index]
        hidden = data.needle(index)
        changed = (clip[0] != 100).flatten(1).any(1).nonzero().flatten().tolist()
        assert changed == list(hidden.frames)
        assert hidden.kinds == data.PAIRS[label]
        assert hidden.kinds[0] != hidden.kinds[1]
        assert data.classes[label] == f"{hidden.kinds[0]}, then {hidden.kinds[1]}"
        for frame in changed:
            rows, columns = (clip[0, frame] != 100).nonzero(as_tuple=True)
            assert max(int(rows.max() - rows.min()), int(columns.max() - columns.min())) < 14
            # 50 to 80 % of an item, the rest of the background.
            assert 100 * 0.2 - 1 <= clip[0, frame].min() <= clip[0, frame].max() <= 0.8 * 255 + 0.2 * 100 + 1
        labels[label] += 1
    assert len(labels) == 12
    # Every pair comes in both orders: whoever knows the kinds alone is right half of the time.
    assert all(tuple(reversed(pair)) in data.PAIRS for pair in data.PAIRS)
    assert {data.needle(i).frames[0] for i in range(300)} >= set(range(12))


@pytest.mark.parametrize("make", [moving, needle])
def test_equal_seeds_give_equal_bytes_in_any_order(make: Any) -> None:
    one, other = make(seed=3, length=50), make(seed=3, length=80)
    torch.manual_seed(5)
    for index in (41, 7, 7, 0):
        (clip, label), (again, same) = one[index], other[index]
        assert clip.dtype == torch.uint8
        assert torch.equal(clip, again)
        assert label == same
    assert torch.equal(one[-1][0], one[49][0])
    differs = [make(seed=4), make("val", seed=3), make("test", seed=3)]
    assert not any(torch.equal(one[0][0], data[0][0]) for data in differs)
    with pytest.raises(IndexError, match="index must lie"):
        one[50]


def test_bytes_stay_what_they_are() -> None:
    """Weights and their recorded scores depend on them; by whole numbers alone, they do not depend on the machine."""
    sums = [int((make(seed=0)[0][0].long() * torch.arange(32)).sum()) for make in (moving, needle)]
    assert sums == [14633517, 26183370]


def test_items_of_a_split_come_from_that_split_of_the_pictures() -> None:
    asked = []

    def noted(split: str) -> Any:
        asked.append(split)
        return few(split)

    for split in LENGTHS:
        assert len(MovingClips(split, pictures=noted)) == LENGTHS[split]
        NeedleInVideo(split, 8, pictures=noted)
    assert asked == [split for split in LENGTHS for _ in range(2)]


@pytest.mark.parametrize("make", [moving, needle])
def test_a_film_of_yours_takes_the_place_of_the_texture(make: Any, tmp_path: Path) -> None:
    pytest.importorskip("av")
    grays = [np.full((32, 32, 3), 2 * number, np.uint8) for number in range(120)]
    film = make_clip(tmp_path / "film.mp4", pictures=grays, count=120, sides=(32, 32))
    shades = {}
    for split in LENGTHS:
        data = make(split, num_frames=6, root=film)
        clips = torch.stack([data[index][0] for index in range(8)]).float()
        assert torch.equal(clips[3], data[3][0].float())
        shades[split] = clips.flatten(3).median(3).values / 240  # how far into the film a frame is
    assert shades["train"].max() < 0.65
    assert 0.55 < shades["val"].min() <= shades["val"].max() < 0.75
    assert shades["test"].min() > 0.65


def test_wrong_options_are_told() -> None:
    for make in (moving, needle):
        with pytest.raises(ValueError, match="split"):
            make("all")
        with pytest.raises(ValueError, match="at least 14"):
            make(img_size=12)
        with pytest.raises(ValueError, match="seed must be"):
            make(seed=-1)
    with pytest.raises(ValueError, match="at least 2"):
        needle(num_frames=1)


def test_data_of_clips_is_normalised_and_of_one_size() -> None:
    options = {"num_frames": 4, "img_size": 24, "mean": [0.4], "std": [0.2], "lengths": {"train": 6}}
    dataset = functools.partial(MovingClips, pictures=pictures)
    data = LabelledClips(dataset, num_classes=16, **options)
    clip, label = data.split("train")[2]
    raw, same = moving(num_frames=4, img_size=24, length=6)[2]
    assert label == same
    assert len(data.split("train")) == 6
    assert clip[None].shape == data.example().shape
    torch.testing.assert_close(clip, (raw / 255 - 0.4) / 0.2)
    assert data.model_options() == {"num_classes": 16, "num_frames": 4, "img_size": 24, "in_chans": 1}
    with pytest.raises(ValueError, match="num_classes must be 16"):
        LabelledClips(dataset, num_classes=12, **options)


def test_single_frames_hide_what_the_needle_hides(monkeypatch: pytest.MonkeyPatch) -> None:
    data = NeedleFrames("train", pictures=pictures, length=400)
    monkeypatch.setattr(data, "background", lambda rng, frames: np.full((frames, 32, 32), 100, np.uint8))
    labels = Counter()
    for index in range(400):
        clip, label = data[index]
        assert clip.shape == (1, 1, 32, 32)
        assert bool((clip != 100).any()) is bool(label)
        labels[data.classes[label]] += 1
    assert set(labels) == {"nothing", *NeedleInVideo.KINDS}
    assert 150 < labels["nothing"] < 250
    with pytest.raises(ValueError, match="num_frames must be 1"):
        NeedleFrames("train", pictures=pictures, num_frames=2)


def test_a_still_background_moves_under_no_item() -> None:
    drifting, still = moving(length=40), moving(length=40, still=1.0)
    for index in range(10):
        changed = [(clip[0, 1:] != clip[0, :-1]).float().mean() for clip, _ in (drifting[index], still[index])]
        # The item, 14 pixels by 14 of 32 by 32, leaves and enters.
        assert changed[1] < 2 * 14**2 / 32**2 < changed[0]
        assert drifting[index][1] == still[index][1]
    half = moving(length=200, still=0.5)
    calm = sum(bool((half[i][0][0, 1:] == half[i][0][0, :-1]).float().mean() > 0.5) for i in range(200))
    assert 70 < calm < 130
    with pytest.raises(ValueError, match="still must"):
        moving(still=1.5)
