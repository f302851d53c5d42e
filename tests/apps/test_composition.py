"""Command lines: what may be pasted, what is quoted, where configurations are looked for, what a sweep learns."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sinuous.apps import composition, run_folder
from sinuous.core.checkpoints import load_state_dict

Sinuous = Callable[..., int]
TINY = [
    "experiment=vision/fashion_mnist",
    "data=vision/fashion_mnist_synthetic",
    "model=vision/timm",
    "model.model_name=test_resnet",
    "debug=fast",
    "trainer.max_epochs=1",
]


def test_the_composed_job_can_be_shown_resolved(sinuous: Sinuous, capsys: pytest.CaptureFixture[str]) -> None:
    assert sinuous("train", "--cfg", "job", "--resolve", *TINY) == 0
    told = capsys.readouterr().out
    assert "output_dir: RUN_FOLDER" in told
    assert "${" not in told


@pytest.mark.parametrize("value", ["/a/b-c_1.ckpt", "/with space/x", "a=b", 'q"uote', "a,b", "x#y", "äé"])
def test_the_line_to_go_on_with_can_be_pasted(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    words = ["--config-dir", "my configs", "task.mixing={a: 1, b: x}", "ckpt_path=old"]
    monkeypatch.setattr(composition, "COMMAND", words)
    line = shlex.split(composition.command_line("sinuous train", ckpt_path=value))
    assert line[:5] == ["sinuous", "train", *words[:3]]
    (override,) = OverridesParser.create().parse_overrides([line[-1]])
    assert (override.key_or_group, override.value()) == ("ckpt_path", value)


@pytest.mark.parametrize("value", ["/a b/c=d", "a%b#c@d e", "(x"])
def test_a_value_with_characters_of_the_grammar_is_shown_quoted(
    value: str, sinuous: Sinuous, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sinuous("train", *TINY, f"data.root={value}") == 2
    told = capsys.readouterr().err
    assert "the value of data.root has a character that the grammar of options reads as its own" in told
    (word,) = shlex.split(told.rpartition("the shell: ")[2])
    assert sinuous("train", *TINY, word) == 2
    assert "grammar" not in capsys.readouterr().err


def test_own_configurations_are_used_and_suggested(
    sinuous: Sinuous, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mine" / "experiment" / "birds"
    folder.mkdir(parents=True)
    (folder / "finches.yaml").write_text("# @package _global_\ndefaults:\n  - override /model: vision/test_vim\n")
    arguments = ["train", "--config-dir", str(tmp_path / "mine")]
    assert sinuous(*arguments, "--cfg", "job", "experiment=birds/finches") == 0
    capsys.readouterr()
    assert sinuous(*arguments, "experiment=birds/finch") == 2
    assert "did you mean experiment/birds/finches" in capsys.readouterr().err


def test_a_sweep_gets_the_best_score_of_each_job(
    sinuous: Sinuous, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hydra.core.utils import JobReturn

    returned: list[Any] = []
    original = JobReturn.return_value.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(JobReturn, "return_value", property(lambda self: original(self), None))
    monkeypatch.setattr(
        JobReturn,
        "return_value",
        property(original, lambda self, value: (returned.append(value), setattr(self, "_return_value", value))[0]),
    )
    assert sinuous("train", "-m", *TINY, "test=false", "seed=0,1") == 0
    assert len(returned) == 2
    for value, folder in zip(returned, sorted((tmp_path / "debug").glob("*/[01]")), strict=True):
        state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        key = next(name for name in state["callbacks"] if name.startswith("BestWeights"))
        assert value == float(state["callbacks"][key]["best_model_score"])


def test_a_run_without_a_logger(sinuous: Sinuous, capsys: pytest.CaptureFixture[str]) -> None:
    assert sinuous("train", *TINY, "~logger", "test=false") == 0
    assert sinuous("train", *TINY, "logger=null") == 2
    assert "logger=null: a group is left out with '~logger'" in capsys.readouterr().err


def test_a_disk_that_is_full_at_the_start_is_named(
    sinuous: Sinuous, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: Path, text: str) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder.Path, "write_text", full)
    assert sinuous("train", *TINY, f"hydra.run.dir={tmp_path / 'x'}") == 2
    told = capsys.readouterr().err
    assert f"cannot write {tmp_path / 'x' / 'config.yaml'}: No space left on device; make room there" in told


def test_examples_that_were_read_are_counted(sinuous: Sinuous, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["trainer.accumulate_grad_batches=2", "trainer.limit_train_batches=3", "data.batch_size=12"]
    assert sinuous("train", *TINY, *more) == 0
    assert "2 steps, 36 images seen" in capsys.readouterr().out


def test_an_odd_batch_for_mixup_is_told(sinuous: Sinuous, capsys: pytest.CaptureFixture[str]) -> None:
    mixing = "task.mixing={_target_: timm.data.Mixup, mixup_alpha: 0.8, num_classes: 10}"
    assert sinuous("train", *TINY, mixing, "data.batch_size=5") == 2
    assert "cannot mix a batch of 5" in (told := capsys.readouterr().err)
    assert "give an even data.batch_size" in told


def test_checkpointing_is_an_option_of_the_run(sinuous: Sinuous, capsys: pytest.CaptureFixture[str]) -> None:
    assert sinuous("train", *TINY, "test=false", "checkpointing=true") == 0
    own = ["model=language/bytes", "+model.dim=16", "+model.depth=2", "data.length=32", "debug=fast", "test=false"]
    losses = []
    for value in ("false", "true", "{layers:2,steps:12}", "{strategy:multi_axis,budget:1e8}"):
        capsys.readouterr()
        assert sinuous("train", *own, f"checkpointing={value}") == 0
        losses.append(re.findall(r"loss (\S+)", out := capsys.readouterr().out))
        assert ("MB planned beside the weights" in out) is ("strategy" in value)
    assert losses[1:] == [losses[0]] * 3 != [[]] * 3
    for value, words in (
        ("{layers:0}", "layers must be"),
        ("{steps:4,strategy:time}", "checkpointing must be true, false"),
        ("{strategy:most}", "strategy must be"),
        ("{strategy:time,budget:100}", "budget must be at least"),
    ):
        assert sinuous("train", *own, f"checkpointing={value}") == 2
        assert words in capsys.readouterr().err
    assert sinuous("train", *TINY, "checkpointing={layers:2}") == 2
    assert "for models with a stack of blocks" in capsys.readouterr().err


@pytest.mark.parametrize("experiment", ["vision/fashion_mnist", "language/bytes"])
def test_overfitting_is_for_every_task(experiment: str, sinuous: Sinuous, tmp_path: Path) -> None:
    small = {
        "vision/fashion_mnist": ["+model.depth=1", "+model.embed_dim=16"],
        "language/bytes": ["+model.dim=16", "+model.depth=1", "data.length=16"],
    }[experiment]
    fast = ["trainer.max_epochs=2", "trainer.check_val_every_n_epoch=2", "scheduler.warmup_epochs=0"]
    assert sinuous("train", f"experiment={experiment}", "debug=overfit", *fast, *small) == 0
    assert list(tmp_path.rglob("*.safetensors"))


def test_averaged_weights_are_what_is_exported(sinuous: Sinuous, tmp_path: Path) -> None:
    assert sinuous("train", *TINY, "test=false", "ema_decay=0.5") == 0
    (folder,) = (tmp_path / "debug").iterdir()
    exported = load_state_dict(folder / "checkpoints" / "best.safetensors")
    state = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    name = next(name for name, tensor in exported.items() if tensor.ndim > 1)
    assert torch.equal(exported[name], state[f"ema.module.{name}"])
    assert not torch.equal(exported[name], state[f"model.{name}"])
