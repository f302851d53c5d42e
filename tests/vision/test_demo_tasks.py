"""`sinuous demo vision --task segment | rows | arrow`: from any picture to masks or answers, or to one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sinuous as package
from sinuous.apps import cli
from sinuous.core.weights import Weights
from sinuous.vision import demo, demo_arrow, demo_rows, demo_segment, drawing
from sinuous.vision.datasets import collage, fashion_mnist


def main(*arguments: str | Path) -> int:
    return cli.main(["demo", "vision", *map(str, arguments)])


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small untrained segmenter of collages."""
    torch.manual_seed(0)
    model = package.create_model("segmenter", decoder_dim=8, embed_dim=16, depth=2)
    names = {"mean": (0.15,), "std": (0.29,), "label_names": collage("test").classes}
    folder = tmp_path_factory.mktemp("models") / "segmenter"
    package.save(model, folder, card={"pretrained_cfg": {key: list(value) for key, value in names.items()}})
    return folder


@pytest.fixture(scope="module")
def pointer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small untrained classifier of arrows."""
    torch.manual_seed(0)
    model = package.create_model("test_vim", img_size=96, patch_size=16, num_classes=2)
    folder = tmp_path_factory.mktemp("models") / "pointer"
    package.save(model, folder)
    return folder


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small untrained ViR for clothing."""
    torch.manual_seed(0)
    model = package.create_model("vir_nano", embed_dim=16, depth=2)
    names = {"mean": [0.286], "std": [0.353], "label_names": fashion_mnist("test").classes}
    folder = tmp_path_factory.mktemp("models") / "reader"
    package.save(model, folder, card={"pretrained_cfg": names})
    return folder


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """Dark clothing on a light ground, wider than high."""
    picture, _ = collage("test")[1]
    light = Image.fromarray(255 - np.asarray(picture)[:40])
    path = tmp_path / "scene.png"
    light.resize((320, 200)).save(path)
    return path


def test_masks_of_own_pictures_are_drawn_and_the_path_is_printed_last(
    segmenter: Path, scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "masks.png"
    assert main("--task", "segment", "--image", scene, scene, "--model", segmenter, "--out", out) == 0
    printed = capsys.readouterr().out.strip().splitlines()
    assert printed[-1] == str(out)
    assert demo_segment.NOTE in printed
    assert any("scene.png" in line for line in printed)
    assert Image.open(out).size[0] > 500


def test_own_pictures_become_light_on_black_with_their_proportions(scene: Path) -> None:
    pixels = np.asarray(demo_segment.prepare(Image.open(scene)))
    assert pixels.shape == (40, 64)
    original = np.asarray(collage("test")[1][0])[:40]
    assert np.corrcoef(pixels.ravel(), original.ravel())[0, 1] > 0.95
    assert demo_segment.prepare(Image.new("L", (500, 1), 200)).size == (64, 1)


def test_without_pictures_the_first_test_collages_are_shown_with_the_truth(segmenter: Path) -> None:
    found, classes = demo_segment.segment(model=str(segmenter))
    assert len(found) == demo_segment.SAMPLES
    for index, one in enumerate(found):
        picture, mask = collage("test")[index]
        assert one.truth is not None
        assert torch.equal(one.truth, mask)
        assert np.array_equal(np.round(one.picture[0].numpy() * 255), np.asarray(picture))
        assert one.predicted.shape == mask.shape
        shares = one.shares(classes)
        assert sum(share for _, share in shares) == pytest.approx(1, abs=0.06)
        assert "background" not in dict(shares)


def test_masks_have_the_colours_of_their_classes(tmp_path: Path) -> None:
    mask = torch.zeros(8, 8, dtype=torch.long)
    mask[:, 4:] = 3
    row = drawing.MaskedPicture(torch.ones(1, 8, 8), mask)
    drawing.mask_grid([row], ["background", "a", "b", "c"], "title", tmp_path / "page.png")
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).reshape(-1, 3)
    third = (np.array(drawing.colormaps["tab20"](2)[:3]) * 255).round()
    assert (np.abs(pixels - third).max(1) <= 1).sum() > 1000, "class 3 has the third colour"


