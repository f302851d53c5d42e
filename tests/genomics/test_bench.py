"""`sinuous bench sequences`: peers of equal size, and states that grow or do not."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sinuous.apps import cli
from sinuous.core.bench import measure
from sinuous.core.sequence_model import SequenceModel
from sinuous.genomics.bench import sequences
from sinuous.genomics.chem_xlstm import ChemXLSTM
from sinuous.genomics.xlstm import fit_xlstm

NAME = "chem_xlstm_nano"


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(function: Callable[..., Any], *arguments: Any, timeout: float) -> Any:
        return function(*arguments)

    monkeypatch.setattr(measure, "in_fresh_process", call)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command with a model that takes no time."""
    monkeypatch.setattr(sequences, "create_model", lambda name: ChemXLSTM(dim=32, depth=1, num_heads=2))


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    sequences.add_arguments(parser)
    return parser.parse_args(["--models", NAME, "--repeats", "1", "--tokens", "2", *arguments])


@pytest.mark.usefixtures("small")
def test_states_of_ours_do_not_grow_and_those_of_attention_do(tmp_path: Path) -> None:
    table, page = tmp_path / "s.csv", tmp_path / "s.md"
    words = ["--models", NAME, "--lengths", "24,48", "--train-up-to", "24", "--repeats", "1", "--tokens", "2"]
    assert cli.main(["bench", "sequences", *words, "--csv", str(table), "--markdown", str(page)]) == 0
    with table.open() as file:
        rows = list(csv.DictReader(file))
    by_place = {(int(row["length"]), row["model"]): row for row in rows}
    states = [float(by_place[length, NAME]["state_kb"]) for length in (24, 48)]
    assert states[0] == states[1] > 0
    states = [float(by_place[length, f"{NAME}: attention"]["state_kb"]) for length in (24, 48)]
    assert states[1] == pytest.approx(states[0] * 50 / 26)  # two letters are written
    for (length, name), row in by_place.items():
        assert bool(row["median_ms"]) is (length == 24)
        assert bool(row["read_tokens_per_s"]) is (sequences.NX_AI not in name)
        assert length == 24 or sequences.NX_AI not in name
    assert float(by_place[24, NAME]["ratio"]) == 1
    assert f"    sinuous bench sequences --models {NAME} --lengths 24,48 --train-up-to 24" in page.read_text()


@pytest.mark.parametrize("pattern", ["mlstm", "slstm", ("mlstm", "slstm")])
def test_peers_have_the_size_of_the_model(pattern: Any) -> None:
    model = ChemXLSTM(dim=128, depth=3, num_heads=4, pattern=pattern)
    size = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in sequences.of_attention(model).parameters()) == pytest.approx(size, rel=0.02)


@pytest.mark.parametrize("pattern", ["mlstm", "slstm", ("mlstm", "slstm")])
def test_nx_ais_model_is_ours(pattern: Any) -> None:
    pytest.importorskip("xlstm")
    model = ChemXLSTM(dim=64, depth=3, num_heads=4, pattern=pattern)
    peer = sequences.of_nx_ai(model, 9)
    state = {name: t for name, t in peer.state_dict().items() if "causal_mask" not in name}
    model.load_state_dict(fit_xlstm(state, model))
    ids = torch.randint(37, (2, 9))
    torch.testing.assert_close(model(ids), peer(ids), rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("small")
def test_a_missing_package_is_said_and_left_out(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sequences, "_has_nx_ai", lambda: False)
    assert sequences.peers_of(NAME) == [sequences.ATTENTION]
    assert "xlstm is not installed, so NX-AI's models are left out" in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_ours_alone_without_memory() -> None:
    (row,) = sequences.run(options("--lengths", "8", "--no-peers", "--no-memory"))
    assert row["peak_mb"] is None
    assert row["median_ms"] > 0
    assert row["tokens_per_s"] == pytest.approx(8e3 / row["median_ms"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "no_such"], "--models: there is no model 'no_such'"),
        (["--models", "vim_tiny_patch16_224"], "no model 'vim_tiny_patch16_224' of sequences"),
        (["--lengths", "0"], "--lengths must be positive integers"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sequences.run(options(*arguments))


def test_a_model_of_both_sides_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences, "create_model", lambda name: SequenceModel(12, 16, 1, "mlstm", causal=False))
    with pytest.raises(ValueError, match="sees both sides"):
        sequences.run(options())
