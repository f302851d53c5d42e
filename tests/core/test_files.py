"""Files are whole or not there, however a process ends."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sinuous.core.files import ended_in_order, written_whole


@pytest.fixture(autouse=True)
def _usual_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    with written_whole(tmp_path / "new" / "a.txt") as unfinished:
        unfinished.write_text("whole")
        assert not (tmp_path / "new" / "a.txt").exists()
    assert os.listdir(tmp_path / "new") == ["a.txt"]


@pytest.mark.parametrize("end", [lambda: os.kill(os.getpid(), signal.SIGTERM), lambda: 1 / 0])
def test_what_is_ended_leaves_the_old_file(end: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")

    def write() -> None:
        with written_whole(tmp_path / "a.txt") as unfinished:
            unfinished.write_text("half")
            end()

    with pytest.raises((SystemExit, ZeroDivisionError)) as caught:
        write()
    assert getattr(caught.value, "code", 143) == 143
    assert os.listdir(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_handlers_of_a_program_and_other_threads_are_left_alone() -> None:
    found: list[Any] = []

    def look() -> None:
        with ended_in_order():
            found.append(signal.getsignal(signal.SIGTERM))

    other = threading.Thread(target=look)
    other.start()
    other.join()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    look()
    assert found == [signal.SIG_DFL, signal.SIG_IGN]
