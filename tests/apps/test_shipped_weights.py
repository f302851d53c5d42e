from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sinuous.core.weights import all_weights


@pytest.mark.slow
@pytest.mark.parametrize("name", all_weights())
def test_shipped_weights_give_the_recorded_scores_of_their_part(
    name: str, sinuous: Callable[..., int], tmp_path: Path
) -> None:
    part = all_weights()[name].card["part"]
    assert sinuous("eval", f"weights={name}", *part["overrides"], f"split={part['split']}", "trainer=cpu") == 0
    (file,) = tmp_path.rglob("scores.json")
    scores = json.loads(file.read_text())[part["split"]]
    assert {key: scores[key] for key in part["scores"]} == pytest.approx(part["scores"], abs=1e-6, rel=0)
