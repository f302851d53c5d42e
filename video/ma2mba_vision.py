"""Features of frames from one of timm's models of pictures, cut behind the block that is read.

    tokens = pool(block(normalise(frame)))              [C, h, w] → [⌈h/p⌉·⌈w/p⌉, C], row by row

Pooling is bilinear (`torch.nn.functional.interpolate`), which for p = 2 and even sides is the mean of 2 × 2 features.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinuous.core.checks import check_indices, check_sizes, described

FAR = (-0.5, 1.5)
"""Values between which frames of floats lie: 0 to 1, and what resizing adds to that."""


@dataclass(frozen=True)
class Reading:
    """How a model of pictures is read.

    Attributes:
        name: of the model in timm.
        block: index of the block whose output is read, from 0.
        width: channels of its features.
        sides: height and width of a frame in pixels.
        grid: height and width of the pooled features.
        mean, std: of each channel, for frames from 0 to 1.
    """

    name: str
    block: int
    width: int
    sides: tuple[int, int]
    grid: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def features(self, vision: nn.Module, frames: Tensor) -> Tensor:
        """Pooled features `[F, tokens, width]` of frames `[F, 3, H, W]`."""
        weight = next(vision.parameters())
        dtype, wide = weight.dtype, torch.promote_types(weight.dtype, torch.float32)
        frames = frames.to(weight.device)  # a group at a time: those of an hour are a gigabyte
        x = frames.to(wide) if frames.is_floating_point() else frames.to(wide) / 255
        mean, std = (torch.tensor(row, dtype=wide, device=x.device)[:, None, None] for row in (self.mean, self.std))
        call: Any = vision.forward_intermediates
        (maps,) = call(((x - mean) / std).to(dtype), indices=[self.block], stop_early=True, intermediates_only=True)
        if maps.shape[-2:] != self.grid:
            maps = F.interpolate(maps, self.grid, mode="bilinear", align_corners=False)
        tokens: Tensor = maps.flatten(2).mT
        return tokens


def build_vision(
    name: str, img_size: int | tuple[int, int], block: int, pooled: int, device: Any, dtype: Any
) -> tuple[nn.Module, Reading]:
    """One of timm's models of pictures up to a block, with random weights, and how it is read.

    Raises:
        ValueError: if there is no such model or block, it gives no features of blocks, or its patches do not fill a
            frame.
    """
    check_sizes(pooled=pooled)
    sides = (img_size[0], img_size[1]) if isinstance(img_size, Sequence) else (img_size, img_size)
    check_sizes(**{"img_size[0]": sides[0], "img_size[1]": sides[1]})
    if ":" not in name and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "timm.list_models() lists the names"
        raise ValueError(f"vision must be one of timm's models (got {name!r}); {hint}")
    cfg = timm.models.get_pretrained_cfg(name)
    sized = {"img_size": sides} if cfg is not None and cfg.fixed_input_size else {}
    vision: Any = timm.create_model(name, num_classes=0, **sized)
    if not (hasattr(vision, "forward_intermediates") and hasattr(vision, "prune_intermediate_layers")):
        raise ValueError(
            f"vision must be a model that gives the features of its blocks (got {name!r}); choose another, as a ViT"
        )
    info = list(vision.feature_info)
    (index,), _ = check_indices(len(info), [block], "vision_block")
    step = info[index]["reduction"]
    if any(side % step for side in sides):
        raise ValueError(
            f"img_size must be a multiple of {step}, the patch of {name} (got {described(img_size)}); give "
            f"{max(1, round(sides[0] / step)) * step}"
        )
    vision.prune_intermediate_layers([index], prune_norm=True, prune_head=True)
    vision.to(device=device, dtype=dtype)
    height, width = (math.ceil(side // step / pooled) for side in sides)
    colours: Any = vision.pretrained_cfg
    mean, std = tuple(colours["mean"]), tuple(colours["std"])
    return vision, Reading(name, index, info[index]["num_chs"], sides, (height, width), mean, std)


def check_frames(frames: Any, batch: int, sides: tuple[int, int]) -> None:
    """Refuse frames that are no pixels `[B, N, 3, H, W]` of a batch of this size.

    Raises:
        ValueError: naming them.
    """
    height, width = sides
    shape = f"[{batch}, N, 3, {height}, {width}]"
    if not isinstance(frames, Tensor):
        raise ValueError(
            f"frames must be a tensor {shape} (got {described(frames)}); to go on from text alone, give "
            "sinuous.core.generation the model's language"
        )
    if frames.ndim != 5 or frames.shape[2:] != (3, height, width):
        remedy = "add the axis of the batch, frames[None]" if frames.ndim == 4 else f"read them with size={height}"
        raise ValueError(f"frames must be {shape} (got {list(frames.shape)}); {remedy}")
    if frames.shape[0] != batch:
        raise ValueError(
            f"frames must be of as many films as there are rows of ids, {batch} (got {frames.shape[0]}); give each "
            "row its own"
        )
    if frames.dtype != torch.uint8 and not frames.is_floating_point():
        raise ValueError(
            f"frames must be uint8 from 0 to 255, or floats from 0 to 1 (got {frames.dtype}); convert them"
        )


def check_range(frames: Tensor) -> None:
    """Refuse frames of floats that are no pixels from 0 to 1.

    Raises:
        ValueError: naming their range.
    """
    if not frames.is_floating_point() or frames.is_meta or not frames.numel():
        return
    low, high = (float(bound) for bound in frames.detach().aminmax())
    if not (FAR[0] <= low and high <= FAR[1]):
        raise ValueError(
            f"frames of floats must lie from 0 to 1 (got {low:g} to {high:g}): the model takes off mean and deviation "
            "itself; give uint8 as they are read, or divide them by 255"
        )
