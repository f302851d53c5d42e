"""What is heard in files of sound: `sinuous demo audio --classify`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from sinuous.audio.demo_models import model_of
from sinuous.audio.io import read_audio
from sinuous.audio.wave_classifier import WaveClassifier

MODEL = "wave_classifier_nano.notes"
TOLD = 3
"""Classes that are told for each file, the most probable ones."""


def run(options: argparse.Namespace) -> list[Path]:
    """Print the most probable classes of each file.

    Returns:
        No files.

    Raises:
        ValueError: if a file or the model cannot be read, or the model is no classifier of sounds.
        FileNotFoundError: if there is no such file.
    """
    model = model_of(options.model, MODEL, options.seed)
    if not isinstance(model, WaveClassifier) or not model.num_classes:
        raise ValueError(f"--model must be a classifier of sounds (got {options.model}); give {MODEL}")
    waves = [read_audio(path, sample_rate=model.sample_rate, mono=True)[0] for path in options.classify]
    show(options.classify, waves, [answer(model, wave) for wave in waves], labels_of(model), model.sample_rate)
    return []


@torch.inference_mode()
def answer(model: WaveClassifier, wave: Tensor) -> Tensor:
    """Probabilities of all classes `[C]` of a wave `[1, T]`."""
    probabilities: Tensor = model(wave[None])[0].softmax(-1)
    return probabilities


def labels_of(model: WaveClassifier) -> list[str]:
    """Names of the classes, or their numbers where the weights do not know them."""
    names = cast("dict[str, Any]", getattr(model, "pretrained_cfg", {})).get("label_names") or ()
    return list(names) if len(names) == model.num_classes else [f"class {i}" for i in range(model.num_classes)]


def show(paths: list[Path], waves: list[Tensor], answers: list[Tensor], labels: list[str], rate: int) -> None:
    """Print a table of the files and their classes."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"heard at {rate:,} Hz", title_justify="left")
    table.add_column("file", overflow="fold")
    table.add_column("seconds", justify="right")
    table.add_column("is")
    for path, wave, probabilities in zip(paths, waves, answers, strict=True):
        best = probabilities.topk(min(TOLD, len(labels)))
        told = [f"{labels[i]} {p:.2f}" for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
        table.add_row(str(path), f"{wave.shape[1] / rate:.2f}", ", ".join(told))
    Console().print(table)
