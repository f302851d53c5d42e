"""Going on with runs: folders of one's own, the newest run, changed settings, and results that do not get lost."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sinuous.apps import resuming
from sinuous.core.checkpoints import load_state_dict

Sinuous = Callable[..., int]
TINY = [
    "experiment=vision/fashion_mnist",
    "data=vision/fashion_mnist_synthetic",
    "model=vision/timm",
    "model.model_name=test_resnet",
    "debug=fast",
    "test=false",
    "trainer.max_epochs=1",
]


def saved(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / resuming.LAST, weights_only=True)
    return content


def test_two_processes_of_one_second_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wish = str(tmp_path / "runs" / "12-00-00")
    first = resuming.new_folder(wish)
    assert resuming.new_folder(wish) == first == wish  # asked again by the same process
    monkeypatch.setattr(resuming, "_CLAIMED", {})  # as another process
    assert resuming.new_folder(wish) == f"{wish}_2"
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"12-00-00", "12-00-00_2"}


def test_a_given_folder_that_holds_a_run_is_not_written_into(
    sinuous: Sinuous, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = f"hydra.run.dir={tmp_path / 'mine'}"
    assert sinuous("train", *TINY, place) == 0
    best = tmp_path / "mine" / "checkpoints" / "best.safetensors"
    weights = best.read_bytes()
    assert sinuous("train", *TINY, place, "seed=1") == 2
    assert "mine holds a run already; go on with it by ckpt_path=" in capsys.readouterr().err
    scoring = ["eval", "model=vision/timm", "model.model_name=test_resnet", f"checkpoint_path={best}"]
    assert sinuous(*scoring, "data=vision/fashion_mnist_synthetic", place) == 2
    assert "mine holds a training, whose files stay as they are" in capsys.readouterr().err
    assert best.read_bytes() == weights
    assert sinuous("train", *TINY, place, f"ckpt_path={tmp_path / 'mine' / resuming.LAST}") == 0


def _state(folder: Path, clock: float) -> Path:
    (folder / resuming.LAST).parent.mkdir(parents=True)
    (folder / resuming.LAST).write_bytes(b"")
    os.utime(folder / resuming.LAST, (clock, clock))
    return folder


def test_the_newest_run_is_the_one_started_last_whatever_the_clock_and_the_folder(tmp_path: Path) -> None:
    runs = tmp_path / "outputs" / "birds"
    copied = _state(runs / "copied", clock=9e9)
    assert resuming.newest_run(runs) == copied
    first, second = _state(runs / "a", clock=2e9), _state(tmp_path / "elsewhere" / "3", clock=1e9)
    for folder in (first, second):
        resuming.enter(str(runs), folder)
    assert resuming.newest_run(runs) == second
    resuming.enter(str(runs), first)  # gone on with
    assert resuming.newest_run(runs) == first
    shutil.rmtree(first)
    assert resuming.newest_run(runs) == second
    with pytest.raises(FileNotFoundError, match=r"no run in .*none has a checkpoints/last\.ckpt"):
        resuming.newest_run(tmp_path / "outputs" / "none")


def test_a_run_that_was_moved_keeps_its_best_score(
    sinuous: Sinuous, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first epoch is the best one by decree: later ones score 0.
    from sinuous.core.tasks.classification import Classification

    assert sinuous("train", *TINY, "trainer.max_epochs=2", "trainer.limit_train_batches=1") == 0
    (folder,) = (tmp_path / "debug").iterdir()
    key = next(name for name in saved(folder)["callbacks"] if name.startswith("BestWeights"))
    score = saved(folder)["callbacks"][key]["best_model_score"]
    assert score > 0
    weights = (folder / "checkpoints" / "best.safetensors").read_bytes()
    moved = tmp_path / "moved"
    shutil.move(folder, moved)
    original = Classification.score

    def worse(self: Any, model: Any, batch: Any) -> Any:
        return original(self, model, (batch[0], (model(batch[0]).argmax(-1) + 1) % 10))

    monkeypatch.setattr(Classification, "score", worse)
    more = ["trainer.max_epochs=3", "trainer.limit_train_batches=1", "schedule=new"]
    assert sinuous("train", *TINY, *more, f"ckpt_path={moved / resuming.LAST}") == 0
    state = saved(moved)["callbacks"][key]
    assert state["best_model_score"] == score
    assert Path(state["best_model_path"]).parent == moved / "checkpoints"
    assert (moved / "checkpoints" / "best.safetensors").read_bytes() == weights


def test_changed_settings_are_refused_or_honoured_and_told(
    sinuous: Sinuous, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sinuous("train", *TINY) == 0
    (folder,) = (tmp_path / "debug").iterdir()
    before = (folder / "config.yaml").read_text()
    for change in ("optimizer.lr=0.05", "trainer.max_epochs=2", "scheduler.min_lr=1e-4", "data.batch_size=10"):
        assert sinuous("train", *TINY, "ckpt_path=last", change) == 2
        told = capsys.readouterr().err
        assert f"{change.partition('=')[0]}: " in told
        assert "give schedule=new to go on with the new settings, or start anew from its weights" in told
        assert (folder / "config.yaml").read_text() == before
    more = ["ckpt_path=last", "optimizer.lr=0.05", "trainer.max_epochs=3", "schedule=new", "task.smoothing=0.2"]
    assert sinuous("train", *TINY, *more) == 0
    told = capsys.readouterr().out
    for change in ("optimizer.lr: 0.003 → 0.05", "task.smoothing: 0.1 → 0.2", "trainer.max_epochs: 1 → 3"):
        assert change in told
    rates = [float(rate) for rate in re.findall(r"lr (\S+) ", told)]
    assert len(rates) == 10  # two epochs more
    assert max(rates) > 0.01  # of the new schedule, which spans three epochs, and not the floor of the old one
    assert min(rates) < 2e-3
    assert saved(folder)["global_step"] == 15


def test_a_run_that_diverges_stops_with_a_sentence_and_exports_no_such_weights(
    sinuous: Sinuous, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sinuous("train", *TINY, "optimizer.lr=1e12", "optimizer.opt=sgd", "trainer.max_epochs=4") == 2
    told = capsys.readouterr().err
    assert re.search(r"the loss is (nan|inf) in step \d+ \(the last finite one was .*, in step \d+\)", told), told
    assert "lower optimizer.lr" in told
    for file in tmp_path.rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_state_dict(file).values())


def test_weights_that_are_no_numbers_are_never_the_best(
    sinuous: Sinuous, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sinuous.apps.training import Training

    def spoil(self: Training) -> None:
        with torch.no_grad():
            next(self.model.parameters()).fill_(float("nan"))

    monkeypatch.setattr(Training, "on_validation_epoch_start", spoil)
    assert sinuous("train", *TINY) == 2
    assert "the trained weights are not all numbers, so none are exported" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob("best.*"))


def test_a_run_without_validation_leaves_its_last_weights_and_says_so(
    sinuous: Sinuous, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sinuous("train", *TINY, "trainer.limit_val_batches=0") == 0
    (weights,) = tmp_path.rglob("*.safetensors")
    assert weights.name == "last.safetensors"
    assert f"the last ones are in {weights}" in capsys.readouterr().out
    state = load_state_dict(weights)
    last = {k.removeprefix("model."): v for k, v in saved(weights.parents[1])["state_dict"].items()}
    assert all(torch.equal(state[name], tensor) for name, tensor in last.items() if name in state)
