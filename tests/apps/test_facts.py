"""Weights know the data that they were trained on: scoring and loading use it, and contradictions are told."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sinuous as package
from sinuous.apps import cli
from sinuous.core.checkpoints import data_facts, read_metadata

Sinuous = Callable[..., int]
FOLDER = ["data=vision/image_folder", "data.num_workers=0"]


def pictures(root: Path, train: str, val: str) -> Path:
    """A folder of pictures whose class is their brightness."""
    for split, classes in (("train", train), ("val", val)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(6):
                values = np.random.default_rng(i).integers(0, 40, (40, 40, 3)) + 60 * (ord(name) - ord("a"))
                Image.fromarray(values.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a Vim for three classes of pictures that are wider than high."""
    base = tmp_path_factory.mktemp("trained")
    root = pictures(base / "data", "abc", "abc")
    sizes = ["data.img_size=[32,64]", "data.num_classes=3", "data.batch_size=4", f"data.root={root}"]
    more = ["trainer.max_epochs=1", "test=false", f"hydra.run.dir={base / 'run'}", "data.mean=[0.5,0.5,0.5]"]
    assert cli.main(["train", *FOLDER, "model=vision/test_vim", *sizes, *more]) == 0
    return base / "run" / "checkpoints" / "best.safetensors"


def test_exported_weights_know_their_data(trained: Path) -> None:
    facts = data_facts(trained)
    assert facts["img_size"] == [32, 64]
    assert facts["classes"] == ["a", "b", "c"]
    assert facts["mean"] == [0.5, 0.5, 0.5]
    assert facts["in_chans"] == 3
    assert {"model", "step"} <= read_metadata(trained).keys()
    assert data_facts(trained.with_name("best.ckpt")) == {}


def scores(text: str) -> str:
    found = re.search(r"test accuracy (0\.\d+|1\.0+), loss (\d+\.\d+)", text)
    assert found, text
    return found[0]


def test_eval_takes_sizes_and_means_from_the_weights(
    trained: Path, sinuous: Sinuous, capsys: pytest.CaptureFixture[str]
) -> None:
    scoring = ["eval", "model_name=test_vim", f"checkpoint_path={trained}", *FOLDER]
    scoring.append(f"data.root={trained.parents[2] / 'data'}")
    assert sinuous(*scoring) == 0
    told = capsys.readouterr().out
    assert "data.img_size is [32, 64], as the weights know it" in told
    assert "data.mean is [0.5, 0.5, 0.5], as the weights know it" in told
    same = ["data.img_size=[32,64]", "data.num_classes=3", "data.mean=[0.5,0.5,0.5]"]
    assert sinuous(*scoring, *same) == 0
    assert scores(capsys.readouterr().out) == scores(told)
    assert sinuous(*scoring, "data.img_size=64") == 0
    told = capsys.readouterr().out
    assert "the weights know data.img_size [32, 64], and 64 is given" in told


def test_eval_refuses_other_classes_by_name(
    trained: Path, sinuous: Sinuous, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = pictures(tmp_path / "other", "abcd", "abcd")
    scoring = ["eval", "model_name=test_vim", f"checkpoint_path={trained}", *FOLDER, f"data.root={root}"]
    assert sinuous(*scoring) == 2
    assert "the weights know the classes a, b, c, and the data has a, b, c, d" in capsys.readouterr().err


def test_a_model_is_built_for_the_pictures_that_its_weights_know(trained: Path) -> None:
    model = package.create_model("test_vim", checkpoint_path=trained).eval()
    assert model.patch_embed.img_size == (32, 64)
    assert model.num_classes == 3
    assert tuple(model.pretrained_cfg["mean"]) == (0.5, 0.5, 0.5)
    assert tuple(model.pretrained_cfg["label_names"]) == ("a", "b", "c")
    # Another aspect with as many patches: positions are resampled, not read as if they were of this one.
    other = package.create_model("test_vim", checkpoint_path=trained, img_size=(64, 32))
    assert other.pos_embed.shape == model.pos_embed.shape
    assert not torch.equal(other.pos_embed, model.pos_embed)
    same = package.create_model("test_vim", checkpoint_path=trained, img_size=(32, 64))
    assert torch.equal(same.pos_embed, model.pos_embed)


def test_the_wrong_split_of_classes_is_refused_in_training(
    sinuous: Sinuous, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = pictures(tmp_path / "data", "abc", "bcd")
    sizes = ["data.img_size=32", "data.num_classes=3", "data.batch_size=4", f"data.root={root}"]
    assert sinuous("train", *FOLDER, "model=vision/test_vim", *sizes) == 2
    assert re.search(r"val has classes that .*train lacks: d; .* which are a, b, c", capsys.readouterr().err)
