"""The command chooses how OpenMP's threads wait, before torch is loaded; its user's choice wins."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sinuous.apps import threads

RUN = "from sinuous.apps.cli import main; main({arguments!r})"


def waits(code: str, **chosen: str) -> dict[str, str]:
    """Variables that GNU's OpenMP says it has read where `code` loads torch."""
    kept = {k: v for k, v in os.environ.items() if k not in threads.WAITING}
    environment = {**kept, "OMP_DISPLAY_ENV": "VERBOSE", **chosen}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    lines = [line.removeprefix("  [host]").strip().partition(" = ") for line in done.stderr.splitlines()]
    values = {name.strip(): value.strip("'") for name, _, value in lines}
    if "GOMP_SPINCOUNT" not in values:
        pytest.skip("the OpenMP runtime of this torch is not GNU's")
    return values


def test_the_command_shortens_the_spin_before_torch_is_loaded() -> None:
    assert waits(RUN.format(arguments=["models", "test_vim"]))["GOMP_SPINCOUNT"] == threads.SPIN_COUNT
    assert waits("import torch")["GOMP_SPINCOUNT"] != threads.SPIN_COUNT


def test_a_choice_of_the_user_wins() -> None:
    run = RUN.format(arguments=["models", "test_vim"])
    assert waits(run, GOMP_SPINCOUNT="77")["GOMP_SPINCOUNT"] == "77"
    passive = waits(run, OMP_WAIT_POLICY="PASSIVE", OMP_NUM_THREADS="2")
    assert passive["OMP_WAIT_POLICY"] == "PASSIVE"
    assert passive["GOMP_SPINCOUNT"] == "0"
    assert passive["OMP_NUM_THREADS"] == "2"


def test_nothing_is_set_where_torch_is_loaded_already(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in threads.WAITING:
        monkeypatch.delenv(name, raising=False)
    threads.choose_waiting()  # torch is loaded by the tests
    assert "GOMP_SPINCOUNT" not in os.environ


def test_one_line_says_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in threads.WAITING:
        monkeypatch.delenv(name, raising=False)
    assert threads.waiting(2).startswith("2 threads wait for each other as OpenMP does by default;")
    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")
    assert threads.waiting(2).startswith("2 threads wait for each other as GOMP_SPINCOUNT=10000;")
