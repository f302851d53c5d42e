"""What the models of a family tell timm: their pictures, weights and paper, and how one is built."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import DefaultCfg, build_model_with_cfg, generate_default_cfgs
from torch import nn

from sinuous.core.weights import shipped_cfgs

Model = TypeVar("Model", bound=nn.Module)

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


def create(
    cls: type[Model], variant: str, pretrained: bool, filter_fn: Callable[..., Any], sizes: Mapping[str, Any]
) -> Model:
    """Build a registered model as timm does.

    Args:
        cls: its class.
        variant: its name.
        pretrained: load the weights of its configuration.
        filter_fn: makes a file's weights those of the model.
        sizes: arguments of the class. With `depths` there are four stages, whose maps are the features; with `depth`,
            the features are the maps after each quarter of the blocks.
    """
    out_indices: tuple[int, ...] = (0, 1, 2, 3)
    if "depths" not in sizes:
        depth = sizes["depth"]
        out_indices = tuple(sorted({max(0, depth * (k + 1) // 4 - 1) for k in range(4)}))
    build: Any = cls
    unknown: tuple[str, ...] = ()
    img_size = sizes.get("img_size")
    clip = any(isinstance(size, Sequence) and len(size) == 3 for size in (img_size, sizes.get("patch_size")))
    if clip and img_size is not None:  # timm knows the sides of pictures alone
        build, unknown = functools.partial(cls, img_size=img_size), ("img_size",)
        sizes = {name: value for name, value in sizes.items() if name != "img_size"}
    model = build_model_with_cfg(
        build,
        variant,
        pretrained,
        pretrained_filter_fn=filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        kwargs_filter=unknown,
        **sizes,
    )
    return cast("Model", model)
