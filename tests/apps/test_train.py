"""`sinuous train`: one small run from end to end, exact continuation however a run ended, and errors told plainly."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sinuous.apps import callbacks, resuming, run_folder
from sinuous.apps.callbacks import Resumable
from sinuous.core.checkpoints import load_state_dict

TINY = [
    "experiment=vision/fashion_mnist",
    "data=vision/fashion_mnist_synthetic",
    "model=vision/timm",
    "model.model_name=test_resnet",
    "debug=fast",
]
# Everything that draws random numbers or keeps state over steps, and both kinds of place to go on from.
EVERYTHING = [
    *TINY,
    "test=false",
    "data.limit=100",
    "ema_decay=0.9",
    "task.mixing={_target_: timm.data.Mixup, mixup_alpha: 0.8, cutmix_alpha: 1.0, num_classes: 10}",
    "model.drop_path_rate=0.1",
    "+model.drop_rate=0.1",
    "callbacks.resumable.every_n_steps=3",
]
STEPS = 10
Sinuous = Callable[..., int]


def state_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / resuming.LAST, weights_only=True)
    return {name: content[name] for name in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")}


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict):
        keys = [] if a.keys() == b.keys() else [f"{path} keys"]
        return keys + [found for key in a.keys() & b.keys() for found in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)):
        return [f for i, (x, y) in enumerate(zip(a, b, strict=True)) for f in differences(x, y, f"{path}/{i}")]
    return [] if a == b else [path]


def test_a_run_from_end_to_end(sinuous: Sinuous, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sinuous("train", *TINY) == 0
    (folder,) = (tmp_path / "debug").iterdir()
    lines = capsys.readouterr().out.splitlines()
    assert lines == (folder / "sinuous.log").read_text().splitlines()
    for part in ("precision 32-true on cpu", "ops: ", "373,370 parameters", "200 train, 40 val, 40 test"):
        assert part in lines[0]
    assert [line for line in lines if line.startswith("step 10 of 10  loss ")]
    assert any(line.startswith("test accuracy 0.") and line.endswith(" on 40 images") for line in lines)
    assert lines[-1] == f"predictions: {folder / 'predictions.png'}"
    with Image.open(folder / "predictions.png") as picture:
        assert min(picture.size) > 800
        assert len(picture.convert("RGB").resize((64, 64)).getcolors(4096) or []) > 50
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [row["val/accuracy"] for row in rows if row.get("val/accuracy")]
    assert "test/accuracy" in rows[-1]
    assert json.loads((folder / "versions.json").read_text())["torch"] == torch.__version__.partition("+")[0]
    assert "???" not in (folder / "config.yaml").read_text()
    assert "debug=fast" in (folder / ".hydra" / "overrides.yaml").read_text()
    exported = load_state_dict(folder / "checkpoints" / "best.safetensors")
    best = load_state_dict(folder / "checkpoints" / "best.ckpt")
    assert differences(exported, best) == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The state after ten steps without a break."""
    from sinuous.apps import cli

    folder = tmp_path_factory.mktemp("whole")
    assert cli.main(["train", *EVERYTHING, f"hydra.run.dir={folder}"]) == 0
    return state_of(folder)


class Cut(Exception):
    pass


