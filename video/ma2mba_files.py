"""Weights of Video-Ma2mba: our own files, language models' files, and pictures models' files, each into its part."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import timm
from torch import Tensor

from sinuous.core.checkpoints import load_state_dict
from sinuous.core.language.models import checkpoint_filter_fn as of_language
from sinuous.core.registry import check_weights, reaching_the_hub

Place = str | os.PathLike[str]


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: Any) -> Mapping[str, Tensor]:
    """Our own weights as they are, or a language model's, as state-spaces publishes them, as those of `language`.

    Raises:
        ValueError: if the weights are of another language model.

    Warns:
        UserWarning: if they are of a language model: the other parts keep the weights that they have.
    """
    if any(name.startswith("language.") for name in state_dict):
        return state_dict
    state = _language_state(state_dict, model)
    warnings.warn(
        "the weights are of a language model: vision and projector keep the weights that they have, and must be loaded "
        "(sinuous.video.ma2mba.load_parts) and trained",
        UserWarning,
        stacklevel=3,
    )
    others = {n: t for n, t in model.state_dict().items() if not n.startswith("language.")}
    return {**others, **{f"language.{name}": tensor for name, tensor in state.items()}}


def load_parts(model: Any, *, language: Place | None = None, vision: Place | bool | None = None) -> None:
    """Load published weights into the parts of a `VideoMa2mba`, in place.

    Args:
        model: to be filled.
        language: a file of state-spaces' Mamba-2, of transformers, or of our own language models.
        vision: a file of the model of pictures, in the names of timm or of open_clip; `True` for timm's own from the
            Hugging Face Hub. Positions are resampled to the model's frames.

    Raises:
        ValueError: if a file is of another model.
        FileNotFoundError: if there is no such file.
        ConnectionError: if the hub cannot be reached.
    """
    if language is not None:
        model.language.load_state_dict(_language_state(load_state_dict(language), model))
    if vision is not None and vision is not False:
        _load_vision(model, vision)


def _load_vision(model: Any, source: Place | bool) -> None:
    reading, wanted = model.reading, model.vision.state_dict()
    cfg = timm.models.get_pretrained_cfg(reading.name)
    options: dict[str, Any] = {"num_classes": 0}
    if cfg is not None and cfg.fixed_input_size:
        options["img_size"] = reading.sides
    if isinstance(source, bool):
        whole = reaching_the_hub(reading.name, lambda: timm.create_model(reading.name, pretrained=True, **options))
        state = whole.state_dict()
    else:
        state = load_state_dict(source)
        whole = timm.create_model(reading.name, **options)
        # timm's own loading only logs names that do not fit.
        if (to_timm := getattr(sys.modules[type(whole).__module__], "checkpoint_filter_fn", None)) is not None:
            state = to_timm(state, whole)
    state = {name: tensor for name, tensor in state.items() if name in wanted}
    check_weights(state, model.vision)
    model.vision.load_state_dict(state)


def _language_state(state_dict: Mapping[str, Tensor], model: Any) -> Mapping[str, Tensor]:
    state = of_language(state_dict, model.language)
    check_weights(state, model.language)
    return state
