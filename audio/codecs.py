r"""Codes of a wave: numbers from 0 to V - 1 that a model of sequences predicts, one or two for each sample.

    mu_law      ⌊((sign(x) log(1 + μ|x|) / log(1 + μ)) + 1) / 2 · μ + 1/2⌋,   μ = V - 1      torchaudio's, bit for bit
    linear      min(round(x V/2) + V/2, V - 1)                                               8-bit WAV, if V = 256
    mu_law_s4   ⌊(F(x) + 1) / 2 · (V - 0.01) + 0.005⌋, F(x) = sign(x) log(1 + μ|x|) / log(1 + μ)
    linear_s4   ⌊(x + 1) / 2 · (V - 0.01) + 0.005⌋
    pcm16_bytes the two bytes of round(32768 x), the high one first, in two's complement

A figure in bits belongs to its codec. Those with `_s4` are for the authors' figures: they stretch each clip to the
whole range first, which loses its level, and take 128 for silence, though a zero between -1 and 1 then becomes 127.

Sources: ITU-T G.711 and pytorch/audio (`mu_law_encoding`); Goel et al. (arXiv 2202.09729), section 5, and
state-spaces/s4, src/dataloaders/audio.py.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sinuous.core.checks import check_near, check_types, described, is_whole

_WHOLE = (torch.int64, torch.int32, torch.int16, torch.uint8)


class Codec(ABC):
    """Turns waves into codes and back.

    Attributes:
        name: under which `codec` makes it.
        vocab_size: number of codes, V.
        silence: the code that stands before the first sample; `decode` makes silence of a row of it.
        codes_per_sample: codes that a sample has.
    """

    name: ClassVar[str]
    codes_per_sample: ClassVar[int] = 1

    @property
    @abstractmethod
    def vocab_size(self) -> int: ...

    @property
    @abstractmethod
    def silence(self) -> int: ...

    def encode(self, wave: Tensor) -> Tensor:
        """Codes, int64 `[..., codes_per_sample T]`, of a wave `[..., T]` between -1 and 1; what lies beyond is clipped.

        Raises:
            ValueError: if the wave is no tensor of floating point, or has samples that are not numbers.
        """
        if not isinstance(wave, Tensor) or not wave.is_floating_point():
            raise ValueError(
                f"wave must be a tensor of floating point between -1 and 1 (got {described(wave)}); divide 16-bit "
                "samples by 32768"
            )
        if wave.ndim == 0:
            raise ValueError("wave must be [..., T] (got a single number); give a row of samples")
        wave = wave.detach()
        if wave.dtype not in (torch.float32, torch.float64):
            wave = wave.float()
        absent = wave.isnan()
        if absent.any():
            place = int(absent.reshape(-1, wave.shape[-1]).any(0).int().argmax())
            raise ValueError(f"wave must be numbers (got NaN, the first at sample {place}); leave those samples out")
        return self._encode(wave.clamp(-1, 1))

    def decode(self, codes: Tensor) -> Tensor:
        """Wave, float32 `[..., T]`, of codes `[..., codes_per_sample T]`.

        Raises:
            ValueError: if they are no whole numbers from 0 to `vocab_size` - 1, or end within a sample.
        """
        if not isinstance(codes, Tensor) or codes.dtype not in _WHOLE:
            raise ValueError(f"codes must be a tensor of whole numbers (got {described(codes)}); encode a wave first")
        if codes.ndim == 0 or codes.shape[-1] % self.codes_per_sample:
            raise ValueError(
                f"codes must be [..., T], {self.codes_per_sample} for each sample (got {described(codes)}); leave out "
                "those of a sample that is not whole"
            )
        if codes.numel():
            low, high = int(codes.min()), int(codes.max())
            if low < 0 or high >= self.vocab_size:
                raise ValueError(
                    f"codes must lie between 0 and {self.vocab_size - 1} (got {low if low < 0 else high}); decode with "
                    "the codec that made them"
                )
        return self._decode(codes)

    @abstractmethod
    def _encode(self, wave: Tensor) -> Tensor: ...

    @abstractmethod
    def _decode(self, codes: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class _Quantizer(Codec):
    """One code of `bits` bits for each sample."""

    bits: int = 8

    def __post_init__(self) -> None:
        if not is_whole(self.bits) or not 2 <= self.bits <= 16:
            raise ValueError(f"bits must be a whole number from 2 to 16 (got {described(self.bits)}); 8 is usual")

    @property
    def vocab_size(self) -> int:
        return 1 << self.bits

    @property
    def silence(self) -> int:
        return 1 << (self.bits - 1)


@dataclass(frozen=True)
class MuLaw(_Quantizer):
    """Logarithmic steps, as torchaudio's `mu_law_encoding`."""

    name: ClassVar[str] = "mu_law"

    def _encode(self, wave: Tensor) -> Tensor:
        mu = torch.tensor(self.vocab_size - 1.0, dtype=wave.dtype, device=wave.device)
        companded = torch.sign(wave) * torch.log1p(mu * torch.abs(wave)) / torch.log1p(mu)
        return ((companded + 1) / 2 * mu + 0.5).to(torch.int64)

    def _decode(self, codes: Tensor) -> Tensor:
        mu = torch.tensor(self.vocab_size - 1.0, device=codes.device)
        companded = codes.float() / mu * 2 - 1.0
        return torch.sign(companded) * (torch.exp(torch.abs(companded) * torch.log1p(mu)) - 1.0) / mu


