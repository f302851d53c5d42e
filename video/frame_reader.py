"""A reader of films: an encoder that looks at each frame by itself, and a sequence model over what it saw.

    f_t = max over places of convolutions of frame t       features of one frame
    x_t = W f_t + b;  x ← x + mixer(norm(x))               `depth` times, causal: a state of constant size goes on
    logits = W' norm(x_T) + b'                             of the last frame, or of the mean over frames

The encoder is trained first, on single frames, and then stands still while the sequence model learns what the order of
frames means: weights of a reader without blocks give another reader its encoder and W. Where the head reads the last
frame, any number of frames can be read, part by part, and there is an answer after each of them.

The order, an encoder of frames and a state space model over frames, is that of Lee et al., "Video-Ma2mba" (arXiv
2411.19460), section 3.1; the sequence model is Mamba-2 (arXiv 2405.21060) unless told otherwise.

Shapes: B clips, N frames, C channels, H and W pixels, F features of a frame, D width, K classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.layers import ConvNormAct
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from sinuous.core import norms
from sinuous.core.checks import check_arguments, check_choice, check_range, check_sizes, described
from sinuous.core.classifier import Classifier
from sinuous.core.pooling import mean_over_time
from sinuous.core.registry import check_weights, register_model
from sinuous.core.stack import Stack, State
from sinuous.core.weights import shipped_cfgs

__all__ = ["FrameEncoder", "FrameReader", "checkpoint_filter_fn"]

WEIGHTS = Path(__file__).parent / "weights"
POOLS = ("last", "avg")
GROUP = 512
"""Frames that are encoded together, so that memory does not grow with the film."""

OPTIONS: dict[str, dict[str, Any]] = {"mamba2": {"d_state": 32, "headdim": 16, "A_init_range": (0.1, 2.0)}}
"""Of mixers, where none are given: many small heads, each with a decay of its own, slow ones at the start."""


class FrameEncoder(nn.Module):
    """Features `[M, F]` of frames `[M, C, H, W]`: convolutions, halving the sides at the first and the third, and the
    largest value of each channel over all places.

    Args:
        in_chans: C.
        widths: channels behind each convolution; F is the last.
    """

    def __init__(self, in_chans: int, widths: Sequence[int], device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.num_features = widths[-1]
        kinds = [(5, 2), (3, 1), (3, 2), *[(3, 1)] * len(widths)]
        self.layers = nn.Sequential(
            *(
                ConvNormAct(before, after, kernel, stride, device=device, dtype=dtype)
                for before, after, (kernel, stride) in zip((in_chans, *widths), widths, kinds, strict=False)
            )
        )

    def init_weights(self) -> None:
        """Fill every parameter and buffer anew, by the rules of torch's convolutions and batch norms."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                module.reset_parameters()

    def forward(self, frames: Tensor) -> Tensor:
        features: Tensor = self.layers(frames).amax((2, 3))
        return features


