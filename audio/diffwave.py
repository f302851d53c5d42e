"""DiffWave: denoisers of waves for diffusers, with the body of a WaveNet or of SaShiMi.

    x = relu(init_conv(wave));   x = body(x, embedding of the step, mel);   output = final_conv(x)

    model = sinuous.create_model("diffwave_sashimi")
    noise = model(sample, timestep).sample

The wave is `[B, 1, T]` of any T, and as many samples come out. Vocoders, models with `mel_bands`, are told a mel
spectrogram `[B, bands, M]` whose frame m stands for samples m hop to (m + 1) hop, or None for no condition. Importing
this imports diffusers; `sinuous.audio` offers the models by name without that.

Source: Kong et al., "DiffWave" (arXiv 2009.09761); Goel et al., "It's Raw!" (arXiv 2202.09729), section 5.3; names of
parameters as in albertfgu/diffwave-sashimi (Apache-2.0), an independent implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from sinuous.audio.diffwave_layers import (
    BareScalarNorm,
    Conv,
    NormedDownPool,
    NormedUpPool,
    Pointwise,
    SashimiBlock,
    WaveNetBlocks,
    ZeroConv,
    embed_steps,
)
from sinuous.core import norms
from sinuous.core.checks import check_arguments, check_sizes, described
from sinuous.core.mixers import S4, Bidirectional, Mixer, build_mixer, mixer_class

STEP_WIDTHS = (128, 512, 512)
"""Of the sines and cosines of a step, and of the two layers that embed it."""


@dataclass
class DiffWaveOutput(BaseOutput):
    """Output of a denoiser.

    Attributes:
        sample: `[B, out_channels, T]`, what the scheduler takes as the model's output.
    """

    sample: Tensor


class DiffWave(ModelMixin, ConfigMixin):
    """What both denoisers share: the call, its checks, and diffusers' saving and loading."""

    _supports_gradient_checkpointing = True

    def forward(
        self, sample: Tensor, timestep: Tensor | float = 0, mel: Tensor | None = None, return_dict: bool = True
    ) -> DiffWaveOutput | tuple[Tensor]:
        """Predict the noise, or what else the scheduler calls for, of noisy waves.

        Args:
            sample: `[B, in_channels, T]`.
            timestep: step of each, `[B]`, or one for all.
            mel: `[B, mel_bands, M]` with M at least T / hop, or None.
            return_dict: False for a tuple.

        Raises:
            ValueError: if an argument has another shape, or the model takes no mel spectrogram.
        """
        config = cast("Any", self).config
        if not isinstance(sample, Tensor) or sample.ndim != 3 or sample.shape[1] != config.in_channels:
            raise ValueError(
                f"sample must be [B, {config.in_channels}, T] (got {described(sample)}); add the missing axes with "
                "unsqueeze"
            )
        if sample.shape[-1] == 0:
            raise ValueError("sample must have at least one step (got none); give a longer one")
        steps = torch.as_tensor(timestep, device=sample.device)
        if steps.numel() not in (1, len(sample)) or steps.ndim > 1:
            raise ValueError(f"timestep must be one number, or one for each of the {len(sample)} waves (got {steps})")
        if mel is not None:
            self._check_mel(mel, sample)
        dtype = next(self.parameters()).dtype
        output = self.denoise(
            sample.to(dtype), steps.expand(len(sample)), None if mel is None else mel.to(sample.device, dtype)
        )
        return DiffWaveOutput(sample=output) if return_dict else (output,)

    def denoise(self, x: Tensor, steps: Tensor, mel: Tensor | None) -> Tensor:
        """`forward` of arguments that have been looked at."""
        raise NotImplementedError

    def _check_mel(self, mel: Tensor, sample: Tensor) -> None:
        bands, hop = (cast("Any", self).config[name] for name in ("mel_bands", "hop"))
        if bands is None:
            raise ValueError(
                f"this model was built without mel_bands and takes no mel spectrogram (got {described(mel)}); leave "
                "it out, or build the model with mel_bands"
            )
        frames = -(-sample.shape[-1] // hop)
        if mel.ndim != 3 or mel.shape[:2] != (len(sample), bands) or mel.shape[2] < frames:
            raise ValueError(
                f"mel must be [{len(sample)}, {bands}, M] with M at least {frames}, a frame for every {hop} of "
                f"{sample.shape[-1]} samples (got {list(mel.shape)}); pad the wave ahead of its spectrogram"
            )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each block again in the backward pass instead of keeping its activations."""
        self.enable_gradient_checkpointing() if enable else self.disable_gradient_checkpointing()

    def _block_call(self) -> Callable[..., Any]:
        """How a block is called: through torch's checkpointing where that is on."""
        checkpointed = self.gradient_checkpointing and torch.is_grad_enabled()
        return self._gradient_checkpointing_func if checkpointed else lambda block, *args: block(*args)

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that weight decay should leave alone: those that mixers name, and scalar norms."""
        names: set[str] = set()
        for place, module in self.named_modules():
            if isinstance(module, Mixer):
                names |= {f"{place}.{name}" for name in module.no_weight_decay()}
            elif isinstance(module, BareScalarNorm):
                names |= {f"{place}.m", f"{place}.s"}
        return names


class DiffWaveWaveNet(DiffWave):
    """DiffWave as it was first: a WaveNet that sees both sides.

    Args:
        in_channels: of the wave.
        out_channels: of the output.
        embed_dim: width of the residual stream.
        skip_channels: width of the skips.
        depth: number of blocks.
        dilation_cycle: blocks until dilations, 1, 2, 4, …, begin anew.
        mel_bands: bands of the spectrogram that the model is told; None for a model without.
        hop: samples of one of its frames.

    Raises:
        ValueError: if a size is not a whole number of 1 or more.
    """

    _no_split_modules = ["WaveNetBlock"]

    @register_to_config
    @check_arguments
    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        embed_dim: int = 256,
        skip_channels: int = 256,
        depth: int = 36,
        dilation_cycle: int = 12,
        mel_bands: int | None = None,
        hop: int = 256,
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, out_channels=out_channels, embed_dim=embed_dim, depth=depth, hop=hop)
        check_sizes(skip_channels=skip_channels, dilation_cycle=dilation_cycle, mel_bands=mel_bands or 1)
        self.gradient_checkpointing = False
        self.init_conv = nn.Sequential(Conv(in_channels, embed_dim), nn.ReLU())
        self.residual_layer = WaveNetBlocks(
            embed_dim, skip_channels, depth, dilation_cycle, STEP_WIDTHS, mel_bands, hop
        )
        self.final_conv = nn.Sequential(
            Conv(skip_channels, skip_channels), nn.ReLU(), ZeroConv(skip_channels, out_channels)
        )

    def denoise(self, x: Tensor, steps: Tensor, mel: Tensor | None) -> Tensor:
        y: Tensor = self.final_conv(self.residual_layer(self.init_conv(x), steps, mel, self._block_call()))
        return y


class DiffWaveSashimi(DiffWave):
    """DiffWave with SaShiMi's U-Net, whose mixers see both sides and whose pools have no shift.

    Args:
        in_channels: of the wave.
        out_channels: of the output.
        embed_dim: width of the stream at the rate of samples.
        depth: blocks at each rate, on the way down, in the middle and on the way up.
        pool: steps that each pool makes one of, finest first.
        expand: how many times wider each pool makes the stream.
        ff: width of the MLPs between their layers, over that of the stream.
        mixer: name of a registered mixer; one that reads forwards alone gets a twin that runs from the end.
        mixer_options: keyword arguments of its constructor.
        mel_bands: bands of the spectrogram that the model is told; None for a model without.
        hop: samples of one of its frames.
        align_mel: streams of a lower rate are told the spectrogram at their rate. False is the authors' code, which
            tells them that of the first samples, a quarter and a sixteenth of the wave.

    Raises:
        ValueError: if a size is not a whole number of 1 or more, or there is no such mixer.
        TypeError: if the mixer has no such option.
    """

    _no_split_modules = ["SashimiBlock"]

    @register_to_config
    @check_arguments
    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        embed_dim: int = 128,
        depth: int = 6,
        pool: Sequence[int] = (4, 4),
        expand: int = 2,
        ff: int = 2,
        mixer: str = "s4_bidirectional",
        mixer_options: Mapping[str, Any] | None = None,
        mel_bands: int | None = None,
        hop: int = 256,
        align_mel: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, out_channels=out_channels, embed_dim=embed_dim, depth=depth, hop=hop)
        check_sizes(expand=expand, ff=ff, mel_bands=mel_bands or 1, **{f"pool[{i}]": p for i, p in enumerate(pool)})
        self.gradient_checkpointing = False
        options = ({"lr": None} if issubclass(mixer_class(mixer), S4) else {}) | dict(mixer_options or {})
        make_mixer = Bidirectional if mixer_class(mixer).causal else build_mixer

        def blocks(width: int, rate: int) -> list[nn.Module]:
            return [
                SashimiBlock(
                    make_mixer(mixer, width, **options), width, ff, STEP_WIDTHS[2], mel_bands, hop, rate, not align_mel
                )
                for _ in range(depth)
            ]

        self.init_conv = nn.Sequential(Pointwise(in_channels, embed_dim), nn.ReLU())
        self.fc_t1 = nn.Linear(*STEP_WIDTHS[:2])
        self.fc_t2 = nn.Linear(*STEP_WIDTHS[1:])
        down: list[nn.Module] = []
        up: list[nn.Module] = []
        width, rate = embed_dim, 1
        for size in pool:
            down += [*blocks(width, rate), NormedDownPool(width, width * expand, size)]
            up = [NormedUpPool(width * expand, width, size), *blocks(width, rate), *up]
            width, rate = width * expand, rate * size
        self.d_layers = nn.ModuleList(down)
        self.c_layers = nn.ModuleList(blocks(width, rate))
        self.u_layers = nn.ModuleList(up)
        self.norm = BareScalarNorm()
        self.final_conv = nn.Sequential(Conv(embed_dim, embed_dim), nn.ReLU(), ZeroConv(embed_dim, out_channels))

    def denoise(self, x: Tensor, steps: Tensor, mel: Tensor | None) -> Tensor:
        embedded = embed_steps(steps, self.fc_t1, self.fc_t2)
        call = self._block_call()
        x = norms.at_least_fp32(self.init_conv(x.mT))
        passed = [x]
        for layer in self.d_layers:
            x = layer(x) if isinstance(layer, NormedDownPool) else call(layer, x, embedded, mel)
            passed.append(x)
        for layer in self.c_layers:
            x = call(layer, x, embedded, mel)
        x = x + passed.pop()
        for layer in self.u_layers:
            skip = passed.pop()
            x = layer(x, skip.shape[1]) if isinstance(layer, NormedUpPool) else call(layer, x, embedded, mel)
            x = x + skip
        y: Tensor = self.final_conv(self.norm(x).mT)
        return y