@pytest.mark.parametrize(
    ("hook", "step", "workers"),
    [("on_train_batch_end", 3, 1), ("on_train_epoch_end", 5, 0), ("on_train_batch_end", 8, 0)],
)
def test_going_on_is_exact(
    hook: str,
    step: int,
    workers: int,
    whole: dict[str, Any],
    sinuous: Sinuous,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = getattr(Resumable, hook)

    def cut(self: Resumable, trainer: Any, *arguments: Any) -> None:
        original(self, trainer, *arguments)
        if trainer.global_step == step:
            raise Cut

    monkeypatch.setattr(Resumable, hook, cut)
    read_by = f"data.num_workers={workers}"
    with pytest.raises(Cut):
        sinuous("train", *EVERYTHING, read_by)
    monkeypatch.setattr(Resumable, hook, original)
    (folder,) = (tmp_path / "debug").iterdir()
    assert state_of(folder)["global_step"] in (3, 5, 6)
    assert sinuous("train", *EVERYTHING, read_by, "ckpt_path=last") == 0
    assert list((tmp_path / "debug").iterdir()) == [folder]  # it went on in its own folder
    assert (folder / "metrics_1.csv").is_file()
    assert state_of(folder)["global_step"] == STEPS
    assert differences(state_of(folder), whole) == []


def test_going_on_after_kill_9_is_exact(whole: dict[str, Any], sinuous: Sinuous, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from sinuous.apps import cli\n"
        "from sinuous.apps.training import Training\n"
        "step = Training.training_step\n"
        "def fatal(self, batch, index):\n"
        "    if self.global_step == 7: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self, batch, index)\n"
        "Training.training_step = fatal\n"
        "cli.main(['train', *sys.argv[1:]])\n"
    )
    environment = {**os.environ, "SINUOUS_OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, *EVERYTHING], env=environment, capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    (folder,) = (tmp_path / "debug").iterdir()
    assert state_of(folder)["global_step"] == 6
    assert sinuous("train", *EVERYTHING, "ckpt_path=last") == 0
    assert differences(state_of(folder), whole) == []


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_go_on(
    signum: signal.Signals,
    code: int,
    whole: dict[str, Any],
    sinuous: Sinuous,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = callbacks.LineProgress.on_train_batch_end

    def signalled(self: Any, trainer: Any, *arguments: Any) -> None:
        original(self, trainer, *arguments)
        if trainer.global_step == 1:
            os.kill(os.getpid(), signum)

    before = signal.getsignal(signum)
    with monkeypatch.context() as patch:
        patch.setattr(callbacks.LineProgress, "on_train_batch_end", signalled)
        assert sinuous("train", *EVERYTHING) == code
    assert signal.getsignal(signum) is before
    (folder,) = (tmp_path / "debug").iterdir()
    sentence = capsys.readouterr().out.splitlines()[-1]
    assert f"stopped by {signum.name} after step 2; the state is in {folder / resuming.LAST}" in sentence
    assert f"go on with: sinuous train {EVERYTHING[0]}" in sentence
    assert state_of(folder)["global_step"] == 2
    assert sinuous("train", *EVERYTHING, f"ckpt_path={folder / resuming.LAST}") == 0
    assert differences(state_of(folder), whole) == []


def test_overfitting_64_pictures(sinuous: Sinuous, tmp_path: Path) -> None:
    changes = [
        "debug=overfit",
        "trainer.max_epochs=30",
        "trainer.check_val_every_n_epoch=30",
        "scheduler.warmup_epochs=1",
    ]
    assert sinuous("train", *TINY[:-1], *changes, "optimizer.lr=1e-2", "data.img_size=16") == 0
    (folder,) = (tmp_path / "debug").iterdir()
    losses = [float(row["train/loss"]) for row in csv.DictReader((folder / "metrics.csv").open()) if row["train/loss"]]
    assert losses[0] > 2
    assert losses[-1] < 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["modle.depth=3"], "there is no option modle.depth here; did you mean model.depth"),
        (["trainer.max_epoch=3"], "there is no option trainer.max_epoch here; did you mean trainer.max_epochs"),
        (["experimnt=fast"], "there is no option experimnt here; did you mean experiment"),
        (["optimizer.lr=fast"], "optimizer.lr must be a number, such as .* \\(got 'fast'\\)"),
        (["optimizer.lr=-1"], "optimizer: Invalid learning rate: -1"),
        (["scheduler.sched=cosin"], "scheduler: Unknown scheduler 'cosin'"),
        (["task.smoothing=2"], r"task.smoothing must be in \[0, 1\) \(got 2\)"),
        (["ema_decay=7"], r"ema_decay must be in \[0, 1\)"),
        (["data.batch_size=0"], r"data.batch_size must be a whole number of at least 1 \(got 0\)"),
        (["seed=-1"], r"seed must be from 0 to 4294967295 \(got -1\)"),
        (
            ["task=language_modelling", "task.unit=byte"],
            "needs data with unit, vocab_size, which LabelledImages lacks",
        ),
        (["trainer.devices=3"], "for 3 processes and this is one; start them with: torchrun"),
        (["hydra.run.dir=/proc/nowhere/x"], "No such file or directory: /proc/nowhere"),
        (["seed=abc"], "Value 'abc' of type 'str' could not be converted to Integer"),
        (
            ["experiment=vision/fashion"],
            "no configuration experiment/vision/fashion; did you mean experiment/vision/fashion_mnist",
        ),
        (["+model.depht=3"], "model: .*unexpected keyword argument 'depht'"),
        (["data=vision/fashion_mnist_full"], "Missing mandatory value: data.root"),
        (["data=vision/fashion_mnist_full", "data.root=nowhere"], "there is no folder .*nowhere"),
        (
            ["data.num_classes=7", "data.dataset.num_classes=10"],
            "has 10 classes and the model predicts 7; give data.num_",
        ),
        (["data.batch_size=500"], "200 training images do not fill one batch of 500"),
        (["ckpt_path=last"], "no run in .*debug has a checkpoints/last.ckpt"),
        (["ckpt_path=nowhere.ckpt"], "there is no checkpoint .*nowhere.ckpt"),
        (["trainer.precision=17"], "Precision '?17'? is invalid"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    arguments: list[str], message: str, sinuous: Sinuous, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sinuous("train", *TINY, *arguments) == 2
    told = capsys.readouterr().err
    assert re.search(message, told), told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=language/bytes", "data=vision/fashion_mnist_synthetic"], "bytes_5m cannot read these images of"),
        (["data=language/austen"], "there is no model to work with; give experiment=NAME .one of .*language/bytes"),
        (
            ["model=vision/test_vim", "data=language/austen"],
            "model.img_size is read from data.img_size, which is not in this configuration",
        ),
        (["model=language/bytes", "data.length=0"], r"data.length must be at least 1 \(got 0\)"),
        (["model=language/bytes", "task.sample_bytes=-2"], "task.sample_bytes=-2"),
    ],
)
def test_parts_that_do_not_go_together_are_told(
    arguments: list[str], message: str, sinuous: Sinuous, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sinuous("train", "debug=fast", *arguments) == 2
    assert re.search(message, told := capsys.readouterr().err), told


def test_a_damaged_checkpoint_is_refused(sinuous: Sinuous, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "half.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:2000])
    assert sinuous("train", *TINY, f"ckpt_path={path}") == 2
    assert f"{path} is no intact checkpoint of sinuous train" in capsys.readouterr().err


def test_an_unreadable_picture_is_named(sinuous: Sinuous, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (40, 40), 80).save(folder / "a.png")
    (tmp_path / "pictures" / "train" / "dog" / "b.jpg").write_bytes(b"\xff\xd8\xff not a jpeg")
    data = ["data=vision/image_folder", f"data.root={tmp_path / 'pictures'}", "data.num_classes=2", "data.img_size=32"]
    for workers in (0, 1):
        changes = ["data.batch_size=3", f"data.num_workers={workers}"]
        assert sinuous("train", *TINY[2:], *data, *changes) == 2
        told = capsys.readouterr().err
        assert "cannot read the picture" in told
        assert "b.jpg" in told
        assert "Traceback" not in told


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, path = run_folder.WholeCheckpoints(), tmp_path / "last.ckpt"
    writer.save_checkpoint({"step": 1}, path)
    before = path.read_bytes()

    def full(content: object, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder.torch, "save", full)
    with pytest.raises(OSError, match=r"cannot write .*last\.ckpt: .*No space left on device; make room"):
        writer.save_checkpoint({"step": 2}, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.slow
def test_two_processes_of_torchrun(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sinuous"]
    environment = {**os.environ, "SINUOUS_OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    for extra in ([], ["ckpt_path=last"]):
        arguments = ["train", *TINY, "trainer=ddp", "trainer.accelerator=cpu", *extra]
        done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "debug").iterdir()
    assert "× 2 processes" in done.stdout
    assert state_of(folder)["global_step"] == STEPS
    assert (folder / "predictions.png").is_file()


BYTES = ["experiment=language/bytes", "debug=fast", "data.length=32", "task.sample_bytes=5"]


@pytest.mark.parametrize("pattern", ["mamba2", "[gated_delta_net,sliding_window_attention]"])
def test_a_language_model_from_end_to_end(
    sinuous: Sinuous, tmp_path: Path, capsys: pytest.CaptureFixture[str], pattern: str
) -> None:
    small = ["+model.dim=16", "+model.depth=2", f"model.pattern={pattern}"]
    if "window" in pattern:
        small.append("model.mixer_options={sliding_window_attention: {window_size: 8}}")
    assert sinuous("train", *BYTES, *small) == 0
    (folder,) = (tmp_path / "debug").iterdir()
    lines = capsys.readouterr().out.splitlines()
    assert "bytes_5m with" in lines[0]
    bits = [line for line in lines if line.startswith("test bits per byte")]
    assert len(bits) == 1
    assert 3 < float(bits[0].split()[4]) < 9
    assert bits[0].endswith("on 1,280 bytes, after at most 31 others")
    assert lines[-1] == f"sample: {folder / 'sample.txt'}"
    assert (folder / "sample.txt").read_bytes().startswith(b"Chapter")
    assert len((folder / "sample.txt").read_bytes()) == len("Chapter") + 5 + 1
    (weights,) = folder.glob("checkpoints/*.safetensors")
    assert weights.name == "best.safetensors"
    small += ["model=language/bytes", "trainer.limit_test_batches=0.05"]
    arguments = [*small, "data.length=32", "task.sample_bytes=5", f"checkpoint_path={weights}"]
    for split in ("test", "val"):
        assert sinuous("eval", *arguments, f"split={split}", f"hydra.run.dir={tmp_path / split}") == 0
        told = capsys.readouterr().out.splitlines()
        assert any(re.match(rf"{split} bits per byte [3-8]\.\d{{4}} on [\d,]+ bytes", line) for line in told), told
    whole = [*arguments[:-1], f"checkpoint_path={tmp_path / 'nowhere'}"]
    assert sinuous("eval", *whole) == 2
    assert "there is no checkpoint at" in capsys.readouterr().err


@pytest.mark.parametrize("pattern", ["mamba2", "s4d"])
def test_a_language_model_goes_on_exactly(
    pattern: str,
    sinuous: Sinuous,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [*BYTES, "test=false", "+model.dim=16", "+model.depth=1", "callbacks.resumable.every_n_steps=3"]
    arguments += [f"model.pattern={pattern}", "optimizer.lr=5e-3"]
    assert sinuous("train", *arguments, f"hydra.run.dir={tmp_path / 'whole'}") == 0
    assert "step 1 of 10  loss " in (told := capsys.readouterr().out)
    assert re.search(r"step 1 of 10 .*  lr 4\.8\de-03", told), told  # of the parameters without a rate of their own
    groups = state_of(tmp_path / "whole")["optimizer_states"][0]["param_groups"]
    peaks = [group["initial_lr"] * group.get("lr_scale", 1) for group in groups]
    assert peaks == pytest.approx([5e-3, 5e-3] + [1e-3] * (pattern == "s4d"))
    original = Resumable.on_train_batch_end

    def cut(self: Resumable, trainer: Any, *more: Any) -> None:
        original(self, trainer, *more)
        if trainer.global_step == 4:
            raise Cut

    monkeypatch.setattr(Resumable, "on_train_batch_end", cut)
    with pytest.raises(Cut):
        sinuous("train", *arguments)
    monkeypatch.setattr(Resumable, "on_train_batch_end", original)
    assert sinuous("train", *arguments, "ckpt_path=last") == 0
    (folder,) = (tmp_path / "debug").iterdir()
    assert state_of(folder)["global_step"] == STEPS
    assert differences(state_of(folder), state_of(tmp_path / "whole")) == []
    if pattern == "s4d":  # as of a run before the mixer had a rate of its own
        assert sinuous("train", *arguments, "model.mixer_options={s4d: {lr: null}}", "ckpt_path=last") == 2
        assert "has groups of [" in (told := capsys.readouterr().err)
        assert "give those of the config.yaml in its run folder, or start anew" in told
