"""VMamba: four selective scans over the map, by rows and by columns from either end, in four stages.

    x ← x + SS2D(LN(x));   x ← x + MLP(LN(x))         the vanilla models have no MLP but a gate in SS2D

Paper: Liu, Tian, Zhao, Yu, Xie, Wang, Ye, Jiao and Liu, "VMamba: Visual State Space Model" (arXiv 2401.10166, NeurIPS
2024). Reference: https://github.com/MzeroMiko/VMamba (MIT). This is an independent implementation with the
reference's names, which reads its files, those of its older code, too:

    model = sinuous.create_model("vmamba_tiny_s1l8", checkpoint_path="vssm1_tiny_0230s_ckpt_epoch_264.pth")

In a name, s is the expansion of SS2D and l the depth of the third stage.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from sinuous.core.blocks import ResidualBlock, SharingBlock
from sinuous.core.building import create
from sinuous.core.checkpoints import unwrapped
from sinuous.core.checks import check_arguments, check_choice, check_range, check_sizes
from sinuous.core.mixers import Mixer
from sinuous.core.patches import Sides
from sinuous.core.registry import check_weights, register_vision_model
from sinuous.core.stack import Stack
from sinuous.vision.registration import family_cfgs
from sinuous.vision.staged import (
    MergeDownsample,
    StackStage,
    StagedBackbone,
    Stem,
    check_stages,
    conv_downsample,
    layer_norm_2d,
    stage_rates,
)

__all__ = ["VMamba", "checkpoint_filter_fn", "our_names"]

_VANILLA: dict[str, Any] = {
    "d_state": 16,
    "expand": 2.0,
    "gate": True,
    "conv_bias": True,
    "mlp_ratio": 0.0,
    "stem": "patch",
    "downsample": "merge",
}

SIZES: dict[str, dict[str, Any]] = {
    "vmamba_vanilla_tiny": {**_VANILLA, "embed_dim": 96, "depths": (2, 2, 9, 2)},
    "vmamba_vanilla_small": {**_VANILLA, "embed_dim": 96, "depths": (2, 2, 27, 2)},
    "vmamba_vanilla_base": {**_VANILLA, "embed_dim": 128, "depths": (2, 2, 27, 2)},
    "vmamba_tiny_s2l5": {"embed_dim": 96, "depths": (2, 2, 5, 2), "expand": 2.0},
    "vmamba_small_s2l15": {"embed_dim": 96, "depths": (2, 2, 15, 2), "expand": 2.0},
    "vmamba_base_s2l15": {"embed_dim": 128, "depths": (2, 2, 15, 2), "expand": 2.0},
    "vmamba_tiny_s1l8": {"embed_dim": 96, "depths": (2, 2, 8, 2)},
    "vmamba_small_s1l20": {"embed_dim": 96, "depths": (2, 2, 20, 2)},
    "vmamba_base_s1l20": {"embed_dim": 128, "depths": (2, 2, 20, 2)},
    "vmamba_nano": {
        "img_size": 28,
        "in_chans": 1,
        "num_classes": 10,
        "embed_dim": 24,
        "depths": (2, 2, 2, 1),
        "mlp_ratio": 2.0,
    },
    "test_vmamba": {"img_size": 64, "embed_dim": 8, "depths": (1, 1, 1, 1), "mlp_ratio": 2.0},
}


def _conv_stem(img_size: Sides, in_chans: int, dim: int, **dd: Any) -> Stem:
    """Two convolutions of side 3 and stride 2; identities keep the published numbers of the layers."""
    return Stem(
        img_size,
        nn.Conv2d(in_chans, dim // 2, 3, 2, 1, **dd),
        nn.Identity(),
        layer_norm_2d(dim // 2, **dd),
        nn.Identity(),
        nn.GELU(),
        nn.Conv2d(dim // 2, dim, 3, 2, 1, **dd),
        nn.Identity(),
        layer_norm_2d(dim, **dd),
    )


def _patch_stem(img_size: Sides, in_chans: int, dim: int, **dd: Any) -> Stem:
    return Stem(img_size, nn.Conv2d(in_chans, dim, 4, 4, **dd), nn.Identity(), layer_norm_2d(dim, **dd))


STEMS = {"conv": _conv_stem, "patch": _patch_stem}
DOWNSAMPLES = {"conv": conv_downsample, "merge": MergeDownsample}


class VSSBlock(ResidualBlock):
    """A `ResidualBlock` with VMamba's names: `norm`, `op`, `norm2`, `mlp`."""

    mixer_name: ClassVar[str] = "op"
    __jit_unused_properties__: ClassVar[list[str]] = ["mixer"]

    @property
    def mixer(self) -> Mixer:  # type: ignore[override]
        return cast("Mixer", self.op)

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        grid: list[int] | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        return self._after_mixer(x, self.op(self._before_mixer(x), cu_seqlens, grid))  # type: ignore[operator]