def test_arrows_are_answered_at_both_sizes(pointer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "answers.png"
    assert main("--task", "arrow", "--model", pointer, "--out", out) == 0
    printed = capsys.readouterr().out.strip().splitlines()
    assert printed[-1] == str(out)
    assert Image.open(out).size[0] > 800
    found = demo_arrow.point(model=str(pointer))
    assert {one.picture.size for one in found} == {(96, 96), (192, 192)}
    assert len(found) == 2 * demo_arrow.SAMPLES
    assert {one.truth for one in found} == {True, False}
    assert all(0 < one.probability < 1 for one in found)


def test_own_arrows_lie_on_white_squares(pointer: Path, tmp_path: Path) -> None:
    Image.new("RGBA", (50, 20), (0, 0, 0, 0)).save(tmp_path / "empty.png")
    (one,) = demo_arrow.point([tmp_path / "empty.png"], model=str(pointer))
    assert (np.asarray(one.picture) == 255).all(), "transparent pixels read as white"
    assert one.truth is None


def test_weights_of_arrows_are_found_by_their_tag_and_missed_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(demo_arrow, "all_weights", dict)
    assert main("--task", "arrow", "--out", tmp_path / "x.png") == 2
    message = capsys.readouterr().err.strip()
    assert "no weights for --task arrow" in message
    assert "experiment=vision/arrow_pointing_small" in message
    assert message.count("\n") == 0
    names = [f"{model}.{demo_arrow.TAG}" for model in ("a", "plstm_vis_tiny_patch16_224", "b")]
    known = {name: Weights(name, *name.split("."), Path("w"), {}) for name in [*names, "c.other"]}
    monkeypatch.setattr(demo_arrow, "all_weights", lambda: known)
    assert demo_arrow.default_model() == names[1]


@pytest.mark.parametrize("task", ["segment", "arrow"])
def test_a_model_of_another_kind_is_a_sentence(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("--task", task, "--model", demo.MODEL, "--out", tmp_path / "x.png") == 2
    assert f"--task {task} needs a" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_an_unknown_task_is_told_with_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for task, message in (
        ("segmant", "there is no --task 'segmant'; did you mean 'segment'?"),
        ("x", "--task must be one of 'classify', 'segment', 'rows', 'arrow'"),
    ):
        assert main("--task", task, "--out", tmp_path / "x.png") == 2
        assert message in capsys.readouterr().err


def test_answers_after_every_strip_are_drawn(
    reader: Path, scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "rows.png"
    assert main("--task", "rows", "--image", scene, "--model", reader, "--out", out) == 0
    printed = capsys.readouterr().out.strip().splitlines()
    assert printed[-1] == str(out)
    assert any("scene.png" in line and "of 28 rows" in line for line in printed)
    assert Image.open(out).size[0] > 500


def test_the_last_answer_to_rows_is_that_to_the_picture(reader: Path) -> None:
    read, classes = demo_rows.read_rows(model=str(reader))
    assert [one.truth for one in read] == classes
    model = package.load(str(reader)).eval()
    pictures = torch.stack([one.picture for one in read])[:, None]
    with torch.no_grad():
        expected = model((pictures - 0.286) / 0.353).softmax(-1)
    torch.testing.assert_close(torch.stack([one.probabilities[-1] for one in read]), expected)
    assert {one.probabilities.shape for one in read} == {(7, 10)}


def test_an_answer_is_settled_after_the_last_strip_that_changes_it() -> None:
    answers = torch.eye(3)[[0, 2, 1, 1]]
    one = demo_rows.RowByRow("", torch.zeros(16, 16), answers, 4, None)
    assert one.settled == 12
    assert demo_rows.RowByRow("", torch.zeros(16, 16), answers[2:], 4, None).settled == 4


def test_models_that_cannot_read_rows_of_clothing_are_told(
    pointer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("--task", "rows", "--model", pointer, "--out", tmp_path / "x.png") == 2
    assert "--task rows needs a ViR for gray pictures" in capsys.readouterr().err