@dataclass(frozen=True)
class Linear(_Quantizer):
    """Equal steps of 2 / V around zero."""

    name: ClassVar[str] = "linear"

    def _encode(self, wave: Tensor) -> Tensor:
        half = self.vocab_size // 2
        return (torch.round(wave * half).to(torch.int64) + half).clamp(max=self.vocab_size - 1)

    def _decode(self, codes: Tensor) -> Tensor:
        return codes.float() / self.silence - 1


@dataclass(frozen=True)
class _Authors(_Quantizer):
    """Quantisation of state-spaces/s4.

    `scale` stretches each clip, the last axis of a wave, to the range from -1 to 1. A constant clip has no range and is
    taken as it is.
    """

    scale: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_types({"scale": bool}, {"scale": self.scale})

    def _stretched(self, wave: Tensor, low: float) -> Tensor:
        """The clip, in the range from `low` to 1."""
        span = 1 - low
        as_it_is = wave if low == -1 else (wave + 1) / 2
        if not self.scale or not wave.numel():
            return as_it_is
        smallest, largest = torch.aminmax(wave, dim=-1, keepdim=True)
        stretched = low + span * (wave - smallest) / (largest - smallest + 1e-6)
        return torch.where(largest > smallest, stretched, as_it_is)

    def _quantised(self, unit: Tensor) -> Tensor:
        return (unit * (self.vocab_size - 0.01) + 0.005).to(torch.int64)


@dataclass(frozen=True)
class MuLawS4(_Authors):
    """Logarithmic steps of the authors' runs on SC09 and YouTubeMix."""

    name: ClassVar[str] = "mu_law_s4"

    def _encode(self, wave: Tensor) -> Tensor:
        wave = self._stretched(wave, -1)
        mu = torch.tensor(self.vocab_size - 1, device=wave.device)
        companded = torch.sign(wave) * (torch.log1p(mu * torch.abs(wave + 1e-8)) / torch.log1p(mu))
        return self._quantised((companded + 1) / 2)

    def _decode(self, codes: Tensor) -> Tensor:
        companded = codes.float() / self.silence - 1
        mu = self.vocab_size - 1
        return torch.sign(companded) * ((1 + mu) ** torch.abs(companded) - 1) / mu


@dataclass(frozen=True)
class LinearS4(_Authors):
    """Equal steps of the authors' runs on Beethoven."""

    name: ClassVar[str] = "linear_s4"

    def _encode(self, wave: Tensor) -> Tensor:
        return self._quantised(self._stretched(wave, 0))

    def _decode(self, codes: Tensor) -> Tensor:
        return codes.float() / self.silence - 1


@dataclass(frozen=True)
class PCM16Bytes(Codec):
    """All 16 bits of a sample as two codes, the high byte first: a sequence twice as long, without loss."""

    name: ClassVar[str] = "pcm16_bytes"
    codes_per_sample: ClassVar[int] = 2

    @property
    def vocab_size(self) -> int:
        return 256

    @property
    def silence(self) -> int:
        return 0

    def _encode(self, wave: Tensor) -> Tensor:
        level = torch.round(wave * 32768).to(torch.int64).clamp(max=32767)
        return torch.stack([level >> 8 & 255, level & 255], -1).flatten(-2)

    def _decode(self, codes: Tensor) -> Tensor:
        high, low = codes.long().unflatten(-1, (-1, 2)).unbind(-1)
        level = high << 8 | low
        return torch.where(level > 32767, level - 65536, level).float() / 32768


_CODECS: dict[str, type[Codec]] = {kind.name: kind for kind in (MuLaw, Linear, MuLawS4, LinearS4, PCM16Bytes)}


def list_codecs() -> list[str]:
    """Names of all codecs."""
    return list(_CODECS)


def codec(name: str, **options: Any) -> Codec:
    """Make a codec by its name.

    Args:
        name: `"mu_law"`, `"linear"`, `"mu_law_s4"`, `"linear_s4"` or `"pcm16_bytes"`.
        options: `bits`, 8 if absent, of all but `pcm16_bytes`: there are `2 ** bits` codes. `scale`, of those with
            `_s4`: each clip is stretched to the whole range, as the authors do, unless it is `False`.

    Raises:
        ValueError: if there is no such codec, or it has no such option, or not that value of it.
    """
    check_near("codec", name, _CODECS)
    kind = _CODECS[name]
    known = inspect.signature(kind).parameters
    if unknown := sorted(set(options) - set(known)):
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise ValueError(f"codec {name!r} has no option {', '.join(unknown)}; {has}")
    return kind(**options)