class VMamba(StagedBackbone):
    """VMamba's backbone.

    Args:
        img_size: height and width in pixels, or one number for both; images of other sizes run, too.
        in_chans: channels of the image.
        num_classes: outputs of the head; 0 for features.
        global_pool: `"avg"` for the mean over cells, `""` for a map of logits.
        embed_dim: width of the first stage, even; it doubles from stage to stage.
        depths: number of blocks of each stage.
        d_state: N, size of the state per channel and route.
        expand: width inside SS2D over that of the stage.
        gate: multiply SS2D's output by silu(z).
        conv_bias: a bias in SS2D's convolution.
        mlp_ratio: width of the MLP over that of the stage; 0 for none.
        stem: `"conv"`, two convolutions of stride 2, or `"patch"`, one of side and stride 4.
        downsample: `"conv"`, a convolution of stride 2, or `"merge"`, Swin's patch merging.
        drop_rate: dropout ahead of the classifier.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.

    Raises:
        ValueError: if a size or a choice is not allowed, or an image is smaller than 4 × 4 pixels.
    """

    norm_name: ClassVar[str] = "classifier.norm"
    head_name: ClassVar[str] = "classifier.head"

    if TYPE_CHECKING:
        classifier: nn.ModuleDict

    @check_arguments
    def __init__(
        self,
        img_size: Sides = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 8, 2),
        d_state: int = 1,
        expand: float = 1.0,
        gate: bool = False,
        conv_bias: bool = False,
        mlp_ratio: float = 4.0,
        stem: str = "conv",
        downsample: str = "conv",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_sizes(in_chans=in_chans, embed_dim=embed_dim, d_state=d_state)
        check_stages("depths", depths)
        check_range(0, 1e6, mlp_ratio=mlp_ratio)
        check_choice("stem", stem, STEMS)
        check_choice("downsample", downsample, DOWNSAMPLES)
        if embed_dim % 2:
            raise ValueError(f"embed_dim must be even, as the stem starts with half of it (got {embed_dim})")
        widths = [embed_dim * 2**stage for stage in range(len(depths))]
        mixer = {"d_state": d_state, "expand": expand, "gate": gate, "conv_bias": conv_bias}
        stages: list[nn.Module] = []
        for stage, (width, rates) in enumerate(zip(widths, stage_rates(depths, drop_path_rate), strict=True)):
            blocks = Stack(
                width,
                len(rates),
                "ss2d",
                {"ss2d": mixer},
                mlp="gelu" if mlp_ratio > 0 else "none",
                mlp_ratio=mlp_ratio or 1.0,
                mlp_bias=True,
                norm="layer",
                causal=False,
                drop_path_rate=rates,
                blocks=(VSSBlock, SharingBlock),
                **dd,
            )
            last = stage == len(widths) - 1
            stages.append(
                StackStage(blocks, nn.Identity() if last else DOWNSAMPLES[downsample](width, 2 * width, **dd))
            )
        super().__init__(
            STEMS[stem](img_size, in_chans, embed_dim, **dd),
            stages,
            widths,
            layer_norm_2d(widths[-1], **dd),
            in_chans,
            num_classes,
            global_pool,
            drop_rate,
            **dd,
        )
        self.init_weights()

    def _norm(self, x: Tensor) -> Tensor:
        y: Tensor = self.classifier["norm"](x)
        return y

    def _classify(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier["head"](x)
        return logits


_RENAMED = (
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"^(norm|head)\.", r"classifier.\1."),
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
)


