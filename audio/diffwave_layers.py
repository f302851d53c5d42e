"""Layers of DiffWave: weight-normed convolutions, the embedding of a step, mel bands at the rate of samples, blocks.

    WaveNet block    h = dilated conv(x + fc_t(e)) + mel;   o = tanh(h_1) ⊙ sigmoid(h_2)
                     x ← (x + res_conv(o)) / √2;   skip ← skip + skip_conv(o)
    SaShiMi block    x ← x + mixer(norm1 x + fc_t(e)) + mel;   x ← x + ff(norm2 x)

e is the embedding of the step. The authors call `kaiming_normal_` on products of weight norms, which their next use
computes anew: their weights start as torch's layers do, and so do these.

Source: Kong et al., "DiffWave" (arXiv 2009.09761), section 3; Goel et al. (arXiv 2202.09729), appendix C.3; names of
parameters as in albertfgu/diffwave-sashimi (Apache-2.0), an independent implementation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinuous.audio.pools import DownPool, UpPool
from sinuous.audio.sashimi_backbone import ScalarNorm
from sinuous.core.mixers import Mixer


class WeightNormed(nn.Module):
    """Weights `g v / ‖v‖` and a bias; the norm is taken over all axes of v but the first.

    Source: Salimans and Kingma (arXiv 1602.07868); names of parameters as torch's `weight_norm` has them.

    Args:
        shape: of v; the first axis is that of outputs, or for transposed convolutions of inputs.
        outputs: size of the bias.
        fan_in: inputs of one output, by which the start is scaled.
    """

    def __init__(self, shape: tuple[int, ...], outputs: int, fan_in: int) -> None:
        super().__init__()
        self.bound = 1 / math.sqrt(fan_in)
        self.weight_g = nn.Parameter(torch.empty(shape[0], *[1] * (len(shape) - 1)))
        self.weight_v = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.reset_parameters()

    def _length(self) -> Tensor:
        axes = list(range(1, self.weight_v.ndim))
        length: Tensor = torch.linalg.vector_norm(self.weight_v, dim=axes, keepdim=True)
        return length

    @property
    def weight(self) -> Tensor:
        return self.weight_v * (self.weight_g / self._length())

    def reset_parameters(self) -> None:
        """As torch's convolutions start."""
        nn.init.uniform_(self.weight_v, -self.bound, self.bound)
        nn.init.uniform_(self.bias, -self.bound, self.bound)
        with torch.no_grad():
            self.weight_g.copy_(self._length())


class WeightNormConv1d(WeightNormed):
    """Weight-normed convolution `[B, C, T]` to `[B, E, T]`, centred on each step."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int = 1, dilation: int = 1) -> None:
        super().__init__((outputs, inputs, kernel_size), outputs, inputs * kernel_size)
        self.dilation, self.padding = dilation, dilation * (kernel_size - 1) // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight, self.bias, padding=self.padding, dilation=self.dilation)


class Conv(nn.Module):
    """A `WeightNormConv1d` under the name `conv`."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv = WeightNormConv1d(inputs, outputs, kernel_size, dilation)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


class Pointwise(Conv):
    """A weight-normed convolution of one step, `[..., C]` to `[..., E]`, for streams with channels last."""

    @property
    def bias(self) -> Tensor:
        return self.conv.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.conv.weight.squeeze(-1), self.conv.bias)