class FrameReader(Classifier):
    """Logits of clips of any length.

    Args:
        in_chans: C.
        num_classes: K; 0 leaves out the head, and the output is what it would read.
        embed_dim: D, width of the residual stream.
        depth: number of blocks; 0 for none, with which the order of frames is not seen.
        mixer: by its registered name, a causal one.
        mixer_options: keyword arguments of the mixer's constructor; those of `OPTIONS` if absent.
        global_pool: what the head reads: `"last"` the last frame, `"avg"` the mean over frames.
        encoder_widths: channels behind each convolution of the encoder.
        frozen: the encoder is not trained, and its batch norms keep the statistics that they have.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        img_size, num_frames: sides and number of the frames that it is trained on; it reads others, too.

    Raises:
        ValueError: if a size or a choice is not allowed, or the mixer is unknown or looks ahead.
        TypeError: if the mixer has no such option.
    """

    @check_arguments
    def __init__(
        self,
        in_chans: int = 1,
        num_classes: int = 12,
        embed_dim: int = 64,
        depth: int = 2,
        mixer: str = "mamba2",
        mixer_options: Mapping[str, Any] | None = None,
        global_pool: str = "last",
        encoder_widths: Sequence[int] = (32, 32, 64, 96),
        frozen: bool = False,
        drop_path_rate: float = 0.0,
        img_size: int = 32,
        num_frames: int = 64,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_sizes(in_chans=in_chans, embed_dim=embed_dim, img_size=img_size, num_frames=num_frames)
        check_sizes(encoder_widths=min(encoder_widths, default=0))
        check_range(0, float("inf"), num_classes=num_classes, depth=depth)
        check_choice("global_pool", global_pool, POOLS)
        self.in_chans, self.depth = in_chans, depth
        self.img_size, self.num_frames = img_size, num_frames
        self.num_features = self.embed_dim = embed_dim
        self.global_pool, self.frozen = global_pool, frozen
        self.encoder = FrameEncoder(in_chans, tuple(encoder_widths), **dd)
        self.embed = nn.Linear(self.encoder.num_features, embed_dim, **dd)
        options = OPTIONS.get(mixer, {}) if mixer_options is None else dict(mixer_options)
        self.layers: Stack | None = None
        if depth:
            self.layers = Stack(embed_dim, depth, mixer, {mixer: options}, drop_path_rate=drop_path_rate, **dd)
        self.norm = norms.RMSNorm(embed_dim, **dd)
        self.reset_classifier(num_classes)
        self.init_weights()
        self.encoder.requires_grad_(not frozen)

    def init_weights(self) -> None:
        """Fill every parameter and buffer anew: blocks as in `Stack.init_weights`, the head N(0, 0.02²)."""
        self.encoder.init_weights()
        self.embed.reset_parameters()
        if self.layers is not None:
            self.layers.init_weights()
        self.norm.reset_parameters()
        self.init_head()

    def no_weight_decay(self) -> set[str]:
        return set() if self.layers is None else {f"layers.{name}" for name in self.layers.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^encoder|^embed", "blocks": [(r"^layers\.(\d+)", None), (r"^norm|^head", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True, *, layers: int = 1, steps: int | None = None) -> None:
        """Recompute blocks in the backward pass, `layers` and `steps` at a time: see `Stack.set_grad_checkpointing`."""
        if self.layers is not None:
            self.layers.set_grad_checkpointing(enable, layers=layers, steps=steps)

    def train(self, mode: bool = True) -> FrameReader:
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, clips: Tensor) -> Tensor:
        """Logits `[B, K]` of clips `[B, C, N, H, W]`.

        Raises:
            ValueError: if clips have another shape.
        """
        return self.forward_head(self.forward_features(clips))

    def forward_features(self, clips: Tensor) -> Tensor:
        """Features of frames `[B, N, D]`, each of its frame and those before it."""
        x = self.encode(clips)
        return x if self.layers is None else self.layers(x)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits `[B, K]`, or what the head reads `[B, D]`, of what `forward_features` returned."""
        features = self.norm(features)
        pooled = features[:, -1] if self.global_pool == "last" else mean_over_time(features)
        logits: Tensor = pooled if pre_logits else self.head(pooled)
        return logits

    def encode(self, clips: Tensor) -> Tensor:
        """Features of single frames `[B, N, D]`, ahead of the first block."""
        self._check(clips)
        frames = clips.transpose(1, 2).flatten(0, 1).to(self.embed.weight.dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = torch.cat([self.encoder(group) for group in frames.split(GROUP)])
        return norms.at_least_fp32(self.embed(features.unflatten(0, (clips.shape[0], clips.shape[2]))))

    @property
    def can_carry(self) -> bool:
        """Whether a film can be read part by part, with an answer after each frame."""
        return self.layers is not None and self.global_pool == "last"

    def prefill(self, frames: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Read a part of a film and go on from `state`.

        Args:
            frames: `[B, C, N, H, W]`.
            state: what an earlier call returned; `None` at the start of a film.

        Returns:
            Logits `[B, N, K]` after each frame, and the state after the last.

        Raises:
            NotImplementedError: if there is no block, or the head reads the mean.
        """
        return self.prefill_features(self.encode(frames), state)

    def prefill_features(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """As `prefill`, from the features `[B, N, D]` that `encode` made of the frames."""
        if self.layers is None or not self.can_carry:
            raise NotImplementedError(
                "a reader without blocks, or of the mean over frames, has no state to carry; call forward"
            )
        x, after = self.layers.prefill(x, state)
        return self.head(self.norm(x)), after

    def _check(self, clips: Tensor) -> None:
        if not isinstance(clips, Tensor) or clips.ndim != 5 or clips.shape[1] != self.in_chans:
            raise ValueError(
                f"clips must be [B, {self.in_chans}, N, H, W] (got {described(clips)}); stack frames on the third axis"
            )
        if clips.shape[2] == 0:
            raise ValueError("clips must have at least one frame (got none); leave empty ones out")


def checkpoint_filter_fn(state: Mapping[str, Tensor], model: FrameReader) -> dict[str, Tensor]:
    """Weights as `model` needs them. Of a reader without blocks, encoder and embedding alone are taken where the model
    has blocks, or a head for other classes; the rest of it stays as it is, to be trained.

    Raises:
        ValueError: if the weights are of another model.

    Warns:
        UserWarning: if encoder and embedding alone are taken.
    """
    fitted = dict(state)
    lone = not any(name.startswith("layers.") for name in fitted)
    head = fitted.get("head.weight")
    if lone and (model.depth or (head is not None and len(head) != model.num_classes)):
        warnings.warn("the weights are of single frames: encoder and embedding alone are taken from them", stacklevel=2)
        taken = ("encoder.", "embed.")
        fitted = {name: tensor for name, tensor in fitted.items() if name.startswith(taken)}
        fitted |= {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(taken)}
    check_weights(fitted, model)
    return fitted


_INPUT = {"classifier": "head", "first_conv": "encoder.layers.0.conv", "license": "apache-2.0"}
_PAPER = {
    "paper_name": "Look Every Frame All at Once: Video-Ma2mba for Efficient Long-form Video Understanding with "
    "Multi-Axis Gradient Checkpointing",
    "paper_ids": "arXiv:2411.19460",
}
_GRAY = {"mean": (0.4,), "std": (0.2,)}
_NANO = {**_INPUT, **_PAPER, **_GRAY, "num_classes": 12, "input_size": (1, 64, 32, 32)}

default_cfgs = generate_default_cfgs(
    {
        **shipped_cfgs(WEIGHTS, "frame_reader_nano", _NANO),
        "test_frame_reader.untrained": {**_NANO, "input_size": (1, 8, 32, 32)},
    }
)


@register_model(domain="video")
def frame_reader_nano(pretrained: bool = False, **kwargs: Any) -> FrameReader:
    """A small reader of films: two blocks of Mamba-2 of width 64 over features of gray frames."""
    return FrameReader(**kwargs)


@register_model(domain="video")
def test_frame_reader(pretrained: bool = False, **kwargs: Any) -> FrameReader:  # noqa: PT028
    """A tiny reader of films, for tests."""
    return FrameReader(**{"embed_dim": 16, "encoder_widths": (8, 8, 16), **kwargs})
