"""Sounds with a class: what a batch holds, official and hashed splits, and folders as people have them."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from pathlib import Path

import pytest
import torch

from sinuous.audio.datasets import (
    DIGITS,
    FAMILIES,
    LANGUAGES,
    WORDS,
    Notes,
    SpeechCommands,
    Voices,
    WaveChanges,
    notes,
    speech_commands,
    voices,
)
from sinuous.audio.datasets.clips import Clips
from sinuous.audio.datasets.notes import split_of
from sinuous.audio.io import write_audio

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("torchaudio")


def tone(samples: int) -> torch.Tensor:
    return 0.5 * torch.sin(torch.arange(samples) / 5)


def test_long_sounds_are_cut_in_the_middle_or_anywhere() -> None:
    wave = torch.arange(100.0)[None]
    assert torch.equal(Clips([wave], [3], 8000, samples=10)[0][0], wave[:, 45:55])
    assert Clips([wave], [3], 8000, samples=200)[0][0].shape == (1, 100)
    moved = Clips([wave], [3], 8000, samples=10, moved=True)
    starts = {int(moved[0][0][0, 0]) for _ in range(100)}
    assert len(starts) > 30
    assert starts <= set(range(91))
    assert all(moved[0][0].shape == (1, 10) for _ in range(10))


def pitch_of(wave: torch.Tensor) -> float:
    """Cycles a sample of the loudest frequency."""
    return int(torch.fft.rfft(wave[0], 2**16).abs().argmax()) / 2**16


def test_changes_move_pitch_colour_and_loudness_within_their_ranges() -> None:
    torch.manual_seed(0)
    wave = tone(4000)[None]
    moved = [WaveChanges(pitch=5)(wave) for _ in range(20)]
    assert all(other.shape == wave.shape for other in moved)
    halftones = [12 * math.log2(pitch_of(other) / pitch_of(wave)) for other in moved]
    assert -5.1 < min(halftones) < -2
    assert 2 < max(halftones) < 5.1
    loud = [float((WaveChanges(gain=12)(wave) / wave)[0, 1]) for _ in range(20)]
    assert 10**-0.6 <= min(loud) < 0.6
    assert 1.5 < max(loud) <= 10**0.6
    noisy = WaveChanges(noise=20)(wave) - wave
    assert 1e-4 < float(noisy.std() / wave.square().mean().sqrt()) < 0.11
    assert float((WaveChanges(tilt=0.5)(wave) - wave).abs().max()) > 0
    assert torch.equal(WaveChanges()(wave), wave)
    assert bool(WaveChanges(5, 0.5, 12, 20)(torch.zeros(1, 100)).isfinite().all())


@pytest.mark.parametrize("wrong", [{"pitch": 13}, {"tilt": 1.0}, {"gain": -1}, {"noise": -1}])
def test_changes_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=rf"changes\.{next(iter(wrong))} must"):
        WaveChanges(**wrong)


def test_only_training_changes_waves() -> None:
    data = Notes(change=torch.zeros_like)
    assert not data.split("train")[0][0].any()
    assert data.split("val")[0][0].any()
    assert Notes(change=torch.zeros_like, augment=False).split("train")[0][0].any()


def test_a_batch_says_where_shorter_sounds_end() -> None:
    data = Notes()
    waves, labels, more = data.collate([(tone(5)[None], 2), (tone(8)[None], 0)])
    assert waves.shape == (2, 1, 8)
    assert not waves[0, 0, 5:].any()
    assert labels.tolist() == [2, 0]
    assert more["lengths"].tolist() == [5, 8]
    assert len(data.collate([(tone(5)[None], 2), (tone(5)[None], 0)])) == 2


def test_whole_instruments_of_the_bundled_notes_are_held_out() -> None:
    data = Notes()
    programs = {name: {note.program for note, _ in data.waves() if split_of(note.program) == name} for name in
                ("train", "val", "test")}  # fmt: skip
    assert {name: len(found) for name, found in programs.items()} == {"train": 80, "val": 16, "test": 32}
    for name in ("train", "val", "test"):
        clips = notes(name)
        assert set(Counter(label for _, label in clips)) == set(range(16))
        assert all(wave.shape == (1, 8000) and float(wave.abs().max()) > 0.005 for wave, _ in clips)
    assert data.facts() == {"classes": list(FAMILIES), "sample_rate": 16000}
    assert data.model_options() == {"num_classes": 16, "sample_rate": 16000}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("a.wav,0,0.1,0,60,x", "line 2: a note must have file, start, seconds"),
        ("a.wav,0,0.1,128,60,90", "line 2: a note must have"),
        ("a.wav,0.05,0.1,1,60,90", r"a\.wav ends before the note that notes\.csv lists at 0\.05 s"),
        ("", "lists no note"),
    ],
)
def test_a_wrong_list_of_notes_is_a_sentence(row: str, said: str, tmp_path: Path) -> None:
    write_audio(tmp_path / "a.wav", tone(1600), 16000)
    with pytest.raises(FileNotFoundError, match="there is no list of notes"):
        notes("train", root=tmp_path)
    (tmp_path / "notes.csv").write_text(f"file,start,seconds,program,pitch,velocity\n{row}\n")
    with pytest.raises(ValueError, match=said):
        notes("train", root=tmp_path)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Five voices with prompts of different lengths, and what does not count."""
    for language in LANGUAGES:
        voice = tmp_path / f"asterisk-core-sounds-{language}-wav" / "sounds" / f"{language}_XX_f_Name"
        for folder in ("", "digits", "silence"):
            (voice / folder).mkdir(parents=True, exist_ok=True)
        for number in range(20):
            write_audio(voice / "digits" / f"{number}.wav", tone(2000 + 10 * number), 8000)
        write_audio(voice / "silence" / "1.wav", tone(8000), 8000)
        write_audio(voice / "short.wav", tone(1599), 8000)
        write_audio(voice / "quiet.wav", tone(8000) / 100, 8000)
        soundfile.write(voice / "nothing.wav", [], 8000)
    return tmp_path


