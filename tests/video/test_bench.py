"""`sinuous bench clips` counts wrong pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sinuous.apps import cli
from sinuous.video.bench import clips

pytest.importorskip("av")


def off_by_two(path: str, times: list[float]) -> Any:
    return clips.by_sinuous(path, [time + 2 / 25 for time in times])


def broken(path: str, times: list[float]) -> Any:
    raise RuntimeError("Could not load it.\nA library is missing.")


def test_pictures_tell_their_number() -> None:
    for number, picture in enumerate(clips.numbered(70)):
        assert clips.number_of(np.repeat(picture[:, :, None], 3, 2)) == number


def test_uneven_films_have_fewer_pictures_in_every_second_part() -> None:
    even, uneven = (clips.times_of(40, 10, kind) for kind in (False, True))
    assert (len(even), len(uneven)) == (400, 325)
    assert set(np.diff(uneven).round(6)) == {0.1, 0.2}


def test_wrong_pictures_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    others = {"off": ("sinuous", off_by_two), "absent": ("no_such", off_by_two), "broken": ("sinuous", broken)}
    readers = [clips.Reader(name, *other) for name, other in others.items()]
    monkeypatch.setattr(clips, "READERS", (clips.READERS[0], *readers))
    page = tmp_path / "clips.md"
    small = ["--seconds", "20", "--pictures", "4", "--group", "50", "--repeats", "1"]
    assert cli.main(["bench", "clips", *small, "--markdown", str(page)]) == 0
    told, errors = capsys.readouterr()
    assert "broken is left out: Could not load it.\n" in errors
    rows = [line.split("|")[1:6] for line in page.read_text().splitlines() if line.startswith(("| even", "| uneven"))]
    assert [[cell.strip() for cell in row[:2] + row[3:]] for row in rows] == [
        ["even", "sinuous", "0", "0"],
        ["even", "off", "4", "2"],
        ["uneven", "sinuous", "0", "0"],
        ["uneven", "off", "4", "2"],
    ]
    assert str(page) in told
