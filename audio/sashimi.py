"""SaShiMi: a model of waveforms, sample by sample, and its net as a backbone.

    z = net(e(codes))                                              see `sinuous.audio.sashimi_backbone`
    logits_t = W z_t + b                                           of code t + 1, from the codes up to t
    e(c) = E_c, or E_c + x(c) w                                    x(c) the level of code c, see `wave_codes`

    model = sinuous.create_model("sashimi_sc09", checkpoint_path="sashimi_sc09.pt")

Models with `scalar` norms have the layout of the published checkpoints, those with `layer` norms that of the authors'
standalone class. Both read the authors' files, those from before version 4 as well. A file with `inv_dt` does not say
of which function of it the step is: runs of version 4 have softplus, files converted from older ones
`mixer_options={"dt_transform": "exp"}`. Older names settle it, and their steps are converted.

Source: Goel et al., "It's Raw! Audio Generation with State-Space Models" (arXiv 2202.09729); state-spaces/s4
(Apache-2.0), an independent implementation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from sinuous.audio.sashimi_backbone import SashimiBackbone, SashimiState
from sinuous.audio.sashimi_checkpoints import fit_sashimi
from sinuous.audio.wave_codes import COMPONENTS, levels_of, logistic_logits, start_logistics
from sinuous.audio.wavenet import Readout
from sinuous.core.checks import check_arguments, check_choice, check_sizes, described
from sinuous.core.registry import register_model
from sinuous.core.weights import shipped_cfgs

__all__ = ["Sashimi", "SashimiBackbone", "SashimiState", "checkpoint_filter_fn"]

EMBEDDINGS = ("codes", "both")
HEADS = ("categorical", "logistic")
CODE_START, WAVE_START = 0.3, 4.0
"""Deviations of E and w at the start with `embedding="both"`: levels of music are about a tenth."""

SIZES: dict[str, dict[str, Any]] = {
    "sashimi_2l": {"depth": 2},
    "sashimi_4l": {"depth": 4},
    "sashimi_8l": {"depth": 8},
    "sashimi_8l_unet": {"depth": 8, "unet": True},
    "sashimi_sc09": {"depth": 8, "norm": "scalar"},
    "sashimi_beethoven": {"depth": 8, "norm": "scalar"},
    "sashimi_youtubemix": {"depth": 8, "norm": "scalar"},
    "sashimi_sc09_unet": {"depth": 8, "norm": "scalar", "unet": True, "mixer_options": {"n_ssm": None}},
    "sashimi_nano": {"depth": 2, "mixer": "s4d", "embedding": "both", "head": "logistic"},
    "test_sashimi": {"embed_dim": 8, "depth": 1, "pool": (2, 2), "vocab_size": 16, "mixer_options": {"d_state": 8}},
}


class Sashimi(nn.Module):
    """SaShiMi on codes of samples: `[B, T]` to logits `[B, T, vocab_size]` of the codes that follow.

    Args:
        vocab_size: V, number of codes.
        embedding: `"codes"`, or `"both"` for codes and the wave itself.
        head: `"categorical"`, or `"logistic"` for eight discretised logistics around the last sample.
        codec: name of the codec whose levels `embedding="both"` and `head="logistic"` take.
        embed_dim, depth, pool, expand, ff, unet, causal, shift, norm, mixer, mixer_options, drop_rate: of the
            `SashimiBackbone`.

    Raises:
        ValueError: if a size or a choice is not allowed, or the codec has no level for each code.
        TypeError: if the mixer has no such option.
    """

    levels: Tensor | None

    @check_arguments
    def __init__(
        self,
        vocab_size: int = 256,
        embed_dim: int = 64,
        depth: int = 8,
        pool: Sequence[int] = (4, 4),
        expand: int = 2,
        ff: int = 2,
        unet: bool = False,
        causal: bool = True,
        shift: bool = True,
        norm: str = "layer",
        mixer: str = "s4",
        mixer_options: Mapping[str, Any] | None = None,
        drop_rate: float = 0.0,
        embedding: str = "codes",
        head: str = "categorical",
        codec: str = "mu_law",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_sizes(vocab_size=vocab_size)
        check_choice("embedding", embedding, EMBEDDINGS)
        check_choice("head", head, HEADS)
        self.vocab_size = vocab_size
        self.num_features = self.embed_dim = self.dim = embed_dim
        self.depth, self.causal = depth, causal
        self.encoder: Any = nn.Sequential(nn.Embedding(vocab_size, embed_dim, **dd))
        self.model = SashimiBackbone(
            embed_dim, depth, pool, expand, ff, unet, causal, shift, norm, mixer, mixer_options, drop_rate, **dd
        )
        self.logistic, self.codec = head == "logistic", codec
        self.decoder: Any = nn.Sequential(Readout(embed_dim, 3 * COMPONENTS if self.logistic else vocab_size, dd))
        self.wave = nn.Parameter(torch.empty(embed_dim, **dd)) if embedding == "both" else None
        known = self.logistic or self.wave is not None
        self.register_buffer("levels", torch.empty(vocab_size, **dd) if known else None)
        self._start()

    def init_weights(self) -> None:
        """Fill every parameter and buffer anew, as torch's layers start and by the mixers' rules."""
        self.encoder[0].reset_parameters()
        self.model.init_weights()
        self.decoder[0].output_transform.reset_parameters()
        self._start()

    def _start(self) -> None:
        """Fill what the options add."""
        if self.levels is not None:
            self.levels.copy_(levels_of(self.codec, self.vocab_size))
        if self.wave is not None:  # the wave is heard above its codes from the start
            nn.init.normal_(self.encoder[0].weight, std=CODE_START)
            nn.init.normal_(self.wave, std=WAVE_START)
        if self.logistic:
            start_logistics(self.decoder[0].output_transform)

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that weight decay should leave alone."""
        return {f"model.{name}" for name in self.model.no_weight_decay()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each block again in the backward pass instead of keeping its activations."""
        self.model.set_grad_checkpointing(enable)

    def forward(self, codes: Tensor) -> Tensor:
        """Logits `[B, T, vocab_size]` of codes `[B, T]`: those at step t are of the code at step t + 1.

        Raises:
            ValueError: if the codes have another shape, dtype or range.
        """
        return self.forward_head(self.forward_features(codes), codes)

    def forward_features(self, codes: Tensor) -> Tensor:
        """Features `[B, T, embed_dim]` that the head reads."""
        features: Tensor = self.model(self._embed(codes, 2))
        return features

    def forward_head(self, x: Tensor, codes: Tensor) -> Tensor:
        """Logits of features `[..., embed_dim]` behind the codes `[...]`."""
        logits: Tensor = self.decoder[0].output_transform(x)
        if self.logistic:
            assert self.levels is not None
            return logistic_logits(logits, self.levels[codes], self.levels)
        return logits

    def prefill(
        self, x: Tensor, state: SashimiState | None = None, *, last_only: bool = False
    ) -> tuple[Tensor, SashimiState]:
        """Read a part of a sequence, of any length, and go on from `state`.

        Args:
            x: codes `[B, T]`.
            state: what an earlier call returned; `None` at the start of a sequence.
            last_only: compute the logits of the last step alone.

        Returns:
            Logits `[B, T, vocab_size]`, or `[B, 1, vocab_size]`, and the state after the last step.

        Raises:
            ValueError: if codes or state have another form.
            NotImplementedError: if the model is not causal.
        """
        features, after = self.model.prefill(self._embed(x, 2), state)
        start = max(x.shape[1] - 1, 0) if last_only else 0
        return self.forward_head(features[:, start:], x[:, start:]), after

    def step(self, x_t: Tensor, state: SashimiState) -> tuple[Tensor, SashimiState]:
        """One step: codes `[B]` to logits `[B, vocab_size]` of the codes that follow, and the next state.

        Raises:
            ValueError, NotImplementedError: as `prefill`.
        """
        features, after = self.model.step(self._embed(x_t, 1), state)
        return self.forward_head(features, x_t), after

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> SashimiState:
        """The state before the first step, on the device and in the dtype of the parameters if none is given.

        Raises:
            NotImplementedError: if the model is not causal.
        """
        return self.model.initial_state(batch_size, device, dtype)

    def _embed(self, codes: Any, ndim: int) -> Tensor:
        if not isinstance(codes, Tensor) or codes.dtype not in (torch.int64, torch.int32) or codes.ndim != ndim:
            raise ValueError(
                f"codes must be an int64 tensor {'[B, T]' if ndim == 2 else '[B]'} (got {described(codes)}); "
                "encode a wave by a codec of sinuous.audio"
            )
        try:
            embedded: Tensor = self.encoder(codes)
        except IndexError:
            raise ValueError(
                f"codes must lie between 0 and {self.vocab_size - 1} (got {int(codes.min())} to {int(codes.max())}); "
                "use the codec that the model was trained with"
            ) from None
        if self.wave is not None:
            assert self.levels is not None
            embedded = embedded + self.levels[codes].unsqueeze(-1) * self.wave
        return embedded


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: Sashimi | SashimiBackbone) -> dict[str, Tensor]:
    """The authors' weights in either layout, older names included, or our own, by the names of `model`."""
    return fit_sashimi(state_dict, model, model if isinstance(model, SashimiBackbone) else model.model)


_PAPER = {
    "license": "apache-2.0",
    "paper_name": "It's Raw! Audio Generation with State-Space Models",
    "paper_ids": "arXiv:2202.09729",
    "origin_url": "https://github.com/state-spaces/s4",
    "classifier": "decoder.0.output_transform",
    "first_conv": "encoder.0",
    "num_classes": 256,
    "input_size": (16000,),
}

default_cfgs = generate_default_cfgs(
    {
        **{f"{name}.untrained": _PAPER for name in ("sashimi_backbone", *SIZES) if name != "sashimi_nano"},
        **shipped_cfgs(Path(__file__).parent / "weights", "sashimi_nano", _PAPER),
    }
)


def _create(variant: str, **kwargs: Any) -> Sashimi:
    sizes = SIZES[variant]
    options = {**sizes.get("mixer_options", {}), **(kwargs.get("mixer_options") or {})}
    if kwargs.get("mixer", sizes.get("mixer", "s4")) != sizes.get("mixer", "s4"):  # the options are for another one
        options = dict(kwargs.get("mixer_options") or {})
    return Sashimi(**{**sizes, **kwargs, "mixer_options": options})


@register_model(domain="audio")
def sashimi_backbone(pretrained: bool = False, **kwargs: Any) -> SashimiBackbone:
    """SaShiMi's net without embedding and head, `[B, T, embed_dim]` to `[B, T, embed_dim]`."""
    return SashimiBackbone(**kwargs)


@register_model(domain="audio")
def sashimi_2l(pretrained: bool = False, **kwargs: Any) -> Sashimi:
    """SaShiMi with two pairs of blocks at each rate."""
    return _create("sashimi_2l", **kwargs)


@register_model(domain="audio")
def sashimi_4l(pretrained: bool = False, **kwargs: Any) -> Sashimi:
    """SaShiMi with four pairs of blocks at each rate."""
    return _create("sashimi_4l", **kwargs)


@register_model(domain="audio")
def sashimi_8l(pretrained: bool = False, **kwargs: Any) -> Sashimi:
    """SaShiMi with eight pairs of blocks at each rate."""
    return _create("sashimi_8l", **kwargs)


@register_model(domain="audio")
def sashimi_8l_unet(pretrained: bool = False, **kwargs: Any) -> Sashimi:
    """SaShiMi's U-Net with eight pairs of blocks at each rate, on the way down and up."""
    return _create("sashimi_8l_unet", **kwargs)


@register_model(domain="audio")
def sashimi_sc09(pretrained: bool = False, **kwargs: Any) -> Sashimi:
    """SaShiMi of spoken digits at 16 kHz, codec `mu_law_s4`, in the layout of the published checkpoint."""
    return _create("sashimi_sc09", **kwargs)


@register_model(domain="audio")
def sashimi_beethoven(pretrained: bool = False, **kwargs: Any) -> Sashimi:
    """SaShiMi of piano sonatas at 16 kHz, codec `linear_s4`, in the layout of the published checkpoints."""
    return _create("sashimi_beethoven", **kwargs)


@register_model(domain="audio")
def sashimi_youtubemix(pretrained: bool = False, **kwargs: Any) -> Sashimi:
    """SaShiMi of piano music at 16 kHz, codec `mu_law_s4`, in the layout of the published checkpoint."""
    return _create("sashimi_youtubemix", **kwargs)


@register_model(domain="audio")
def sashimi_sc09_unet(pretrained: bool = False, **kwargs: Any) -> Sashimi:
    """SaShiMi's U-Net of spoken digits at 16 kHz, codec `mu_law_s4`, in the layout of the published checkpoint."""
    return _create("sashimi_sc09_unet", **kwargs)


@register_model(domain="audio")
def sashimi_nano(pretrained: bool = False, **kwargs: Any) -> Sashimi:
    """SaShiMi with two pairs of S4D blocks at each rate, for music at 8 kHz in real time."""
    return _create("sashimi_nano", **kwargs)


@register_model(domain="audio")
def test_sashimi(pretrained: bool = False, **kwargs: Any) -> Sashimi:  # noqa: PT028
    """SaShiMi for tests: width 8, 16 codes."""
    return _create("test_sashimi", **kwargs)
