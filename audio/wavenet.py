r"""WaveNet: dilated causal convolutions over codes of samples, the baseline of SaShiMi.

    x_0 = W_start embedding(codes)
    z_l = tanh(F_l * x_l) ⊙ σ(G_l * x_l)                  `*` two taps, d_l = 1, 2, 4, … samples apart
    x_{l+1} = x_l + R_l z_l
    logits = W_out E_2 relu(E_1 relu(Σ_l S_l z_l))        with biases in the last three

A step keeps what each convolution will still read: as many past inputs as it looks back, zeros before the first sample.

Paper: van den Oord et al., "WaveNet" (arXiv 1609.03499), as Goel et al. (2202.09729, appendix C.2) compare with it.
Reference: https://github.com/state-spaces/s4 (Apache-2.0), src/models/baselines/wavenet.py. This is an independent
implementation that reads the reference's state dictionaries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from timm.models import DefaultCfg, generate_default_cfgs
from torch import Tensor, nn

from sinuous.core.checks import check_arguments, check_sizes, described
from sinuous.core.mixers.contract import register_state
from sinuous.core.registry import register_model

__all__ = ["WaveNet", "WaveNetState", "checkpoint_filter_fn"]


@register_state
class WaveNetState(NamedTuple):
    """past: the inputs that the convolutions will still read, those of the first layer first and each layer's oldest
    first, `[B, Σ_l (kernel_size - 1) d_l, residual_channels]`."""

    past: Tensor


class Convolutions(nn.Module):
    """Parameters of the convolutions by the names of the reference; `WaveNet` applies them."""

    def __init__(
        self,
        count: int,
        embed_dim: int,
        residual_channels: int,
        dilation_channels: int,
        skip_channels: int,
        end_channels: int,
        kernel_size: int,
        bias: bool,
        dd: dict[str, Any],
    ) -> None:
        super().__init__()

        def layers(wide_in: int, wide_out: int, taps: int) -> nn.ModuleList:
            return nn.ModuleList(nn.Conv1d(wide_in, wide_out, taps, bias=bias, **dd) for _ in range(count))

        self.filter_convs: Any = layers(residual_channels, dilation_channels, kernel_size)
        self.gate_convs: Any = layers(residual_channels, dilation_channels, kernel_size)
        self.residual_convs: Any = layers(dilation_channels, residual_channels, 1)
        self.skip_convs: Any = layers(dilation_channels, skip_channels, 1)
        self.start_conv = nn.Conv1d(embed_dim, residual_channels, 1, bias=bias, **dd)
        self.end_conv_1 = nn.Conv1d(skip_channels, end_channels, 1, **dd)
        self.end_conv_2 = nn.Conv1d(end_channels, embed_dim, 1, **dd)


class Readout(nn.Module):
    """The output matrix by its name in the reference."""

    def __init__(self, embed_dim: int, vocab_size: int, dd: dict[str, Any]) -> None:
        super().__init__()
        self.output_transform = nn.Linear(embed_dim, vocab_size, **dd)


class WaveNet(nn.Module):
    """WaveNet over codes of samples.

    Args:
        vocab_size: V, number of codes.
        embed_dim: width of the embedding and in front of the output matrix.
        layers: convolutions in a block, whose dilations double from 1.
        blocks: number of blocks.
        residual_channels: width of x.
        dilation_channels: width of z.
        skip_channels: width of the sum over all layers.
        end_channels: width between E_1 and E_2.
        kernel_size: taps of a dilated convolution.
        bias: biases in all convolutions; E_1 and E_2 have them always.

    Attributes:
        dilations: of all layers.
        receptive_field: number of codes that an output depends on, its own included.

    Raises:
        ValueError: if a size is less than 1.
    """

    causal: ClassVar[bool] = True

    @check_arguments
    def __init__(
        self,
        vocab_size: int = 256,
        embed_dim: int = 256,
        layers: int = 10,
        blocks: int = 4,
        residual_channels: int = 64,
        dilation_channels: int = 64,
        skip_channels: int = 1024,
        end_channels: int = 512,
        kernel_size: int = 2,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_sizes(vocab_size=vocab_size, embed_dim=embed_dim, layers=layers, blocks=blocks)
        check_sizes(residual_channels=residual_channels, dilation_channels=dilation_channels)
        check_sizes(skip_channels=skip_channels, end_channels=end_channels, kernel_size=kernel_size)
        self.vocab_size, self.embed_dim, self.num_features = vocab_size, embed_dim, embed_dim
        self.residual_channels, self.kernel_size = residual_channels, kernel_size
        self.dilations = [2**layer for _ in range(blocks) for layer in range(layers)]
        self.receptive_field = 1 + (kernel_size - 1) * sum(self.dilations)
        self.encoder = nn.Sequential(nn.Embedding(vocab_size, embed_dim, **dd))
        self.model = Convolutions(
            len(self.dilations),
            embed_dim,
            residual_channels,
            dilation_channels,
            skip_channels,
            end_channels,
            kernel_size,
            bias,
            dd,
        )
        self.decoder: Any = nn.Sequential(Readout(embed_dim, vocab_size, dd))

    def init_weights(self) -> None:
        """Fill every parameter anew, as torch's layers do."""
        for module in self.modules():
            if isinstance(module, nn.Embedding | nn.Conv1d | nn.Linear):
                module.reset_parameters()

    def no_weight_decay(self) -> set[str]:
        return set()

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B, T, vocab_size]` of codes `[B, T]`: at t those of the code after x_t."""
        return self.prefill(x)[0]

    def prefill(
        self, x: Tensor, state: WaveNetState | None = None, *, last_only: bool = False
    ) -> tuple[Tensor, WaveNetState]:
        """Read a part of a sequence and go on from `state`.

        Args:
            x: codes `[B, T]`.
            state: what an earlier call returned; `None` at the start of a sequence.
            last_only: compute the logits of the last step alone.

        Returns:
            Logits `[B, T, vocab_size]`, or `[B, 1, vocab_size]`, and the state after the last step.
        """
        stream = self.start(x, 2).transpose(1, 2)
        state = self.initial_state(x.shape[0]) if state is None else state
        if x.shape[1] == 0:
            return stream.new_zeros(x.shape[0], 0, self.vocab_size), state
        begin = x.shape[1] - 1 if last_only else 0
        summed: Tensor | None = None
        kept = []
        for layer, past in enumerate(self._split(state.past)):
            history = torch.cat([past.transpose(1, 2), stream], 2)
            weight, bias = self.gated(layer)
            z = _gate(F.conv1d(history, weight, bias, dilation=self.dilations[layer]), 1)
            skip = self.model.skip_convs[layer](z[..., begin:])
            summed = skip if summed is None else summed + skip
            stream = self.model.residual_convs[layer](z) + stream
            kept.append(history[..., history.shape[2] - past.shape[1] :])
        assert summed is not None
        return self._finish(summed.transpose(1, 2)), WaveNetState(torch.cat(kept, 2).transpose(1, 2))

    def step(self, x_t: Tensor, state: WaveNetState) -> tuple[Tensor, WaveNetState]:
        """One step: codes `[B]` to logits `[B, vocab_size]` and the next state."""
        stream = self.start(x_t, 1)
        outputs, kept = [], []
        for layer, past in enumerate(self._split(state.past)):
            taps = [*past[:, :: self.dilations[layer]].unbind(1), stream]
            kept += [past[:, 1:], stream.unsqueeze(1)] if past.shape[1] else []
            weight, bias = self.gated(layer)
            z = _gate(F.linear(torch.cat(taps, 1), weight.transpose(1, 2).flatten(1), bias), 1)
            outputs.append(z)
            residual = self.model.residual_convs[layer]
            stream = F.linear(z, residual.weight.squeeze(2), residual.bias) + stream
        past = torch.cat(kept, 1) if kept else state.past
        return self._finish(F.linear(torch.cat(outputs, 1), *self.skips())), WaveNetState(past)

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> WaveNetState:
        """The state before the first step, on the device and in the dtype of the parameters if none is given."""
        shape = (batch_size, self.receptive_field - 1, self.residual_channels)
        return WaveNetState(self.model.start_conv.weight.new_zeros(shape, device=device, dtype=dtype))

    def _split(self, past: Tensor) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = past.split([(self.kernel_size - 1) * dilation for dilation in self.dilations], 1)
        return parts

    def gated(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """Weight `[2 dilation_channels, residual_channels, kernel_size]` and bias of a layer's F and G."""
        value, gate = self.model.filter_convs[layer], self.model.gate_convs[layer]
        bias = None if value.bias is None else torch.cat([value.bias, gate.bias])
        return torch.cat([value.weight, gate.weight]), bias

    def skips(self) -> tuple[Tensor, Tensor | None]:
        """Weight `[skip_channels, layers × dilation_channels]` and bias of the sum over all layers."""
        convs: list[Any] = list(self.model.skip_convs)
        bias = None if convs[0].bias is None else torch.stack([conv.bias for conv in convs]).sum(0)
        return torch.cat([conv.weight.squeeze(2) for conv in convs], 1), bias

    def start(self, x: Tensor, ndim: int) -> Tensor:
        """x_0 `[…, residual_channels]` of codes, `[B, T]` if `ndim` is 2 or `[B]`."""
        if not isinstance(x, Tensor) or x.ndim != ndim or x.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"x must be codes, int64 {'[B, T]' if ndim == 2 else '[B]'} (got {described(x)}); "
                "encode a wave by a codec of sinuous.audio"
            )
        try:
            x = self.encoder(x)
        except IndexError:
            raise ValueError(
                f"codes must lie between 0 and {self.vocab_size - 1} (got {int(x.min())} to {int(x.max())}); "
                "use the codec that the model was trained with"
            ) from None
        start = self.model.start_conv
        return F.linear(x, start.weight.squeeze(2), start.bias)

    def _finish(self, summed: Tensor) -> Tensor:
        first, second = self.model.end_conv_1, self.model.end_conv_2
        x = F.relu(F.linear(F.relu(summed), first.weight.squeeze(2), first.bias))
        logits: Tensor = self.decoder[0].output_transform(F.linear(x, second.weight.squeeze(2), second.bias))
        return logits


def _gate(x: Tensor, axis: int) -> Tensor:
    value, gate = x.chunk(2, axis)
    return torch.tanh(value) * torch.sigmoid(gate)


_OLDER = {"encoder.weight": "encoder.0.weight"} | {
    f"decoder.output_transform.{name}": f"decoder.0.output_transform.{name}" for name in ("weight", "bias")
}


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: WaveNet) -> dict[str, Tensor]:
    """The authors' weights, or our own, by the names of `model`."""
    parts = tuple(f"{name}." for name, _ in model.named_children())
    named = {_OLDER.get(name, name): tensor for name, tensor in state_dict.items()}
    return {name if name.startswith(parts) else f"model.{name}": tensor for name, tensor in named.items()}


_COMMON = {
    "num_classes": 256,
    "classifier": "decoder.0.output_transform",
    "first_conv": "encoder.0",
    "paper_name": "WaveNet: A Generative Model for Raw Audio",
    "paper_ids": "arXiv:1609.03499",
    "origin_url": "https://github.com/state-spaces/s4",
}
default_cfgs: dict[str, DefaultCfg] = generate_default_cfgs(
    {"wavenet_4m": {**_COMMON, "input_size": (16000,)}, "test_wavenet": {**_COMMON, "input_size": (64,)}}
)


@register_model(domain="audio")
def wavenet_4m(pretrained: bool = False, **kwargs: Any) -> WaveNet:
    """WaveNet with four blocks of ten layers of width 64, as SaShiMi's authors compare with it."""
    return WaveNet(**kwargs)


@register_model(domain="audio")
def test_wavenet(pretrained: bool = False, **kwargs: Any) -> WaveNet:  # noqa: PT028
    """A WaveNet of two blocks of three layers, for tests."""
    sizes = {"embed_dim": 12, "residual_channels": 8, "dilation_channels": 10, "skip_channels": 16, "end_channels": 14}
    return WaveNet(**{"layers": 3, "blocks": 2, **sizes, **kwargs})
