"""The page of recurrences says what the code declares."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sinuous.apps import recurrences

PAGE = Path(__file__).parents[2] / "docs" / "recurrences.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == recurrences.markdown(), "run `sinuous info recurrences --markdown docs/recurrences.md`"


def test_every_op_and_mixer_says_all_of_itself() -> None:
    for row in [*recurrences.ops(), *recurrences.all_mixers()]:
        assert [column for column, text in row.items() if not text] == [], row


def test_info_prints_both_tables(sinuous: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert sinuous("info", "recurrences") == 0
    told = capsys.readouterr().out
    assert "gated_delta_net" in told
    assert "selective_scan" in told
