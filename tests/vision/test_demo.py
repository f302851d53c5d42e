"""`sinuous demo vision`: from any picture to answers, evidence and a figure, or to one sentence."""

from __future__ import annotations

import builtins
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageDraw
from torchvision.datasets import FashionMNIST

from sinuous import vision
from sinuous.apps import cli
from sinuous.core.registry import list_models
from sinuous.vision import demo, drawing


def main(arguments: list[str]) -> int:
    return cli.main(["demo", *arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A folder with a small untrained model that classifies Fashion-MNIST."""
    torch.manual_seed(0)
    vim = timm.create_model("vim_nano", embed_dim=16, depth=2)
    names = {"label_names": list(FashionMNIST.classes), "mean": (0.286,), "std": (0.353,)}
    vim.pretrained_cfg = {**vim.pretrained_cfg, **names}
    folder = tmp_path_factory.mktemp("model")
    timm.models.save_for_hf(vim, folder, model_args={"embed_dim": 16, "depth": 2})
    return str(folder)


@pytest.fixture
def shirt(tmp_path) -> str:
    """A dark shirt on light, off centre, in colour."""
    image = Image.new("RGB", (400, 300), (240, 235, 220))
    outline = [(160, 60), (260, 60), (350, 140), (300, 160), (270, 130), (270, 280), (150, 280), (150, 130)]
    ImageDraw.Draw(image).polygon(outline, fill=(40, 60, 140))
    path = tmp_path / "shirt.png"
    image.save(path)
    return str(path)


def test_dark_on_light_becomes_light_on_black_and_fills_the_square(shirt):
    pixels = np.asarray(demo.prepare(Image.open(shirt))).astype(int)
    assert pixels.shape == (28, 28)
    assert pixels[:, [0, -1]].max() < 30, "the shirt is taller than wide: its sides are filled with black"
    assert pixels[[0, -1]].max() > 200, "it reaches from top to bottom"
    assert pixels[14, 12:16].min() > 200


def test_light_on_dark_keeps_its_sense(shirt):
    dark = Image.open(shirt)
    light = Image.fromarray(255 - np.asarray(dark))
    difference = np.abs(np.asarray(demo.prepare(dark)).astype(int) - np.asarray(demo.prepare(light)))
    assert difference.max() <= 2


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (28, 28)])
def test_a_picture_of_nothing_is_black(size):
    assert np.asarray(demo.prepare(Image.new("L", size, 200))).max() == 0


def test_samples_show_each_class_once_and_unchanged(model):
    result = demo.explain(model=model)
    assert [f.truth for f in result.findings] == list(FashionMNIST.classes)
    assert result.note is None
    pictures, _ = demo.samples()
    np.testing.assert_allclose(result.findings[3].picture, np.asarray(pictures[3]) / 255, atol=1e-6)


def test_answers_are_probabilities_and_evidence_has_the_size_of_the_picture(model):
    result = demo.explain(model=model, top=10)
    for finding in result.findings:
        values = [p for _, p in finding.answers]
        assert sum(values) == pytest.approx(1, abs=1e-5)
        assert values == sorted(values, reverse=True)
        assert finding.evidence.shape == finding.picture.shape == (28, 28)
        assert (finding.evidence[finding.picture == 0] == 0).all(), "a black pixel is what the picture is compared with"


@pytest.mark.parametrize("name", list_models("*_nano.fashion_mnist", domain="vision", pretrained=True))
def test_every_shipped_classifier_is_explained(name, tmp_path):
    image = Image.fromarray(np.asarray(demo.samples()[0][7]))
    result = demo.explain([image], model=name)
    assert result.findings[0].answers[0][0] in ("Sneaker", "Ankle boot", "Sandal")
    assert result.findings[0].evidence.abs().sum() > 0
    assert ("attention" in result.method) == name.startswith("vim_nano")


def test_smoothing_keeps_the_sum():
    shares = torch.zeros(28, 28)
    shares[10, 12], shares[17, 14] = 2.0, -0.5
    assert drawing._smooth(shares, 1).sum().item() == pytest.approx(1.5, rel=1e-5)


def test_the_command_draws_own_pictures_and_prints_the_path_last(model, shirt, tmp_path, capsys):
    out = tmp_path / "new" / "seen.png"
    assert main(["vision", "--image", shirt, "--model", model, "--out", str(out)]) == 0
    printed = capsys.readouterr().out.strip().splitlines()
    assert printed[-1] == str(out)
    assert demo.NOTE in printed
    assert any("shirt.png" in line for line in printed)
    width, height = Image.open(out).size
    assert width > 600
    assert height > 300


def test_an_unreadable_or_missing_picture_is_one_sentence(model, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nno more")
    for path in (broken, tmp_path / "absent.png"):
        assert main(["vision", "--image", str(path), "--model", model, "--out", str(tmp_path / "x.png")]) == 2
        message = capsys.readouterr().err.strip()
        assert path.name in message
        assert message.count("\n") == 0
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("out", ["", "picture"])
def test_a_figure_wants_a_files_name(model, tmp_path, capsys, out):
    assert main(["vision", "--model", model, "--out", str(tmp_path / out)]) == 2
    assert "--out must be a picture's file, such as" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_weights_or_of_another_kind_is_one_sentence(capsys):
    for name, part in (("vim_tiny_patch16_224", "weights"), ("no_such_model", "no_such_model")):
        assert main(["vision", "--model", name]) == 2
        message = capsys.readouterr().err.strip()
        assert part in message
        assert message.count("\n") == 0


def test_without_matplotlib_the_extra_is_named(model, tmp_path, monkeypatch, capsys):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return original(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "sinuous.vision.drawing", raising=False)
    monkeypatch.delattr(vision, "drawing", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["vision", "--model", model, "--out", str(tmp_path / "x.png")]) == 2
    assert "sinuous[train]" in capsys.readouterr().err
