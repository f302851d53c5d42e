"""The smaller verbs: eval, models, info, convert, export."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sinuous as package
from sinuous.apps import backends, models
from sinuous.core.checkpoints import load_state_dict
from sinuous.core.registry import ModelInfo

Sinuous = Callable[..., int]
IMAGES = "data=vision/fashion_mnist"
SMALL = ["trainer.limit_test_batches=3", "data.eval_batch_size=50"]


def accuracy_in(text: str) -> str:
    found = re.search(r"accuracy (0\.\d{4})[, ].*on 150 images", text)
    assert found, text
    return found.group(1)


def test_eval_gives_the_digits_of_the_training(
    sinuous: Sinuous, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["experiment=vision/fashion_mnist", "model=vision/test_vim", "debug=fast", "optimizer.lr=1e-2", *SMALL]
    assert sinuous("train", *train) == 0
    trained = accuracy_in(capsys.readouterr().out)
    (weights,) = tmp_path.glob("debug/*/checkpoints/best.safetensors")
    arguments = ["model_name=test_vim", f"checkpoint_path={weights}", IMAGES, *SMALL]
    lines = []
    for _ in range(2):
        assert sinuous("eval", "hydra.run.dir=" + str(tmp_path / "eval"), *arguments) == 0
        lines.append([line for line in capsys.readouterr().out.splitlines() if "accuracy" in line])
    assert accuracy_in(lines[0][0]) == trained
    assert lines[0] == lines[1]
    assert (tmp_path / "eval" / "predictions.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "model_name"),
        (["model_name=vim_nano"], "give checkpoint_path=FILE or pretrained=true"),
        (["model_name=vim_nan", "checkpoint_path=README.md", IMAGES], "did you mean .*'vim_nano'"),
        (["model_name=test_vim", "checkpoint_path=nowhere.pth", IMAGES], "there is no checkpoint at nowhere.pth"),
        (["model_name=test_vim", "checkpoint_path=README.md", IMAGES], "is not a checkpoint, or is damaged"),
        (["model_name=test_vim", "pretrained=true", IMAGES], "no weights for 'test_vim'"),
        (["model_name=vim_nano", "pretrained=true", "split=train"], "split must be val or test"),
        (["model_name=vim_nano", "pretrained=yes_please"], "Value 'yes_please' is not a valid bool"),
        (["model_name=vim_nano", "pretrained=true", "logger=csv"], "this verb has no group logger"),
        (["model_name=vim_nano", "pretrained=true"], "there is no data to work with; give experiment=NAME"),
        (["model=language/bytes"], "give checkpoint_path=FILE or pretrained=true"),
    ],
)
def test_mistakes_of_eval(
    arguments: list[str],
    message: str,
    sinuous: Sinuous,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert sinuous("eval", *arguments) == 2
    told = capsys.readouterr().err
    assert re.search(message, told), told
    assert "Traceback" not in told


def test_models_are_listed(
    sinuous: Sinuous, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert sinuous("models", "vim_tiny*") == 0
    told = capsys.readouterr().out
    assert "vim_tiny_patch16_224" in told
    assert "7,148,008" in told
    assert "3×224×224" in told
    assert "vim_small" not in told
    assert sinuous("models", "--domain", "visoin") == 2
    refusal = capsys.readouterr().err
    assert "no model of the domain 'visoin'; the domains are " in refusal
    assert all(name in refusal for name in ("audio", "generation", "genomics", "language", "video", "vision"))
    assert sinuous("models", "nothing*") == 2
    assert "no model matches 'nothing*'" in capsys.readouterr().err


def test_any_score_of_weights_is_shown_under_its_name() -> None:
    facts = {"name": "m", "domain": "vision", "params": 1, "input_size": (1, 2, 2), "paper": None, "license": None}
    measured = {"accuracy": 0.91237, "bits_per_byte": 1.8}
    assert (
        models.scores(ModelInfo(**facts, weights=("a",), card={"scores": {"test": measured}}))
        == "accuracy 0.9124, bits per byte 1.8"
    )
    assert models.scores(ModelInfo(**facts, weights=())) == ""


def test_info_kernels_says_what_runs_and_why(
    sinuous: Sinuous, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert sinuous("info", "kernels") == 0
    told = capsys.readouterr().out
    for family in backends.families():
        assert re.search(rf"{family.name} +│ (cpu|torch|triton|recurrent)", told)
    assert "triton: the tensors are on cpu" in told
    monkeypatch.setenv("SINUOUS_BACKEND", "torch")
    assert sinuous("info", "kernels") == 0
    assert re.search(r"selective_scan +│ torch", capsys.readouterr().out)
    assert sinuous("info", "kernels", "--dtype", "int8") == 2
    assert "--dtype must name a floating-point dtype" in capsys.readouterr().err


def test_the_ops_of_a_model_are_found() -> None:
    with package.backend("torch"):
        used = backends.of_model(package.create_model("test_vim"), torch.zeros(1, 3, 64, 64))
    assert used == {"causal_conv1d": "torch", "selective_scan": "torch"}


def test_convert_reads_an_authors_file(sinuous: Sinuous, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = package.create_model("test_vim", num_classes=7)
    args = argparse.Namespace(model="vim", nested=argparse.Namespace(lr=1))
    source, target = tmp_path / "vim.pth", tmp_path / "vim.safetensors"
    torch.save({"model": model.state_dict(), "args": args, "epoch": 3}, source)
    assert sinuous("convert", str(source), str(target), "--model", "test_vim") == 0
    count = len(model.state_dict())
    told = capsys.readouterr().out
    assert f"{count} tensors" in told
    assert f"under the same name in vim.pth: {count}" in told
    assert "renamed or derived: 0" in told
    restored = package.create_model("test_vim", num_classes=7, checkpoint_path=target)
    image = torch.randn(2, 3, 64, 64)
    assert torch.equal(restored.eval()(image), model.eval()(image))
    assert load_state_dict(target).keys() == model.state_dict().keys()
    assert sinuous("convert", str(source), str(target), "--model", "test_vim") == 2
    assert "exists; give --overwrite" in capsys.readouterr().err
    assert sinuous("convert", str(source), str(target), "--model", "test_vim", "--overwrite") == 0
    assert sinuous("convert", str(source), str(tmp_path / "x.pth"), "--model", "test_vim") == 2
    assert "OUT must end in .safetensors" in capsys.readouterr().err
    assert sinuous("convert", str(source), str(tmp_path / "y.safetensors"), "--model", "vim_nano") == 2
    assert "checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "y.safetensors").exists()


def test_convert_rounds_to_half_precision(sinuous: Sinuous, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = package.create_model("test_vim").state_dict()
    source, target = tmp_path / "vim.pth", tmp_path / "half.safetensors"
    torch.save(state, source)
    assert sinuous("convert", str(source), str(target), "--model", "test_vim", "--half") == 0
    half = load_state_dict(target)
    assert all(torch.equal(half[name], tensor.half()) for name, tensor in state.items())
    restored = package.create_model("test_vim", checkpoint_path=target).state_dict()
    assert all(torch.equal(restored[name], tensor.half().float()) for name, tensor in state.items())
    state["head.bias"][0] = 1e5
    torch.save(state, source)
    assert sinuous("convert", str(source), str(tmp_path / "x.safetensors"), "--model", "test_vim", "--half") == 2
    assert "head.bias has numbers up to 1e+05 and half precision ends at 65504" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()


def test_export_writes_shipped_weights_with_what_they_know(
    sinuous: Sinuous, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="needs sinuous[export]")
    import onnxruntime

    model = package.create_model("test_vim", num_classes=3, img_size=16)
    package.save(model, tmp_path / "saved")
    target = tmp_path / "vim.onnx"
    assert sinuous("export", str(tmp_path / "saved"), str(target)) == 0
    assert "values [batch, 3, 16, 16]" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(target)
    facts = json.loads(session.get_modelmeta().custom_metadata_map["sinuous"])
    assert facts["architecture"] == "test_vim"
    assert facts["input_size"] == [3, 16, 16]
    assert len(facts["mean"]) == 3
    picture = torch.randn(1, 3, 16, 16)
    y = torch.from_numpy(session.run(["y"], {"x": picture.numpy()})[0])
    torch.testing.assert_close(y, model.eval()(picture).detach(), rtol=1e-5, atol=1e-5)
    assert sinuous("export", str(tmp_path / "saved"), str(target)) == 2
    assert "exists; give --overwrite" in capsys.readouterr().err


def test_export_refuses_other_endings_and_names_without_weights(
    sinuous: Sinuous, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sinuous("export", "vim_nano.fashion_mnist", str(tmp_path / "x.pt")) == 2
    assert "OUT must end in .onnx" in capsys.readouterr().err
    assert sinuous("export", "test_vim", str(tmp_path / "x.onnx")) == 2
    assert "sinuous has no weights for 'test_vim'" in capsys.readouterr().err
