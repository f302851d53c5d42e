"""Codes of waves: torchaudio's and the authors' to the bit, silence, clipping, and what is refused."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sinuous.audio.codecs import Codec, codec, list_codecs

ALL: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in list_codecs()),
    ("mu_law", {"bits": 10}),
    ("linear", {"bits": 16}),
    ("mu_law_s4", {"scale": False}),
    ("linear_s4", {"scale": False, "bits": 4}),
]
STEP = {"mu_law": 0.0215, "linear": 1 / 128, "mu_law_s4": 0.0426, "linear_s4": 2 / 255, "pcm16_bytes": 1 / 32768}
"""Largest error of a sample between -1 and 1."""


@pytest.fixture(params=ALL, ids=lambda of: " ".join([of[0], *(f"{key}={value}" for key, value in of[1].items())]))
def any_codec(request: pytest.FixtureRequest) -> Codec:
    name, options = request.param
    return codec(name, **options)


def ramp(points: int = 20_001, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(-1, 1, points, dtype=dtype)


@pytest.mark.parametrize("bits", [8, 9, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mu_law_is_torchaudios_to_the_bit(bits: int, dtype: torch.dtype) -> None:
    functional = pytest.importorskip("torchaudio.functional")
    generator = torch.Generator().manual_seed(0)
    wave = torch.cat([ramp(dtype=dtype), torch.rand(50_000, dtype=dtype, generator=generator) * 2 - 1])
    ours = codec("mu_law", bits=bits)
    codes = ours.encode(wave)
    assert torch.equal(codes, functional.mu_law_encoding(wave, 1 << bits))
    assert torch.equal(ours.decode(codes), functional.mu_law_decoding(codes, 1 << bits))


def published(wave: Tensor, logarithmic: bool, low: float) -> Tensor:
    """Quantise one clip by the authors' formula in plain numbers."""
    smallest, largest = wave.min(), wave.max()
    x = low + (1 - low) * (wave - smallest) / (largest - smallest + 1e-6)
    if logarithmic:
        mu = torch.tensor(255)
        x = (x.sign() * (torch.log1p(mu * (x + 1e-8).abs()) / torch.log1p(mu)) + 1) / 2
    return (x * 255.99 + 0.005).long()


@pytest.mark.parametrize(("name", "logarithmic", "low"), [("mu_law_s4", True, -1.0), ("linear_s4", False, 0.0)])
def test_the_authors_codecs_stretch_each_clip_by_itself(name: str, logarithmic: bool, low: float) -> None:
    generator = torch.Generator().manual_seed(0)
    clips = torch.rand(3, 500, generator=generator) * torch.tensor([[0.1], [1.0], [0.5]]) - 0.05
    wanted = torch.stack([published(clip, logarithmic, low) for clip in clips])
    assert torch.equal(codec(name).encode(clips), wanted)
    assert wanted.min() == 0
    assert wanted.max() == 255
    assert not torch.equal(codec(name, scale=False).encode(clips), wanted)


def test_the_authors_mu_law_differs_from_torchaudios_where_it_is_known_to() -> None:
    wave = ramp()
    ours, authors = codec("mu_law"), codec("mu_law_s4")
    assert (ours.encode(wave) != authors.encode(wave)).double().mean() == pytest.approx(0.402, abs=0.005)
    zero = len(wave) // 2
    assert (int(ours.encode(wave)[zero]), int(authors.encode(wave)[zero]), authors.silence) == (128, 127, 128)
    assert float(authors.decode(torch.tensor([128]))) == 0


def test_what_is_decoded_is_as_near_as_the_steps_allow(any_codec: Codec) -> None:
    wave = ramp()
    codes = any_codec.encode(wave)
    assert codes.dtype == torch.int64
    assert codes.shape == (len(wave) * any_codec.codes_per_sample,)
    assert 0 <= codes.min() <= codes.max() < any_codec.vocab_size
    decoded = any_codec.decode(codes)
    assert decoded.dtype == torch.float32
    assert decoded.shape == wave.shape
    coarser = 256 / min(any_codec.vocab_size, 256)
    assert (decoded - wave).abs().max() <= STEP[any_codec.name] * coarser * (1 + 1e-3)


