"""`sinuous train`: Hydra composes, Lightning runs, the run folder keeps what came out."""

from __future__ import annotations

import logging
import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any, cast

import hydra
import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar
from omegaconf import DictConfig, OmegaConf

from sinuous.apps import backends
from sinuous.apps.callbacks import BestWeights, RunStopped
from sinuous.apps.composition import LAST, newest_run, run_composed
from sinuous.apps.data_module import Splits
from sinuous.apps.run_folder import WholeCheckpoints, describe, keep_metrics

log = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """`sinuous train experiment=DOMAIN/NAME [key=value …]`."""
    return run_composed(train, "train", "sinuous train", argv)


def train(config: DictConfig) -> int:
    """Train, test and draw what `config` describes; returns the exit code."""
    quieten()
    folder = Path(config.output_dir)
    start = _start_of(config)
    data, task = make_run(config)
    trainer = make_trainer(config)
    if trainer.is_global_zero:
        if start is not None and start.resolve().parents[1] == folder.resolve():
            keep_metrics(folder)
        describe(folder, config)
        log.info("%s", first_line(trainer, task, data, ("train", "val", "test"), config.model))
    began = time.perf_counter()
    try:
        trainer.fit(task, data, ckpt_path=start, weights_only=True)
    except RunStopped as stop:
        log.info("%s; go on with: sinuous train %sckpt_path=%s", stop, _overrides(), stop.checkpoint)
        return 128 + int(signal.Signals(stop.signum))
    seconds = time.perf_counter() - began
    if config.test:
        _test(trainer, task, data, folder, seconds)
    return 0


def _start_of(config: DictConfig) -> Path | None:
    if not config.ckpt_path:
        return None
    path = newest_run(config.runs) / LAST if config.ckpt_path == "last" else Path(config.ckpt_path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path.resolve()} to go on from; check ckpt_path")
    try:
        content = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is no intact checkpoint of sinuous train; take another one") from error
    if not isinstance(content, dict) or not {"state_dict", "optimizer_states", "loops"} <= content.keys():
        raise ValueError(
            f"{path} holds no state to go on from, as {LAST} of a run does; to start from weights alone, give "
            "+model.checkpoint_path instead of ckpt_path"
        )
    return path


def _overrides() -> str:
    overrides = hydra.core.hydra_config.HydraConfig.get().overrides.task
    return "".join(f"{o} " for o in overrides if not o.startswith("ckpt_path="))


def _test(trainer: L.Trainer, task: Any, data: Splits, folder: Path, seconds: float) -> None:
    best = next((c for c in trainer.checkpoint_callbacks if isinstance(c, BestWeights) and c.best_model_path), None)
    trainer.test(task, data, ckpt_path=best.best_model_path if best else None, verbose=False, weights_only=True)
    if not trainer.is_global_zero:
        return
    seen = trainer.global_step * data.batch_size * trainer.world_size * trainer.accumulate_grad_batches
    log.info(
        "trained for %.0f s in this run, %d steps, %s %s seen", seconds, trainer.global_step, f"{seen:,}", data.examples
    )
    if best:
        log.info("weights: %s", best.weights)
    for line in task.report(data, folder, "test", "Test set"):
        log.info("%s", line)


