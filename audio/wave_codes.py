r"""What a model of codes can know of the wave behind them: levels of codes, and logistics around the last sample.

    p(c | features, c_t) = (1 - ε) Σ_i π_i (σ((b_{c+1} - μ_i) / s_i) - σ((b_c - μ_i) / s_i)) + ε / V
    μ_i = x(c_t) + δ_i / 10                               x(c) the level of code c in [-1, 1]; π, δ, log s from features

b are the borders half-way between neighbouring levels, the first and the last at infinity, so that p sums to one for
every codec.

Source: discretised logistics as in Salimans et al., "PixelCNN++" (arXiv 1701.05517), section 2.1; here around the last
sample, and with a floor.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    """Logarithms of the probabilities of all codes, `[..., V]`, in fp32 or fp64.

    Args:
        parameters: `[..., 3 K]`: logits of π, δ, and log s of K logistics.
        level: x(c_t), `[...]`.
        levels: x, `[V]`.
    """
    kind = "cpu" if parameters.is_meta else parameters.device.type  # there is no autocast on the device meta
    with torch.autocast(kind, enabled=False):  # differences of sums near one need all digits
        share, offset, log_scale = norms.at_least_fp32(parameters).chunk(3, -1)
        levels = levels.to(share.dtype)
        borders = (levels[1:] + levels[:-1]) / 2
        rate = torch.exp(-log_scale.clamp(SMALLEST, LARGEST))
        mean = level.to(share.dtype).unsqueeze(-1) + OFFSET * offset
        # (b - μ) / s as a product of matrices, whose backward pass keeps nothing as large as it.
        lines = torch.stack([rate, -rate * mean], -1) @ torch.stack([borders, torch.ones_like(borders)])
        cumulative = (torch.softmax(share, -1).unsqueeze(-2) @ torch.sigmoid(lines)).squeeze(-2)
        ends = F.pad(F.pad(cumulative, (1, 0)), (0, 1), value=1.0)
        mass = ends.diff(dim=-1).clamp(min=0)
        return torch.log((1 - FLOOR) * mass + FLOOR / len(levels))
