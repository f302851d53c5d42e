"""Hydra around the verbs that take a composed configuration: its schema, its run folders, its errors."""

from __future__ import annotations

import itertools
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, OmegaConf

from sinuous.apps import domain_configs, resuming

CONFIG_PATH = "pkg://sinuous.apps.configs"


@dataclass
class TrainSchema:
    """Keys of a configuration of `sinuous train`. Misspelt keys and wrong types are errors of Hydra's."""

    task_name: str = "train"
    seed: int = 0
    ckpt_path: str | None = None
    runs: str = "${oc.env:SINUOUS_OUT,outputs}/${task_name}"
    output_dir: str = "${hydra:runtime.output_dir}"
    schedule: str = "saved"
    ema_decay: float | None = None
    checkpointing: Any = False
    augment: bool = True
    test: bool = True
    model: Any = field(default_factory=dict)
    data: Any = field(default_factory=dict)
    task: Any = field(default_factory=dict)
    noise: Any = field(default_factory=dict)
    optimizer: Any = field(default_factory=dict)
    scheduler: Any = field(default_factory=dict)
    trainer: Any = field(default_factory=dict)
    callbacks: Any = field(default_factory=dict)
    logger: Any = field(default_factory=dict)


@dataclass
class EvalSchema(TrainSchema):
    """Keys of a configuration of `sinuous eval`: its own, and those of training, which an experiment may set."""

    task_name: str = "eval"
    weights: str | None = None
    model_name: str = MISSING
    checkpoint_path: str | None = None
    prefer: str | None = None
    pretrained: bool = False
    split: str = "test"


def register() -> None:
    """Make the schemas, the resolver `run_folder` and all configurations known to Hydra. May be called again."""
    domain_configs.register()
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainSchema)
    store.store(name="eval_schema", node=EvalSchema)
    OmegaConf.register_new_resolver("run_folder", resuming.run_folder, replace=True)
    OmegaConf.register_new_resolver("new_folder", resuming.new_folder, replace=True)


def _check_numbers(config_name: str) -> None:
    """Refuse a word in place of a number. The groups are open, so Hydra lets it pass, and libraries break on it late.

    Raises:
        ValueError: naming the option, unless the word is `auto`, which Lightning takes for several numbers.
    """
    overrides = HydraConfig.get().overrides.task
    words = {}
    for text, override in zip(overrides, OverridesParser.create().parse_overrides(overrides), strict=True):
        value = override.value()
        if "." in override.key_or_group and isinstance(value, str) and value != "auto" and "${" not in value:
            words[text] = (override.key_or_group, value)
    if not words:
        return
    others = [text for text in overrides if text not in words]
    plain = GlobalHydra.instance().config_loader().load_configuration(config_name, others, RunMode.RUN)
    for key, value in words.values():
        usual = OmegaConf.select(plain, key)
        if isinstance(usual, int | float):
            kind = "true or false" if isinstance(usual, bool) else "a number"
            raise ValueError(f"{key} must be {kind}, such as {str(usual).lower()} (got {value!r})")


@dataclass(frozen=True)
class Outcome:
    """Exit code of a job, and its score, which a sweeper may want to optimize."""

    code: int
    score: float | None = None


COMMAND: list[str] = []
"""Words behind the verb with which this process was started."""


def command_line(prog: str, **replaced: object) -> str:
    """The command of this process, to be pasted into a shell, with some options replaced."""
    others = [word for word in COMMAND if word.partition("=")[0] not in replaced]
    return shlex.join([*prog.split(), *others, *(f"{key}={_quoted(str(value))}" for key, value in replaced.items())])


def _quoted(value: str) -> str:
    """A value as Hydra's grammar takes it."""
    plain = value.translate(str.maketrans("", "", "_/-+.$%*@?|:"))
    return value if plain.isascii() and plain.isalnum() else '"' + value.replace('"', '\\"') + '"'


def config_folders(argv: Sequence[str]) -> list[Path]:
    """Folders that `--config-dir` or `-cd` name."""
    named = [word.partition("=")[2] for word in argv if word.startswith("--config-dir=")]
    named += [after for word, after in itertools.pairwise(argv) if word in ("--config-dir", "-cd")]
    return [Path(name) for name in named]


def run_composed(work: Callable[[DictConfig], Outcome], config_name: str, prog: str, argv: list[str]) -> int:
    """Compose `config_name` with the overrides in `argv`, call `work` on it (once per job of a sweep), return its code.

    Errors of Hydra's and of `work` come out as they were raised.
    """
    register()
    COMMAND[:] = argv
    domain_configs.EXTRA[:] = config_folders(argv)
    if "--cfg" in argv or "-c" in argv:  # the run's folder is not chosen yet, and --resolve would ask for it
        argv = [*argv, *([] if any(word.startswith("output_dir=") for word in argv) else ["output_dir=RUN_FOLDER"])]
    codes: list[int] = []
    failures: list[Exception] = []

    def job(config: DictConfig) -> float | None:
        try:
            _check_numbers(config_name)
            outcome = work(config)
            codes.append(outcome.code)
            return outcome.score
        except Exception as error:  # kept here, or Hydra would print a line of its own before raising it
            failures.append(error)
            return None

    if int(os.environ.get("RANK", 0)) > 0:
        # Only the first process of torchrun makes a run folder; the others hear of it through the strategy.
        quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.output_subdir=null", "hydra.run.dir=."]
        argv = [*argv, *quiet]
    own, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR", "0")
    sys.argv = [prog, *argv]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise instead of printing and ending the process
    try:
        hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name=config_name)(job)()
    finally:
        sys.argv, os.environ["HYDRA_FULL_ERROR"] = own, full_error
    if failures:
        raise failures[0]
    return max(codes, default=0)