class ZeroConv(nn.Module):
    """A convolution of one step that starts at zero, `[B, C, T]` to `[B, E, T]`, under the name `conv`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


def embed_steps(steps: Tensor, first: nn.Linear, second: nn.Linear) -> Tensor:
    """Embedding of steps `[B]`, `[B, E]`: 64 sines and cosines of wavelengths from 2π to 20,000π, two layers with
    SiLU."""
    half = first.in_features // 2
    exponents = torch.arange(half, device=steps.device, dtype=torch.float64) / (half - 1)
    angles = steps.double().unsqueeze(1) * torch.exp(-math.log(10000) * exponents)
    waves = torch.cat([angles.sin(), angles.cos()], 1).to(first.weight.dtype)
    return F.silu(second(F.silu(first(waves))))


class MelUpsampling(WeightNormed):
    """Transposed convolution over mel bands and time that makes `stride` steps of each, of 3 bands and 2 frames."""

    def __init__(self, stride: int) -> None:
        # torch scales the start of transposed convolutions by the outputs of one input.
        super().__init__((1, 1, 3, 2 * stride), 1, 6 * stride)
        self.stride = stride

    def forward(self, mel: Tensor) -> Tensor:
        """`[B, 1, bands, M]` to `[B, 1, bands, stride M]`."""
        y = F.conv_transpose2d(mel, self.weight, self.bias, stride=(1, self.stride), padding=(1, self.stride // 2))
        return F.leaky_relu(y[..., : mel.shape[-1] * self.stride], 0.4)


class Conditioned(nn.Module):
    """A block that may be told a mel spectrogram.

    Args:
        channels: of what is added to the block's stream.
        mel_bands: None for a block without.
        hop: samples of a frame; frames are brought to the rate of samples in two strides.
        rate: samples of one step of the block's stream, over which bands are averaged.
        first_samples: give a stream of lower rate not the averages but the first samples, as the authors' code does.
    """

    def __init__(self, channels: int, mel_bands: int | None, hop: int, rate: int, first_samples: bool) -> None:
        super().__init__()
        self.rate, self.first_samples = rate, first_samples
        if mel_bands is not None:
            self.upsample_conv2d = nn.ModuleList(MelUpsampling(stride) for stride in two_factors(hop))
            self.mel_conv = Conv(mel_bands, channels)

    def of_mel(self, mel: Tensor, length: int) -> Tensor:
        """What a spectrogram `[B, bands, M]` adds to a stream of `length` steps, `[B, channels, length]`."""
        x = mel.unsqueeze(1)
        for layer in self.upsample_conv2d:
            x = layer(x)
        x = x.squeeze(1)
        if self.rate > 1 and not self.first_samples:
            x = F.avg_pool1d(x, self.rate, ceil_mode=True)
        y: Tensor = self.mel_conv(x[..., :length])
        return y


def two_factors(hop: int) -> tuple[int, int]:
    """The two whole numbers of which `hop` is the product that are nearest to each other, the smaller first."""
    small = max(factor for factor in range(1, math.isqrt(hop) + 1) if hop % factor == 0)
    return small, hop // small


class WaveNetBlock(Conditioned):
    """Gated dilated convolution that sees both sides, `[B, C, T]` to `[B, C, T]` and a skip `[B, S, T]`."""

    def __init__(self, channels: int, skip: int, dilation: int, steps: int, mel_bands: int | None, hop: int) -> None:
        super().__init__(2 * channels, mel_bands, hop, 1, False)
        self.fc_t = nn.Linear(steps, channels)
        self.dilated_conv_layer = Conv(channels, 2 * channels, 3, dilation)
        self.res_conv = WeightNormConv1d(channels, channels)
        self.skip_conv = WeightNormConv1d(channels, skip)

    def forward(self, x: Tensor, step: Tensor, mel: Tensor | None) -> tuple[Tensor, Tensor]:
        h = self.dilated_conv_layer(x + self.fc_t(step).unsqueeze(-1))
        if mel is not None:
            h = h + self.of_mel(mel, x.shape[-1])
        signal, gate = h.chunk(2, 1)
        out = torch.tanh(signal) * torch.sigmoid(gate)
        return (x + self.res_conv(out)) * math.sqrt(0.5), self.skip_conv(out)


class WaveNetBlocks(nn.Module):
    """The embedding of steps and the blocks, dilations 1, 2, 4, … over and over: `[B, C, T]` to `[B, S, T]`."""

    def __init__(
        self,
        channels: int,
        skip: int,
        depth: int,
        dilation_cycle: int,
        steps: tuple[int, int, int],
        mel_bands: int | None,
        hop: int,
    ) -> None:
        super().__init__()
        self.fc_t1 = nn.Linear(steps[0], steps[1])
        self.fc_t2 = nn.Linear(steps[1], steps[2])
        self.residual_blocks = nn.ModuleList(
            WaveNetBlock(channels, skip, 2 ** (i % dilation_cycle), steps[2], mel_bands, hop) for i in range(depth)
        )

    def forward(self, x: Tensor, steps: Tensor, mel: Tensor | None, call: Callable[..., Any]) -> Tensor:
        """Run the blocks, each by `call(block, x, embedding, mel)`."""
        embedded = embed_steps(steps, self.fc_t1, self.fc_t2)
        total: Tensor | None = None
        for block in self.residual_blocks:
            x, skip = call(block, x, embedded, mel)
            total = skip if total is None else total + skip
        assert total is not None
        return total * math.sqrt(1 / len(self.residual_blocks))


class BareScalarNorm(ScalarNorm):
    """A `ScalarNorm` whose two numbers lie in the module itself."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.m = nn.Parameter(torch.zeros(1))
        self.s = nn.Parameter(torch.ones(1))

    @property
    def norm(self) -> dict[str, nn.Parameter]:  # type: ignore[override]
        return {"m": self.m, "s": self.s}


class PointwiseMLP(nn.Module):
    """`W' gelu(W x + b) + b'`, weight-normed."""

    def __init__(self, dim: int, expand: int) -> None:
        super().__init__()
        self.ff = nn.Sequential(Pointwise(dim, expand * dim), nn.GELU(), Pointwise(expand * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.ff(x)
        return y


class SashimiBlock(Conditioned):
    """A mixer and an MLP, both residual, on streams `[B, T, D]`."""

    def __init__(
        self,
        mixer: Mixer,
        dim: int,
        ff: int,
        steps: int,
        mel_bands: int | None,
        hop: int,
        rate: int,
        first_samples: bool,
    ) -> None:
        super().__init__(dim, mel_bands, hop, rate, first_samples)
        self.fc_t = nn.Linear(steps, dim)
        self.layer = mixer
        self.ff = PointwiseMLP(dim, ff)
        self.norm1 = BareScalarNorm()
        self.norm2 = BareScalarNorm()

    def forward(self, x: Tensor, step: Tensor, mel: Tensor | None) -> Tensor:
        y = self.layer(self.norm1(x) + self.fc_t(step).unsqueeze(1))
        if mel is not None:
            y = y + self.of_mel(mel, x.shape[1]).mT
        x = x + y
        x = x + self.ff(self.norm2(x))
        return x


class NormedDownPool(DownPool):
    """A `DownPool` with a weight-normed layer in the authors' wrapping, the last group filled up with zeros."""

    def __init__(self, narrow: int, wide: int, pool: int) -> None:
        super().__init__(narrow, wide, pool, False, True, {})
        self.linear = Pointwise(narrow * pool, wide)  # type: ignore[assignment]


class NormedUpPool(UpPool):
    """An `UpPool` with a weight-normed layer in the authors' wrapping, without shift."""

    def __init__(self, wide: int, narrow: int, pool: int) -> None:
        super().__init__(wide, narrow, pool, False, False, {})
        self.linear = Pointwise(wide, narrow * pool)  # type: ignore[assignment]