def test_prompts_are_split_by_what_is_said(prompts: Path) -> None:
    data = Voices(prompts)
    names: dict[str, set[str]] = {}
    for split in ("train", "val", "test"):
        clips = data.split(split)
        names[split] = {path.name for path in clips.sounds}
        assert len(clips) == 5 * len(names[split])
        assert list(clips.lengths) == [wave.shape[1] for wave, _ in clips]
        assert Counter(label for _, label in clips) == dict.fromkeys(range(5), len(names[split]))
    assert names["train"].isdisjoint(names["val"] | names["test"])
    assert set.union(*names.values()) == {f"{number}.wav" for number in range(20)}
    for name in names["test"]:
        assert zlib.crc32(f"digits/{name}".encode()) % 10 == 9
    assert next(w.shape for w, _ in voices("test", root=prompts, sample_rate=4000, seconds=0.1)) == (1, 400)


def test_a_missing_voice_is_named(prompts: Path) -> None:
    (prompts / "asterisk-core-sounds-ru-wav" / "sounds" / "ru_XX_f_Name").rename(prompts / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"no voice ru_.*unpack asterisk-core-sounds-ru-wav"):
        voices("test", root=prompts)
    with pytest.raises(ValueError, match=r"give it with data\.root=FOLDER"):
        Voices().split("test")


@pytest.fixture
def words(tmp_path: Path) -> Path:
    for word in (*WORDS, "_background_noise_"):
        (tmp_path / word).mkdir()
        for name in ("a", "b", "c"):
            write_audio(tmp_path / word / f"{name}.wav", tone(1600), 16000)
    (tmp_path / "cat" / ".DS_Store").write_text("of a Mac")
    (tmp_path / "validation_list.txt").write_text("".join(f"{word}/a.wav\n" for word in WORDS))
    (tmp_path / "testing_list.txt").write_text("".join(f"{word}/b.wav\n" for word in WORDS))
    return tmp_path


def test_spoken_words_follow_the_official_lists(words: Path) -> None:
    data = SpeechCommands(words)
    assert data.num_classes == 35
    assert list(data.classes) == sorted(data.classes)
    for split, name in (("train", "c.wav"), ("val", "a.wav"), ("test", "b.wav")):
        clips = data.split(split)
        assert [path.name for path in clips.sounds] == [name] * 35
        assert [path.parent.name for path in clips.sounds] == list(data.classes)
        assert list(clips.labels) == list(range(35))
    digits = speech_commands("test", root=words, digits=True)
    assert [path.parent.name for path in digits.sounds] == list(DIGITS)
    assert digits[0][0].shape == (1, 1600)


def test_odd_folders_of_words_are_sentences(words: Path) -> None:
    (words / "cat" / "b.wav").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no cat/b\.wav, which testing_list\.txt lists"):
        speech_commands("test", root=words)
    for name in ("a", "c"):
        (words / "cat" / f"{name}.wav").unlink()
    with pytest.raises(FileNotFoundError, match=r"cat and the folders below it have no sound"):
        speech_commands("train", root=words)
    (words / "dog").rename(words / "hound")
    (words / "cat").rename(words / "dog")
    with pytest.raises(FileNotFoundError, match="has no folder 'cat'"):
        speech_commands("train", root=words)
    (words / "testing_list.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no list .*testing_list\.txt"):
        speech_commands("train", root=words)
    (words / "bed" / "c.wav").write_text("no sound")
