"""Denoisers of waves by name: `sinuous.audio.diffwave`, which needs diffusers, is imported when one is built.

The authors' checkpoints load: `create_model("diffwave_sashimi", checkpoint_path="500000.pkl")`. Those of SaShiMi have
the names of S4's third version, and C as it is behind a convolution of L steps; both are converted.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from timm.models import generate_default_cfgs
from torch import Tensor, nn

from sinuous.audio.sashimi_checkpoints import of_system, take_lengths_out
from sinuous.core.extras import package
from sinuous.core.registry import register_model

SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "diffwave_sashimi": ("DiffWaveSashimi", {"embed_dim": 128}),
    "diffwave_sashimi_small": ("DiffWaveSashimi", {"embed_dim": 64}),
    "diffwave_sashimi_vocoder": ("DiffWaveSashimi", {"embed_dim": 32, "mel_bands": 80}),
    "diffwave_wavenet": ("DiffWaveWaveNet", {}),
    "diffwave_wavenet_small": ("DiffWaveWaveNet", {"embed_dim": 128, "depth": 30, "dilation_cycle": 10}),
    "test_diffwave": ("DiffWaveSashimi", {"embed_dim": 8, "depth": 1, "pool": (2, 2), "mixer_options": {"d_state": 8}}),
}


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The authors' names or our own, as `model` has them."""
    state: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        name, tensor = of_system(name, tensor, softplus=False)
        state[name] = tensor.squeeze(-1) if ".output_linear." in name and tensor.ndim == 3 else tensor
    take_lengths_out(state, model)
    return state


_PAPER = {
    "license": "apache-2.0",
    "classifier": "final_conv.2.conv",
    "first_conv": "init_conv.0.conv",
    "input_size": (1, 16000),
    "num_classes": 0,
    "origin_url": "https://github.com/albertfgu/diffwave-sashimi",
}
_SASHIMI = {"paper_name": "It's Raw! Audio Generation with State-Space Models", "paper_ids": "arXiv:2202.09729"}
_WAVENET = {
    "paper_name": "DiffWave: A Versatile Diffusion Model for Audio Synthesis",
    "paper_ids": "arXiv:2009.09761",
}

default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": {**_PAPER, **(_WAVENET if "wavenet" in name else _SASHIMI)} for name in SIZES}
)


def _create(variant: str, device: Any = None, dtype: Any = None, **kwargs: Any) -> nn.Module:
    package("diffusers", "diffusion")
    kind, sizes = SIZES[variant]
    if kwargs.get("mixer", sizes.get("mixer", "s4_bidirectional")) != "s4_bidirectional":  # options are for another one
        sizes = {key: value for key, value in sizes.items() if key != "mixer_options"}
    options = sizes.get("mixer_options", {}) | dict(kwargs.pop("mixer_options", None) or {})
    if options:
        kwargs["mixer_options"] = options
    model: nn.Module = getattr(importlib.import_module("sinuous.audio.diffwave"), kind)(**{**sizes, **kwargs})
    # Not by diffusers, which warns of every dtype.
    return model if device is None and dtype is None else nn.Module.to(model, device=device, dtype=dtype)


@register_model(domain="audio")
def diffwave_sashimi(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiffWave with SaShiMi's U-Net of width 128: 6 blocks of S4 that reads both ways at each of three rates."""
    return _create("diffwave_sashimi", **kwargs)


@register_model(domain="audio")
def diffwave_sashimi_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiffWave with SaShiMi's U-Net of width 64."""
    return _create("diffwave_sashimi_small", **kwargs)


@register_model(domain="audio")
def diffwave_sashimi_vocoder(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiffWave with SaShiMi's U-Net of width 32, told a spectrogram of 80 mel bands every 256 samples."""
    return _create("diffwave_sashimi_vocoder", **kwargs)


@register_model(domain="audio")
def diffwave_wavenet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiffWave with a WaveNet of 36 blocks of width 256."""
    return _create("diffwave_wavenet", **kwargs)


@register_model(domain="audio")
def diffwave_wavenet_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiffWave with a WaveNet of 30 blocks of width 128."""
    return _create("diffwave_wavenet_small", **kwargs)


@register_model(domain="audio")
def test_diffwave(pretrained: bool = False, **kwargs: Any) -> nn.Module:  # noqa: PT028
    """DiffWave for tests: SaShiMi's U-Net of width 8."""
    return _create("test_diffwave", **kwargs)