def our_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Give the parameters of a file of the reference's older code the names of the newer one, which are ours, too."""
    state = {}
    for name, tensor in state_dict.items():
        for pattern, ours in _RENAMED:
            name = re.sub(pattern, ours, name)
        state[name] = tensor
    return state


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The authors' checkpoints, or our own, as `model` needs them: unwrapped and renamed.

    Linear layers that were saved as 1 × 1 convolutions, `[E, D, 1, 1]`, become matrices again.

    Raises:
        ValueError: if the weights are of another model.
    """
    state = our_names(unwrapped(state_dict))
    for name, parameter in model.state_dict().items():
        if name in state and state[name].ndim == 4 and parameter.ndim == 2 and state[name].shape[2:] == (1, 1):
            state[name] = state[name].flatten(1)
    check_weights(state, model, adapted=("classifier.head.", "patch_embed.0.weight"))
    return state


default_cfgs = family_cfgs(
    SIZES,
    staged=True,
    first_conv="patch_embed.0",
    classifier="classifier.head",
    license="mit",
    paper_name="VMamba: Visual State Space Model",
    paper_ids="arXiv:2401.10166",
    origin_url="https://github.com/MzeroMiko/VMamba",
)


def _create_vmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> VMamba:
    return create(VMamba, variant, pretrained, checkpoint_filter_fn, {**SIZES[variant], **kwargs})


@register_vision_model
def vmamba_vanilla_tiny(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Vanilla VMamba-T: 82.2 % on ImageNet-1k in the paper."""
    return _create_vmamba("vmamba_vanilla_tiny", pretrained, **kwargs)


@register_vision_model
def vmamba_vanilla_small(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Vanilla VMamba-S: 83.5 % in the paper."""
    return _create_vmamba("vmamba_vanilla_small", pretrained, **kwargs)


@register_vision_model
def vmamba_vanilla_base(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Vanilla VMamba-B: 83.7 % in the paper."""
    return _create_vmamba("vmamba_vanilla_base", pretrained, **kwargs)


@register_vision_model
def vmamba_tiny_s2l5(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T, wide inside: 82.5 % in the paper."""
    return _create_vmamba("vmamba_tiny_s2l5", pretrained, **kwargs)


@register_vision_model
def vmamba_small_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S, wide inside: 83.6 % in the paper."""
    return _create_vmamba("vmamba_small_s2l15", pretrained, **kwargs)


@register_vision_model
def vmamba_base_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B, wide inside: 83.9 % in the paper."""
    return _create_vmamba("vmamba_base_s2l15", pretrained, **kwargs)


@register_vision_model
def vmamba_tiny_s1l8(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T: 82.6 % in the paper."""
    return _create_vmamba("vmamba_tiny_s1l8", pretrained, **kwargs)


@register_vision_model
def vmamba_small_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S: 83.3 % in the paper."""
    return _create_vmamba("vmamba_small_s1l20", pretrained, **kwargs)


@register_vision_model
def vmamba_base_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B: 83.8 % in the paper."""
    return _create_vmamba("vmamba_base_s1l20", pretrained, **kwargs)


@register_vision_model
def vmamba_nano(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """For images of 28 to 64 pixels, small enough to train on a laptop's CPU; ours, not the paper's."""
    return _create_vmamba("vmamba_nano", pretrained, **kwargs)


@register_vision_model
def test_vmamba(pretrained: bool = False, **kwargs: Any) -> VMamba:  # noqa: PT028
    """For tests: every mechanism at the smallest size."""
    return _create_vmamba("test_vmamba", pretrained, **kwargs)
