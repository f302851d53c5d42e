"""Sounds as codes: what a window holds, which samples belong to which split, and folders as people have them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sinuous.audio.codecs import codec
from sinuous.audio.datasets import SAMPLES, AudioFolder, HoldMusic, Music, audio_folder, hold_music, music
from sinuous.audio.datasets.coded import CodeWindows
from sinuous.audio.datasets.files import natural, sound_files
from sinuous.audio.datasets.hold_music import BLOCK, runs
from sinuous.audio.io import write_audio
from sinuous.core.tasks.language_modelling import IGNORED

pytest.importorskip("soundfile")
pytest.importorskip("torchaudio")


def ramp(samples: int, scale: float = 0.9) -> torch.Tensor:
    return torch.linspace(-scale, scale, samples)


def test_a_window_begins_from_silence_and_predicts_itself() -> None:
    wave, mu_law = ramp(1000), codec("mu_law")
    windows = CodeWindows([wave], mu_law, 300)
    assert [len(codes) for codes, _ in windows] == [300, 300, 300, 100]
    codes, following = windows[1]
    assert codes.dtype == following.dtype == torch.int64
    assert torch.equal(following, mu_law.encode(wave[300:600]))
    assert codes[0] == mu_law.silence
    assert torch.equal(codes[1:], following[:-1])


def test_windows_use_each_sample_once_and_overlap_by_the_stride() -> None:
    waves = [ramp(n) for n in (1000, 299, 300, 1)]
    targets = torch.cat([following for _, following in CodeWindows(waves, codec("mu_law"), 300)])
    assert torch.equal(targets, torch.cat([codec("mu_law").encode(wave) for wave in waves]))
    assert CodeWindows([ramp(1000)], codec("mu_law"), 300, 200).places == [(0, s) for s in (0, 200, 400, 600, 800)]
    assert CodeWindows([ramp(1000)], codec("mu_law"), 300, whole=True).places == [(0, 0), (0, 300), (0, 600)]


def test_moved_windows_stay_whole_and_within_their_wave() -> None:
    windows = CodeWindows([ramp(1000), ramp(100)], codec("mu_law"), 300, moved=True)
    starts = set()
    for _ in range(50):
        codes, following = windows[3]
        assert len(codes) == len(following) == 300
        codes, _ = windows[0]
        assert len(codes) == 300
        starts.add(int(windows[0][1][0]))
        assert len(windows[4][0]) == 100
    assert len(starts) > 10


def test_two_codes_a_sample_stay_together() -> None:
    windows = CodeWindows([ramp(100)], codec("pcm16_bytes"), 30)
    codes, following = windows[0]
    assert len(codes) == len(following) == 60
    assert torch.equal(following, codec("pcm16_bytes").encode(ramp(100)[:30]))


def test_shorter_windows_of_a_batch_end_in_what_does_not_count() -> None:
    data = HoldMusic(length=300)
    codes, following = data.collate(list(CodeWindows([ramp(500)], data.codec, 300)))
    assert codes.shape == following.shape == (2, 300)
    assert (following[1, 200:] == IGNORED).all()
    assert (codes[1, 200:] == data.codec.silence).all()
    assert (following[:, :200] != IGNORED).all()


def test_blocks_of_four_seconds_are_split_by_sixteen() -> None:
    track = torch.arange(20.5 * BLOCK)
    assert [(int(w[0]) // BLOCK, len(w) / BLOCK) for w in runs(track, "val")] == [(7, 1.0)]
    assert [(int(w[0]) // BLOCK, len(w) / BLOCK) for w in runs(track, "test")] == [(15, 1.0)]
    assert [(int(w[0]) // BLOCK, len(w) / BLOCK) for w in runs(track, "train")] == [(0, 7.0), (8, 7.0), (16, 4.5)]


def test_the_bundled_music_has_every_split() -> None:
    sizes = {name: sum(len(codes) for codes, _ in hold_music(name, length=BLOCK)) for name in ("train", "val", "test")}
    assert sizes == {"train": 28 * BLOCK, "val": 2 * BLOCK, "test": 2 * BLOCK}
    data = HoldMusic(length=1000)
    assert len(data.split("test")) == 2
    assert data.example().shape == (1, 1000)
    assert data.facts() == {
        "unit": "sample", "codec": "mu_law", "bits": 8, "sample_rate": 8000, "vocab_size": 256
    }  # fmt: skip
    assert sum(file.stat().st_size for file in SAMPLES.rglob("*") if file.is_file()) <= 2_000_000


def test_hold_music_from_a_folder_of_any_rate(tmp_path: Path) -> None:
    (tmp_path / "moh").mkdir()
    write_audio(tmp_path / "moh" / "a.WAV", torch.stack([ramp(16000 * 64)] * 2), 16000)
    (tmp_path / ".hidden.wav").write_text("no sound")
    (tmp_path / "copyright.txt").write_text("a text")
    windows = hold_music("test", length=BLOCK, root=tmp_path)
    assert [len(codes) for codes, _ in windows] == [BLOCK]
    write_audio(tmp_path / "moh" / "a.WAV", ramp(8000), 8000)
    with pytest.raises(ValueError, match="has no part for val"):
        hold_music("val", length=BLOCK, root=tmp_path)


def test_other_packages_beside_hold_music_are_left_out(tmp_path: Path) -> None:
    for name, seconds in (("music/usr/share/asterisk/moh/a.wav", 64), ("sounds/usr/share/asterisk/sounds/hi.wav", 65)):
        (tmp_path / name).parent.mkdir(parents=True)
        write_audio(tmp_path / name, torch.zeros(1, 8000 * seconds), 8000)
    assert [len(track) for track in HoldMusic(root=tmp_path).tracks()] == [8000 * 64]


def test_where_hold_music_comes_from_is_said_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="source must be 'bundled' or 'folder'"):
        hold_music("val", length=10, source="download")
    with pytest.raises(ValueError, match="bundled reads no folder"):
        hold_music("val", length=10, source="bundled", root=tmp_path)
    with pytest.raises(ValueError, match=r"give it with data\.root=FOLDER"):
        hold_music("val", length=10, source="folder")
    with pytest.raises(ValueError, match="split must be one of"):
        hold_music("validation", length=10)
    with pytest.raises(ValueError, match="no codec 'mulaw'; did you mean"):
        HoldMusic(codec="mulaw")
    with pytest.raises(ValueError, match=r"data\.stride must be at least 1"):
        HoldMusic(stride=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty files of 0.1 to 2 s at several rates, and what else lies about."""
    for number in range(1, 21):
        rate = (8000, 16000, 11025)[number % 3]
        write_audio(tmp_path / f"{number}.{('wav', 'FLAC')[number % 2]}", ramp(rate // 10 * number), rate)
    (tmp_path / "._1.wav").write_bytes(b"of a Mac")
    (tmp_path / "notes.txt").write_text("no sound")
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_files_of_a_folder_are_split_in_natural_order(folder: Path) -> None:
    data = AudioFolder(folder, sample_rate=8000)
    names = {name: [file.name for file in data.files(name)] for name in ("train", "val", "test")}
    assert names == {
        "train": [f"{n}.{('wav', 'FLAC')[n % 2]}" for n in range(1, 18)],
        "val": ["18.wav"],
        "test": ["19.FLAC", "20.wav"],
    }
    (windows,) = (audio_folder("val", root=folder, length=10**6, sample_rate=8000),)
    assert [len(codes) for codes, _ in windows] == [14400]
    assert natural("b10a") > natural("b9z")


def test_folders_of_splits_are_taken_as_they_are(tmp_path: Path) -> None:
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
        write_audio(tmp_path / name / "a.wav", ramp(100), 16000)
    with pytest.raises(ValueError, match="has a folder train and no folder test"):
        audio_folder("train", root=tmp_path, length=10)
    (tmp_path / "test").mkdir()
    with pytest.raises(FileNotFoundError, match=r"have no sound; files ending with \.wav"):
        audio_folder("test", root=tmp_path, length=10)
    assert len(audio_folder("val", root=tmp_path, length=50)) == 2


def test_odd_folders_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        audio_folder("train", root=tmp_path / "nowhere", length=10)
    (tmp_path / "music.deb").write_bytes(b"!<arch>")
    with pytest.raises(ValueError, match=r"got the file .*music\.deb\); unpack it \(dpkg -x music\.deb FOLDER\)"):
        audio_folder("train", root=tmp_path / "music.deb", length=10)
    with pytest.raises(ValueError, match=r"holds music\.deb, which is still packed"):
        sound_files(tmp_path)
    for number in range(3):
        write_audio(tmp_path / f"{number}.wav", ramp(100), 16000)
    with pytest.raises(ValueError, match="has 3 sound files, too few"):
        audio_folder("train", root=tmp_path, length=10)
    with pytest.raises(ValueError, match=r"no window of 200 samples, as the longest wave has 100"):
        CodeWindows([ramp(100)], codec("mu_law"), 200, whole=True)
    (tmp_path / "0.wav").write_text("no sound")
    for number in range(3, 20):
        write_audio(tmp_path / f"{number}.wav", ramp(100), 16000)
    with pytest.raises(ValueError, match=r"0\.wav is no sound that can be read"):
        audio_folder("train", root=tmp_path, length=10)


def test_published_music_has_the_recipe_of_its_figures(folder: Path) -> None:
    for name, length, codes in (("beethoven", 128000, "linear_s4"), ("youtubemix", 131072, "mu_law_s4")):
        data = Music(name, folder)
        assert (data.length, data.eval_length, data.codec.name, data.sample_rate) == (length, length, codes, 16000)
        assert not data.augment
    # Windows are stretched to the whole range, and what is left at the end of a file is left out.
    windows = music("test", root=folder, length=15000)
    assert [len(codes) for codes, _ in windows] == [15000] * 4
    assert int(windows[0][1].min()) == 0
    assert int(windows[0][1].max()) == 255
    with pytest.raises(ValueError, match=r"no data\.name 'betoven'; did you mean 'beethoven'"):
        Music("betoven", folder)


def test_spoken_digits_are_split_by_the_official_lists(tmp_path: Path) -> None:
    digits = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    for digit in (*digits, "cat"):
        (tmp_path / digit).mkdir()
        for name in ("a", "b", "c"):
            write_audio(tmp_path / digit / f"{name}.wav", ramp(12000), 16000)
    (tmp_path / "validation_list.txt").write_text("".join(f"{d}/b.wav\n" for d in (*digits, "cat")))
    (tmp_path / "testing_list.txt").write_text("zero/c.wav\n")
    assert [len(music(name, name="sc09", root=tmp_path)) for name in ("train", "val", "test")] == [19, 10, 1]
    assert [len(codes) for codes, _ in music("test", name="sc09", root=tmp_path)] == [12000]
