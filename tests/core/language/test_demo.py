"""`sinuous demo language`: from a prompt to text, figures and files, or to one sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sinuous
from sinuous.apps import cli
from sinuous.core.generation import Token
from sinuous.core.language import demo
from sinuous.core.language.datasets import ByteText
from sinuous.core.language.drawing import wrapped
from sinuous.core.language.models import WEIGHTS
from sinuous.core.sequence_model import SequenceModel

SMALL = {"dim": 16, "depth": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a small untrained model of bytes."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "small"
    sinuous.save(sinuous.create_model("bytes_nano", **SMALL), folder)
    return str(folder)


@pytest.fixture
def run(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`run(*options)` in an empty folder, with the small model and 20 bytes to write unless told otherwise."""
    monkeypatch.chdir(tmp_path)
    return lambda *options: cli.main(["demo", "language", "--model", model, "--tokens", "20", *options])


def test_text_is_written_printed_and_drawn(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--prompt", "Änne", "--out", "new/a.txt", "--figure", "other/a.png") == 0
    printed = capsys.readouterr().out
    text = (tmp_path / "new/a.txt").read_bytes()
    assert text.startswith("Änne".encode())
    assert len(text) == len("Änne".encode()) + 20 + 1
    assert demo.printable(text[:-1].decode(errors="replace")) in printed
    assert "20 bytes" in printed
    assert printed.splitlines()[-2:] == ["new/a.txt", "other/a.png"]
    assert Image.open(tmp_path / "other/a.png").size[0] > 1000


def test_the_seed_decides_what_is_written(run: Any, tmp_path: Path) -> None:
    texts = []
    for seed in ("0", "0", "1"):
        assert run("--seed", seed) == 0
        texts.append((tmp_path / "sinuous_language.txt").read_bytes())
    assert texts[0] == texts[1] != texts[2]


def test_ones_own_text_is_measured_by_all_models(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "MEASURED", 40)
    monkeypatch.setattr(ByteText, "split", lambda self, name: _Split(b"a short text to learn from"))
    (tmp_path / "mine.txt").write_bytes(b"my text is not long but long enough; it goes on after what is scored")
    assert run("--text", "mine.txt") == 0
    printed = capsys.readouterr().out
    assert "bits per byte of mine.txt, its first 40 bytes" in printed
    for label in ("trigrams of bytes", "n-grams of 6 bytes", "xz after the training text"):
        assert label in printed


class _Split:
    def __init__(self, text: bytes) -> None:
        self.text = np.frombuffer(text, np.uint8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", ""], "--prompt must not be empty"),
        (["--tokens", "-3"], "--tokens must be at least 1 (got -3)"),
        (["--seed", "-1"], "--seed must be from 0"),
        (["--seed", str(2**63)], "--seed must be from 0"),
        (["--temperature", "-1"], "temperature must be 0 or more and finite (got -1.0)"),
        (["--temperature", "nan"], "temperature must be 0 or more and finite (got nan)"),
        (["--temperature", "0", "--top-p", "0.9"], "top_p has no effect at temperature 0"),
        (["--top-p", "2"], "top_p must lie above 0 and not above 1, or be None (got 2.0)"),
        (["--text", "absent.txt"], "absent.txt"),
        (["--text", "."], "give the path of a file"),
        (["--text", "one.txt"], "one.txt has 1 bytes"),
        (["--out", "."], "--out must be a text's file"),
        (["--figure", "folder.png"], "--figure must be a file that ends in .png"),
        (["--figure", "figure"], "--figure must be a file that ends in .png"),
        (["--out", "a.png", "--figure", "a.png"], "--out and --figure must be two files (got a.png for both)"),
        (["--model", "vim_nano.fashion_mnist"], "the demo needs a causal model of 256 bytes"),
        (["--model", "bytes_5m"], "bytes_5m"),
        (["--model", "nothing"], "nothing"),
    ],
)
def test_wrong_input_is_one_sentence_before_anything_is_written(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    (tmp_path / "one.txt").write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()
    assert run(*options) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.strip().count("\n") == 0
    assert out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.png", "one.txt"]


def test_ctrl_c_leaves_what_is_written(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> Iterator[Token]:
        yield from (Token(0, byte) for byte in b"so far")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "stream", interrupted)
    assert run("--prompt", "It went ") == 130
    assert (tmp_path / "sinuous_language.txt").read_bytes() == b"It went so far\n"
    assert "It went so far" in capsys.readouterr().out


def test_without_matplotlib_the_text_is_there_and_the_extra_is_named(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = demo.importlib.util.find_spec
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert run() == 0
    printed = capsys.readouterr().out
    assert "sinuous[train]" in printed
    assert printed.splitlines()[-1] == "sinuous_language.txt"
    assert not (tmp_path / "sinuous_language.png").exists()


def test_recorded_scores_are_those_of_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shipped:
        card = {"scores": {"test": {"bits_per_byte": 1.5}}, "baselines": {"xz": {"bits_per_byte": 2.5, "other": 1}}}

    monkeypatch.setattr(demo, "all_weights", lambda: {"a.b": Shipped})
    assert demo._recorded("a.b") == {"the model": 1.5, "xz": 2.5}
    assert demo._recorded("a.c") == {}


def test_surprisal_is_the_cross_entropy_in_windows() -> None:
    torch.manual_seed(0)
    model = SequenceModel(256, 16, 1).eval()
    text = bytes(range(40, 80))
    bits = demo.surprisal(model, text, window=16)
    assert bits.shape == (39,)
    ids = torch.tensor(list(text))
    for first, last in ((0, 16), (16, 32), (32, 39)):
        logits = model(ids[None, first:last])[0]
        nats = torch.nn.functional.cross_entropy(logits, ids[first + 1 : last + 1], reduction="none")
        torch.testing.assert_close(bits[first:last], nats / math.log(2))


def test_characters_add_up_their_bytes() -> None:
    text = "aé€".encode() + b"\xff" + b"b\x1b\xe2"
    bits = [1.0] * len(text)
    pairs = demo.characters(text, bits)
    assert pairs == [("a", 1), ("é", 2), ("€", 3), ("�", 1), ("b", 1), ("�", 1), ("�", 1)]
    cut_short = demo.characters(b"\xe2\x82a", [1.0, 1.0, 4.0])
    assert cut_short == [("�", 3), ("a", 3)]


def test_what_a_terminal_would_obey_is_replaced() -> None:
    assert demo.printable("a\x1b[2J\x07\x9b\n\tü") == "a�[2J��\n\tü"


def test_lines_break_at_spaces_and_keep_every_character() -> None:
    text = "one two three\nfour " + "x" * 25 + " end"
    lines = wrapped([(c, 0.0) for c in text], columns=10)
    assert ["".join(c for c, _ in line) for line in lines] == [
        "one two ", "three\n", "four ", "xxxxxxxxxx", "xxxxxxxxxx", "xxxxx end",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "position", "begin"),
    [
        (b"one\n\ntwo\n", 0, 0),
        (b"one\n\ntwo\n", -5, 0),
        (b"one\n\ntwo\n", 1, 5),
        (b"one\n\ntwo\n", 5, 5),
        (b"one\n\ntwo\n", 6, 6),  # no line begins later
        (b"no end of line", 4, 4),
    ],
)
def test_a_passage_begins_with_a_line(text: bytes, position: int, begin: int) -> None:
    assert demo._line_start(text, position) == begin


def test_the_demo_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--help"]) == 0
    assert "Write on from a prompt with a model of bytes" in " ".join(capsys.readouterr().out.split())


def test_shipped_cards_hold_what_the_demo_shows() -> None:
    for path in WEIGHTS.glob("*.json"):
        card = json.loads(path.read_text())
        assert {"xz", "trigrams of bytes"} <= card["baselines"].keys()
