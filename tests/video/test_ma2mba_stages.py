"""The three stages in which Video-Ma2mba is trained: what is learned, of made clips and of a folder, and their runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sinuous.apps import cli
from sinuous.video.datasets import NeedleInVideo
from sinuous.video.film_texts import FilmTexts
from sinuous.video.lessons import FilmLessons, NeedleLessons
from sinuous.video.text_tokens import ByteTokens, Script
from sinuous.vision.datasets import fashion_mnist

SIZES: dict[str, Any] = {"num_frames": 6, "img_size": 32}


def needles(split: str, num_frames: int, **options: Any) -> NeedleInVideo:
    return NeedleInVideo(split, num_frames, pictures=fashion_mnist, **options)


def lessons(split: str, kind: str = "questions", **options: Any) -> NeedleLessons:
    return NeedleLessons(split, kind=kind, needles=needles, **options)


def written(ids: torch.Tensor) -> str:
    return "".join("#" if i == 256 else "/" if i == 0 else chr(i) for i in ids.tolist())


def test_targets_are_the_next_tokens_of_what_is_learned() -> None:
    script = Script(ByteTokens(), 256, 2)
    script.read("<|user|>")
    script.watch(2)
    script.ask("why?")
    script.say("so")
    ids, targets = script.pair()
    assert written(ids) == "<|user|>####why?/<|assistant|>so"
    assert written(targets[targets != -100]) == "so/"
    assert torch.equal(targets[targets != -100], torch.cat([ids[1:], torch.tensor([0])])[targets != -100])


@pytest.mark.parametrize("kind", ["captions", "scenes", "questions"])
def test_lessons_tell_the_needles(kind: str) -> None:
    made = lessons("test", kind, length=5, **SIZES)
    clips = needles("test", 6, img_size=32, length=5)
    data = FilmTexts(lambda *_, **__: made, length=256, tokens_per_frame=1, **SIZES)
    rows = data.split("test")
    for index in range(5):
        (places, kinds), clip = clips.needle(index), clips[index][0]
        ids, targets, frames = rows[index]
        learned = written(targets[targets != -100])
        assert frames.dtype == torch.uint8
        assert written(ids).count("#") == len(frames)
        if kind == "captions":
            assert learned == f"{kinds[index % 2]}/"
            assert torch.equal(frames, clip[:, places[index % 2]].expand(3, -1, -1)[None])
        elif kind == "questions":
            assert learned == f"{kinds[0]}/{kinds[1]}/"
            assert written(ids).startswith("<|user|>######Which item came first?/<|assistant|>")
        else:
            scenes = [[k for p, k in zip(places, kinds, strict=True) if p // 2 == n] for n in range(3)]
            assert learned == "".join((", ".join(scene) or "nothing") + ". " for scene in scenes)
            assert written(ids).startswith("##" + learned.partition(".")[0] + ". ##")


def test_batches_are_filled_with_ends_that_are_not_learned() -> None:
    data = FilmTexts(lessons, length=256, tokens_per_frame=1, **SIZES, lengths={"train": 8})
    rows = data.split("train")
    assert len(rows) == 8
    ids, targets, more = data.collate([rows[i] for i in range(8)])
    assert ids.shape == targets.shape
    assert more["frames"].shape == (8, 6, 3, 32, 32)
    for row in range(8):
        length = len(rows[row][0])
        assert torch.equal(ids[row, :length], rows[row][0])
        assert set(ids[row, length:].tolist()) <= {0}
        assert set(targets[row, length:].tolist()) <= {-100}


def test_rows_that_are_too_short_for_their_films_are_told() -> None:
    with pytest.raises(ValueError, match=r"data.length=9 must be enough .* \(got a row of \d+ tokens\)"):
        FilmTexts(lessons, length=9, tokens_per_frame=4, **SIZES).split("val")[0]
    with pytest.raises(ValueError, match="text is bytes, 256 tokens, and the model has 100"):
        FilmTexts(lessons, length=9, tokens_per_frame=4, vocab_size=100, **SIZES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pytest.importorskip("av")
    from made_films import make_clip

    make_clip(tmp_path / "a.mp4", codec="mpeg4", count=8, rate=1)
    talk = [
        {"from": "human", "value": "<video>\nWhat happens?"},
        {"from": "gpt", "value": "A dog runs."},
        {"from": "human", "value": "Where?"},
        {"from": "gpt", "value": "Home."},
    ]
    scenes = [{"start": 0, "stop": 4, "caption": "A street."}, {"start": 4, "stop": 8, "caption": "A door."}]
    entries = [
        {"video": "a.mp4", "conversations": talk},
        {"video": "a.mp4", "scenes": scenes},
        {"video": "a.mp4", "conversations": [{"from": "gpt", "value": "A film."}]},
        {"film": "a.mp4"},
    ]
    for split in ("train", "test"):
        (tmp_path / f"{split}.json").write_text(json.dumps(entries))
    return tmp_path


def test_folders_in_the_layout_of_llava(folder: Path) -> None:
    data = FilmTexts(lessons, root=folder, length=256, tokens_per_frame=1, num_frames=3, img_size=32)
    rows = data.split("test")
    expected = [
        "<|user|>###What happens?/<|assistant|>A dog runs./<|user|>Where?/<|assistant|>Home.",
        "###A street. ###A door.",
        "###A film.",
    ]
    said = ["A dog runs./Home./", "A street. A door. ", "A film./"]
    for index in range(3):
        ids, targets, frames = rows[index]
        assert written(ids) == expected[index]
        assert written(targets[targets != -100]) == said[index]
        assert len(frames) == (6 if index == 1 else 3)
    with pytest.raises(ValueError, match=r"entry 3 of .*test\.json must have video \(or image\)"):
        rows[3]
    with pytest.raises(FileNotFoundError, match=r"has no val\.json"):
        data.split("val")
    with pytest.raises(ValueError, match=r"same number of frames \(got 3 and 6\); give data.batch_size=1"):
        data.collate([rows[0], rows[1]])


def test_frames_of_a_rate_are_cut_at_the_most(folder: Path) -> None:
    for fps, count in ((1.0, 5), (0.5, 4)):
        made = FilmLessons("train", root=folder, num_frames=5, img_size=32, fps=fps, length=2)
        assert len(made) == 2
        assert len(made[0][0]) == count


FAST = ["debug=fast", "trainer=cpu", "trainer.max_epochs=1", "data.batch_size=4", "data.eval_batch_size=4"]


@pytest.mark.slow
def test_the_stages_run_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lightning")
    monkeypatch.setenv("SINUOUS_OUT", str(tmp_path))
    small = [*FAST, "data.lengths={train:8,val:4,test:4}"]
    weights: list[str] = []
    for stage in ("alignment", "long_video", "instruction"):
        assert cli.main(["train", f"experiment=video/ma2mba_{stage}", *small, *weights]) == 0
        assert "test bits per byte" in capsys.readouterr().out
        newest = max(tmp_path.rglob("*.safetensors"), key=lambda file: file.stat().st_mtime)
        weights = [f"model.checkpoint_path={newest}"]
