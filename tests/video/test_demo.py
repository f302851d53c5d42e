"""`sinuous demo video` finds and draws the scenes of a film."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from made_films import make_clip
from PIL import Image

import sinuous
from sinuous.apps import cli

pytest.importorskip("av")
pytest.importorskip("matplotlib")

from sinuous.video.datasets import NeedleInVideo
from sinuous.video.demo import CLIP
from sinuous.video.evidence import MODEL, decisive_frames, read_evidence, reader_of
from sinuous.video.io import read_frames
from sinuous.vision.datasets import fashion_mnist


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
    assert cli.main(["demo", "video", "--model", "nobody"]) == 2
    assert "nobody" in capsys.readouterr().err


@pytest.fixture
def model(tmp_path: Path) -> str:
    torch.manual_seed(0)
    sinuous.save(sinuous.create_model("test_frame_reader"), tmp_path / "reader")
    return str(tmp_path / "reader")


def test_the_clip_is_the_one_that_its_seed_makes() -> None:
    clips = NeedleInVideo("test", 256, pictures=functools.partial(fashion_mnist, source="bundled"), seed=1)
    clip, label = clips[0]
    pixels, times = read_frames(CLIP)
    assert torch.equal(pixels, clip.transpose(0, 1).expand(-1, 3, -1, -1))
    assert times.tolist() == pytest.approx([number / 8 for number in range(256)], abs=1e-3)
    facts = json.loads(CLIP.with_suffix(".json").read_text())
    assert (tuple(facts["frames"]), tuple(facts["kinds"])) == clips.needle(0)
    assert facts["answer"] == clips.classes[label]


def test_answers_come_after_each_frame(model: str) -> None:
    reader = reader_of(model)
    evidence = read_evidence(reader, CLIP)
    assert evidence.probabilities.shape == (256, 12)
    clip = NeedleInVideo("test", 256, pictures=functools.partial(fashion_mnist, source="bundled"), seed=1)[0][0]
    with torch.no_grad():
        for stop in (1, 100, 256):
            logits = reader((clip[None, :, :stop].float() / 255 - 0.4) / 0.2)
            torch.testing.assert_close(evidence.probabilities[stop - 1], logits[0].softmax(-1), rtol=0, atol=1e-5)


def test_the_answer_rests_on_the_frames_without_which_it_is_least_probable(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    reader = sinuous.create_model("test_frame_reader").eval()
    reader.set_grad_checkpointing(layers=2, steps=5)
    x = torch.randn(1, 20, 16)

    def final(features: torch.Tensor) -> torch.Tensor:
        return reader.forward_head(reader.layers(features)).log_softmax(-1)

    with torch.no_grad():
        answer = int(final(x).argmax())
        without = x.repeat(20, 1, 1)
        without[range(20), range(20)] = x.mean(1)
        expected = final(without)[:, answer].argsort()[:3].sort().values.tolist()
    for steps in (1024, 7):  # parts that end between the frames
        monkeypatch.setattr("sinuous.video.evidence.STEPS", steps)
        assert decisive_frames(reader, x, 3) == expected
    assert decisive_frames(reader, x[:, :1], 2) == [0]
    layers = reader.layers
    assert (layers.grad_checkpointing, layers.checkpoint_layers, layers.checkpoint_steps) == (True, 2, 5)


def test_the_shipped_reader_tells_what_the_clip_hides_and_where() -> None:
    evidence = read_evidence(reader_of(MODEL), CLIP)
    facts = json.loads(CLIP.with_suffix(".json").read_text())
    assert evidence.answers[evidence.answer] == facts["answer"]
    assert evidence.decisive == facts["frames"]


def test_the_clip_is_read_and_drawn(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", "video", "--model", model]) == 0
    printed = capsys.readouterr().out
    assert "hidden are: trouser, then dress, at 20.00 s and 29.38 s" in printed
    assert printed.rstrip().endswith("needle.png")
    assert np.asarray(Image.open("needle.png").convert("RGB")).std() > 10
    assert cli.main(["demo", "video", "--model", model, "--video", str(film(tmp_path / "film.mp4"))]) == 0
    assert "hidden" not in capsys.readouterr().out


def test_without_weights_the_scenes_of_the_clip_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sinuous.video.demo.all_weights", dict)
    assert cli.main(["demo", "video"]) == 0
    printed = capsys.readouterr().out
    assert "do not come with this version" in printed
    assert "--model" in printed
    assert printed.rstrip().endswith("scenes.png")
