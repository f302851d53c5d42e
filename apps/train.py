"""`sinuous train`: Hydra composes, Lightning runs, the run folder keeps what came out."""

from __future__ import annotations

import inspect
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
from sinuous.apps.batches import Batches
from sinuous.apps.callbacks import BestWeights, RunStopped, finite
from sinuous.apps.composition import Outcome, command_line, run_composed
from sinuous.apps.domain_configs import known
from sinuous.apps.resuming import changed_settings, check_folder, enter, start_of
from sinuous.apps.run_folder import WholeCheckpoints, describe, keep_metrics, keep_scores
from sinuous.apps.threads import waiting
from sinuous.apps.training import Training
from sinuous.core.checkpointing import checkpointing_of, length_in, plan_memory, set_checkpointing
from sinuous.core.data import lacking

log = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """`sinuous train experiment=DOMAIN/NAME [key=value …]`."""
    return run_composed(train, "train", "sinuous train", argv)


def train(config: DictConfig) -> Outcome:
    """Train, test and draw what `config` describes; the score is the best of the validation (`task.best`)."""
    quieten()
    folder = Path(config.output_dir)
    start = start_of(config)
    check_folder(folder, start)
    batches, training = make_run(config)
    changes = [] if start is None else changed_settings(config, start)
    trainer = make_trainer(config)
    if trainer.is_global_zero:
        if start is not None and start.resolve().parents[1] == folder.resolve():
            keep_metrics(folder)
        enter(config.runs, folder)
        describe(folder, config)
        log.info("%s", first_line(trainer, training, batches, ("train", "val", "test"), config.model))
        if trainer.strategy.root_device.type == "cpu" and torch.get_num_threads() > 1:
            log.info("%s", waiting(torch.get_num_threads()))
        if changes:
            log.info("changed since the run began: %s", "; ".join(changes))
    began = time.perf_counter()
    try:
        trainer.fit(training, batches, ckpt_path=start, weights_only=True)
    except RunStopped as stop:
        log.info("%s; go on with: %s", stop, command_line("sinuous train", ckpt_path=stop.checkpoint))
        return Outcome(128 + int(signal.Signals(stop.signum)))
    seconds = time.perf_counter() - began
    _keep_last_weights(trainer, training, folder)
    if config.test:
        _test(trainer, training, batches, folder, seconds)
    return Outcome(0, _best_score(trainer))


def _best_score(trainer: L.Trainer) -> float | None:
    scores = [c.best_model_score for c in trainer.checkpoint_callbacks if isinstance(c, BestWeights)]
    return next((float(score) for score in scores if score is not None), None)


def _keep_last_weights(trainer: L.Trainer, training: Training, folder: Path) -> None:
    """Export the weights as they are where no validation has chosen the best ones."""
    writer = next((c for c in trainer.checkpoint_callbacks if isinstance(c, BestWeights)), None)
    if writer is None or writer.best_model_path:
        return
    if not finite(training):
        raise ValueError(
            "the trained weights are not all numbers, so none are exported; lower optimizer.lr, or give "
            "trainer.gradient_clip_val=1"
        )
    path = folder / "checkpoints" / "last.safetensors"
    writer.export(trainer, training, path)
    if trainer.is_global_zero:
        log.info("no validation was run, so that no weights are the best: the last ones are in %s", path)


def _test(trainer: L.Trainer, training: Training, batches: Batches, folder: Path, seconds: float) -> None:
    best = next((c for c in trainer.checkpoint_callbacks if isinstance(c, BestWeights) and c.best_model_path), None)
    trainer.test(training, batches, ckpt_path=best.best_model_path if best else None, verbose=False, weights_only=True)
    if not trainer.is_global_zero:
        return
    seen = training.batches_read * batches.batch_size * trainer.world_size
    noun = batches.data.noun
    log.info("trained for %.0f s in this run, %d steps, %s %s seen", seconds, trainer.global_step, f"{seen:,}", noun)
    keep_scores(folder, "test", training.scores())
    if best:
        log.info("weights: %s", best.weights)
    for line in training.report(batches.scored(), folder, "test"):
        log.info("%s", line)


def quieten() -> None:
    """Silence what Lightning says about itself; what it says about the run stays."""
    for name in ("lightning.pytorch", "lightning.fabric", "timm"):
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


def make_run(config: DictConfig) -> tuple[Batches, Training]:
    """Seed every generator, then make the data and the training that `config` describes.

    Raises:
        ValueError: if a part is missing, they do not go together, the seed is out of range, or `checkpointing` is
            not for this model.
    """
    check_parts(config)
    if config.schedule not in ("saved", "new"):
        raise ValueError(f"schedule must be saved or new (got {config.schedule!r})")
    if not 0 <= config.seed < 2**32:  # numpy's range
        raise ValueError(f"seed must be from 0 to 4294967295 (got {config.seed})")
    L.seed_everything(config.seed, workers=True, verbose=False)
    batches = make_batches(config)
    take_from_data(config, batches.data)
    training = make_training(config)
    if missing := lacking(batches.data, training.task.takes):
        raise ValueError(
            f"the task {type(training.task).__name__} needs data with {', '.join(missing)}, which "
            f"{type(batches.data).__name__} lacks; choose data=… and task=… that go together"
        )
    checkpoint_blocks(training, batches, config.get("checkpointing"))
    return batches, training


