"""The experiments of the domain run: a few steps of training, validation and test."""

from __future__ import annotations

from pathlib import Path

import pytest

from sinuous.apps import cli

pytest.importorskip("lightning")

FAST = ["debug=fast", "trainer=cpu", "trainer.max_epochs=1", "data.batch_size=4", "data.eval_batch_size=4"]
SMALL = ["data.lengths={train:20,val:8,test:8}", "data.img_size=16"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "more"),
    [
        ("moving_clips", ["data.num_frames=4", "data.dataset.still=0.5", "+model.embed_dim=16", "+model.depth=2"]),
        ("needle_frames", []),
        ("needle", ["data.num_frames=20", "model.frozen=true"]),
        ("needle", ["data.num_frames=6", "model.depth=0", "model.global_pool=avg"]),
        ("needle", ["data.num_frames=6", "model.mixer=sliding_window_attention"]),
    ],
)
def test_an_experiment_runs(
    experiment: str,
    more: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SINUOUS_OUT", str(tmp_path))
    assert cli.main(["train", f"experiment=video/{experiment}", *FAST, *SMALL, *more]) == 0
    assert "test accuracy" in capsys.readouterr().out
