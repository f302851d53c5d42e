"""A run of `sinuous train` in this process, small enough for tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

from sinuous.apps import cli


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Sums split over threads differ in their last bits; the other process of a test has one thread too."""
    torch.set_num_threads(1)


@pytest.fixture
def sinuous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`sinuous(*arguments)` runs the command with its run folders under tmp_path."""
    monkeypatch.setenv("SINUOUS_OUT", str(tmp_path))

    def run(*arguments: str) -> int:
        with mock.patch.dict(os.environ):  # seeds that Lightning leaves for other processes
            return cli.main(list(arguments))

    return run
