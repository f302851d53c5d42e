"""HViR: two stages of convolutions, then two of ViR's blocks, whose retention reads the map as a grid.

    stages 1, 2     x ← x + BN(conv(GELU(BN(conv(x)))))
    stages 3, 4     x ← x + γ ⊙ retention(LN(x));   x ← x + γ ⊙ MLP(LN(x))      over the whole map

Stem, convolutions and down-samplings are MambaVision's. Retention over a grid takes time linear in its cells and needs
no windows (`sinuous.core.mixers.vir`).

The second version of the ViR paper (Hatamizadeh et al., "ViR: Towards Efficient Vision Retention Backbones", arXiv
2310.19731) describes a hybrid of this kind under this name. No code and no sizes of it are public: the sizes, the stem
and the retention over a grid are ours, and there are no weights to compare with.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from torch import nn

from sinuous.core.blocks import SharingBlock
from sinuous.core.building import create
from sinuous.core.checks import check_arguments, check_range, check_sizes
from sinuous.core.patches import Sides
from sinuous.core.registry import register_vision_model
from sinuous.core.stack import Stack
from sinuous.vision.mambavision import ConvBlock, checkpoint_filter_fn, conv_stem, plain_downsample
from sinuous.vision.registration import family_cfgs
from sinuous.vision.staged import StackStage, Stage, StagedBackbone, check_stages, stage_rates
from sinuous.vision.vir import ViRBlock

__all__ = ["HViR", "checkpoint_filter_fn"]

SIZES: dict[str, dict[str, Any]] = {
    "hvir_tiny": {"embed_dim": 64, "stem_dim": 32, "depths": (2, 3, 8, 4), "num_heads": (1, 2, 4, 8)},
    "hvir_small": {"embed_dim": 96, "stem_dim": 64, "depths": (3, 3, 8, 5), "num_heads": (1, 3, 6, 12)},
    "test_hvir": {
        "img_size": 64,
        "embed_dim": 8,
        "stem_dim": 8,
        "depths": (1, 1, 2, 1),
        "num_heads": (1, 1, 2, 4),
        "mlp_ratio": 2.0,
        "init_values": 0.1,
    },
}


class HViR(StagedBackbone):
    """HViR's backbone.

    Args:
        img_size: height and width in pixels, or one number for both; images of other sizes run, too.
        in_chans: channels of the image.
        num_classes: outputs of the head; 0 for features.
        global_pool: `"avg"` for the mean over cells, `""` for a map of logits.
        embed_dim: width of the first stage; it doubles from stage to stage.
        stem_dim: width between the stem's two convolutions.
        depths: number of blocks of each stage.
        num_heads: of the retention in each stage. The first two stages have none.
        mlp_ratio: width of the MLP over that of the stage.
        init_values: start of the scale, per channel, of what blocks of the last two stages add; `None` or 0 for none.
        drop_rate: dropout ahead of the classifier.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.

    Raises:
        ValueError: if a size is not allowed, heads do not divide a width, or an image is smaller than 4 × 4 pixels.
    """

    @check_arguments
    def __init__(
        self,
        img_size: Sides = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        stem_dim: int = 32,
        depths: Sequence[int] = (2, 3, 8, 4),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        mlp_ratio: float = 4.0,
        init_values: float | None = 1e-5,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_sizes(in_chans=in_chans, embed_dim=embed_dim, stem_dim=stem_dim)
        check_stages("depths", depths)
        check_stages("num_heads", num_heads)
        check_range(0, 1e6, init_values=init_values)
        widths = [embed_dim * 2**stage for stage in range(len(depths))]
        stages: list[nn.Module] = []
        for stage, (width, rates) in enumerate(zip(widths, stage_rates(depths, drop_path_rate), strict=True)):
            end = plain_downsample(width, 2 * width, **dd) if width < widths[-1] else nn.Identity()
            if stage < 2:
                stages.append(Stage([ConvBlock(width, rate, **dd) for rate in rates], end))
                continue
            blocks = Stack(
                width,
                len(rates),
                "vir_retention_grid",
                {"vir_retention_grid": {"num_heads": num_heads[stage]}},
                mlp="gelu",
                mlp_ratio=mlp_ratio,
                mlp_bias=True,
                norm="layer",
                norm_eps=1e-6,
                causal=False,
                drop_path_rate=rates,
                init_values=init_values or None,
                blocks=(ViRBlock, SharingBlock),
                **dd,
            )
            stages.append(StackStage(blocks, end))
        super().__init__(
            conv_stem(img_size, in_chans, stem_dim, embed_dim, **dd),
            stages,
            widths,
            nn.BatchNorm2d(widths[-1], **dd),
            in_chans,
            num_classes,
            global_pool,
            drop_rate,
            **dd,
        )
        self.init_weights()


default_cfgs = family_cfgs(
    SIZES,
    staged=True,
    crop_pct=0.9,
    mean=IMAGENET_INCEPTION_MEAN,
    std=IMAGENET_INCEPTION_STD,
    first_conv="patch_embed.conv_down.0",
    paper_name="ViR: Towards Efficient Vision Retention Backbones",
    paper_ids="arXiv:2310.19731",
    origin_url="https://github.com/NVlabs/ViR",
)


def _create_hvir(variant: str, pretrained: bool = False, **kwargs: Any) -> HViR:
    return create(HViR, variant, pretrained, checkpoint_filter_fn, {**SIZES[variant], **kwargs})


@register_vision_model
def hvir_tiny(pretrained: bool = False, **kwargs: Any) -> HViR:
    """HViR with stages of 64 to 512 channels; a size of ours."""
    return _create_hvir("hvir_tiny", pretrained, **kwargs)


@register_vision_model
def hvir_small(pretrained: bool = False, **kwargs: Any) -> HViR:
    """HViR with stages of 96 to 768 channels; a size of ours."""
    return _create_hvir("hvir_small", pretrained, **kwargs)


@register_vision_model
def test_hvir(pretrained: bool = False, **kwargs: Any) -> HViR:  # noqa: PT028
    """For tests: every mechanism at the smallest size."""
    return _create_hvir("test_hvir", pretrained, **kwargs)
