"""Classifiers of sounds: padding never reaches an answer, clips of any length, any mixer, training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sinuous
from sinuous.audio import front_ends, wave_classifier
from sinuous.audio.wave_classifier import FRONT_ENDS, WaveClassifier
from sinuous.core.mixers import list_mixers
from sinuous.core.tasks.classification import Classification

LENGTHS = (811, 3, 1600, 80)


def create(front_end: str = "wave", mixer: str = "s4d_bidirectional", **options: object) -> WaveClassifier:
    if front_end != "wave":
        pytest.importorskip("torchaudio")
    torch.manual_seed(0)
    model = wave_classifier.test_wave_classifier(front_end=front_end, mixer=mixer, **options).double().eval()
    torch.nn.init.normal_(model.head.weight)
    return model


def clips(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(1, length, generator=generator, dtype=torch.float64) * 2 - 1 for length in lengths]


def ragged(lengths: tuple[int, ...] = LENGTHS, filling: float = 0.0) -> tuple[Tensor, Tensor]:
    rows = [F.pad(clip, (0, max(lengths) - clip.shape[1]), value=filling) for clip in clips(lengths)]
    return torch.stack(rows), torch.tensor(lengths)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("filling", [0.0, 5.0, float("nan")])
def test_an_answer_is_that_of_the_clip_alone_whatever_lies_behind_it(front_end: str, filling: float) -> None:
    model = create(front_end)
    together = model(*ragged(filling=filling))
    alone = torch.cat([model(clip[None]) for clip in clips()])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)
    assert float((alone[0] - alone[2]).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("mixer", [name for name in list_mixers() if name not in ("ss2d", "plstm_grid")])
def test_any_mixer_reads_clips_apart(mixer: str) -> None:
    options = {"window_size": 4} if mixer == "sliding_window_attention" else {}
    model = create(mixer=mixer, mixer_options=options, depth=2)
    lengths = (96, 64, 200)
    together = model(*ragged(lengths, float("nan")))
    alone = torch.cat([model(clip[None]) for clip in clips(lengths)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-8)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_gradients_are_those_of_the_clips_alone(front_end: str) -> None:
    model, grads = create(front_end), []
    for batch in ([ragged(filling=7.0)], [(clip[None], None) for clip in clips()]):
        model.zero_grad()
        sum(model(*part).square().sum() for part in batch).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for together, alone in zip(*grads, strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_whole_clips_need_no_lengths(front_end: str) -> None:
    model, wave = create(front_end), torch.rand(2, 1, 500, dtype=torch.float64)
    torch.testing.assert_close(model(wave, torch.tensor([500, 500])), model(wave), rtol=0, atol=1e-12)
    assert model.float()(wave.float()).dtype == torch.float32


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_there_are_as_many_frames_as_begun_hops_and_at_least_one(front_end: str) -> None:
    model = create(front_end)
    hop = model.front_end.hop
    for samples in (1, hop - 1, hop, hop + 1, 5 * hop + 3):
        frames = model.front_end(torch.zeros(1, 1, samples, dtype=torch.float64))
        assert frames.shape == (1, max(1, -(-samples // hop)), model.front_end.num_features)


def test_mel_bands_are_torchaudios() -> None:
    torchaudio = pytest.importorskip("torchaudio")
    front_end = front_ends.LogMel(8000, 40)
    wave = torch.randn(2, 1, 2000, dtype=torch.float64)
    reference = torchaudio.transforms.MelSpectrogram(
        8000, n_fft=512, win_length=200, hop_length=80, n_mels=40, center=False, normalized=False
    ).double()
    # The window of 200 lies in the middle of torchaudio's 512.
    padded_wave = torch.nn.functional.pad(wave[:, 0], (60 + 156, 600))
    power = reference(padded_wave)[..., :25].mT / torch.hann_window(200, dtype=torch.float64).sum() ** 2
    torch.testing.assert_close(10 ** (4 * front_end(wave) - 6), power + 1e-10, rtol=1e-6, atol=1e-12)
    cepstrum = front_ends.Cepstrum(8000, 40, 13)(wave)
    cosines = torchaudio.functional.create_dct(13, 40, "ortho").double()
    torch.testing.assert_close(cepstrum, front_end(wave) @ cosines)


def test_silence_and_full_scale_stay_numbers() -> None:
    pytest.importorskip("torchaudio")
    front_end = front_ends.LogMel(8000)
    assert torch.equal(front_end(torch.zeros(1, 1, 800)), torch.full((1, 10, 40), -1.0))
    assert float(front_end(torch.ones(1, 1, 800)).abs().max()) < 2


def test_it_trains_under_the_shared_task_on_clips_of_different_lengths() -> None:
    torch.manual_seed(0)
    model, task = wave_classifier.test_wave_classifier(num_classes=2, depth=1), Classification(2, smoothing=0.0)
    lengths = torch.tensor([400, 301, 640, 511, 800, 555])
    labels = lengths % 2
    tones = torch.sin(torch.arange(800) * torch.where(labels == 1, 1.5, 0.1)[:, None, None])
    batch = (tones, labels, {"lengths": lengths})
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    first = float(task.loss(model, batch).detach())
    for _ in range(30):
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < first / 3
    model.eval()
    assert task.score(model, batch)[:, 0].tolist() == batch[1].tolist()


def test_save_and_load_give_the_same_answers(tmp_path: Path) -> None:
    model = sinuous.create_model("test_wave_classifier", num_classes=3, mixer="mamba").eval()
    sinuous.save(model, tmp_path / "saved")
    again = sinuous.load(tmp_path / "saved").eval()
    wave = torch.rand(2, 1, 300)
    assert torch.equal(model(wave), again(wave))


def test_the_nano_fits_into_four_megabytes_in_half_precision() -> None:
    assert sum(p.numel() for p in wave_classifier.wave_classifier_nano().parameters()) * 2 < 4_000_000


def test_checkpointed_blocks_and_new_heads() -> None:
    model = create()
    wave = ragged()
    before = model(*wave)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(*wave), before)
    model.reset_classifier(7)
    assert model(*wave).shape == (4, 7)
    model.reset_classifier(0)
    assert model(*wave).shape == (4, model.num_features)


@pytest.mark.parametrize(
    ("wave", "lengths", "message"),
    [
        (torch.zeros(2, 100), None, r"wave must be \[B, 1, T\].*unsqueeze"),
        (torch.zeros(1, 2, 100), None, r"wave must be \[B, 1, T\].*mean"),
        (torch.zeros(1, 1, 100, dtype=torch.int16), None, "real numbers of full scale"),
        (torch.zeros(1, 1, 0), None, "at least one sample"),
        (torch.zeros(2, 1, 100), torch.tensor([100]), "for each of the 2 clips"),
        (torch.zeros(2, 1, 100), torch.tensor([100.0, 50.0]), "for each of the 2 clips"),
        (torch.zeros(2, 1, 100), torch.tensor([101, 50]), r"between 1 and the 100 samples .*got 50 to 101"),
        (torch.zeros(2, 1, 100), torch.tensor([0, 50]), "leave empty clips out"),
    ],
)
def test_wrong_waves_and_lengths_are_refused(wave: Tensor, lengths: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wave_classifier.test_wave_classifier()(wave, lengths)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"front_end": "mel"}, "front_end must be one of 'wave', 'log_mel', 'mfcc'"),
        ({"front_end": "mfcc", "front_end_options": {"num_coefficients": 41}}, "not be more than the 40 bands"),
        ({"sample_rate": 0}, "sample_rate must be at least 1"),
        ({"mixer": "s5d"}, "there is no mixer 's5d'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wave_classifier.test_wave_classifier(**options)


def test_torchaudio_is_imported_on_first_use_and_its_errors_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(name: str) -> SimpleNamespace:
        raise RuntimeError("compiled with\ndifferent CUDA versions")

    model = wave_classifier.test_wave_classifier(front_end="log_mel")
    front_ends._mel_filters.cache_clear()
    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(ImportError, match=r"^torchaudio is installed and does not load \(compiled with different CUDA"):
        model(torch.zeros(1, 1, 100))


def test_the_raw_wave_needs_no_torchaudio() -> None:
    code = (
        "import sys, torch; from sinuous.audio.wave_classifier import test_wave_classifier as t; "
        "t(front_end='mfcc'); t()(torch.zeros(1, 1, 99)); sys.exit('torchaudio' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