@pytest.mark.parametrize("name", ["mu_law", "linear", "pcm16_bytes"])  # the others decode to the edge of a step
def test_codes_are_those_of_what_they_decode_to(name: str) -> None:
    codes = codec(name).encode(ramp())
    assert torch.equal(codec(name).encode(codec(name).decode(codes)), codes)


def test_silence_is_silent_and_loud_samples_are_clipped(any_codec: Codec) -> None:
    silent = torch.full((2, 6), any_codec.silence)
    assert any_codec.decode(silent).abs().max() < 1e-3
    loud = torch.tensor([-1.0, -1.7, 1.0, 1.2, math.inf, -math.inf])
    assert torch.equal(any_codec.encode(loud), any_codec.encode(loud.clamp(-1, 1)))


@pytest.mark.parametrize("level", [0.0, 0.25, -1.0])
def test_constant_clips_keep_their_level(any_codec: Codec, level: float) -> None:
    decoded = any_codec.decode(any_codec.encode(torch.full((2, 64), level)))
    assert (decoded - level).abs().max() <= STEP[any_codec.name] * 256 / min(any_codec.vocab_size, 256)


def test_a_clip_without_samples_has_no_codes(any_codec: Codec) -> None:
    assert any_codec.encode(torch.zeros(2, 0)).shape == (2, 0)
    assert any_codec.decode(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0)


@given(st.lists(st.integers(-32768, 32767), min_size=1, max_size=50))
def test_sixteen_bits_come_back_unchanged_from_two_bytes(levels: list[int]) -> None:
    bytes_ = codec("pcm16_bytes")
    wave = torch.tensor(levels, dtype=torch.float32) / 32768
    codes = bytes_.encode(wave)
    assert bytes(codes.tolist()) == b"".join(level.to_bytes(2, "big", signed=True) for level in levels)
    assert torch.equal(bytes_.decode(codes), wave)


def test_waves_of_less_precision_are_coded_as_floats(any_codec: Codec) -> None:
    wave = ramp(101).half()
    assert torch.equal(any_codec.encode(wave), any_codec.encode(wave.float()))
    assert not any_codec.encode(wave.requires_grad_()).requires_grad


def test_codecs_are_equal_by_their_options_and_travel_to_workers(any_codec: Codec) -> None:
    assert pickle.loads(pickle.dumps(any_codec)) == any_codec
    assert codec("mu_law") != codec("mu_law", bits=9)


@pytest.mark.parametrize(
    ("wave", "sentence"),
    [
        (torch.tensor([0.0, 0.5, math.nan]), r"must be numbers \(got NaN, the first at sample 2\)"),
        (torch.tensor([1, 2]), "divide 16-bit samples by 32768"),
        ([0.1, 0.2], "must be a tensor of floating point"),
        (torch.tensor(0.5), "give a row of samples"),
        (torch.zeros(3, dtype=torch.complex64), "must be a tensor of floating point"),
    ],
)
def test_waves_that_are_none_are_refused(any_codec: Codec, wave: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        any_codec.encode(wave)


@pytest.mark.parametrize(
    ("codes", "sentence"),
    [
        (torch.tensor([0.5, 1.0]), "tensor of whole numbers"),
        (torch.tensor([0, 1 << 16]), "must lie between 0 and"),
        (torch.tensor([-1, 3]), r"must lie between 0 and \d+ \(got -1\)"),
        (torch.tensor(3), r"codes must be \[..., T\]"),
    ],
)
def test_codes_that_are_none_are_refused(any_codec: Codec, codes: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        any_codec.decode(codes)


def test_half_a_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="2 for each sample"):
        codec("pcm16_bytes").decode(torch.tensor([0, 1, 2]))


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("mu-law", {}, "did you mean 'mu_law'"),
        ("mulaw", {}, "did you mean"),
        (8, {}, "codec must be one of"),
        ("mu_law", {"scale": True}, "codec 'mu_law' has no option scale; it has bits"),
        ("pcm16_bytes", {"bits": 8}, "no option bits; it has none"),
        ("linear", {"bits": 1}, "bits must be a whole number from 2 to 16"),
        ("linear", {"bits": 8.0}, "bits must be a whole number"),
        ("linear_s4", {"scale": "no"}, "scale must be True or False"),
    ],
)
def test_wrong_names_and_options_are_told_in_a_sentence(name: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        codec(name, **options)
