"""The datasets: sizes, balance, disjoint splits, and errors that say what to do."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor

from sinuous.core.data import SPLITS
from sinuous.vision.datasets import (
    BUNDLED_FASHION_MNIST,
    LabelledImages,
    cifar10,
    fashion_mnist,
    image_folder,
    labelled,
    read_idx,
    synthetic,
)


def test_the_bundled_subset_is_balanced_and_its_splits_are_disjoint() -> None:
    sets = {split: fashion_mnist(split) for split in SPLITS}
    assert {split: len(data) for split, data in sets.items()} == {"train": 10_000, "val": 2_000, "test": 2_000}
    for data in sets.values():
        assert np.ptp(np.bincount(data.labels, minlength=10)) == 0
    pictures = {split: {image.tobytes() for image in data.images} for split, data in sets.items()}
    assert pictures["train"].isdisjoint(pictures["val"])
    assert (BUNDLED_FASHION_MNIST / "NOTICE.txt").read_text().count("MIT License") == 1


def test_items_are_pictures_with_labels() -> None:
    image, label = fashion_mnist("test")[3]
    assert isinstance(image, Image.Image)
    assert image.size == (28, 28)
    assert label in range(10)
    tensor, same = fashion_mnist("test", transform=transforms.ToTensor())[3]
    assert tensor.shape == (1, 28, 28)
    assert same == label
    assert torch.equal(tensor[0], torch.from_numpy(np.array(image)) / 255)


def _write_idx(folder: Path, name: str, array: np.ndarray, *, packed: bool) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    content = header + array.astype(np.uint8).tobytes()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("inner", ["", "FashionMNIST/raw", "usr/share/datasets/fashion-mnist"])
def test_a_folder_of_idx_files(tmp_path: Path, packed: bool, inner: str) -> None:
    images = np.arange(12 * 28 * 28).reshape(12, 28, 28) % 251
    for part in ("train", "t10k"):
        _write_idx(tmp_path / inner, f"{part}-images-idx3-ubyte", images, packed=packed)
        _write_idx(tmp_path / inner, f"{part}-labels-idx1-ubyte", np.arange(12) % 10, packed=packed)
    train, val, test = (fashion_mnist(split, source="folder", root=tmp_path) for split in SPLITS)
    assert (len(train), len(val), len(test)) == (10, 2, 12)
    assert np.array_equal(np.concatenate([train.images, val.images]), images)
    assert list(val.labels) == [0, 1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-100], "is cut off: .* bytes where its header promises"),
        (lambda content: b"<html>not found</html>", "is no IDX file of unsigned bytes"),
        (lambda content: b"", "is no IDX file"),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_damaged_idx_files_are_named(tmp_path: Path, damage: Any, message: str, packed: bool) -> None:
    content = damage(gzip.decompress((BUNDLED_FASHION_MNIST / "t10k-images-idx3-ubyte.gz").read_bytes()))
    path = tmp_path / ("t10k-images-idx3-ubyte" + ".gz" * packed)
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(ValueError, match=f"t10k-images-idx3-ubyte.*{message}.*again"):
        read_idx(tmp_path, "t10k-images-idx3-ubyte")


def test_a_cut_gzip_file_is_named(tmp_path: Path) -> None:
    whole = (BUNDLED_FASHION_MNIST / "t10k-images-idx3-ubyte.gz").read_bytes()
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz is damaged"):
        read_idx(tmp_path, "t10k-images-idx3-ubyte")


def test_missing_data_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} has no train-images-idx3-ubyte"):
        fashion_mnist(source="folder", root=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere.*data\.root=FOLDER"):
        fashion_mnist(source="folder", root=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"data\.root=FOLDER"):
        fashion_mnist(source="folder")
    with pytest.raises(ValueError, match=r"source must be bundled, folder or download .got 'cloud'"):
        fashion_mnist(source="cloud")
    with pytest.raises(ValueError, match=r"split must be one of 'train', 'val', 'test' .got 'dev'"):
        fashion_mnist("dev")


def test_a_failed_download_names_the_way_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unreachable:
        def __init__(self, root: Path, download: bool) -> None:
            raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(labelled.datasets, "FashionMNIST", Unreachable)
    with pytest.raises(OSError, match=r"could not be downloaded .*data\.source=folder data\.root=FOLDER"):
        fashion_mnist(source="download", root=tmp_path)


def test_cifar10_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="holds no intact cifar-10-batches-py"):
        cifar10(root=tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *arguments: True)
    rows = np.random.default_rng(0).integers(0, 256, (12, 3072), dtype=np.uint8)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": [i % 10 for i in range(12)]}))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    sizes = {split: len(cifar10(split, root=tmp_path)) for split in SPLITS}
    assert sizes == {"train": 50, "val": 10, "test": 12}
    assert cifar10("test", root=tmp_path)[0][0].size == (32, 32)


def test_an_image_folder_and_its_unreadable_picture(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("L", (8, 6), 80).save(tmp_path / split / name / "a.png")
    (tmp_path / "val" / "dog" / "b.jpg").write_bytes(b"\xff\xd8\xff not a jpeg")
    train = image_folder("train", root=tmp_path)
    assert train.classes == ["cat", "dog"]
    assert train[0][0].mode == "RGB"
    test = image_folder("test", root=tmp_path)
    assert len(test) == 3
    with pytest.raises(ValueError, match=r"cannot read the picture .*b\.jpg .*take it out"):
        test[2]
    with pytest.raises(FileNotFoundError, match="has no folder 'train'"):
        image_folder("train", root=tmp_path / "train")


def test_synthetic_data_is_fixed_per_split() -> None:
    options: dict[str, Any] = {"sizes": {"train": 5, "val": 3, "test": 3}, "image_size": (1, 8, 8), "num_classes": 4}
    first, again, other = (synthetic(split, **options) for split in ("val", "val", "test"))
    assert np.array_equal(np.array(first[1][0]), np.array(again[1][0]))
    assert not np.array_equal(np.array(first[1][0]), np.array(other[1][0]))
    assert len(synthetic("train", **options)) == 5
    assert first.classes == ["0", "1", "2", "3"]


def _classes(root: Path, split: str, names: str) -> None:
    for name in names:
        (root / split / name).mkdir(parents=True)
        Image.new("RGB", (40, 40), 80).save(root / split / name / "x.png")


def test_classes_are_numbered_as_in_the_training_folder(tmp_path: Path) -> None:
    _classes(tmp_path, "train", "abc")
    _classes(tmp_path, "val", "bc")
    split = image_folder("val", root=tmp_path)
    assert split.classes == ["a", "b", "c"]
    assert split.targets == [1, 2]
    assert image_folder("test", root=tmp_path).targets == [1, 2]


def test_classes_that_the_training_folder_lacks_are_refused_by_name(tmp_path: Path) -> None:
    _classes(tmp_path, "train", "abc")
    _classes(tmp_path, "val", "bcd")
    with pytest.raises(ValueError, match=r"val has classes that .*train lacks: d; .* which are a, b, c"):
        image_folder("val", root=tmp_path)


def test_a_class_without_pictures_to_train_on_is_refused(tmp_path: Path) -> None:
    _classes(tmp_path, "train", "ab")
    (tmp_path / "train" / "c").mkdir()
    with pytest.raises(FileNotFoundError, match="classes c"):
        image_folder("train", root=tmp_path)


def test_a_folder_with_no_training_split_numbers_its_own_classes(tmp_path: Path) -> None:
    _classes(tmp_path, "val", "bd")
    assert image_folder("val", root=tmp_path).targets == [0, 1]


def _pictures(root: Path, **options: object) -> LabelledImages:
    known: dict[str, object] = {"num_classes": 2, "in_chans": 1, "img_size": 8, "mean": [0.5], "std": [0.5]}
    return LabelledImages(image_folder, pil_to_tensor, pil_to_tensor, root=root, **{**known, **options})  # type: ignore[arg-type]


def test_pictures_have_the_channels_that_are_asked_for(tmp_path: Path) -> None:
    _classes(tmp_path, "train", "ab")
    assert _pictures(tmp_path).split("train")[0][0].shape == (1, 40, 40)
    colour = _pictures(tmp_path, in_chans=3, mean=[0.1, 0.2, 0.3], std=[1, 1, 1])
    assert colour.split("train")[0][0].shape == (3, 40, 40)
    assert colour.example().shape == (1, 3, 8, 8)
    assert _pictures(tmp_path, img_size=[8, 24]).example().shape == (1, 1, 8, 24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": [0.485, 0.456, 0.406]}, r"data.mean must have one number .* give data.mean=\[0.449\]"),
        ({"in_chans": 3, "mean": [0, 0, 0]}, r"data.std must have one number .* give data.std=\[0.5,0.5,0.5\]"),
        ({"in_chans": 4}, r"data.in_chans must be 1 .* or 3 .* \(got 4\)"),
    ],
)
def test_means_and_channels_must_fit(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        _pictures(tmp_path, **options)
