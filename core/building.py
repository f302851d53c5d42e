"""Backbones of timm's registry, built as timm builds its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from timm.models import build_model_with_cfg
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


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
