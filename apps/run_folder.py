"""A run's folder, besides metrics: checkpoints written whole or not at all, configuration, versions, scores."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from omegaconf import DictConfig, OmegaConf

from sinuous.apps.packages import installed


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it, so that a killed run leaves the older file, not half a one.

    Lightning's own way goes through the system's folder for temporary files, from where a rename can be a copy.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            raise OSError(
                f"cannot write {target}: {error}; make room on the disk, then go on with ckpt_path=last"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)


def describe(folder: Path, config: DictConfig) -> None:
    """Write `config.yaml`, the configuration with everything filled in, and `versions.json` into the run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
    versions = {"python": platform.python_version(), "machine": platform.machine(), "threads": torch.get_num_threads()}
    versions |= {package: version for package, version in installed().items() if version is not None}
    _write(folder / "versions.json", json.dumps(versions, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:  # of a full disk, which names no file
        raise OSError(
            f"cannot write {path}: {error.strerror}; make room there, or give another hydra.run.dir"
        ) from error


def keep_metrics(folder: Path) -> None:
    """Set `metrics.csv` of the part that ran before aside: Lightning's CSV logger starts its file anew."""
    current = folder / "metrics.csv"
    if current.is_file():
        number = len(list(folder.glob("metrics_*.csv"))) + 1
        current.rename(folder / f"metrics_{number}.csv")


def keep_scores(folder: Path, split: str, scores: Mapping[str, float]) -> None:
    """Write `scores.json`, every digit of the scores of a split, into the run folder."""
    _write(folder / "scores.json", json.dumps({split: dict(scores)}, indent=2) + "\n")
