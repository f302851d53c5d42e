"""`sinuous eval`: the score of some weights on a test set, the same digits every time."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sinuous.apps.composition import COMMAND, Outcome, run_composed
from sinuous.apps.resuming import LAST
from sinuous.apps.run_folder import describe, keep_scores
from sinuous.apps.train import check_parts, first_line, make_batches, make_run, make_trainer, quieten
from sinuous.core.checkpoints import data_facts
from sinuous.core.weights import find_weights

log = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """`sinuous eval weights=NAME.TAG [data.root=FOLDER]`, `sinuous eval model_name=NAME data=GROUP/NAME
    checkpoint_path=FILE` (or `pretrained=true`), or with the groups of a training: `sinuous eval model=GROUP/NAME
    checkpoint_path=FILE`."""
    return run_composed(evaluate, "eval", "sinuous eval", with_experiment(argv))


def with_experiment(argv: list[str]) -> list[str]:
    """The arguments, with `weights=NAME.TAG` preceded by the experiment that made these weights.

    Where that experiment reads a folder of the user's and none is given, the data that comes with the package takes its
    place. A part of data that are there anyway does not: all of them are scored.
    """
    chosen = next((word.removeprefix("weights=") for word in argv if word.startswith("weights=")), None)
    if chosen in (None, "null"):
        return argv
    weights = find_weights(chosen)
    card, keys = weights.card, {word.partition("=")[0].lstrip("+") for word in argv}
    overrides = [f"experiment={card['experiment']}", *card["overrides"]]
    if "data.root" not in keys and "data" not in keys:
        overrides += [override for override in card["part"]["overrides"] if override.startswith("data=")]
    return [*overrides, f"checkpoint_path={weights.file}", *argv]


def recorded(config: DictConfig) -> list[str]:
    """Scores that the JSON of shipped weights records, to compare with."""
    if not config.weights:
        return []
    card = find_weights(config.weights).card
    places = {config.split: card["scores"].get(config.split, {})}
    if card["part"]["split"] == config.split and card["part"]["overrides"]:
        places[f"part of {config.split} that comes with the package"] = card["part"]["scores"]
    texts = [
        f"{name.replace('_', ' ')} {value:.4f} ({place})"
        for place, scores in places.items()
        for name, value in scores.items()
    ]
    return [f"recorded of {config.weights}: {', '.join(texts)}"]


def adopt_facts(config: DictConfig, facts: dict[str, Any]) -> None:
    """Make the data as the weights know theirs, where the command line says nothing else.

    Raises:
        ValueError: if the data has other classes than the weights know, or the same in another order.
    """
    given = {word.partition("=")[0].lstrip("+") for word in COMMAND}
    if classes := facts.get("classes"):
        facts = {**facts, "num_classes": len(classes)}
    for name, value in facts.items():
        key = f"data.{name}"
        if name not in list(config.data) or config.data.get(name) == value:  # a missing value is in the list
            continue
        if key in given:
            log.info("the weights know %s %s, and %s is given", key, value, config.data[name])
        else:
            log.info("%s is %s, as the weights know it", key, value)
            config.data[name] = value
    if classes:
        data: Any = make_batches(config).data
        present = list(data.classes)
        if present != list(classes):
            raise ValueError(
                f"the weights know the classes {', '.join(classes)}, and the data has {', '.join(present)}; give data "
                "with the same classes, or weights that were trained on these"
            )


def evaluate(config: DictConfig) -> Outcome:
    """Score the model of `config` and show what it does with its data; the score is the task's best."""
    quieten()
    by_name = "${model_name}" in OmegaConf.to_container(config.model, resolve=False).values()
    if by_name and OmegaConf.is_missing(config, "model_name"):
        raise ValueError(
            "the model is missing: give weights=NAME.TAG for weights that come with a package, or model_name=NAME; "
            "`sinuous models` lists the names"
        )
    if not config.pretrained and config.checkpoint_path is None:
        raise ValueError("the weights to score are missing: give checkpoint_path=FILE or pretrained=true")
    if config.split not in ("val", "test"):
        raise ValueError(f"split must be val or test (got {config.split!r})")
    if config.checkpoint_path is not None and not Path(config.checkpoint_path).is_file():
        raise FileNotFoundError(f"there is no checkpoint at {config.checkpoint_path}; check checkpoint_path")
    folder = Path(config.output_dir)
    if (folder / LAST.parent).exists():
        raise ValueError(f"{folder} holds a training, whose files stay as they are; give another hydra.run.dir")
    check_parts(config)
    OmegaConf.set_struct(config, False)
    if config.checkpoint_path is not None:
        adopt_facts(config, data_facts(config.checkpoint_path))
    config.update(optimizer={}, scheduler={}, ema_decay=None)  # which an experiment may have set
    if by_name:
        config.model.update(getattr(make_batches(config).data, "model_options", dict)())
    config.model.update(pretrained=config.pretrained, checkpoint_path=config.checkpoint_path)
    if config.prefer is not None:
        config.model.update(prefer=config.prefer)
    batches, training = make_run(config)
    trainer = make_trainer(config)
    if trainer.is_global_zero:
        describe(folder, config)
        log.info("%s", first_line(trainer, training, batches, (config.split,), config.model))
    loader = batches.val_dataloader() if config.split == "val" else batches.test_dataloader()
    trainer.test(training, loader, verbose=False)
    if trainer.is_global_zero:
        keep_scores(folder, config.split, training.scores())
        for line in [*training.report(batches.scored(), folder, config.split), *recorded(config)]:
            log.info("%s", line)
    best = str(config.task.get("best", {}).get("monitor", "")).partition("/")[2]
    return Outcome(0, training.scores().get(best))
