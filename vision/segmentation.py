"""Segmentation: the maps of any backbone, joined by a small decoder, to a class for each pixel.

Maps of all levels are projected to one width and added at the size of the finest, as in a feature pyramid network (Lin
et al., arXiv 1612.03144) and its use for segmentation (Kirillov et al., arXiv 1901.02446). What patches are too coarse
for, the outlines, comes from a convolution of the picture itself.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from sinuous.core.checks import check_arguments, check_sizes, described
from sinuous.core.registry import register_model
from sinuous.core.weights import shipped_cfgs

__all__ = ["Segmenter", "feature_maps"]

ANY_SIZE: tuple[dict[str, Any], ...] = (
    {"dynamic_img_size": True},
    {"strict_img_size": False, "dynamic_mask": True},
    {"strict_img_size": False},
    {},
)
"""Options by which models that are built for one size take all of them, in the order in which they are tried."""


def feature_maps(
    backbone: str, in_chans: int = 3, pretrained: bool = False, **options: Any
) -> tuple[nn.Module, tuple[int, int] | None]:
    """Build a model that gives a list of maps, and takes pictures of any size where it can.

    A staged model gives the maps that it gives by default, most of them of strides 4, 8, 16 and 32; an isotropic one,
    whose maps have one stride, those of four depths, a quarter of the blocks apart.

    Args:
        backbone: name of a model of ours or of timm's.
        in_chans: channels of the picture.
        pretrained: load the weights that come with that name.
        options: for the model's constructor; `out_indices` chooses the maps.

    Returns:
        The model, and the only size that it reads, or None if it reads any.

    Raises:
        ValueError: if there is no such model (naming the nearest), or it has no maps.
        TypeError: for an option that the model does not have.
    """
    if not timm.is_model(backbone):
        near = difflib.get_close_matches(backbone, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "timm.list_models() lists the names"
        raise ValueError(f"there is no backbone {backbone!r}; {hint}")
    any_size, whole = _tried(backbone, in_chans, options)
    infos = getattr(whole, "feature_info", None)
    if not infos:
        raise ValueError(f"{backbone!r} gives no maps; choose another backbone")
    if "out_indices" not in options and len({info["reduction"] for info in infos}) == 1:
        quarters = {max(0, len(infos) * (k + 1) // 4 - 1) for k in range(4)}
        options = {**options, "out_indices": tuple(sorted(quarters))}
    try:
        maps: nn.Module = timm.create_model(
            backbone, pretrained=pretrained, features_only=True, in_chans=in_chans, **{**any_size, **options}
        )
    except (RuntimeError, AttributeError, AssertionError) as error:
        raise ValueError(f"{backbone!r} gives no maps ({error}); choose another backbone") from error
    cfg: Any = whole.pretrained_cfg
    fixed = not any_size and cfg.get("fixed_input_size")
    return maps, to_2tuple(options.get("img_size") or cfg["input_size"][1:]) if fixed else None


def _tried(backbone: str, in_chans: int, options: Mapping[str, Any]) -> tuple[dict[str, Any], nn.Module]:
    """Options of `ANY_SIZE` that the backbone has, and the whole of it without memory for parameters."""
    plain = {key: value for key, value in options.items() if key != "out_indices"}
    for any_size in ANY_SIZE:
        try:
            with torch.device("meta"):
                model = timm.create_model(backbone, in_chans=in_chans, **{**any_size, **plain})
        except TypeError as error:
            if any(key in str(error) for key in any_size if key not in plain):
                continue
            raise
        return any_size, model
    raise AssertionError("the last of ANY_SIZE is empty")


class Segmenter(nn.Module):
    """A backbone under a decoder: `[B, C, H, W] → [B, K, H, W]`, logits of K classes for each pixel.

    Any size of one pixel or more runs: pictures whose sides are no multiples of the coarsest stride are continued by
    their last rows and columns for the backbone, or scaled where it reads one size only.

    Args:
        backbone: name of a model of ours or of timm's, staged or isotropic.
        num_classes: K.
        decoder_dim: width of the decoder at the finest map; outlines are drawn at a quarter of it.
        in_chans: C.
        pretrained: load the backbone's weights.
        options: for the backbone, such as `img_size`, `drop_path_rate`, `mixer` or `out_indices`.

    Raises:
        ValueError: if there is no such backbone (naming the nearest), it gives no maps, or a number is too small.
        TypeError: for an option that the backbone does not have.
    """

    @check_arguments
    def __init__(
        self,
        backbone: str,
        num_classes: int,
        decoder_dim: int = 64,
        in_chans: int = 3,
        pretrained: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes, decoder_dim=decoder_dim, in_chans=in_chans)
        self.num_classes, self.in_chans, self.decoder_dim = num_classes, in_chans, decoder_dim
        self.backbone, self.only_size = feature_maps(backbone, in_chans, pretrained, **options)
        info: Any = self.backbone.feature_info
        self.reductions = [int(reduction) for reduction in info.reduction()]
        self.channels_last = str(getattr(self.backbone, "output_fmt", "NCHW")) in ("NHWC", "Format.NHWC")
        fine = max(1, decoder_dim // 4)
        self.laterals = nn.ModuleList(nn.Conv2d(width, decoder_dim, 1) for width in info.channels())
        self.join = nn.Sequential(_Normed(decoder_dim), nn.GELU(), nn.Conv2d(decoder_dim, decoder_dim, 3, padding=1))
        self.narrow = nn.Sequential(_Normed(decoder_dim), nn.GELU(), nn.Conv2d(decoder_dim, fine, 1))
        self.outlines = nn.Conv2d(in_chans, fine, 3, padding=1)
        self.head = nn.Sequential(
            _Normed(2 * fine),
            nn.GELU(),
            nn.Conv2d(2 * fine, 2 * fine, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(2 * fine, num_classes, 1),
        )

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        inner: Any = self.backbone
        model = getattr(inner, "model", inner)  # timm wraps models whose maps are taps
        names: set[str] = getattr(model, "no_weight_decay", set)()
        prefix = "backbone." if model is inner else "backbone.model."
        return {prefix + name for name in names}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Let the backbone recompute its blocks in the backward pass."""
        inner: Any = self.backbone
        getattr(inner, "model", inner).set_grad_checkpointing(enable)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.in_chans or 0 in x.shape[2:]:
            raise ValueError(
                f"pictures must have shape [B, C, H, W] with {self.in_chans} channels (got {described(x)}); add the "
                "axes that are missing, or build the model with in_chans"
            )
        height, width = x.shape[2:]
        step = max(self.reductions)
        padded = F.pad(x, (0, -width % step, 0, -height % step), mode="replicate")
        maps = self.backbone(padded if self.only_size is None else _resized(x, self.only_size))
        if self.channels_last:
            maps = [m.movedim(-1, 1) for m in maps]
        finest = max((m.shape[2:] for m in maps), key=lambda size: size[0] * size[1])
        joined = sum(_resized(project(m), finest) for project, m in zip(self.laterals, maps, strict=True))
        coarse = _resized(self.narrow(joined + self.join(joined)), padded.shape[2:])
        logits: Tensor = self.head(torch.cat([coarse, self.outlines(padded)], 1))
        return logits[:, :, :height, :width]


class _Normed(nn.GroupNorm):
    """One group for all channels: pictures of a batch do not mix, and a batch of one trains."""

    def __init__(self, channels: int) -> None:
        super().__init__(1, channels)


def _resized(maps: Tensor, size: Any) -> Tensor:
    return maps if maps.shape[2:] == size else F.interpolate(maps, size, mode="bilinear", align_corners=False)


default_cfgs = generate_default_cfgs(
    shipped_cfgs(Path(__file__).parent / "weights", "segmenter", {"input_size": (1, 64, 64), "num_classes": 11})
)


@register_model(domain="vision")
def segmenter(
    pretrained: bool = False,
    backbone: str = "vim_nano",
    num_classes: int = 11,
    in_chans: int = 1,
    pretrained_backbone: bool = False,
    **options: Any,
) -> Segmenter:
    """`Segmenter` by name, over any backbone; by default that of the collages of `sinuous.vision.datasets`."""
    if backbone == "vim_nano":
        options = {"img_size": 64, **options}
    return Segmenter(backbone, num_classes, in_chans=in_chans, pretrained=pretrained_backbone, **options)
