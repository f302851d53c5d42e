"""Vision Mamba: image patches in a row, scanned from both ends, with the class token in the middle.

Paper: Zhu, Liao, Zhang, Wang, Liu and Wang, "Vision Mamba: Efficient Visual Representation Learning with Bidirectional
State Space Model" (arXiv 2401.09417, ICML 2024). Reference: https://github.com/hustvl/Vim (Apache-2.0). This is an
independent implementation; parameters have the reference's names, so that its `model` dictionaries load as they are:

    model = sinuous.create_model("vim_tiny_patch16_224", checkpoint_path="vim_t_midclstok_76p1acc.pth")

Shapes: B batch, M patches, D width, L tokens: the patches and, at M // 2 unless told otherwise, the class token. Mixers
that read a grid leave no place for it, and L = M.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from sinuous.core import norms
from sinuous.core.building import create
from sinuous.core.checkpoints import unwrapped
from sinuous.core.checks import check_arguments
from sinuous.core.isotropic import Isotropic
from sinuous.core.isotropic_checkpoints import fit_checkpoint
from sinuous.core.patches import Sides
from sinuous.core.registry import register_vision_model
from sinuous.vision.registration import PICO, family_cfgs

__all__ = ["Vim", "checkpoint_filter_fn"]

MIXER_SIZES = ("d_state", "d_conv", "expand")

# Widths and depths. Sizes of mixers are those of `vim_pair`, whose state is 16 unless a variant says otherwise.
SIZES: dict[str, dict[str, Any]] = {
    "vim_tiny_patch16_224": {"patch_size": 16, "embed_dim": 192, "depth": 24},
    "vim_tiny_patch16_stride8_224": {"patch_size": 16, "stride": 8, "embed_dim": 192, "depth": 24},
    "vim_small_patch16_224": {"patch_size": 16, "embed_dim": 384, "depth": 24},
    "vim_small_patch16_stride8_224": {"patch_size": 16, "stride": 8, "embed_dim": 384, "depth": 24},
    "vim_base_patch16_224": {"patch_size": 16, "embed_dim": 768, "depth": 24},
    "vim_nano": {
        "img_size": 28,
        "patch_size": 4,
        "in_chans": 1,
        "num_classes": 10,
        "embed_dim": 64,
        "depth": 6,
        "d_state": 8,
    },
    "vim_pico_patch16_96": {
        "img_size": 96,
        "patch_size": 16,
        "num_classes": 2,
        "embed_dim": 64,
        "depth": 4,
        "dynamic_img_size": True,
    },
    "test_vim": {"patch_size": 8, "embed_dim": 32, "depth": 4, "d_state": 8},
}


class Vim(Isotropic):
    """Vision Mamba.

    Args:
        img_size: height and width in pixels, or one number for both; any aspect.
        patch_size: side of a patch.
        stride: distance of patches; the patch size if absent.
        in_chans: channels of the image.
        num_classes: outputs of the head; 0 for features.
        global_pool: what the head reads: `"token"` the class token, `"avg"` the mean over patches, `""` everything.
            `None` is `"token"`, or `"avg"` where there is no class token.
        class_token: its place in the row of patches, `"middle"`, `"head"` or `"tail"`, or `"none"`. `None` is
            `"middle"`, or `"none"` for mixers that read the patches as a grid, which has no cell for it.
        embed_dim: D, width of the residual stream.
        depth: number of blocks.
        d_state, d_conv, expand: sizes of the mixers, for those mixers that have them; the mixer's own if absent.
        mixer: `"vim_pair"`, or any other registered mixer; a causal one gets a twin that runs from the end. Without a
            class token, mixers are told the grid.
        mixer_options: further keyword arguments of the mixer, such as `backward_dt_init="reference"`.
        drop_rate: dropout after the position embedding.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        dynamic_img_size: accept images of every size; position embeddings are then resampled in each call.

    Raises:
        ValueError: if an image is smaller than a patch, `global_pool`, `class_token` or `mixer` is unknown, a mixer
            that reads a grid is given a class token, or there is none for `global_pool` to read.
        TypeError: if the mixer has no such option.
    """

    norm_name: ClassVar[str] = "norm_f"
    default_class_token: ClassVar[str] = "middle"

    @check_arguments
    def __init__(
        self,
        img_size: Sides = 224,
        patch_size: Sides = 16,
        stride: Sides | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        class_token: str | None = None,
        embed_dim: int = 192,
        depth: int = 24,
        pos_embed: bool = True,
        d_state: int | None = None,
        d_conv: int | None = None,
        expand: float | None = None,
        mixer: str = "vim_pair",
        mixer_options: dict[str, Any] | None = None,
        route: str | list[str] = "raster",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = {"d_state": d_state, "d_conv": d_conv, "expand": expand}
        options = {name: value for name, value in sizes.items() if value is not None}
        options.update(mixer_options or {})
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            stride=stride,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            class_token=class_token,
            embed_dim=embed_dim,
            depth=depth,
            pos_embed=pos_embed,
            mixer=mixer,
            mixer_options=options,
            route=route,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            dynamic_img_size=dynamic_img_size,
            stack={"causal": False},
            norm=norms.RMSNorm,
            device=device,
            dtype=dtype,
        )
        self.init_weights()

    def _norm(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm_f(x)  # type: ignore[operator]
        return normed


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Vim) -> dict[str, Tensor]:
    """The authors' checkpoints, or our own, as `model` needs them: unwrapped and resampled to its grid and patch.

    Unlike the authors' fine-tuning script, which takes the first rows of `pos_embed` for the class token's, this takes
    the row where it lies.

    Raises:
        ValueError: if the weights are of another model or only one of the two has a class token, or if their grid
            cannot be told from their number.
    """
    state = unwrapped(state_dict)
    fit_checkpoint(state, model)
    return state


default_cfgs = family_cfgs(
    SIZES,
    {"vim_pico_patch16_96": PICO},
    first_conv="patch_embed.proj",
    paper_name="Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
    paper_ids="arXiv:2401.09417",
    origin_url="https://github.com/hustvl/Vim",
)


def _create_vim(variant: str, pretrained: bool = False, **kwargs: Any) -> Vim:
    sizes = dict(SIZES[variant])
    if kwargs.get("mixer", "vim_pair") != "vim_pair":
        sizes = {name: size for name, size in sizes.items() if name not in MIXER_SIZES}
    sizes.update(kwargs)
    return create(Vim, variant, pretrained, checkpoint_filter_fn, sizes)


@register_vision_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti: 76.1 % on ImageNet-1k in the paper."""
    return _create_vim("vim_tiny_patch16_224", pretrained, **kwargs)


