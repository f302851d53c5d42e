"""MambaVision: two stages of convolutions, then two whose windows are mixed by selective scans and by attention.

    stages 1, 2     x ← x + BN(conv(GELU(BN(conv(x)))))
    stages 3, 4     x ← x + γ ⊙ mixer(LN(x));   x ← x + γ ⊙ MLP(LN(x))      in windows, a sequence each

In stages 3 and 4 the first ⌈depth / 2⌉ blocks have MambaVision's mixer, the others attention. γ is there in the larger
models.

Paper: Hatamizadeh and Kautz, "MambaVision: A Hybrid Mamba-Transformer Vision Backbone" (arXiv 2407.08083, CVPR 2025).
Reference: https://github.com/NVlabs/MambaVision. This is an independent implementation with the authors' names, which
reads their files:

    model = sinuous.create_model("mambavision_t", checkpoint_path="mambavision_tiny_1k.pth.tar")
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from timm.layers import DropPath, LayerScale2d
from timm.models._input import update_model_args
from torch import Tensor, nn

from sinuous.core.blocks import ResidualBlock, SharingBlock
from sinuous.core.building import create
from sinuous.core.checkpoints import unwrapped
from sinuous.core.checks import check_arguments, check_positive, check_sizes
from sinuous.core.patches import Sides
from sinuous.core.registry import check_weights, register_vision_model
from sinuous.core.stack import Stack
from sinuous.vision.registration import family_cfgs
from sinuous.vision.staged import StackStage, Stage, StagedBackbone, Stem, check_stages, stage_rates

__all__ = ["ConvBlock", "MambaVision", "checkpoint_filter_fn", "conv_stem", "plain_downsample"]

_SMALL_HEADS, _LARGE_HEADS = (2, 4, 8, 16), (4, 8, 16, 32)

SIZES: dict[str, dict[str, Any]] = {
    "mambavision_t": {"embed_dim": 80, "stem_dim": 32, "depths": (1, 3, 8, 4)},
    "mambavision_t2": {"embed_dim": 80, "stem_dim": 32, "depths": (1, 3, 11, 4)},
    "mambavision_s": {"embed_dim": 96, "stem_dim": 64, "depths": (3, 3, 7, 5)},
    "mambavision_b": {"embed_dim": 128, "stem_dim": 64, "depths": (3, 3, 10, 5), "init_values": 1e-5},
    "mambavision_l": {
        "embed_dim": 196,
        "stem_dim": 64,
        "depths": (3, 3, 10, 5),
        "num_heads": _LARGE_HEADS,
        "init_values": 1e-5,
    },
    "mambavision_l2": {
        "embed_dim": 196,
        "stem_dim": 64,
        "depths": (3, 3, 12, 5),
        "num_heads": _LARGE_HEADS,
        "init_values": 1e-5,
    },
    "mambavision_l2_512": {
        "img_size": 512,
        "embed_dim": 196,
        "stem_dim": 64,
        "depths": (3, 3, 12, 5),
        "num_heads": _LARGE_HEADS,
        "window_size": (8, 8, 32, 16),
        "init_values": 1e-5,
    },
    "mambavision_l3_256": {
        "img_size": 256,
        "embed_dim": 256,
        "stem_dim": 64,
        "depths": (3, 3, 20, 10),
        "num_heads": _LARGE_HEADS,
        "window_size": (8, 8, 16, 8),
        "init_values": 1e-5,
    },
    "mambavision_l3_512": {
        "img_size": 512,
        "embed_dim": 256,
        "stem_dim": 64,
        "depths": (3, 3, 20, 10),
        "num_heads": _LARGE_HEADS,
        "window_size": (8, 8, 32, 16),
        "init_values": 1e-5,
    },
    "mambavision_nano": {
        "img_size": 28,
        "in_chans": 1,
        "num_classes": 10,
        "embed_dim": 24,
        "stem_dim": 16,
        "depths": (2, 2, 2, 1),
        "num_heads": (1, 2, 4, 8),
        "window_size": (7, 4, 2, 2),
        "mlp_ratio": 2.0,
    },
    "test_mambavision": {
        "img_size": 64,
        "embed_dim": 8,
        "stem_dim": 8,
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 2, 2, 4),
        "window_size": (8, 8, 3, 2),
        "mlp_ratio": 2.0,
        "init_values": 0.1,
        "conv_init_values": 0.1,
    },
}


def conv_stem(img_size: Sides, in_chans: int, stem_dim: int, dim: int, **dd: Any) -> Stem:
    """Two convolutions of side 3 and stride 2 with batch norms, whose ε is 1e-4 here and 1e-5 everywhere else."""
    layers = nn.Sequential(
        nn.Conv2d(in_chans, stem_dim, 3, 2, 1, bias=False, **dd),
        nn.BatchNorm2d(stem_dim, eps=1e-4, **dd),
        nn.ReLU(),
        nn.Conv2d(stem_dim, dim, 3, 2, 1, bias=False, **dd),
        nn.BatchNorm2d(dim, eps=1e-4, **dd),
        nn.ReLU(),
    )
    return Stem(img_size, OrderedDict(conv_down=layers))


def plain_downsample(dim: int, out_dim: int, **dd: Any) -> nn.Module:
    """A convolution of side 3 and stride 2 alone, ⌈h/2⌉ × ⌈w/2⌉ cells, under its published name `reduction.0`."""
    conv = nn.Conv2d(dim, out_dim, 3, 2, 1, bias=False, **dd)
    return nn.Sequential(OrderedDict(reduction=nn.Sequential(conv)))


class ConvBlock(nn.Module):
    """x ← x + γ ⊙ BN(conv(GELU(BN(conv(x))))), convolutions of side 3, the GELU by its tanh formula.

    Args:
        dim: channels.
        drop_path: rate at which all but x is left out of a sample in training.
        init_values: start of γ; `None` for none.
    """

    def __init__(self, dim: int, drop_path: float = 0.0, init_values: float | None = None, **dd: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, **dd)
        self.norm1 = nn.BatchNorm2d(dim, **dd)
        self.act1 = nn.GELU(approximate="tanh")
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        self.ls = nn.Identity() if init_values is None else LayerScale2d(dim, init_values, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        y = x + self.drop_path(self.ls(y))
        return y


class MambaVisionBlock(ResidualBlock):
    """A `ResidualBlock` with MambaVision's names: `norm1`, `mixer`, `gamma_1`, `norm2`, `mlp`, `gamma_2`."""

    norm_name: ClassVar[str] = "norm1"
    __jit_unused_properties__: ClassVar[list[str]] = ["norm"]

    if TYPE_CHECKING:
        gamma_1: nn.Parameter | None
        gamma_2: nn.Parameter | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.init_values: float | None = getattr(self.ls1, "init_values", None)
        self.register_parameter("gamma_1", getattr(self.ls1, "gamma", None))
        self.register_parameter("gamma_2", getattr(self.ls2, "gamma", None))
        self.ls1 = self.ls2 = nn.Identity()

    @property
    def norm(self) -> nn.Module:  # type: ignore[override]
        return cast("nn.Module", self.norm1)

    def init_weights(self) -> None:
        super().init_weights()
        for gamma in (self.gamma_1, self.gamma_2):
            if gamma is not None:
                nn.init.constant_(gamma, cast("float", self.init_values))

    def _before_mixer(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm1(x)  # type: ignore[operator]
        return normed

    def _after_mixer(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.drop_path(_scaled(y, self.gamma_1))
        y = self.mlp(self.norm2(x))
        x = x + self.drop_path(_scaled(y, self.gamma_2))
        return x


def _scaled(y: Tensor, gamma: Tensor | None) -> Tensor:
    return y if gamma is None else gamma * y


class MambaVision(StagedBackbone):
    """MambaVision's backbone.

    Args:
        img_size: height and width in pixels, or one number for both; images of other sizes run, too.
        in_chans: channels of the image.
        num_classes: outputs of the head; 0 for features.
        global_pool: `"avg"` for the mean over cells, `""` for a map of logits.
        embed_dim: width of the first stage; it doubles from stage to stage.
        stem_dim: width between the stem's two convolutions.
        depths: number of blocks of each stage.
        num_heads: of the attention in each stage. The first two stages have none.
        window_size: side of the windows in each stage, or one number for all. The first two stages have none.
        mlp_ratio: width of the MLP over that of the stage.
        init_values: start of the scale, per channel, of what blocks of the last two stages add; `None` for no scale.
        conv_init_values: the same for the first two stages.
        drop_rate: dropout ahead of the classifier.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.

    Raises:
        ValueError: if a size is not allowed, heads do not divide a width, or an image is smaller than 4 × 4 pixels.
    """

    stages_name: ClassVar[str] = "levels"

    if TYPE_CHECKING:
        levels: nn.ModuleList

    @check_arguments
    def __init__(
        self,
        img_size: Sides = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 80,
        stem_dim: int = 32,
        depths: Sequence[int] = (1, 3, 8, 4),
        num_heads: Sequence[int] = _SMALL_HEADS,
        window_size: int | Sequence[int] = (8, 8, 14, 7),
        mlp_ratio: float = 4.0,
        init_values: float | None = None,
        conv_init_values: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_sizes(in_chans=in_chans, embed_dim=embed_dim, stem_dim=stem_dim)
        check_stages("depths", depths)
        check_stages("num_heads", num_heads)
        check_positive(init_values=init_values, conv_init_values=conv_init_values)
        windows = _windows(window_size)
        widths = [embed_dim * 2**stage for stage in range(len(depths))]
        stages: list[nn.Module] = []
        for stage, (width, rates) in enumerate(zip(widths, stage_rates(depths, drop_path_rate), strict=True)):
            end = plain_downsample(width, 2 * width, **dd) if width < widths[-1] else nn.Identity()
            if stage < 2:
                stages.append(Stage([ConvBlock(width, rate, conv_init_values, **dd) for rate in rates], end))
                continue
            scans = math.ceil(len(rates) / 2)
            mixers = ["mambavision"] * scans + ["vit_attention"] * (len(rates) - scans)
            blocks = Stack(
                width,
                len(rates),
                mixers,
                {"vit_attention": {"num_heads": num_heads[stage]}} if len(rates) > 1 else {},
                mlp="gelu",
                mlp_ratio=mlp_ratio,
                mlp_bias=True,
                norm="layer",
                causal=False,
                drop_path_rate=rates,
                init_values=init_values,
                blocks=(MambaVisionBlock, SharingBlock),
                **dd,
            )
            stages.append(StackStage(blocks, end, windows[stage]))
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

    def _run(self, x: Tensor) -> Tensor:
        for stage in self.levels:
            x = stage(x)
        return x

    @torch.jit.ignore
    @check_arguments
    def set_input_size(self, img_size: Sides | None = None, window_size: int | Sequence[int] | None = None) -> None:
        """Write another image size down, which every size runs without; take other windows.

        Args:
            img_size: height and width in pixels, or one number for both.
            window_size: side of the windows in each stage, or one number for all.

        Raises:
            ValueError: if images are smaller than 4 × 4 pixels, or a window than 1.
        """
        windows = None if window_size is None else _windows(window_size)
        super().set_input_size(img_size)
        if windows is not None:
            for stage, side in zip(
                self.levels, windows, strict=False
            ):  # those of stages that were pruned away are over
                if isinstance(stage, StackStage):
                    stage.window_size = side
            update_model_args(self, window_size=windows)


def _windows(window_size: int | Sequence[int]) -> tuple[int, ...]:
    windows = (window_size,) * 4 if not isinstance(window_size, Sequence) else tuple(window_size)
    check_stages("window_size", windows)
    return windows


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The authors' checkpoints, or our own, as `model` needs them: unwrapped.

    Raises:
        ValueError: if the weights are of another model.
    """
    state = unwrapped(state_dict)
    check_weights(state, model, adapted=("head.", "patch_embed.conv_down.0.weight"))
    return state


default_cfgs = family_cfgs(
    SIZES,
    {
        "mambavision_t2": {"crop_pct": 0.98},
        "mambavision_s": {"crop_pct": 0.93},
        "mambavision_l2_512": {"input_size": (3, 512, 512), "crop_pct": 0.93, "crop_mode": "squash"},
        "mambavision_l3_256": {"input_size": (3, 256, 256)},
        "mambavision_l3_512": {"input_size": (3, 512, 512), "crop_pct": 0.93, "crop_mode": "squash"},
    },
    staged=True,
    crop_pct=1.0,
    first_conv="patch_embed.conv_down.0",
    license="cc-by-nc-sa-4.0",
    paper_name="MambaVision: A Hybrid Mamba-Transformer Vision Backbone",
    paper_ids="arXiv:2407.08083",
    origin_url="https://github.com/NVlabs/MambaVision",
)


def _create_mambavision(variant: str, pretrained: bool = False, **kwargs: Any) -> MambaVision:
    return create(MambaVision, variant, pretrained, checkpoint_filter_fn, {**SIZES[variant], **kwargs})


@register_vision_model
def mambavision_t(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-T: 82.3 % on ImageNet-1k in the paper."""
    return _create_mambavision("mambavision_t", pretrained, **kwargs)


@register_vision_model
def mambavision_t2(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-T2: 82.7 % in the paper."""
    return _create_mambavision("mambavision_t2", pretrained, **kwargs)


@register_vision_model
def mambavision_s(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-S: 83.3 % in the paper."""
    return _create_mambavision("mambavision_s", pretrained, **kwargs)


@register_vision_model
def mambavision_b(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-B: 84.2 % in the paper, 84.9 % after ImageNet-21k."""
    return _create_mambavision("mambavision_b", pretrained, **kwargs)


@register_vision_model
def mambavision_l(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L: 85.0 % in the paper, 86.1 % after ImageNet-21k."""
    return _create_mambavision("mambavision_l", pretrained, **kwargs)


@register_vision_model
def mambavision_l2(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L2: 85.3 % in the paper."""
    return _create_mambavision("mambavision_l2", pretrained, **kwargs)


@register_vision_model
def mambavision_l2_512(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L2 for 512 pixels: 87.3 % in the paper, after ImageNet-21k."""
    return _create_mambavision("mambavision_l2_512", pretrained, **kwargs)


@register_vision_model
def mambavision_l3_256(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L3 for 256 pixels: 87.3 % in the paper, after ImageNet-21k."""
    return _create_mambavision("mambavision_l3_256", pretrained, **kwargs)


@register_vision_model
def mambavision_l3_512(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L3 for 512 pixels: 88.1 % in the paper, after ImageNet-21k."""
    return _create_mambavision("mambavision_l3_512", pretrained, **kwargs)


@register_vision_model
def mambavision_nano(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """For images of 28 to 64 pixels, small enough to train on a laptop's CPU; ours, not the paper's."""
    return _create_mambavision("mambavision_nano", pretrained, **kwargs)


@register_vision_model
def test_mambavision(pretrained: bool = False, **kwargs: Any) -> MambaVision:  # noqa: PT028
    """For tests: every mechanism at the smallest size."""
    return _create_mambavision("test_mambavision", pretrained, **kwargs)
