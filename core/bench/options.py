"""Options that the benches share, and their checks, which come before minutes of measuring."""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path

import torch

from sinuous.core.checks import check_sizes


def add_machine(parser: argparse.ArgumentParser) -> None:
    """`--threads` and `--device`."""
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))


def add_outputs(parser: argparse.ArgumentParser, csv: str = "also write the rows to this file") -> None:
    """`--csv` and `--markdown`."""
    parser.add_argument("--csv", type=Path, help=csv)
    parser.add_argument("--markdown", type=Path, help="also write a page with the table and how it was measured")


def positive_integers(flag: str, text: str) -> list[int]:
    """The numbers of a list with commas, in order and each once.

    Raises:
        ValueError: if it is no such list.
    """
    if not all(part.strip().isdigit() and int(part) > 0 for part in text.split(",")):
        raise ValueError(f"{flag} must be positive integers separated by commas (got {text!r})")
    return sorted({int(part) for part in text.split(",")})


def check(options: argparse.Namespace) -> None:
    """Refuse numbers below 1, a device that is not there, and files that could not be written in the end.

    Raises:
        ValueError: naming the option.
        ModuleNotFoundError: if a figure is wanted and there is no matplotlib.
    """
    for name, value in vars(options).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, int) and not isinstance(value, bool) and name != "seed":
            check_sizes(**{flag: value})
        if isinstance(value, Path):
            _check_writable(flag, value)
    if getattr(options, "device", None) == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a CUDA device, and torch sees none; leave the option out")
    if getattr(options, "figure", None):
        importlib.import_module("matplotlib")


def _check_writable(flag: str, path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"{flag} must name a file (got the folder {path}); add a file name to it")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not (folder.is_dir() and os.access(path if path.exists() else folder, os.W_OK)):
        raise ValueError(f"{flag} cannot be written at {path}: {folder} is no folder open to you; name another place")
