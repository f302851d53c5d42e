"""Files of sound as people have them: what is there comes back, and what is wrong is one sentence with the name."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sinuous.audio import io_reading
from sinuous.audio.io import AudioWriter, audio_info, read_audio, resample, write_audio

soundfile = pytest.importorskip("soundfile")
RATE = 48000
FORMATS = ["wav", "flac", "ogg", "opus", "mp3", "aiff"]


@pytest.fixture
def sweep() -> torch.Tensor:
    seconds = torch.arange(RATE) / RATE
    return torch.stack([0.4 * torch.sin(2000 * seconds + 4000 * seconds**2), 0.2 * torch.sin(5000 * seconds)])


@pytest.mark.parametrize("ending", ["wav", "flac", "aiff"])
def test_whole_numbers_come_back_to_the_bit(ending: str, tmp_path: Path) -> None:
    codes = torch.randint(-(2**15), 2**15, (2, 5000))
    path = write_audio(tmp_path / f"noise.{ending}", codes / 2**15, 1234)
    wave, rate = read_audio(path)
    assert rate == 1234
    assert wave.dtype == torch.float32
    assert torch.equal((wave * 2**15).long(), codes)


@pytest.mark.parametrize("ending", FORMATS)
def test_a_part_is_a_slice_of_the_whole_and_the_length_is_what_is_read(
    ending: str, sweep: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(io_reading, "BLOCK", 1000)
    path = write_audio(tmp_path / f"sweep.{ending.upper()}", sweep, RATE)
    whole, rate = read_audio(path)
    info = audio_info(path)
    assert (info.sample_rate, info.channels, info.frames) == (rate, 2, whole.shape[1])
    assert info.seconds == whole.shape[1] / rate
    assert (whole[:, : RATE // 2] - sweep[:, : RATE // 2]).abs().max() < 0.05
    for start, seconds in ((0.0, 0.1), (0.3, 0.25), (0.7, None), (0.9, 5.0)):
        part, _ = read_audio(path, start=start, seconds=seconds)
        first = round(start * rate)
        last = None if seconds is None else first + round(seconds * rate)
        assert torch.equal(part, whole[:, first:last])


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW"])
def test_every_depth_of_wav_is_read(subtype: str, sweep: torch.Tensor, tmp_path: Path) -> None:
    path = write_audio(tmp_path / "four.wav", sweep.repeat(2, 1), RATE, subtype=subtype)
    assert audio_info(path).subtype == subtype
    wave, _ = read_audio(path)
    assert wave.shape == (4, RATE)
    assert (wave - sweep.repeat(2, 1)).abs().max() < (0.02 if subtype in ("PCM_U8", "ULAW") else 1e-6)


def test_another_rate_and_one_channel_on_request(sweep: torch.Tensor, tmp_path: Path) -> None:
    path = write_audio(tmp_path / "sweep.wav", sweep, RATE, subtype="FLOAT")
    mono, rate = read_audio(path, sample_rate=8000, mono=True)
    assert rate == 8000
    torch.testing.assert_close(mono, resample(sweep.mean(0, keepdim=True), RATE, 8000))


def test_a_mean_of_channels_does_not_clip_and_lossy_peaks_stay(tmp_path: Path) -> None:
    path = write_audio(tmp_path / "loud.wav", torch.tensor([[1.5, -2.0], [1.5, 2.0]]), 8000, subtype="FLOAT")
    assert read_audio(path, mono=True)[0].tolist() == [[1.5, 0.0]]


def test_silence_is_sound(tmp_path: Path) -> None:
    assert not read_audio(write_audio(tmp_path / "silent.flac", torch.zeros(100), 8000))[0].any()


def wav(samples: int, data: int, rate: int = 8000, channels: int = 1) -> bytes:
    """A WAV of 16 bits whose header says that it has `data` bytes."""
    head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", min(data + 36, 2**32 - 1), b"WAVE", b"fmt ", 16, 1, channels,
                       rate, 2 * channels * rate % 2**32, 2 * channels, 16, b"data", data)  # fmt: skip
    return head + np.arange(samples, dtype="<i2").tobytes()


def test_what_is_there_counts_and_not_the_header(tmp_path: Path) -> None:
    path = tmp_path / "piped.wav"
    for promised in (2**32 - 1, 4000, 600):  # of a pipe, cut off, exact
        path.write_bytes(wav(300, promised))
        assert read_audio(path)[0].shape == (1, 300)
    path.write_bytes(wav(300, 0))
    with pytest.raises(ValueError, match=r"piped\.wav has no sound: its header promises none"):
        read_audio(path)


def test_chunks_of_odd_length_and_extensible_headers_are_read(tmp_path: Path) -> None:
    path, content = tmp_path / "odd.wav", wav(300, 600)
    odd = b"LIST" + struct.pack("<I", 5) + b"INFOx\0"
    path.write_bytes(content[:36] + odd + content[36:] + b"junk" + struct.pack("<I", 3) + b"abc\0")
    assert torch.equal(read_audio(path)[0][0] * 2**15, torch.arange(300.0))
    kind = bytes.fromhex("0100000000001000800000aa00389b71")  # whole numbers
    extensible = struct.pack("<HHIIHHHHI16s", 0xFFFE, 2, 8000, 32000, 4, 16, 22, 16, 3, kind)
    path.write_bytes(content[:16] + struct.pack("<I", len(extensible)) + extensible + content[36:])
    assert torch.equal(read_audio(path)[0].mT.flatten() * 2**15, torch.arange(300.0))


def test_the_mean_of_four_channels_is_one(sweep: torch.Tensor, tmp_path: Path) -> None:
    path = write_audio(tmp_path / "four.wav", sweep.repeat(2, 1) * torch.tensor([[1.0], [1.0], [-1.0], [3.0]]), RATE,
                       subtype="FLOAT")  # fmt: skip
    wave, _ = read_audio(path, mono=True)
    torch.testing.assert_close(wave[0], sweep[1])


def test_content_counts_and_not_the_ending_of_the_name(sweep: torch.Tensor, tmp_path: Path) -> None:
    for ending in ("flac", "mp3"):
        path = write_audio(tmp_path / f"sweep.{ending}", sweep, RATE)
        expected, _ = read_audio(path)
        assert torch.equal(read_audio(path.rename(tmp_path / "other.wav"))[0], expected)


def test_headers_without_a_rate_channels_or_samples_are_sentences(tmp_path: Path) -> None:
    facts = (4096 << 128 + 128) | (4096 << 112 + 128) | (8000 << 44 + 128) | (15 << 36 + 128)
    empty = {
        "rate.wav": wav(300, 600, rate=0),
        "fast.wav": wav(300, 600, rate=2**32 - 1),
        "channels.wav": wav(300, 600, channels=0),
        "none.flac": b"fLaC" + bytes([0x80, 0, 0, 34]) + facts.to_bytes(34, "big"),
    }
    for name, content in empty.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name) as caught:
            read_audio(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_file_that_may_not_be_read_is_a_sentence(
    sweep: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_audio(tmp_path / "secret.wav", sweep, RATE)

    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refused)  # chmod does not stop the superuser
    with pytest.raises(
        ValueError, match=r"secret\.wav cannot be opened \(Permission denied\); give a file that may be"
    ):
        read_audio(path)


@pytest.mark.parametrize("ending", FORMATS)
def test_a_cut_file_gives_sound_or_one_sentence(ending: str, sweep: torch.Tensor, tmp_path: Path) -> None:
    path = write_audio(tmp_path / f"sweep.{ending}", sweep, RATE)
    content = path.read_bytes()
    for share in (0.001, 0.01, 0.3, 0.9):
        path.write_bytes(content[: round(len(content) * share) + 1])
        wave = sentence = None
        try:
            wave, _ = read_audio(path)
        except ValueError as error:
            sentence = str(error)
        assert (wave is None) != (sentence is None)
        assert wave is None or 0 < wave.shape[1] <= RATE
        assert sentence is None or (str(path) in sentence and "\n" not in sentence)


def test_files_that_are_no_sound_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("no sound at all " * 100)
    (tmp_path / "text.raw").write_text("no sound at all " * 100)
    for name, said in (
        ("empty.wav", "is empty"),
        ("text.wav", "is no sound that can be read"),
        ("text.raw", "is no sound that can be read"),
        ("", "is a folder"),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            read_audio(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        with pytest.raises(ValueError, match=said):
            audio_info(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere\.wav"):
        read_audio(tmp_path / "nowhere.wav")
    with pytest.raises(ValueError, match="path must be the name of a file"):
        read_audio(3)  # type: ignore[arg-type]


def test_samples_that_are_no_numbers_are_refused_with_their_place(tmp_path: Path) -> None:
    samples = np.zeros(8000, np.float32)
    samples[6000] = np.nan
    path = tmp_path / "nan.wav"
    soundfile.write(path, samples, 8000, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"nan\.wav has samples that are no finite numbers, first at 0\.750 s"):
        read_audio(path)
    assert read_audio(path, seconds=0.5)[0].shape == (1, 4000)
    samples[6000] = np.inf
    soundfile.write(path, samples, 8000, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"first at 0\.750 s"):
        read_audio(path, start=0.5)


def test_parts_outside_the_file_are_refused(sweep: torch.Tensor, tmp_path: Path) -> None:
    for ending in ("wav", "mp3"):
        path = write_audio(tmp_path / f"sweep.{ending}", sweep, RATE)
        with pytest.raises(ValueError, match=r"has no sound from 7 s on, it lasts 1\.0"):
            read_audio(path, start=7)
        with pytest.raises(ValueError, match="seconds must be long enough"):
            read_audio(path, seconds=0.0)
        with pytest.raises(ValueError, match="start must be 0 or more"):
            read_audio(path, start=-1)
        with pytest.raises(ValueError, match="sample_rate must be at least 1"):
            read_audio(path, sample_rate=0)


@pytest.mark.parametrize("ending", FORMATS)
def test_a_writer_appends_and_the_file_appears_when_it_is_whole(
    ending: str, sweep: torch.Tensor, tmp_path: Path
) -> None:
    path = tmp_path / f"song.{ending}"
    with AudioWriter(path, RATE, 2) as writer:
        for part in sweep.split(777, 1):
            writer.write(part)
        assert not path.exists()
        assert writer.frames == RATE
    assert os.listdir(tmp_path) == [path.name]
    with pytest.raises(ValueError, match="is closed"):
        writer.write(sweep)
    at_once = write_audio(tmp_path / f"at_once.{ending}", sweep, RATE)
    bound = 0.05 if ending in ("ogg", "opus", "mp3") else 0.0  # encoders look at what they are given at once
    assert (read_audio(path)[0] - read_audio(at_once)[0]).abs().max() <= bound


@pytest.mark.parametrize("ending", FORMATS)
def test_an_interrupted_file_is_whole(ending: str, sweep: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / f"song.{ending}"

    def interrupted() -> None:
        with AudioWriter(path, RATE, 2) as writer:
            writer.write(sweep[:, :30000])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == [path.name]
    assert read_audio(path)[0].shape[1] >= 30000


def test_nothing_is_left_where_nothing_was_written(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), AudioWriter(tmp_path / "a.wav", RATE):
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match=r"no sound was given to be written to .*a\.wav"):
        write_audio(tmp_path / "a.wav", torch.zeros(1, 0), RATE)
    with pytest.raises(ValueError, match=r"finite numbers, to be written to .*a\.wav"):
        write_audio(tmp_path / "a.wav", torch.full((1, 3), float("nan")), RATE)
    assert os.listdir(tmp_path) == []


ENDED = """
import sys, torch
from sinuous.audio.io import AudioWriter
with AudioWriter(sys.argv[1], 8000) as writer:
    if sys.argv[2] == "written":
        writer.write(torch.rand(1, 20_000) - 0.5)
    print("begun", flush=True)
    while True:
        if sys.argv[2] == "written":
            writer.write(torch.rand(1, 100) - 0.5)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
