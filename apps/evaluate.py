"""`sinuous eval`: the score of some weights on a test set, the same digits every time."""

from __future__ import annotations

import logging
from pathlib import Path

import hydra
import lightning as L
from omegaconf import DictConfig, OmegaConf

from sinuous.apps.composition import run_composed
from sinuous.apps.run_folder import describe
from sinuous.apps.tasks.classification import Classification
from sinuous.apps.train import first_line, make_data, make_trainer, quieten

log = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """`sinuous eval model_name=NAME data=GROUP/NAME checkpoint_path=FILE` (or `pretrained=true`)."""
    return run_composed(evaluate, "eval", "sinuous eval", argv)


def evaluate(config: DictConfig) -> int:
    """Score the model of `config` and draw a page of its predictions; returns the exit code."""
    quieten()
    if OmegaConf.is_missing(config, "model_name"):
        raise ValueError("the model is missing: give model_name=NAME; `sinuous models` lists the names")
    if not config.pretrained and config.checkpoint_path is None:
        raise ValueError("the weights to score are missing: give checkpoint_path=FILE or pretrained=true")
    if config.split not in ("val", "test"):
        raise ValueError(f"split must be val or test (got {config.split!r})")
    L.seed_everything(config.seed, workers=True, verbose=False)
    data = make_data(config)
    task = Classification(hydra.utils.instantiate(config.model, _convert_="all"), num_classes=data.num_classes)
    trainer = make_trainer(config)
    folder = Path(config.output_dir)
    if trainer.is_global_zero:
        describe(folder, config)
        log.info("%s", first_line(trainer, task, data, (config.split,), config.model))
    loader = data.val_dataloader() if config.split == "val" else data.test_dataloader()
    trainer.test(task, loader, verbose=False)
    if trainer.is_global_zero:
        for line in task.report(data, folder, config.split, config.model_name):
            log.info("%s", line)
    return 0