def quieten() -> None:
    """Silence what Lightning says about itself; what it says about the run stays."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        "Found .* module\\(s\\) in eval mode at the start of training.*",  # the averaged weights
        ".*does not have many workers.*",
        "Checkpoint directory .* exists and is not empty.*",
        "The number of training batches .* is smaller than the logging interval.*",
        "'set_vital' is deprecated.*",
        ".*find_unused_parameters=True.*",
        ".*recommended to use .*devices=1.*",
        "Experiment logs directory .* exists and is not empty.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message)


def _resolved(part: DictConfig) -> dict[str, Any]:
    return cast("dict[str, Any]", OmegaConf.to_container(part, resolve=True, throw_on_missing=True))


def make_run(config: DictConfig) -> tuple[Splits, Any]:
    """Seeds every generator, then makes the data and the task that `config` describes.

    Raises:
        ValueError: if they do not go together, or the seed is out of range.
    """
    if not 0 <= config.seed < 2**32:  # numpy's range
        raise ValueError(f"seed must be from 0 to 4294967295 (got {config.seed})")
    L.seed_everything(config.seed, workers=True, verbose=False)
    data, task = make_data(config), make_task(config)
    if not isinstance(data, task.takes):
        raise ValueError(
            f"the task {type(task).__name__} is for data of the kind {task.takes.__name__} (got "
            f"{type(data).__name__}); choose data=… and task=… that go together"
        )
    return data, task


def make_data(config: DictConfig) -> Splits:
    """The DataModule; `root` and `source` are only names by which the entry `dataset` is reached."""
    options = {key: value for key, value in _resolved(config.data).items() if key not in ("root", "source")}
    data: Splits = hydra.utils.instantiate(options, _convert_="all")
    return data


def make_task(config: DictConfig) -> Any:
    """The task with its model and, where there are any, optimizer and scheduler, as plain Python objects; its entry
    `best` is for the callbacks."""
    parts = {name: _resolved(config[name]) for name in ("model", "optimizer", "scheduler") if name in config}
    options = {key: value for key, value in _resolved(config.task).items() if key != "best"}
    return hydra.utils.instantiate({**options, **parts}, _convert_="all")


def make_trainer(config: DictConfig) -> L.Trainer:
    """Lightning's Trainer, with precision chosen for the machine where the configuration says `auto`."""
    options = OmegaConf.to_container(config.trainer, resolve=True)
    assert isinstance(options, dict)
    if options.get("precision") == "auto":
        ampere = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
        options["precision"] = "bf16-mixed" if ampere and options["accelerator"] != "cpu" else "32-true"
    callbacks = [hydra.utils.instantiate(c, _convert_="all") for c in config.get("callbacks", {}).values()]
    loggers = [hydra.utils.instantiate(c, _convert_="all") for c in config.get("logger", {}).values()]
    trainer: L.Trainer = hydra.utils.instantiate(
        options,
        callbacks=callbacks,
        logger=loggers or False,
        plugins=[WholeCheckpoints()],
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
        _convert_="all",
    )
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.world_size > 1 and not getattr(environment, "creates_processes_externally", False):
        # Lightning would start the others from sys.argv, which names our verb and not a file.
        raise ValueError(
            f"trainer.devices={trainer.num_devices} on {trainer.num_nodes} node(s) is for {trainer.world_size} "
            f"processes and this is one; start them with: torchrun --nproc-per-node {trainer.num_devices} -m sinuous "
            "train … trainer=ddp"
        )
    return trainer


def name_of(model_config: DictConfig) -> str:
    """What the model is called: sinuous and timm name the argument differently."""
    name: str = model_config.get("name") or model_config.get("model_name")
    return name


def first_line(trainer: L.Trainer, task: Any, data: Splits, splits: tuple[str, ...], model_config: DictConfig) -> str:
    """Precision, device, backend of the ops, parameters and data sizes, in one line."""
    device = trainer.strategy.root_device
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    model = task.model.to(device)
    parameters = sum(p.numel() for p in model.parameters())
    sizes = ", ".join(f"{len(data.split(name)):,} {name}" for name in splits)
    try:
        used = backends.of_model(model, data.example())
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError, AssertionError) as error:
        if "SINUOUS_BACKEND" in str(error):
            raise
        raise ValueError(
            f"{name_of(model_config)} cannot read these {data.examples} of {list(data.example().shape)}: "
            f"{str(error).rstrip('.')}; choose a model and data, or sizes of them, that go together"
        ) from error
    ops = ", ".join(f"{op} by {backend}" for op, backend in used.items()) or "none of ours"
    processes = f" × {trainer.world_size} processes" if trainer.world_size > 1 else ""
    return (
        f"precision {trainer.precision} on {device} ({machine}){processes}; ops: {ops}; "
        f"{name_of(model_config)} with {parameters:,} parameters; {data.examples}: {sizes}; "
        f"run folder {os.path.relpath(trainer.default_root_dir)}"
    )
