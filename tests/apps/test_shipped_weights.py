from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sinuous.apps.evaluate import with_experiment
from sinuous.core.weights import Weights, all_weights


@pytest.mark.parametrize("name", all_weights())
def test_shipped_weights_give_the_recorded_scores_of_their_part(
    name: str, sinuous: Callable[..., int], tmp_path: Path
) -> None:
    part = all_weights()[name].card["part"]
    assert sinuous("eval", f"weights={name}", *part["overrides"], f"split={part['split']}", "trainer=cpu") == 0
    (file,) = tmp_path.rglob("scores.json")
    scores = json.loads(file.read_text())[part["split"]]
    assert {key: scores[key] for key in part["scores"]} == pytest.approx(part["scores"], abs=1e-6, rel=0)


@pytest.mark.parametrize(
    ("part", "words", "expected"),
    [
        (["data=birds/bundled"], [], ["data=birds/bundled"]),
        (["data=birds/bundled"], ["data.root=songs"], ["data.root=songs"]),
        (["data.eval_limit=8"], [], []),  # of data that come with the package: all of them are scored
    ],
)
def test_a_part_stands_for_data_that_are_not_there(
    monkeypatch: pytest.MonkeyPatch, part: list[str], words: list[str], expected: list[str]
) -> None:
    card = {"experiment": "birds/songs", "overrides": ["seed=1"], "part": {"overrides": part}}
    weights = Weights("a.b", "a", "b", Path("a.b.safetensors"), card)
    monkeypatch.setattr("sinuous.apps.evaluate.find_weights", lambda name: weights)
    words = ["weights=a.b", *words]
    begin, *middle, end = [word for word in with_experiment(words) if word not in ("seed=1", "weights=a.b")]
    assert begin == "experiment=birds/songs"
    assert [word for word in (*middle, end) if not word.startswith("checkpoint_path=")] == expected
