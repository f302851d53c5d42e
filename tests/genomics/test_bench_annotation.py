"""`sinuous bench annotation`: labelling in parts and at once."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sinuous
from sinuous.apps import cli
from sinuous.core.bench import measure
from sinuous.genomics.bench import annotation
from sinuous.genomics.dna_xlstm import dna_xlstm_nano


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model that takes no time, and one process for all calls."""

    def call(function: Callable[..., Any], *arguments: Any, timeout: float) -> Any:
        return function(*arguments)

    monkeypatch.setattr(measure, "in_fresh_process", call)
    torch.manual_seed(0)
    model = dna_xlstm_nano(dim=32, depth=1, num_heads=2, head="position", num_classes=3, strands="shared")
    sinuous.save(model, tmp_path / "model")
    return str(tmp_path / "model")


def test_a_row_for_each_length_and_way_and_a_picture(folder: str, tmp_path: Path) -> None:
    table, page, figure = tmp_path / "a.csv", tmp_path / "a.md", tmp_path / "a.png"
    words = ["--model", folder, "--lengths", "300,900", "--whole-up-to", "300", "--chunk", "128"]
    outputs = ["--csv", str(table), "--markdown", str(page), "--figure", str(figure)]
    pytest.importorskip("matplotlib")
    assert cli.main(["bench", "annotation", *words, *outputs]) == 0
    with table.open() as file:
        rows = [(int(row["length"]), row["way"]) for row in csv.DictReader(file)]
    assert rows == [(300, "streamed"), (300, "whole"), (900, "streamed")]
    assert "--lengths 300,900" in page.read_text()
    assert figure.stat().st_size > 1000


def test_bases_come_from_the_file_if_there_is_one(folder: str, tmp_path: Path) -> None:
    fasta = tmp_path / "some.fa"
    fasta.write_text(">one\nACGTN\n")
    model: Any = sinuous.load(folder)
    assert torch.equal(annotation.letters(model, 5, fasta).long(), model.tokenizer.encode("ACGTN"))
    with pytest.raises(ValueError, match=r"--lengths must be at most 5, as .*some.fa begins with so many"):
        annotation.letters(model, 6, fasta)
    random = annotation.letters(model, 1000, None)
    assert set(random.tolist()) == set(model.tokenizer.natural.tolist())


def test_a_model_that_labels_no_bases_is_refused(folder: str, tmp_path: Path) -> None:
    sinuous.save(dna_xlstm_nano(dim=32, depth=1, num_heads=2), tmp_path / "other")
    assert cli.main(["bench", "annotation", "--model", str(tmp_path / "other")]) == 2
