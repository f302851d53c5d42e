"""Foreign checkpoints are read without running anything in them, and bad files are refused in one sentence."""

from __future__ import annotations

import argparse
import io
import os
import pathlib
import pickle
import sys
import types
from typing import Any

import pytest
import torch
from safetensors import safe_open

import sinuous
from sinuous.core.checkpoints import load_state_dict, save_safetensors

WEIGHTS = {"layers.0.weight": torch.arange(6.0).view(2, 3), "layers.0.bias": torch.ones(2)}


class RunsACommand:
    def __init__(self, witness: pathlib.Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.witness}",))


def same(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_training_file_with_a_namespace(tmp_path: pathlib.Path, zipped: bool) -> None:
    args = argparse.Namespace(lr=5e-4, betas=(0.9, 0.999), nested=argparse.Namespace(names=["a", {"b": None}]))
    averaged = {name: tensor + 1 for name, tensor in WEIGHTS.items()}
    file = {
        "model": WEIGHTS,
        "model_ema": averaged,
        "optimizer": {"state": {0: {"step": torch.tensor(3)}}, "param_groups": [{"lr": 1e-3}]},
        "epoch": 299,
        "args": args,
    }
    torch.save(file, tmp_path / "vim.pth", _use_new_zipfile_serialization=zipped)
    assert same(load_state_dict(tmp_path / "vim.pth"), WEIGHTS)
    assert same(load_state_dict(tmp_path / "vim.pth", prefer="model_ema"), averaged)
    with pytest.raises(ValueError, match=r"no 'teacher'; it has 'model', 'model_ema', 'optimizer', 'epoch', 'args'"):
        load_state_dict(tmp_path / "vim.pth", prefer="teacher")


class CfgNode(dict):
    """A stand-in for yacs', which keeps its switches beside its entries, under the same name in the file."""

    __module__, __qualname__ = "yacs.config", "CfgNode"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.__dict__["__immutable__"] = True


def test_a_training_file_with_a_yacs_configuration(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("yacs.config")
    module.CfgNode = CfgNode  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    averaged = {name: tensor + 1 for name, tensor in WEIGHTS.items()}
    file = {
        "model": WEIGHTS,
        "ema": averaged,
        "opt": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "args": argparse.Namespace(num_classes=1000),
        "config": CfgNode({"MODEL": CfgNode({"DEPTHS": [2, 2], "NAME": "XL"})}),
    }
    torch.save(file, tmp_path / "xl.pt")
    monkeypatch.delitem(sys.modules, "yacs.config")
    assert same(load_state_dict(tmp_path / "xl.pt"), averaged)
    assert same(load_state_dict(tmp_path / "xl.pt", prefer="ema"), averaged)
    assert same(load_state_dict(tmp_path / "xl.pt", prefer="model"), WEIGHTS)


def test_averages_that_are_no_weights_by_name_are_passed_over(tmp_path: pathlib.Path) -> None:
    torch.save({"model": WEIGHTS, "ema": {"decay": 0.999, "shadow_params": list(WEIGHTS.values())}}, tmp_path / "a.pt")
    assert same(load_state_dict(tmp_path / "a.pt"), WEIGHTS)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 1},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {"model": {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}},
    ],
)
def test_wrapping_is_taken_off(tmp_path: pathlib.Path, wrap: Any) -> None:
    torch.save(wrap(WEIGHTS), tmp_path / "weights.pt")
    assert same(load_state_dict(tmp_path / "weights.pt"), WEIGHTS)


def test_a_lightning_file_of_others_keeps_what_lies_beside_the_model(tmp_path: pathlib.Path) -> None:
    beside = {"encoder.0.weight": torch.ones(4, 2), "decoder.bias": torch.zeros(3)}
    ours = {"task.teacher": torch.ones(2), "ema.n": torch.tensor(7)}
    state = {**{f"model.{name}": tensor for name, tensor in WEIGHTS.items()}, **beside, **ours}
    torch.save({"pytorch-lightning_version": "1.9", "state_dict": state}, tmp_path / "run.ckpt")
    assert same(load_state_dict(tmp_path / "run.ckpt"), {**WEIGHTS, **beside})


