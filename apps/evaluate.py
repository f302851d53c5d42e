"""`sinuous eval`: the score of some weights on a test set, the same digits every time."""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

import sinuous
from sinuous.apps.composition import run_composed
from sinuous.apps.run_folder import describe
from sinuous.apps.train import first_line, make_run, make_trainer, name_of, quieten

log = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """`sinuous eval model_name=NAME data=GROUP/NAME checkpoint_path=FILE` (or `pretrained=true`), or with the groups
    of a training: `sinuous eval model=core/bytes checkpoint_path=FILE`."""
    return run_composed(evaluate, "eval", "sinuous eval", argv)


def evaluate(config: DictConfig) -> int:
    """Score the model of `config` and show what it does with its data; returns the exit code."""
    quieten()
    unresolved = OmegaConf.to_container(config.model, resolve=False)
    if OmegaConf.is_missing(config, "model_name") and "${model_name}" in unresolved.values():
        raise ValueError("the model is missing: give model_name=NAME; `sinuous models` lists the names")
    if not config.pretrained and config.checkpoint_path is None:
        raise ValueError("the weights to score are missing: give checkpoint_path=FILE or pretrained=true")
    if config.split not in ("val", "test"):
        raise ValueError(f"split must be val or test (got {config.split!r})")
    elsewhere = {*sinuous.list_models()} - {*sinuous.list_models(domain="vision")}
    if "${model_name}" in unresolved.values() and (config.model_name in elsewhere or "img_size" not in config.data):
        raise ValueError(
            f"model_name={config.model_name} is for a model of images with data of images; name other models by their "
            "configuration, as in training: model=core/bytes"
        )
    OmegaConf.set_struct(config, False)
    config.model.update(pretrained=config.pretrained, checkpoint_path=config.checkpoint_path)
    data, task = make_run(config)
    trainer = make_trainer(config)
    folder = Path(config.output_dir)
    if trainer.is_global_zero:
        describe(folder, config)
        log.info("%s", first_line(trainer, task, data, (config.split,), config.model))
    loader = data.val_dataloader() if config.split == "val" else data.test_dataloader()
    trainer.test(task, loader, verbose=False)
    if trainer.is_global_zero:
        for line in task.report(data, folder, config.split, name_of(config.model)):
            log.info("%s", line)
    return 0
