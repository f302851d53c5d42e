"""Pictures that are made as they are read: the published arrows, and collages that are the same on every machine."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from torchvision.transforms import ToTensor, v2

from sinuous.vision.datasets import (
    ArrowPictures,
    LabelledImages,
    MaskedImages,
    arrow_pointing,
    collage,
    fashion_mnist,
)
from sinuous.vision.datasets.arrows import PAD
from sinuous.vision.datasets.collages import THRESHOLD

# Labels of the first 32 pictures that the authors' generator makes.
PUBLISHED = [
    ("train", 42, 192, "11011000100111000001011111100000"),
    ("train", 43, 192, "01111000011111100010110011101110"),
    ("val", 100042, 192, "11101010100011111101010101010000"),
    ("ext_val", 100043, 384, "10000110101010100001100001010011"),
    ("test", 200042, 192, "00011111100011110001100001011111"),
    ("ext_test", 200043, 384, "01010111101010111111001111110010"),
]


@pytest.mark.parametrize(("split", "seed", "side", "labels"), PUBLISHED)
def test_arrows_have_the_published_labels(split: str, seed: int, side: int, labels: str) -> None:
    data = arrow_pointing(split, seed=seed)
    assert "".join(str(data[i][1]) for i in range(32)) == labels
    assert data[0][0].size == (side, side)
    if seed != 43:
        assert "".join(str(arrow_pointing(split).scene(i).label) for i in range(32)) == labels, "the split's own seed"


@pytest.mark.skipif(int(PIL.__version__.partition(".")[0]) != 12, reason="the count is of Pillow 12's strokes")
def test_arrows_have_the_published_pixels() -> None:
    data = arrow_pointing("train", seed=43)
    black = [int((np.asarray(data[i][0])[..., 0] == 0).sum()) for i in range(8)]
    assert black == [1699, 1025, 1777, 1810, 1352, 2560, 2782, 1754]
    assert set(np.unique(np.asarray(data[0][0]))) == {0, 255}


def test_arrows_of_an_index_are_always_the_same_and_of_the_numbers_asked_for() -> None:
    sizes = {split: len(arrow_pointing(split)) for split, *_ in PUBLISHED}
    assert sizes == {"train": 100_000, "val": 5_120, "ext_val": 5_120, "test": 10_240, "ext_test": 10_240}
    short, whole = arrow_pointing("val", length=10), arrow_pointing("val")
    assert len(short) == 10
    assert short[9][0].tobytes() == whole[9][0].tobytes() == short[-1][0].tobytes()
    assert whole[9][0].tobytes() != whole[8][0].tobytes()
    with pytest.raises(IndexError, match="between -10 and 9"):
        short[10]


@pytest.mark.parametrize("split", ["train", "ext_test"])
def test_a_side_that_is_given_holds_for_every_split(split: str) -> None:
    data = arrow_pointing(split, side=160, length=5)
    assert data[0][0].size == (160, 160)


def test_the_arrow_points_at_the_circle_where_the_label_says_so() -> None:
    data = arrow_pointing("val", length=300)
    for scene in map(data.scene, range(300)):
        towards = np.subtract(scene.circle, scene.arrow)
        distance = float(np.hypot(*towards))
        tip = np.array([np.cos(scene.angle), np.sin(scene.angle)])
        missed_by = abs(float(tip[0] * towards[1] - tip[1] * towards[0]))
        hits = float(tip @ towards) > 0 and missed_by < scene.radius
        assert hits == bool(scene.label)
        assert distance > 2 * scene.radius


def test_the_unit_scales_all_that_is_drawn() -> None:
    whole = arrow_pointing("val", length=4, arrow_length=(40, 60), arrow_width=(4, 7))
    half = arrow_pointing("val", side=96, unit=0.5, length=4, arrow_length=(40, 60), arrow_width=(4, 7))
    for index in range(4):
        large, small = whole.scene(index), half.scene(index)
        assert (small.label, small.arrow_length) == (large.label, large.arrow_length)
        assert small.angle == pytest.approx(large.angle)
        for name in ("arrow", "circle", "radius"):
            assert np.multiply(2, getattr(small, name)) == pytest.approx(np.array(getattr(large, name)))
        assert min(*small.arrow, *small.circle) >= PAD / 2
        shrunk = np.asarray(whole[index][0].resize((96, 96), Image.Resampling.BOX).convert("L")) < 128
        drawn = np.asarray(half[index][0].convert("L")) < 128
        assert (shrunk & drawn).sum() > 0.85 * (shrunk | drawn).sum()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "ext_tset"}, "there is no split 'ext_tset'; did you mean 'ext_test'"),
        ({"split": "q"}, "split must be one of 'train', 'val', 'ext_val', 'test', 'ext_test' .got 'q'"),
        ({"side": 100}, "side must be at least 150 pixels with unit=1.*got 100.*smaller unit"),
        ({"unit": 0.0}, "unit must be more than 0"),
        ({"arrow_length": (30, 15)}, "arrow_length must be two numbers of at least 1, the smaller one first"),
        ({"arrow_width": (0, 2)}, "arrow_width must be two numbers of at least 1"),
        ({"length": 0}, "length must be at least 1"),
        ({"seed": -1}, "seed must be a whole number of 0 or more"),
    ],
)
def test_wrong_options_of_arrows_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arrow_pointing(**options)


def _arrows(**options: Any) -> ArrowPictures:
    known: dict[str, Any] = {"num_classes": 2, "in_chans": 3, "img_size": 192, "mean": [0] * 3, "std": [1] * 3}
    return ArrowPictures(arrow_pointing, ToTensor(), ToTensor(), **{**known, **options})


def test_arrow_data_extrapolates_in_evaluation_alone() -> None:
    data = _arrows(extrapolate=True, img_size=384, lengths={"test": 3})
    picture, label = data.split("test")[1]
    assert picture.shape == (3, 384, 384)
    assert label == int(PUBLISHED[5][3][1])
    assert len(data.split("test")) == 3
    assert data.split("val").scene(0).label == int(PUBLISHED[3][3][0])
    assert [_arrows(train_seed=s).split("train").scene(0).label for s in (42, 43)] == [1, 0]
    assert list(data.classes) == ["points elsewhere", "points at the circle"]
    with pytest.raises(ValueError, match=r"data.img_size must be one number.*\[96, 192\]"):
        _arrows(img_size=[96, 192])


def test_collages_are_the_same_on_every_machine() -> None:
    digests = {}
    for split in ("train", "val", "test"):
        data = collage(split)
        content = hashlib.sha256()
        for index in (0, 1, len(data) - 1):
            picture, mask = data[index]
            content.update(picture.tobytes() + mask.numpy().astype("<i8").tobytes())
        digests[split] = content.hexdigest()[:16]
    assert digests == {"train": "3623c41f396cc3d9", "val": "078b3e6e7d1842ab", "test": "10317cfb36ccdb67"}


def test_a_collage_is_a_picture_and_a_class_for_each_pixel() -> None:
    data = collage("val", side=96, length=50)
    assert len(data) == 50
    assert data.classes == ["background", *fashion_mnist("val").classes]
    seen = set()
    for picture, mask in (data[i] for i in range(50)):
        pixels = np.asarray(picture)
        assert picture.mode == "L"
        assert picture.size == (96, 96)
        assert mask.dtype == torch.int64
        assert mask.shape == (96, 96)
        assert np.array_equal(mask.numpy() > 0, pixels > THRESHOLD)
        assert set(np.unique(pixels[mask.numpy() == 0])) == {0}
        seen |= set(mask.unique().tolist())
    assert seen == set(range(11))


def test_items_are_of_their_split_between_two_and_five_and_of_the_sizes_promised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = collage("test", length=200)
    assert np.array_equal(data.items.images, fashion_mnist("test").images)
    sizes: list[int] = []
    resize = Image.Image.resize

    def counted(image: Image.Image, size: tuple[int, int], *options: Any) -> Image.Image:
        sizes.append(size[0])
        return resize(image, size, *options)

    monkeypatch.setattr(Image.Image, "resize", counted)
    counts = []
    for index in range(200):
        before = len(sizes)
        data[index]
        counts.append(len(sizes) - before)
    assert set(counts) == {2, 3, 4, 5}
    assert (min(sizes), max(sizes)) == (16, 40)


def test_picture_and_mask_are_changed_together() -> None:
    plain = collage("test", length=3)
    flipped = collage("test", length=3, transform=v2.Compose([v2.ToImage(), v2.RandomHorizontalFlip(1.0)]))
    for index in range(3):
        picture, mask = plain[index]
        image, turned = flipped[index]
        assert torch.equal(image[0].flip(-1), torch.from_numpy(np.array(picture)))
        assert torch.equal(turned.flip(-1), mask)
        assert type(turned) is torch.Tensor


def _masked(transform: Any, **options: Any) -> MaskedImages:
    known: dict[str, Any] = {"num_classes": 11, "in_chans": 1, "img_size": 64, "mean": [0.0], "std": [1.0]}
    return MaskedImages(collage, transform, transform, **{**known, **options})


def test_masked_data_has_the_channels_and_lengths_that_are_asked_for() -> None:
    transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    data = _masked(transform, in_chans=3, mean=[0] * 3, std=[1] * 3, lengths={"val": 7})
    picture, mask = data.split("val")[0]
    assert len(data.split("val")) == 7
    assert len(data.split("test")) == 2000
    assert picture.shape == (3, 64, 64)
    assert picture.dtype == torch.float32
    assert type(picture) is type(mask) is torch.Tensor
    assert data.classes[0] == "background"
    assert isinstance(data, LabelledImages)


def test_a_mask_of_another_size_than_its_picture_is_told() -> None:
    cut = _masked(lambda picture, mask: (v2.functional.to_image(picture), mask[..., :32])).split("val")
    with pytest.raises(ValueError, match=r"a transformed mask must have .* 64 x 64 .got 64 x 32.; cut and scale both"):
        cut[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "tets"}, "there is no split 'tets'; did you mean 'test'"),
        ({"side": 39}, "side must be at least 40, the side of the largest item .got 39"),
        ({"source": "cloud"}, "source must be bundled, folder or download"),
        ({"length": 0}, "length must be at least 1"),
    ],
)
def test_wrong_options_of_collages_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collage(**options)


def test_an_unknown_split_of_lengths_and_other_classes_are_told() -> None:
    with pytest.raises(ValueError, match=r"there is no split of data.lengths 'vla'; did you mean 'val'"):
        _masked(None, lengths={"vla": 3})
    with pytest.raises(ValueError, match=r"has 11 classes and the model predicts 10; give data.num_classes=11"):
        _masked(None, num_classes=10).split("val")
