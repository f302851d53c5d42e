"""Models of the demo, by name: with their weights, from a folder, or untrained."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import nn

import sinuous
from sinuous.audio.codecs import Codec, codec
from sinuous.core.demo_parts import model_with_weights
from sinuous.core.registry import list_models
from sinuous.core.weights import all_weights

SOUNDS: dict[str, tuple[str, int]] = {
    "sashimi_sc09": ("mu_law_s4", 16000),
    "sashimi_sc09_unet": ("mu_law_s4", 16000),
    "sashimi_youtubemix": ("mu_law_s4", 16000),
    "sashimi_beethoven": ("linear_s4", 16000),
}
"""Codecs and rates of models that others have trained."""
USUAL = ("mu_law", 8000)


class Sound(NamedTuple):
    """How a model's codes are heard: their codec, and samples per second."""

    codec: Codec
    rate: int


def model_of(name: str | None, default: str, seed: int) -> nn.Module:
    """A model with its weights, in evaluation mode; one without any by the name of a registered model, which is said.

    Args:
        name: `NAME.TAG`, a folder or a hub id, or a model's name; None for the default.
        default: weights.
        seed: of untrained weights.

    Raises:
        ValueError: if there is no such model, or the default's weights are missing.
    """
    has_weights = {weights.architecture for weights in all_weights().values()}
    if name is None or os.path.isdir(name) or name not in list_models() or name in has_weights:
        return model_with_weights(name, default)
    print(f"{name} has no weights here: an untrained model, which makes noise")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = sinuous.create_model(name)
    return model.eval()


def sound_of(name: str, model: Any, codec_name: str | None, rate: int | None) -> Sound:
    """How the codes of a model are heard: as its user says, as its weights say, or as models of its name do.

    Raises:
        ValueError: if the codec has another number of codes than the model.
    """
    card = all_weights()[name].card if name in all_weights() else {}
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture", name)
    usual = SOUNDS.get(architecture, USUAL)
    chosen = codec_name or card.get("codec", usual[0])
    options = {} if chosen == "pcm16_bytes" else {"bits": max(2, (int(model.vocab_size) - 1).bit_length())}
    coded = codec(chosen, **options)
    if coded.vocab_size != model.vocab_size:
        raise ValueError(
            f"the model has {model.vocab_size} codes and codec {coded.name} has {coded.vocab_size}; give --codec, or "
            "another --model"
        )
    return Sound(coded, int(rate or card.get("sample_rate", usual[1])))
