"""A classifier of sounds: a front end, residual blocks around any mixer, the mean over time, a linear layer.

    frames = front end of the wave                      [B, 1, T] to [B, F, features], see `sinuous.audio.front_ends`
    x = W frames + b;  x ← x + mixer(norm(x));  x ← x + mlp(norm(x))         `depth` times
    logits = W' mean over frames of norm(x) + b'

With S4 that reads both ways it is the model of raw speech of Gu, Goel and Ré (arXiv 2111.00396, section 4.3), who read
every sample; here the front end makes frames first. Clips of different lengths are packed into one row ahead of the
first mixer, so that no recurrence reads padding, and an answer is that of the clip alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from sinuous.audio.front_ends import Cepstrum, LearnedFilters, LogMel, frames_of
from sinuous.core import norms
from sinuous.core.checks import check_arguments, check_choice, check_range, check_sizes, described
from sinuous.core.classifier import Classifier
from sinuous.core.pooling import mean_over_time
from sinuous.core.registry import register_model
from sinuous.core.stack import Stack
from sinuous.core.weights import shipped_cfgs

FRONT_ENDS = ("wave", "log_mel", "mfcc")
WEIGHTS = Path(__file__).parent / "weights"


class WaveClassifier(Classifier):
    """Logits of clips of any length.

    Args:
        num_classes: C; 0 leaves out the head, and the output is the mean.
        sample_rate: samples a second of the waves.
        front_end: `"wave"`, `"log_mel"` or `"mfcc"`.
        mixer: by its registered name; one that reads forwards alone gets a twin that runs from the end.
        embed_dim: D, width of the residual stream.
        depth: number of blocks.
        mixer_options: keyword arguments of the mixer's constructor.
        front_end_options: keyword arguments of the front end: `strides`, `num_bands`, `hop`, `window`,
            `num_coefficients`.
        mlp_ratio: width of the MLPs between their layers, over `embed_dim`; 0 for none.
        drop_rate: dropout ahead of the head and inside the MLPs.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.

    Shapes: B clips, T samples, F frames, D width, C classes.

    Raises:
        ValueError: if a size or a choice is not allowed, or there is no such mixer.
    """

    @check_arguments
    def __init__(
        self,
        num_classes: int = 35,
        sample_rate: int = 16000,
        front_end: str = "wave",
        mixer: str = "s4d_bidirectional",
        embed_dim: int = 128,
        depth: int = 6,
        mixer_options: Mapping[str, Any] | None = None,
        front_end_options: Mapping[str, Any] | None = None,
        mlp_ratio: float = 2.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_choice("front_end", front_end, FRONT_ENDS)
        check_range(0, float("inf"), num_classes=num_classes, mlp_ratio=mlp_ratio)
        check_sizes(sample_rate=sample_rate, embed_dim=embed_dim, depth=depth)
        self.sample_rate = sample_rate
        self.num_features = self.embed_dim = embed_dim
        self.depth, self.drop_rate = depth, drop_rate
        options = dict(front_end_options or {})
        self.front_end: LearnedFilters | LogMel
        if front_end == "wave":
            self.front_end = LearnedFilters(sample_rate, embed_dim, **options, **dd)
        else:
            self.front_end = (LogMel if front_end == "log_mel" else Cepstrum)(sample_rate, **options)
        self.embed = nn.Linear(self.front_end.num_features, embed_dim, **dd)
        self.layers = Stack(
            embed_dim,
            depth,
            mixer,
            {mixer: dict(mixer_options or {})},
            mlp="gelu" if mlp_ratio else "none",
            mlp_ratio=mlp_ratio or 1.0,
            mlp_bias=True,
            norm="layer",
            causal=False,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            **dd,
        )
        self.norm = norms.LayerNorm(embed_dim, **dd)
        self.reset_classifier(num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """Fill every parameter and buffer anew: blocks as in `Stack.init_weights`, the head N(0, 0.02²)."""
        self.front_end.init_weights()
        self.embed.reset_parameters()
        self.layers.init_weights()
        self.norm.reset_parameters()
        self.init_head()

    def no_weight_decay(self) -> set[str]:
        return {f"layers.{name}" for name in self.layers.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": r"^front_end|^embed",
            "blocks": [(r"^layers\.(\d+)", None), (r"^norm|^head", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.layers.set_grad_checkpointing(enable)

    def forward(self, wave: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits `[B, C]` of waves `[B, 1, T]`, of full scale ±1.

        Args:
            wave: clips, those that end early with anything behind their end.
            lengths: samples of each clip, whole numbers `[B]`; all are of T samples if absent.

        Raises:
            ValueError: if the wave or the lengths have another shape, or a length is not between 1 and T.
        """
        features, bounds = self.forward_features(wave, lengths)
        return self.forward_head(features, bounds)

    def forward_features(self, wave: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Features of frames, `[B, F, D]` and None where all clips have as many frames; else packed, `[1, ΣF, D]`, and
        their boundaries `[B + 1]`."""
        self._check(wave, lengths)
        lengths = None if lengths is None else lengths.to(wave.device)
        x, bounds = self.embed(self.front_end(wave, lengths).to(self.embed.weight.dtype)), None
        if lengths is not None:
            x, bounds = _packed(x, frames_of(lengths, self.front_end.hop))
        return self.norm(self.layers(norms.at_least_fp32(x), bounds)), bounds

    def forward_head(self, features: Tensor, bounds: Tensor | None = None, pre_logits: bool = False) -> Tensor:
        """Logits `[B, C]`, or means `[B, D]`, of what `forward_features` returned."""
        mean = F.dropout(mean_over_time(features, cu_seqlens=bounds), self.drop_rate, self.training)
        logits: Tensor = mean if pre_logits else self.head(mean)
        return logits

    def _check(self, wave: Tensor, lengths: Tensor | None) -> None:
        if not isinstance(wave, Tensor) or wave.ndim != 3 or wave.shape[1] != 1:
            raise ValueError(
                f"wave must be [B, 1, T] (got {described(wave)}); add the missing axes with unsqueeze, and mix several "
                "channels to one with mean(1, keepdim=True)"
            )
        if not wave.is_floating_point():
            raise ValueError(f"wave must be of real numbers of full scale ±1 (got {wave.dtype}); divide the samples")
        if wave.shape[-1] == 0:
            raise ValueError("wave must have at least one sample (got none); leave empty clips out")
        if lengths is None:
            return
        if not isinstance(lengths, Tensor) or lengths.shape != wave.shape[:1] or lengths.is_floating_point():
            raise ValueError(
                f"lengths must be a whole number of samples for each of the {len(wave)} clips (got "
                f"{described(lengths)}); give torch.tensor([T_1, T_2, ...])"
            )
        if len(lengths) and not lengths.is_meta and not 1 <= int(lengths.min()) <= int(lengths.max()) <= wave.shape[-1]:
            raise ValueError(
                f"lengths must lie between 1 and the {wave.shape[-1]} samples of the wave (got {int(lengths.min())} "
                f"to {int(lengths.max())}); count samples, and leave empty clips out"
            )


def _packed(x: Tensor, counts: Tensor) -> tuple[Tensor, Tensor | None]:
    """The first `counts` steps of each row of `[B, F, D]` in one row, and their boundaries; as they are where all rows
    are whole."""
    whole = x.shape[1]
    if bool((counts == whole).all()):
        return x, None
    kept = torch.arange(whole, device=x.device) < counts.unsqueeze(1)
    return x[kept].unsqueeze(0), F.pad(counts.cumsum(0), (1, 0))


_INPUT = {"classifier": "head", "first_conv": "embed", "license": "apache-2.0"}
_PAPER = {
    "paper_name": "Efficiently Modeling Long Sequences with Structured State Spaces",
    "paper_ids": "arXiv:2111.00396",
}

default_cfgs = generate_default_cfgs(
    {
        "wave_classifier.untrained": {**_INPUT, **_PAPER, "num_classes": 35, "input_size": (1, 16000)},
        "test_wave_classifier.untrained": {**_INPUT, **_PAPER, "num_classes": 4, "input_size": (1, 800)},
        **shipped_cfgs(
            WEIGHTS, "wave_classifier_nano", {**_INPUT, **_PAPER, "num_classes": 16, "input_size": (1, 16000)}
        ),
    }
)


@register_model(domain="audio")
def wave_classifier(pretrained: bool = False, **kwargs: Any) -> WaveClassifier:
    """A classifier of sounds with 6 blocks of width 128, on the raw wave unless told otherwise."""
    return WaveClassifier(**kwargs)


@register_model(domain="audio")
def wave_classifier_nano(pretrained: bool = False, **kwargs: Any) -> WaveClassifier:
    """A small classifier of sounds with 4 blocks of width 96, on mel bands: instruments' notes."""
    sizes = {"num_classes": 16, "front_end": "log_mel", "embed_dim": 96, "depth": 4}
    return WaveClassifier(**{**sizes, **kwargs})


@register_model(domain="audio")
def test_wave_classifier(pretrained: bool = False, **kwargs: Any) -> WaveClassifier:  # noqa: PT028
    """A tiny classifier of sounds, for tests."""
    sizes = {"num_classes": 4, "sample_rate": 8000, "embed_dim": 16, "depth": 2}
    return WaveClassifier(**{**sizes, **kwargs})
