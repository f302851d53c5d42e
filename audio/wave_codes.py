r"""What a model of codes can know of the wave behind them: levels of codes, and logistics around the last sample.

    p(c | features, c_t) = (1 - ε) Σ_i π_i (σ(z_{i,c+1}) - σ(z_{i,c})) + ε / V,       z_{i,c} = (b_c - μ_i) / s_i
    μ_i = x(c_t) + δ_i / 10                               x(c) the level of code c in [-1, 1]; π, δ, log s from features

b are the borders half-way between neighbouring levels, the first and the last at infinity, so that p sums to one for
every codec. Probabilities of rare codes are differences of numbers that are nearly equal; they are computed as

    σ(z') - σ(z) = σ(z') σ(-z) (1 - e^{z - z'}),          z' - z = (b' - b) / s

Source: discretised logistics as in Salimans et al., "PixelCNN++" (arXiv 1701.05517), section 2.1; here around the last
sample, and with a floor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sinuous.audio.codecs import codec
from sinuous.core import norms

COMPONENTS = 8
FLOOR = 1e-3
"""ε, the share of the uniform distribution: no sound is impossible, at a price of 0.0014 bits a sample."""
SMALLEST, LARGEST = -9.0, 2.0
"""Bounds of log s: a step of 16-bit sound is e^-10, the whole range e^0.7."""
OFFSET = 0.1
"""Unit of δ: neighbouring samples of music differ by a few hundredths of the range."""
STARTS = (-6.0, -1.5)
"""log s of the narrowest and of the widest logistic at the start."""
BLOCK = (2**26, 2**18)
"""Numbers of a block, of logistics times codes, elsewhere and on a CPU."""


def levels_of(name: str, vocab_size: int) -> Tensor:
    """Levels `[V]` of the codes of a codec, fp32, rising, on the CPU.

    Raises:
        ValueError: if there is no such codec, or it has not one code a sample, or another number of codes.
    """
    kind = codec(name)
    if kind.codes_per_sample == 1 and kind.vocab_size != vocab_size >= 4:
        kind = codec(name, bits=vocab_size.bit_length() - 1)
    if kind.codes_per_sample > 1 or kind.vocab_size != vocab_size:
        raise ValueError(
            f"codec {name!r} has no level for each of {vocab_size} codes; give a codec with one code a sample, and "
            "vocab_size as its number of codes, a power of 2"
        )
    return kind.decode(torch.arange(vocab_size, device="cpu"))


def start_logistics(readout: nn.Linear) -> None:
    """Fill the layer in front of `logistic_logits`: logistics around the last sample, from narrow to wide."""
    nn.init.normal_(readout.weight, std=0.02)
    nn.init.zeros_(readout.bias)
    with torch.no_grad():
        readout.bias[2 * COMPONENTS :] = torch.linspace(*STARTS, COMPONENTS, device=readout.bias.device)


def logistic_logits(parameters: Tensor, level: Tensor, levels: Tensor) -> Tensor:
    """Logarithms of the probabilities of all codes, `[..., V]`, in fp32 or fp64, each to the digits of its dtype.

    Args:
        parameters: `[..., 3 K]`: logits of π, δ, and log s of K logistics.
        level: x(c_t), `[...]`, which is told and has no gradient.
        levels: x, `[V]`, likewise.
    """
    kind = "cpu" if parameters.is_meta else parameters.device.type  # there is no autocast on the device meta
    with torch.autocast(kind, enabled=False):
        share, offset, log_scale = norms.at_least_fp32(parameters).flatten(0, -2).chunk(3, -1)
        rate = torch.exp(-log_scale.clamp(SMALLEST, LARGEST))
        masses: Tensor = _Masses.apply(  # type: ignore[no-untyped-call]
            torch.softmax(share, -1), rate, rate * (OFFSET * offset), level.reshape(-1).to(share.dtype), levels.double()
        )
        logits: Tensor = torch.log((1 - FLOOR) * masses + FLOOR / len(levels)).unflatten(0, parameters.shape[:-1])
    return logits


class _Masses(torch.autograd.Function):
    """Masses `[N, V]` of mixtures of logistics between borders, of shares, 1 / s and δ / (10 s), all `[N, K]`.

    Rows go through in blocks that stay in a processor's cache, and nothing of the size of logistics times codes is
    kept for the backward pass. The masses' derivatives need no difference: dσ(z) = σ(z) σ(-z) dz.
    """

    @staticmethod
    def forward(ctx: Any, share: Tensor, rate: Tensor, shift: Tensor, level: Tensor, levels: Tensor) -> Tensor:
        ctx.save_for_backward(share, rate, shift, level, levels)
        blocks = _Masses._blocks(share, rate, shift, level, levels)
        return torch.cat([torch.einsum("nk,nkv->nv", part, mass) for part, *_, mass in blocks])

    @staticmethod
    @once_differentiable  # type: ignore[misc,untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parts = []
        of_masses = grad.split(_rows(ctx.saved_tensors[0], grad.shape[1]))
        for of_mass, block in zip(of_masses, _Masses._blocks(*ctx.saved_tensors), strict=True):
            share, below, above, places, mass = block
            steps = of_mass[:, :-1] - of_mass[:, 1:]  # a border adds to the code below it what it takes from the other
            of_z = below.mul_(above).mul_(share.unsqueeze(-1)).mul_(steps.unsqueeze(1))
            of_shift = -of_z.sum(-1)
            parts.append((mass.mul_(of_mass.unsqueeze(1)).sum(-1), of_z.mul_(places.unsqueeze(1)).sum(-1), of_shift))
        return (*map(torch.cat, zip(*parts, strict=True)), None, None)

    @staticmethod
    def _blocks(share: Tensor, rate: Tensor, shift: Tensor, level: Tensor, levels: Tensor) -> Iterator[Any]:
        """Of each block of rows: shares, σ(z) and σ(-z) `[n, K, V - 1]`, borders less levels `[n, V - 1]`, masses."""
        borders = (levels[1:] + levels[:-1]) / 2
        gaps = -borders.diff().to(rate.dtype)
        # Two numbers for each border: of loud sounds the digits of one are too few for the narrowest logistics.
        coarse = borders.to(rate.dtype)
        fine = (borders - coarse).to(rate.dtype)
        rows = _rows(share, len(levels))
        for part, r, s, x in zip(*(tensor.split(rows) for tensor in (share, rate, shift, level)), strict=True):
            places = (coarse - x.unsqueeze(-1)).add_(fine)
            z = (r.unsqueeze(-1) * places.unsqueeze(1)).sub_(s.unsqueeze(-1))
            below, above = torch.sigmoid(z), torch.sigmoid(z.neg_())
            inner = torch.expm1(r.unsqueeze(-1) * gaps).mul_(below[..., 1:]).mul_(above[..., :-1]).neg_()
            yield part, below, above, places, torch.cat([below[..., :1], inner, above[..., -1:]], -1)


def _rows(share: Tensor, vocab_size: int) -> int:
    """Rows of a block."""
    return max(1, BLOCK[share.device.type == "cpu"] // (share.shape[-1] * vocab_size))
