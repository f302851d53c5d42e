"""`sinuous bench audio`: engines beside each other, clips together, and training."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from sinuous.apps import cli
from sinuous.audio import sashimi
from sinuous.audio.bench import audio
from sinuous.core.bench import measure
from sinuous.kernels import cpu


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(function: Callable[..., Any], *arguments: Any, timeout: float) -> Any:
        return function(*arguments)

    monkeypatch.setattr(measure, "in_fresh_process", call)


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    audio.add_arguments(parser)
    few = ["--samples", "40", "--steps", "3", "--context", "20", "--repeats", "1"]
    return parser.parse_args([*few, *arguments])


def test_a_row_for_each_engine_and_number_of_clips(tmp_path: Path) -> None:
    if cpu.interpreter_unavailable() is not None:
        pytest.skip("no C kernels here")
    table, page = tmp_path / "a.csv", tmp_path / "a.md"
    words = ["--models", "test_sashimi,test_wavenet", "--clips", "1,2", "--samples", "40", "--steps", "3"]
    written = ["--csv", str(table), "--markdown", str(page)]
    assert cli.main(["bench", "audio", *words, "--context", "20", "--repeats", "1", *written]) == 0
    with table.open() as file:
        rows = list(csv.DictReader(file))
    places = [(row["model"], row["clips"], row["engine"]) for row in rows]
    engines = ("c", "torch", "recomputation")
    assert places == [(m, n, e) for m in ("test_sashimi", "test_wavenet") for n in "12" for e in engines]
    for row in rows:
        rate = float(row["samples_per_s"])
        assert float(row["real_time"]) == pytest.approx(rate / int(row["clips"]) / 16000, rel=1e-3)
        one = next(r for r in rows if (r["model"], r["engine"], r["clips"]) == (row["model"], row["engine"], "1"))
        assert float(row["over_one_clip"]) == pytest.approx(rate / float(one["samples_per_s"]), rel=1e-3)
        if row["engine"] == "torch":
            assert float(row["over_torch"]) == 1
    assert "    sinuous bench audio --models test_sashimi,test_wavenet --clips 1,2" in page.read_text()


def test_a_model_that_the_engine_in_c_lacks_is_measured_without_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def other(name: str) -> nn.Module:
        return sashimi.test_sashimi(mixer="mamba", mixer_options={})

    monkeypatch.setattr(audio, "create_model", other)
    rows = audio.run(options("--models", "test_sashimi", "--clips", "1"))
    assert [row["engine"] for row in rows] == ["torch", "recomputation"]
    assert "this model has Mamba" in capsys.readouterr().err


def test_training_has_a_row_for_each_length_depth_and_mixer(monkeypatch: pytest.MonkeyPatch) -> None:
    def small(name: str, **kwargs: Any) -> nn.Module:
        return sashimi.test_sashimi(vocab_size=256, **kwargs)

    monkeypatch.setattr(audio, "create_model", small)
    rows = audio.run(options("--training", "--lengths", "24,48", "--layers", "1"))
    assert [(row["length"], row["layers"], row["mixer"]) for row in rows] == [
        (24, 1, "s4"), (24, 1, "s4d"), (48, 1, "s4"), (48, 1, "s4d"),
    ]  # fmt: skip
    for row in rows:
        assert row["samples_per_s"] == pytest.approx(row["length"] / row["seconds"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "no_such"], "--models: there is no model 'no_such'"),
        (["--models", "sashimi_backbone"], "sashimi_backbone draws no codes"),
        (["--clips", "0"], "--clips must be positive integers"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        audio.run(options(*arguments))