def check_parts(config: DictConfig) -> None:
    """Refuse a configuration without a model, data or a task, naming choices."""
    for part in ("model", "data", "task"):
        if not config.get(part):
            offered = [name.removeprefix("experiment/") for name in known() if name.startswith("experiment/")]
            raise ValueError(
                f"there is no {part} to work with; give experiment=NAME (one of {', '.join(offered)}), or {part}=NAME; "
                "--help lists the names"
            )


def make_batches(config: DictConfig) -> Batches:
    """The data in batches: options of `Batches` are its own, the others are for the data's constructor."""
    options = _resolved(config.data)
    of_batches = inspect.signature(Batches).parameters.keys() - {"data", "augment"}
    loading = {name: options.pop(name) for name in of_batches & options.keys()}
    data = hydra.utils.instantiate(options, _convert_="all")
    return Batches(data, augment=config.get("augment", True), **loading)


def take_from_data(config: DictConfig, data: Any) -> None:
    """Fill in what the task leaves open (`num_classes: ???`) by the data's attributes of these names."""
    for name in config.task:
        if OmegaConf.is_missing(config.task, name) and hasattr(data, name):
            config.task[name] = getattr(data, name)


def checkpoint_blocks(training: Training, batches: Batches, option: Any) -> None:
    """Let the model recompute its blocks as `checkpointing` says: `true`, `{layers, steps}` or `{strategy, budget}`.

    Raises:
        ValueError: if the option is none of these, or the model cannot.
    """
    chosen = checkpointing_of(OmegaConf.to_container(option) if OmegaConf.is_config(option) else option)
    if chosen is None:
        return
    if "strategy" not in chosen and "budget" not in chosen:
        set_checkpointing(training.model, **chosen)
        return
    length = length_in(training.model, batches.data.example())
    plan = plan_memory(training.model, batches.batch_size, length, **chosen)
    plan.apply(training.model)
    log.info("%s", str(plan).partition("\n")[0] + f", {plan.total / 1e6:,.0f} MB planned beside the weights")


def make_training(config: DictConfig) -> Training:
    """The model and the task with, where there are any, optimizer and scheduler, as plain Python objects; the task's
    entry `best` is for the callbacks."""
    parts = {name: _resolved(config[name]) for name in ("model", "task", "optimizer", "scheduler") if config.get(name)}
    parts["task"].pop("best", None)
    made = {name: hydra.utils.instantiate(options, _convert_="all") for name, options in parts.items()}
    made["task"].augment = config.get("augment", True)
    return Training(**made, ema_decay=config.get("ema_decay"), new_schedule=config.get("schedule") == "new")


def make_trainer(config: DictConfig) -> L.Trainer:
    """Lightning's Trainer, with precision chosen for the machine where the configuration says `auto`."""
    options = OmegaConf.to_container(config.trainer, resolve=True)
    assert isinstance(options, dict)
    if options.get("precision") == "auto":
        ampere = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
        options["precision"] = "bf16-mixed" if ampere and options["accelerator"] != "cpu" else "32-true"
    callbacks = [hydra.utils.instantiate(c, _convert_="all") for c in (config.get("callbacks") or {}).values()]
    loggers = [hydra.utils.instantiate(c, _convert_="all") for c in (config.get("logger") or {}).values()]
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
    """Name of the model: sinuous and timm name the argument differently, and another maker has a name itself."""
    name: str = model_config.get("name") or model_config.get("model_name") or model_config["_target_"].split(".")[-1]
    return name


def first_line(
    trainer: L.Trainer, training: Training, batches: Batches, splits: tuple[str, ...], model_config: DictConfig
) -> str:
    """Precision, device, backend of the ops, parameters and data sizes, in one line."""
    device = trainer.strategy.root_device
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    model, data = training.model.to(device), batches.data
    parameters = sum(p.numel() for p in model.parameters())
    sizes = ", ".join(f"{len(batches.split(name)):,} {name}" for name in splits)
    try:
        used = backends.of_model(model, data.example())
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError, AssertionError) as error:
        if "SINUOUS_BACKEND" in str(error):
            raise
        raise ValueError(
            f"{name_of(model_config)} cannot read these {data.noun} of {list(data.example().shape)}: "
            f"{str(error).rstrip('.')}; choose a model and data, or sizes of them, that go together"
        ) from error
    ops = ", ".join(f"{op} by {backend}" for op, backend in used.items()) or "none of ours"
    processes = f" × {trainer.world_size} processes" if trainer.world_size > 1 else ""
    return (
        f"precision {trainer.precision} on {device} ({machine}){processes}; ops: {ops}; "
        f"{name_of(model_config)} with {parameters:,} parameters; {data.noun}: {sizes}; "
        f"run folder {os.path.relpath(trainer.default_root_dir)}"
    )
