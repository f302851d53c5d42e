"""A run of `sinuous train` in this process, small enough for tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sinuous.apps import cli

TINY = [
    "experiment=vision/fashion_mnist",
    "data=vision/fashion_mnist_synthetic",
    "model=vision/timm",
    "model.model_name=test_resnet",
    "debug=fast",
]


@pytest.fixture
def sinuous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`sinuous(*arguments)` runs the command with its run folders under tmp_path."""
    monkeypatch.setenv("SINUOUS_OUT", str(tmp_path))
    monkeypatch.setattr(os, "environ", os.environ.copy())

    def run(*arguments: str) -> int:
        return cli.main(list(arguments))

    return run
