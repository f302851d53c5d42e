"""Parts of a stack by name: mixers and what they are told of their place, MLPs, norms."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import nn

from sinuous.core import norms
from sinuous.core.checks import check_range
from sinuous.core.mixers import Bidirectional, Mixer, build_mixer, list_mixers, mixer_class
from sinuous.core.mixers import mixer_options as options_of

MLPS: dict[str, Callable[..., nn.Module]] = {
    "gelu": Mlp,
    "geglu": functools.partial(GluMlp, act_layer=nn.GELU, gate_last=False),
    "swiglu": SwiGLU,
}
NORMS: dict[str, Callable[..., nn.Module]] = {
    "rms": norms.RMSNorm,
    "layer": norms.LayerNorm,
    "layer_no_bias": functools.partial(norms.LayerNorm, bias=False),
}
PLACE = {"block_index", "num_blocks"}
"""Options of mixers that start differently for their place in a model."""
ROUNDINGS: dict[str, Callable[[float], int]] = {"up": math.ceil, "down": lambda width: math.floor(width + 1e-9)}


def drop_path_rates(depth: int, last: float) -> list[float]:
    """Rates of stochastic depth for `depth` blocks, rising linearly from 0 at the first to `last`."""
    check_range(0, 1, drop_path_rate=last)
    rates: list[float] = torch.linspace(0, last, depth, device="cpu").tolist()
    return rates


def mixer_of(name: str, dim: int, options: dict[str, Any], causal: bool) -> Mixer:
    """A mixer; in a model that is not causal, a causal one with its twin."""
    if causal or not mixer_class(name).causal:
        return build_mixer(name, dim, **options)
    return Bidirectional(name, dim, **options)


def place_options(names: Sequence[str], i: int) -> dict[str, int]:
    """Options that tell the mixer of block i where it stands among those of all blocks, if it has such options."""
    known = {"block_index": i, "num_blocks": len(names), mixer_class(names[i]).shared_option: names[i] in names[:i]}
    return {option: value for option, value in known.items() if option is not None and option in options_of(names[i])}


def options_by_place(names: Sequence[str], options: Mapping[str, Any] | Sequence[Any]) -> list[Mapping[str, Any]]:
    """Options of each place of a pattern."""
    if isinstance(options, Mapping):
        if strangers := sorted(set(options) - set(names)):
            raise ValueError(
                f"mixer_options has options for {', '.join(strangers)}, which the pattern {list(names)} lacks; "
                "correct the name or leave them out"
            )
        return [options.get(name, {}) for name in names]
    if len(options) != len(names):
        raise ValueError(
            f"mixer_options must have one entry for each of the {len(names)} places of the pattern (got {len(options)})"
        )
    return list(options)


def check_pattern(names: tuple[str, ...], mlps: Mapping[str, str], causal: bool) -> None:
    """Refuse a pattern that is empty, or names what is no mixer, or one that looks ahead in a causal model.

    Raises:
        ValueError: naming it.
    """
    if not names:
        raise ValueError(f"pattern must name at least one mixer (got none); choose from {', '.join(list_mixers())}")
    for name in mlps:
        mixer_class(name)  # refuses a name that no mixer has
    blind = [name for name in names if not mixer_class(name).causal]
    if causal and blind:
        raise ValueError(
            f"mixer {blind[0]!r} looks at the future and the model is causal; choose another mixer or causal=False"
        )


def mlp_of(kind: str, dim: int, hidden: int, options: dict[str, Any]) -> nn.Module | None:
    """An MLP of `hidden` channels between its layers, or none."""
    if kind == "none":
        return None
    return MLPS[kind](dim, 2 * hidden if kind == "geglu" else hidden, **options)  # GluMlp counts both halves


def mlp_width(dim: int, ratio: float, multiple_of: int, rounding: str) -> int:
    """Channels between the layers of an MLP: `dim` times `ratio`, rounded to a multiple of `multiple_of`.

    Raises:
        ValueError: if that is 0.
    """
    width = ROUNDINGS[rounding](dim * ratio / multiple_of) * multiple_of
    if width == 0:
        raise ValueError(
            f"mlp_ratio {ratio} of dim {dim} rounded down to a multiple of {multiple_of} leaves the MLP no "
            "width; give a smaller mlp_multiple_of"
        )
    return width
