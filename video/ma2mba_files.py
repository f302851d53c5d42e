"""Weights of Video-Ma2mba: our own files, language models' files, and pictures models' files, each into its part."""

from __future__ import annotations

import os
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
        vision: a file of the model of pictures, as timm, OpenAI or transformers publish it; `True` for timm's own from
            the Hugging Face Hub. Positions are resampled to the model's frames.

    Raises:
        ValueError: if a file is of another model.
        FileNotFoundError: if there is no such file.
        ConnectionError: if the hub cannot be reached.
    """
    if language is not None:
        model.language.load_state_dict(_language_state(load_state_dict(language), model))
    if vision is None or vision is False:
        return
    reading = model.reading
    cfg = timm.models.get_pretrained_cfg(reading.name)
    sized = {"img_size": reading.sides} if cfg is not None and cfg.fixed_input_size else {}
    file = {} if vision is True else {"pretrained_cfg_overlay": {"state_dict": load_state_dict(vision)}}
    try:
        whole: Any = reaching_the_hub(
            reading.name,
            lambda: timm.create_model(reading.name, pretrained=True, num_classes=0, **sized, **file),
        )
    except (KeyError, RuntimeError) as error:  # from timm and from load_state_dict: of names and of shapes
        if vision is True:
            raise
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"{vision} is no file of {reading.name} ({reason}); choose that of this model") from error
    wanted = model.vision.state_dict()
    model.vision.load_state_dict({name: tensor for name, tensor in whole.state_dict().items() if name in wanted})


def _language_state(state_dict: Mapping[str, Tensor], model: Any) -> Mapping[str, Tensor]:
    state = of_language(state_dict, model.language)
    check_weights(state, model.language)
    return state