@register_vision_model
def vim_tiny_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti fine-tuned with overlapping patches: 78.3 % in the paper."""
    return _create_vim("vim_tiny_patch16_stride8_224", pretrained, **kwargs)


@register_vision_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S: 80.5 % in the paper."""
    return _create_vim("vim_small_patch16_224", pretrained, **kwargs)


@register_vision_model
def vim_small_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S fine-tuned with overlapping patches: 81.6 % in the paper."""
    return _create_vim("vim_small_patch16_stride8_224", pretrained, **kwargs)


@register_vision_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-B: 81.9 % in the paper."""
    return _create_vim("vim_base_patch16_224", pretrained, **kwargs)


@register_vision_model
def vim_nano(pretrained: bool = False, **kwargs: Any) -> Vim:
    """For images of 28 to 64 pixels, small enough to train on a laptop's CPU; ours, not the paper's."""
    return _create_vim("vim_nano", pretrained, **kwargs)


@register_vision_model
def vim_pico_patch16_96(pretrained: bool = False, **kwargs: Any) -> Vim:
    """For two classes of drawn images of 96 pixels and more; ours, not the paper's."""
    return _create_vim("vim_pico_patch16_96", pretrained, **kwargs)


@register_vision_model
def test_vim(pretrained: bool = False, **kwargs: Any) -> Vim:  # noqa: PT028
    """For tests: every mechanism at the smallest size."""
    return _create_vim("test_vim", pretrained, **kwargs)
