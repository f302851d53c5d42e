"""What the models of a family tell timm: their pictures, weights and paper."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import DefaultCfg, generate_default_cfgs

from sinuous.core.weights import shipped_cfgs

_IMAGENET: dict[str, Any] = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "classifier": "head",
    "license": "apache-2.0",
}
_NANO: dict[str, Any] = {
    "input_size": (1, 28, 28),
    "num_classes": 10,
    "mean": (0.5,),
    "std": (0.5,),
    "crop_pct": 1.0,
    "license": "apache-2.0",
}
PICO: dict[str, Any] = {"input_size": (3, 96, 96), "num_classes": 2, "crop_pct": 1.0, "license": "apache-2.0"}
"""Of models of 96 pixels that tell two classes, as whether an arrow points at a circle."""
_TEST: dict[str, Any] = {"input_size": (3, 64, 64), "license": "apache-2.0"}


def family_cfgs(
    names: Iterable[str], own: Mapping[str, Mapping[str, Any]] | None = None, *, staged: bool = False, **common: Any
) -> dict[str, DefaultCfg]:
    """timm's `default_cfgs` of a family, with a tag for each of the weights that ship.

    Args:
        names: of the registered models; those called `…_nano` are for 28 gray pixels, `test_…` for 64.
        own: entries of single models.
        staged: maps shrink to a 32nd of the image's sides, and images of every size run; else an image has the model's
            size, and the features are tokens.
        **common: entries of all, such as `paper_ids`, over those of ImageNet.
    """
    configs: dict[str, Any] = {}
    for name in names:
        small = _NANO if name.endswith("_nano") else _TEST if name.startswith("test_") else {}
        cfg = {**_IMAGENET, **common, **small, **(own or {}).get(name, {})}
        if staged:
            cfg["pool_size"] = tuple(math.ceil(side / 32) for side in cfg["input_size"][1:])
        else:
            cfg |= {"pool_size": None, "fixed_input_size": True}
        configs |= shipped_cfgs(Path(__file__).parent / "weights", name, cfg)
    found: dict[str, DefaultCfg] = generate_default_cfgs(configs)
    return found
