"""`sinuous demo audio`: a whole file of sound and its figure from any clip, or one sentence and nothing."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import sinuous
from sinuous.apps.cli import main
from sinuous.audio import demo_music
from sinuous.audio.codecs import codec

pytest.importorskip("soundfile")

from sinuous.audio.io import audio_info, read_audio, write_audio

RATE = 8000
MU_LAW = codec("mu_law", bits=4)
"""That of `test_sashimi`, which has 16 codes."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the figure, which takes longer than the sound."""
    monkeypatch.setattr(demo_music, "_drawn", lambda *_: [])


def tone(rate: int = RATE, seconds: float = 0.25, channels: int = 1) -> Tensor:
    t = torch.arange(round(rate * seconds)) / rate
    return 0.5 * torch.sin(2 * torch.pi * 200 * t).repeat(channels, 1)


def told(words: str, capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    """What a command prints to where it should: files to stdout, a sentence to stderr."""
    assert main(f"demo audio {words}".split()) == code
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return printed.err if code == 2 else printed.out


def test_a_clip_goes_on(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_audio("clip.wav", tone(), RATE)
    words = "--clip clip.wav --model test_sashimi --prompt-seconds 0.2 --seconds 0.05 --out new/longer.wav"
    out = told(words, capsys)
    lines = out.splitlines()
    assert lines[-2:] == ["new/longer.wav", "new/longer.png"]
    assert "untrained" in lines[0]
    assert "prompt: 0.2 s" in out
    assert "× real time by engine" in out
    assert "bits a sample (mu_law)" in out
    wave, rate = read_audio("new/longer.wav")
    assert (rate, wave.shape) == (RATE, (1, 2000))
    heard = MU_LAW.decode(MU_LAW.encode(tone()[0, :1600]))
    torch.testing.assert_close(wave[0, :1600], heard, rtol=0, atol=1e-4)
    width, height = Image.open("new/longer.png").size
    assert width > height > 500
    again = told(words.replace("new/longer", "again"), capsys)
    assert torch.equal(read_audio("again.wav")[0], wave)
    assert again.splitlines()[-1] == "again.png"
    told(words.replace("new/longer", "other") + " --seed 1", capsys)
    other = read_audio("other.wav")[0]
    assert torch.equal(other[0, :1600], wave[0, :1600])
    assert not torch.equal(other, wave)


@pytest.mark.parametrize(
    ("rate", "channels", "subtype", "ending"),
    [
        (44100, 4, "PCM_24", "wav"),
        (1234, 1, "PCM_16", "wav"),
        (8000, 1, "PCM_U8", "wav"),
        (16000, 2, "FLOAT", "wav"),
        (48000, 1, None, "ogg"),
        (22050, 2, None, "flac"),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_clips_of_any_rate_and_width_go_on(
    rate: int, channels: int, subtype: str | None, ending: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_audio(f"clip.{ending}", tone(rate, channels=channels), rate, subtype=subtype)
    told(f"--clip clip.{ending} --model test_sashimi --prompt-seconds 0.2 --seconds 0.01 --out o.flac", capsys)
    wave, found = read_audio("o.flac")
    assert (found, wave.shape) == (RATE, (1, 1680))
    assert 0.3 < wave[0, 400:1200].abs().max() < 0.7


@pytest.mark.usefixtures("undrawn")
def test_short_and_silent_clips_go_on(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_audio("silent.wav", torch.zeros(1, 80), RATE)
    told("--clip silent.wav --model test_sashimi --seconds 0.01 --out o.wav", capsys)
    assert audio_info("o.wav").frames == 160
    told("--clip silent.wav --start 0.005 --model test_sashimi --seconds 0.01 --out p.wav", capsys)
    assert audio_info("p.wav").frames == 120


def test_the_recording_is_beside_what_the_model_made(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("sinuous.audio.drawing.draw_continuation", lambda *of, **_: (drawn.append(of), of[5].touch()))
    wave = torch.rand(1, 2000) - 0.5
    write_audio("clip.wav", wave, RATE)
    words = "--clip clip.wav --model test_sashimi --prompt-seconds 0.1 --out o.wav --seconds"
    out = told(f"{words} 0.05", capsys)
    assert "the recording goes on: 0.1 s" in out
    made, _, prompt, bits, *_, (recorded, cost) = drawn[0]
    assert (prompt, made.shape, bits.shape) == (800, (1200,), (1200,))
    assert torch.equal(recorded, MU_LAW.decode(MU_LAW.encode(wave[0, :1200])))
    assert torch.equal(recorded[:800], made[:800])
    assert torch.equal(cost[:800], bits[:800])
    assert cost[800:].isfinite().all()
    told(f"{words} 0.2", capsys)  # the recording ends before the model does
    assert drawn[1][-1][0].shape == (2000,)
    write_audio("clip.wav", wave[:, :700], RATE)  # and here within the prompt
    out = told(f"{words} 0.05", capsys)
    assert "the recording goes on" not in out
    assert drawn[2][-1] is None


def test_damage_behind_the_prompt_does_no_harm(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = torch.zeros(1200)
    samples[1000] = torch.nan
    pytest.importorskip("soundfile").write("clip.wav", samples.numpy(), RATE, subtype="FLOAT")
    words = "--clip clip.wav --model test_sashimi --prompt-seconds 0.1 --seconds 0.05 --out o.wav"
    assert "goes on:" not in told(words, capsys)
    assert audio_info("o.wav").frames == 1200


@pytest.mark.usefixtures("undrawn")
def test_without_a_prompt_it_begins_from_silence(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = told("--prompt-seconds 0 --model test_sashimi --seconds 0.02 --out o.wav", capsys)
    assert "prompt" not in out
    assert audio_info("o.wav").frames == 160


@pytest.mark.usefixtures("undrawn")
def test_two_codes_make_a_sample(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_audio("clip.wav", tone(), RATE)
    words = "--clip clip.wav --model test_wavenet --codec pcm16_bytes --rate 4000"
    out = told(f"{words} --prompt-seconds 0.1 --seconds 0.02 --out o.wav", capsys)
    assert (audio_info("o.wav").frames, audio_info("o.wav").sample_rate) == (480, 4000)
    assert "pcm16_bytes" in out


def test_ctrl_c_leaves_a_whole_file(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = demo_music.stream

    def interrupted(*arguments: Any, **options: Any) -> Iterator[Any]:
        yield next(iter(whole(*arguments, **options)))
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_music, "stream", interrupted)
    write_audio("clip.wav", tone(), RATE)
    words = "--clip clip.wav --model test_sashimi --prompt-seconds 0.2 --seconds 9 --out o.wav"
    out = told(words, capsys, code=130)
    assert audio_info("o.wav").frames == 1600 + 800
    assert out.splitlines()[-2:] == ["o.wav", "o.png"]
    assert Image.open("o.png").size[0] > 500
    monkeypatch.setattr(demo_music, "score", interrupted_at_once)
    told(words.replace("o.wav", "p.wav"), capsys, code=130)
    assert audio_info("p.wav").frames == 1600
    assert sorted(path.name for path in here.iterdir()) == ["clip.wav", "o.png", "o.wav", "p.png", "p.wav"]


def interrupted_at_once(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("undrawn")
def test_a_full_disk_leaves_no_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_audio("clip.wav", tone(), RATE)
    limits, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        said = told("--clip clip.wav --model test_sashimi --seconds 0.05 --out o.wav", capsys, code=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "o.wav could not be written to its end" in said
    assert [path.name for path in here.iterdir()] == ["clip.wav"]


@pytest.mark.parametrize("content", [b"", b"no sound at all", b"RIFF\x24\x00\x00\x00WAVEfmt ", None])
def test_what_is_no_sound_is_told_in_a_sentence(
    content: bytes | None, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        Path("clip.wav").write_bytes(content)
    for words in ("--clip clip.wav --model test_sashimi", "--classify clip.wav --model test_wave_classifier"):
        said = told(words, capsys, code=2)
        assert "clip.wav" in said
        assert len(said.splitlines()) == 1
    assert [path.name for path in here.iterdir()] == ([] if content is None else ["clip.wav"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--clip clip.wav --out clip.wav", "--out must not be a file that is read"),
        ("--clip clip.wav --out o.txt", "--out must be a file that ends in .wav"),
        ("--clip clip.wav --seconds 0", "--seconds must be more than 0"),
        ("--clip clip.wav --prompt-seconds -1", "--prompt-seconds must be 0 or more"),
        ("--clip clip.wav --start 9", "clip.wav"),
        ("--clip clip.wav --codec mu", "there is no codec 'mu'"),
        ("--clip clip.wav --codec pcm16_bytes", "the model has 16 codes and codec pcm16_bytes has 256"),
        ("--clip clip.wav --temperature -1", "temperature must be 0 or more"),
        ("--clip clip.wav --rate 0", "--rate must be at least 1"),
        ("--clip clip.wav --model test_wave_classifier", "--model must be a model of codes"),
        ("--classify clip.wav --model test_sashimi", "--model must be a classifier of sounds"),
        ("--clip clip.wav --model sashimi_nono", "sashimi_nano"),
    ],
)
def test_wrong_options_are_told_in_a_sentence(
    words: str, sentence: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_audio("clip.wav", tone(), RATE)
    said = told(words if "--model" in words else f"{words} --model test_sashimi", capsys, code=2)
    assert sentence in said
    assert [path.name for path in here.iterdir()] == ["clip.wav"]


def test_missing_weights_are_told(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("sinuous.core.demo_parts", "sinuous.audio.demo_models"):
        monkeypatch.setattr(f"{module}.all_weights", dict)
    write_audio("clip.wav", tone(), RATE)
    assert "sashimi_nano.hold_music do not come with this version" in told("--clip clip.wav", capsys, code=2)
    assert "wave_classifier_nano.notes do not come" in told("--classify clip.wav", capsys, code=2)


def test_models_of_a_folder_go_on_and_listen(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    sinuous.save(sinuous.create_model("test_sashimi"), "music")
    listener = sinuous.create_model("test_wave_classifier", num_classes=2)
    with torch.no_grad():
        listener.head.bias.copy_(torch.tensor([0.0, 9.0]))
    sinuous.save(listener, "listener", card={"pretrained_cfg": {"label_names": ["horn", "harp"]}})
    write_audio("one.wav", tone(44100, channels=4), 44100)
    write_audio("two.flac", torch.zeros(1, 20), RATE)
    told("--clip one.wav --model music --prompt-seconds 0.1 --seconds 0.01 --out o.wav", capsys)
    assert audio_info("o.wav").frames == 880
    out = told("--classify one.wav two.flac --model listener", capsys)
    rows = [line for line in out.splitlines() if ".wav" in line or ".flac" in line]
    assert len(rows) == 2
    assert all("harp 1.00" in row and "horn" in row for row in rows)
    assert "0.25" in rows[0]


def test_the_bundled_clip_goes_on(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = told("--model test_sashimi --seconds 0.02 --out o.wav", capsys)
    assert "prompt: 2.0 s" in out
    wave, _ = read_audio("o.wav")
    assert wave.shape == (1, 16160)
    assert wave[0, :16000].std() > 0.01
    assert "--start must lie in the bundled clip" in told("--model test_sashimi --start 5 --out p.wav", capsys, code=2)
