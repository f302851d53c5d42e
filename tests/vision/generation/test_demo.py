"""`sinuous demo generation`, and the run that leaves what it draws from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import sinuous
from sinuous.apps import cli

diffusers = pytest.importorskip("diffusers")

from sinuous.vision.datasets import fashion_mnist  # noqa: E402
from sinuous.vision.generation import ClassConditionalPipeline, load_pipeline  # noqa: E402
from sinuous.vision.generation.tasks import PictureDenoising  # noqa: E402

CLASSES = {0: "Bag", 1: "Sneaker"}


def denoiser() -> Any:
    torch.manual_seed(0)
    return sinuous.create_model("test_lamamba_diff", in_channels=1, out_channels=1, num_classes=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipeline")
    ClassConditionalPipeline(denoiser(), diffusers.FlowMatchEulerDiscreteScheduler(), id2label=CLASSES).save_pretrained(
        path
    )
    return path


def told(arguments: str, capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    assert cli.main(["demo", "generation", *arguments.split()]) == code
    out = capsys.readouterr()
    return " ".join((out.err if code else out.out).split())


def test_pictures_in_rows_and_a_strip(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid, strip = tmp_path / "grid.png", tmp_path / "strip.png"
    shown = told(f"--model {folder} --class Sneaker --n 3 --steps 4 --size 8x12 --out {grid} --strip {strip}", capsys)
    assert shown.startswith("3 pictures of 8 x 12 pixels in")
    assert shown.endswith(f"{grid} {strip}")
    with Image.open(grid) as picture:  # two a row, eightfold, four pixels around each
        assert picture.size == (2 * (12 * 8 + 4) + 4, 2 * (8 * 8 + 4) + 4)
    with Image.open(strip) as picture:
        assert picture.size == (4 * (12 * 8 + 4) + 4, 8 * 8 + 2 * 4)


def test_a_picture_is_the_one_of_its_seed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, same, other = (tmp_path / f"{name}.png" for name in ("one", "same", "other"))
    for path, seed in ((one, 3), (same, 3), (other, 4)):
        told(f"--model {folder} --class 0 --n 1 --steps 2 --seed {seed} --out {path}", capsys)
    assert one.read_bytes() == same.read_bytes() != other.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model lamamba_diff_s", "the weights lamamba_diff_s do not come with this version"),
        ("--model {folder} --class Sneakers", "there is no class 'Sneakers'; did you mean 'Sneaker'?"),
        ("--model {folder} --class 2", "a class must be from 0 to 1 (got 2)"),
        ("--model {folder} --n 0", "--n must be"),
        ("--model {folder} --steps 0", "--steps must be"),
        ("--model {folder} --guidance nan", "guidance_scale must be a finite number"),
        ("--model {folder} --size 8", "must be like 32x48"),
        ("--model {folder} --out here.jpg", "--out must be a file that ends in .png"),
        ("--model {folder} --out {there}/a.png --strip {there}/a.png", "--out must not be a file"),
        ("--model nowhere", "nowhere is not there"),
    ],
)
def test_what_cannot_be_is_a_sentence_and_no_file(
    arguments: str, message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = arguments.format(folder=folder, there=tmp_path)
    if "--out" not in filled:
        filled += f" --out {tmp_path / 'grid.png'}"
    assert message in told(filled, capsys, code=2)
    assert list(tmp_path.iterdir()) == []


class _Bundled:
    noun = "images"
    classes = tuple(CLASSES.values())


def test_a_run_leaves_a_pipeline_and_a_sheet(tmp_path: Path) -> None:
    task = PictureDenoising(diffusers.FlowMatchEulerDiscreteScheduler(), 2, columns=3, steps=2)
    model = denoiser()
    batch = torch.zeros(2, 1, 8, 8), torch.tensor([0, 1])
    assert task.loss(model, batch).isfinite()
    lines = task.report(model, _Bundled(), [task.score(model, batch)], {"loss": 1.0}, tmp_path, "test")
    assert "6 pictures of 2 classes in" in lines[-1]
    with Image.open(tmp_path / "samples_test.png") as picture:
        assert picture.size == (3 * (8 * 12 + 4) + 4, 2 * (8 * 12 + 4) + 4)
        first_row = {picture.crop((4 + 100 * k, 4, 100 + 100 * k, 100)).tobytes() for k in range(3)}
    assert len(first_row) == 3  # each column has noise of its own
    loaded = load_pipeline(tmp_path / "pipeline")
    assert loaded.labels == {"Bag": 0, "Sneaker": 1}
    assert dict(loaded.config.defaults) == {"guidance_scale": 1.5, "num_inference_steps": 2}
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, loaded.transformer.state_dict()[name])


def test_latents_are_not_drawn(tmp_path: Path) -> None:
    task = PictureDenoising(diffusers.FlowMatchEulerDiscreteScheduler(), 2, steps=2)
    model = sinuous.create_model("test_lamamba_diff", out_channels=4, num_classes=2)
    lines = task.report(model, _Bundled(), [2], {"loss": 1.0}, tmp_path, "test")
    assert "it draws with the VAE that made these latents" in lines[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


class _Clothing(_Bundled):
    """150 bundled pictures padded to 32 pixels."""

    classes = tuple(map(str, range(10)))

    def split(self, name: str) -> Any:
        data = fashion_mnist(name)
        padded = torch.nn.functional.pad(torch.tensor(data.images[:150])[:, None] / 127.5 - 1, (2, 2, 2, 2), value=-1.0)
        return list(zip(padded, data.labels.tolist(), strict=False))


def test_with_a_judge_a_run_scores_its_pictures_or_says_why_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = sinuous.create_model(
        "test_lamamba_diff", in_channels=1, out_channels=1, sample_size=32, patch_size=8, depths=[1, 1]
    )
    for pictures, message in (
        (70, "test 70 pictures beside 150 real ones: fd "),
        (20, "are not scored: images must be"),
    ):
        task = PictureDenoising(
            diffusers.FlowMatchEulerDiscreteScheduler(),
            10,
            rows=1,
            columns=1,
            steps=1,
            judge="vim_nano.fashion_mnist",
            pictures=pictures,
        )
        lines = task.report(model, _Clothing(), [2], {"loss": 1.0}, tmp_path, "test")
        assert message in lines[-1]
    values = json.loads((tmp_path / "picture_scores.json").read_text())["test"]
    assert set(values) == {"fd", "kid", "precision", "recall", "accuracy"}
    assert values["fd"] > 10