@pytest.mark.parametrize("state", ["written", "empty"])
def test_a_process_that_is_told_to_end_leaves_a_whole_file_or_none(state: str, tmp_path: Path) -> None:
    path = tmp_path / "song.wav"
    with subprocess.Popen([sys.executable, "-c", ENDED, path, state], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        process.terminate()
        assert process.wait(120) == 143
    assert os.listdir(tmp_path) == ([path.name] if state == "written" else [])
    if state == "written":
        assert read_audio(path)[0].shape[1] == audio_info(path).frames >= 20_000


FULL = """
import resource, signal, sys, torch
from sinuous.audio.io import write_audio
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    write_audio(sys.argv[1], torch.rand(1, 200_000) - 0.5, 48000)
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "mp3"])
def test_a_full_disk_leaves_the_old_file_and_one_sentence(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"song.{ending}"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", FULL, path, "20000"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{path} could not be written to its end and was left out, with "), done.stdout
    assert os.listdir(tmp_path) == [path.name]
    assert path.read_bytes() == b"old"


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path: Path) -> None:
    wave = torch.zeros(1, 100)
    for name, rate, options, said in (
        ("a.txt", 8000, {}, "must end with .wav, .flac"),
        ("a.opus", 44100, {}, "rate must be one of 8000, 12000"),
        ("a.wav", 8000, {"subtype": "PCM_99"}, "subtype of a.wav must be one of 'PCM_16'"),
        ("a.ogg", 8000, {"subtype": "OPUS"}, "subtype of a.ogg must be"),
        ("a.flac", 8000, {"subtype": "FLOAT"}, "subtype of a.flac must be one of"),
        ("a.mp3", 1234, {}, "a.mp3 cannot have 1 channels of MPEG_LAYER_III at 1,234 Hz"),
        ("a.wav", 0, {}, "rate must be at least 1"),
        ("", 8000, {}, "is a folder"),
    ):
        with pytest.raises(ValueError, match=said):
            write_audio(tmp_path / name, wave, rate, **options)
    with pytest.raises(ValueError, match=r"a\.flac cannot have 9 channels"):
        write_audio(tmp_path / "a.flac", wave.repeat(9, 1), 8000)
    with pytest.raises(ValueError, match=r"wave must be a tensor of floats, \[C, T\]"):
        write_audio(tmp_path / "a.wav", torch.zeros(1, 1, 10), 8000)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write_audio(tmp_path / "none" / "a.wav", wave, 8000)
    with AudioWriter(tmp_path / "b.wav", 8000, 2) as writer:
        with pytest.raises(ValueError, match="wave must have 2 channels"):
            writer.write(wave)
        writer.write(wave.repeat(2, 1))
    assert os.listdir(tmp_path) == ["b.wav"]
