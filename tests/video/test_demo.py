"""`sinuous demo video` finds and draws the scenes of a film."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from made_films import make_clip
from PIL import Image

from sinuous.apps import cli

pytest.importorskip("av")
pytest.importorskip("matplotlib")


def film(path: Path) -> Path:
    """Three scenes of 2, 3 and 1 seconds at 8 pictures a second."""
    rng = np.random.default_rng(0)
    scenes = [rng.integers(0, 255, (6, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1) for _ in range(3)]
    return make_clip(path, rate=8, count=48, pictures=[scenes[0]] * 16 + [scenes[1]] * 24 + [scenes[2]] * 8)


def test_scenes_are_found_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = film(tmp_path / "film.mp4"), tmp_path / "scenes.png"
    assert cli.main(["demo", "video", "--video", str(path), "--fps", "4", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "3 scene(s) in 6.0 s, 24 frames looked at" in printed
    assert "scenes begin at 0.00, 2.00, 5.00 s" in printed
    assert printed.rstrip().endswith(str(out))
    assert np.asarray(Image.open(out).convert("RGB")).std() > 10


def test_what_is_no_film_ends_with_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("no film\n" * 100)
    assert cli.main(["demo", "video", "--video", str(text)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert cli.main(["demo", "video"]) == 2
    assert "--video PATH" in capsys.readouterr().err