def test_a_lightning_file_gives_the_averaged_weights_first(tmp_path: pathlib.Path) -> None:
    live = {f"model.{name}": tensor for name, tensor in WEIGHTS.items()}
    torch.save({"pytorch-lightning_version": "2.6", "state_dict": live}, tmp_path / "live.ckpt")
    assert same(load_state_dict(tmp_path / "live.ckpt"), WEIGHTS)
    averaged = {f"ema.module.{name}": tensor * 2 for name, tensor in WEIGHTS.items()}
    torch.save({"pytorch-lightning_version": "2.6", "state_dict": {**live, **averaged}}, tmp_path / "ema.ckpt")
    assert same(load_state_dict(tmp_path / "ema.ckpt"), {name: tensor * 2 for name, tensor in WEIGHTS.items()})


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("hidden", ["beside", "in the namespace"])
def test_a_hostile_file_is_refused_and_runs_nothing(tmp_path: pathlib.Path, zipped: bool, hidden: str) -> None:
    bomb = RunsACommand(tmp_path / "witness")
    extra = bomb if hidden == "beside" else argparse.Namespace(lr=1, log=[bomb])
    torch.save({"model": WEIGHTS, "args": extra}, tmp_path / "bad.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"bad\.pth is refused: it contains (posix|nt)\.system, which"):
        load_state_dict(tmp_path / "bad.pth")
    assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (torch.nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
        ({"model": WEIGHTS, "path": pathlib.PurePosixPath("a")}, r"pathlib\.PurePosixPath"),
        ({"model": WEIGHTS, "call": eval}, r"\b(builtins\.)?eval"),
    ],
)
def test_other_objects_are_refused_by_name(tmp_path: pathlib.Path, content: Any, name: str) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=f"it contains {name}, which reading would have to run"):
        load_state_dict(tmp_path / "other.pth")


def _torch_bytes() -> bytes:
    stream = io.BytesIO()
    torch.save({"model": WEIGHTS}, stream)
    return stream.getvalue()


def _safetensors_bytes(folder: pathlib.Path) -> bytes:
    save_safetensors(WEIGHTS, folder / "whole.safetensors")
    return (folder / "whole.safetensors").read_bytes()


def test_damaged_files_get_one_sentence(tmp_path: pathlib.Path) -> None:
    whole, safe = _torch_bytes(), _safetensors_bytes(tmp_path)
    damaged = {
        "empty.pth": b"",
        "text.pth": b"Not Found: the page has moved\n",
        "page.html": b"<!DOCTYPE html><html>",
        "half.pth": whole[: len(whole) // 2],
        "flipped.pth": whole[:200] + bytes(64) + whole[264:],
        "half.safetensors": safe[: len(safe) // 2],
        "short.safetensors": safe[:12],
        "list.pth": pickle.dumps([1, 2], protocol=2),
        "numbers.pth": pickle.dumps({"a": 1}, protocol=2),
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name) as caught:
            load_state_dict(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400
    with pytest.raises(ValueError, match="is a folder"):
        load_state_dict(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_state_dict(tmp_path / "missing.pth")


def test_scripted_programs_are_refused(tmp_path: pathlib.Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "scripted.pt")
    with pytest.raises(ValueError, match="TorchScript program"):
        load_state_dict(tmp_path / "scripted.pt")


def test_safetensors_round_trip_with_shared_and_strided_tensors(tmp_path: pathlib.Path) -> None:
    tied = torch.randn(4, 3)
    state = {"embed": tied, "head": tied, "turned": tied.t(), "slice": tied[1:3]}
    save_safetensors(state, tmp_path / "sub" / "w.safetensors", {"model": "vim_nano"})
    assert same(load_state_dict(tmp_path / "sub" / "w.safetensors"), state)
    with safe_open(tmp_path / "sub" / "w.safetensors", "pt") as file:
        assert file.metadata() == {"model": "vim_nano"}


def test_a_failed_write_leaves_the_old_file(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "w.safetensors"
    save_safetensors(WEIGHTS, target)
    before = target.read_bytes()

    def full(source: object, destination: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sinuous.core.checkpoints.os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        save_safetensors({"other": torch.zeros(3)}, target)
    assert target.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_file_of_averaged_weights_alone_says_how_to_read_it(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "ema.pth"
    torch.save({"model_ema": {"a": torch.ones(2)}, "epoch": 3}, path)
    with pytest.raises(ValueError, match="give prefer='model_ema' to take its 'model_ema'"):
        load_state_dict(path)
    assert torch.equal(load_state_dict(path, "model_ema")["a"], torch.ones(2))


def test_averaged_weights_are_built_on_request(tmp_path: pathlib.Path) -> None:
    raw = sinuous.create_model("test_vim")
    averaged = {name: tensor + 1 for name, tensor in raw.state_dict().items()}
    torch.save({"model": raw.state_dict(), "model_ema": averaged}, tmp_path / "both.pth")
    built = sinuous.create_model("test_vim", checkpoint_path=tmp_path / "both.pth", prefer="model_ema")
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in built.state_dict().items())


def test_a_file_of_weights_is_as_open_as_other_files(tmp_path: pathlib.Path) -> None:
    save_safetensors({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
