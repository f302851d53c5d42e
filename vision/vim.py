r"""Vision Mamba (Vim): an image as one sequence of patches, read by selective scans from both ends.

    x = insert(patches, cls, M // 2) + pos_embed            M patches; the class token stands in the middle
    x ← x + mixer(RMSNorm(x))                               depth times, with x in fp32
    logits = head(RMSNorm(x)[M // 2])

Source: Zhu et al., "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model"
(arXiv 2401.09417, ICML 2024); reference implementation hustvl/Vim (Apache-2.0), whose published checkpoints load
without renaming. Written from the equations; no code is taken over.

Where this differs from the reference, on purpose:

* The reference carries two streams, (hidden, residual), and adds a mixer's output at the start of the next block. Here
  the sum is one stream. Outputs are the same, and so are the DropPath rates per mixer.
* The step sizes of the scan from the end start like those of the scan from the front. The reference zeroes that bias
  by accident; `mixer_kwargs=dict(backward_dt_init="reference")` does as it does.
* Other image sizes: the reference asserts one size, and its fine-tuning script resizes `pos_embed` as if the class
  token stood first. Here the middle row is set aside, the grid resized, and the row put back in the new middle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import get_device_dtype, lecun_normal_, resample_patch_embed, to_2tuple
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from sinuous.core import norms
from sinuous.core.blocks import MixerBlock
from sinuous.core.mixers import Bidirectional, Mixer, build_mixer, mixer_class, mixer_options
from sinuous.core.registry import check_weights, register_vision_model

__all__ = ["Vim", "checkpoint_filter_fn", "resize_pos_embed"]

POOLS = ("token", "avg", "")


# Sizes are proxies while FX traces, and proxies cannot be compared: the checks stay one node.
@torch.fx.wrap
def check_image(x: Tensor, img_size: tuple[int, int], patch_size: tuple[int, int], dynamic: bool) -> Tensor:
    """`x`, or a ValueError that says which image size is wanted."""
    if x.dim() != 4:
        raise ValueError(f"images must have shape [B, C, H, W] (got {list(x.shape)})")
    height, width = x.shape[2], x.shape[3]
    if not dynamic and (height != img_size[0] or width != img_size[1]):
        raise ValueError(
            f"the model is set to {img_size[0]} x {img_size[1]} images (got {height} x {width}); "
            "call set_input_size, or build it with dynamic_img_size=True"
        )
    if height < patch_size[0] or width < patch_size[1]:
        raise ValueError(
            f"a {height} x {width} image is smaller than a patch of {patch_size[0]} x {patch_size[1]}; resize the image"
        )
    return x


@torch.fx.wrap
def resize_pos_embed(pos_embed: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resample positions bicubically to another grid; the row of the class token moves to the new middle.

    Args:
        pos_embed: `[1, M + 1, D]`, M = h · w, row M // 2 belonging to the class token.
        old_grid: (h, w).
        new_grid: (h', w').

    Returns:
        `[1, M' + 1, D]`, in the dtype of `pos_embed`.
    """
    if old_grid[0] == new_grid[0] and old_grid[1] == new_grid[1]:
        return pos_embed
    middle = old_grid[0] * old_grid[1] // 2
    token = pos_embed[:, middle : middle + 1]
    grid = torch.cat([pos_embed[:, :middle], pos_embed[:, middle + 1 :]], dim=1)
    grid = grid.float().reshape(1, old_grid[0], old_grid[1], -1).permute(0, 3, 1, 2)
    size = [new_grid[0], new_grid[1]]
    grid = F.interpolate(grid, size=size, mode="bicubic", antialias=True, align_corners=False)
    return insert_middle(grid.flatten(2).transpose(1, 2).to(pos_embed.dtype), token)


def insert_middle(tokens: Tensor, token: Tensor) -> Tensor:
    """`[B, M, D]` and `[B, 1, D]` to `[B, M + 1, D]`, the token at index M // 2."""
    middle = tokens.shape[1] // 2
    return torch.cat([tokens[:, :middle], token, tokens[:, middle:]], dim=1)


def without_middle(tokens: Tensor) -> Tensor:
    """`[B, M + 1, D]` to `[B, M, D]`: the tokens of the grid."""
    middle = (tokens.shape[1] - 1) // 2
    return torch.cat([tokens[:, :middle], tokens[:, middle + 1 :]], dim=1)


class PatchEmbed(nn.Module):
    """Patches, which overlap where `stride` is less than `patch_size`: `[B, C, H, W]` to `[B, D, h, w]`.

    The grid has h = (H - patch) // stride + 1 rows, and likewise for columns.

    Raises:
        ValueError: if the image is smaller than a patch, or the stride less than 1.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        stride: int | tuple[int, int],
        in_chans: int,
        embed_dim: int,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.patch_size: tuple[int, int] = to_2tuple(patch_size)
        self.stride: tuple[int, int] = to_2tuple(stride)
        if min(self.patch_size + self.stride) < 1:
            raise ValueError(f"patch_size and stride must be at least 1 (got {patch_size} and {stride})")
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.stride, device=device, dtype=dtype)
        self.set_img_size(img_size)

    @torch.jit.ignore
    def set_img_size(self, img_size: int | tuple[int, int]) -> None:
        size: tuple[int, int] = to_2tuple(img_size)
        if size[0] < self.patch_size[0] or size[1] < self.patch_size[1]:
            raise ValueError(
                f"img_size {size[0]} x {size[1]} is smaller than a patch of {self.patch_size[0]} x "
                f"{self.patch_size[1]}; choose a larger image or a smaller patch_size"
            )
        self.img_size = (int(size[0]), int(size[1]))
        self.grid_size = self.dynamic_feat_size(self.img_size)

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """The grid of an image of this size."""
        return (
            (img_size[0] - self.patch_size[0]) // self.stride[0] + 1,
            (img_size[1] - self.patch_size[1]) // self.stride[1] + 1,
        )

    def init_weights(self) -> None:
        lecun_normal_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Vim(nn.Module):
    """Vision Mamba.

    Args:
        img_size: height and width that the model is set to.
        patch_size: side of a patch.
        stride: distance between patches; that of neighbouring patches, `patch_size`, if absent.
        in_chans: channels of the image.
        num_classes: classes of the head; 0 for none.
        global_pool: `"token"` takes the class token, `"avg"` averages the tokens of the grid, `""` keeps all tokens.
        embed_dim: D, width of the residual stream.
        depth: number of blocks.
        d_state, d_conv, expand: of the mixers that have them; state per channel, taps, inner width / D.
        mixer: name of a registered mixer; a causal one works in both directions, as `Bidirectional`.
        mixer_kwargs: further options of the mixer.
        drop_rate: dropout before the head.
        pos_drop_rate: dropout after the positions are added.
        drop_path_rate: of the last block; earlier ones rise linearly from 0.
        dynamic_img_size: accept any image size, resampling `pos_embed` in every forward pass.

    Raises:
        ValueError: for an unknown `global_pool` or mixer, or an image smaller than a patch.
        TypeError: for an option that the mixer does not have.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        stride: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        mixer: str = "vim_pair",
        mixer_kwargs: Mapping[str, Any] | None = None,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_pool(global_pool)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbed(
            img_size, patch_size, patch_size if stride is None else stride, in_chans, embed_dim, **dd
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        tokens = math.prod(self.patch_embed.grid_size) + 1
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, embed_dim, **dd))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        sizes = {"d_state": d_state, "d_conv": d_conv, "expand": expand}
        options = {**sizes, **(mixer_kwargs or {}), **dd}
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.layers = nn.ModuleList(
            MixerBlock(norms.RMSNorm(embed_dim, **dd), _both_ways(mixer, embed_dim, options, frozenset(sizes)), rate)
            for rate in rates
        )
        self.norm_f = norms.RMSNorm(embed_dim, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        reduction = max(self.patch_embed.stride)
        self.feature_info = [
            {"module": f"layers.{i}", "num_chs": embed_dim, "reduction": reduction} for i in range(depth)
        ]
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Fill every parameter anew, as after `to_empty` (Vim's code: truncated normals, lecun normal for patches,
        the projections back to the residual stream divided by sqrt(depth), after GPT-2)."""
        self.patch_embed.init_weights()
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for layer in self.layers:
            layer.norm.reset_parameters()
            layer.mixer.init_weights()
            for name, weight in layer.mixer.named_parameters():
                if name.endswith(("out_proj.weight", "o_proj.weight")):
                    with torch.no_grad():
                        weight.div_(math.sqrt(len(self.layers)))
        if isinstance(self.norm_f, norms.RMSNorm):
            self.norm_f.reset_parameters()
        self._init_head()

    def _init_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        mixers = {f"layers.{i}.mixer.{name}" for i, b in enumerate(self.layers) for name in b.mixer.no_weight_decay()}
        return {"cls_token", "pos_embed"} | mixers

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head, on the device and in the dtype and mode of the model; pooling stays unless given."""
        if global_pool is not None:
            check_pool(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        dd = get_device_dtype(self)
        self.head = nn.Linear(self.embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self._init_head()
        self.head.train(self.training)

    @torch.jit.ignore
    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Set the model to another image size, also one that is not square, or to another patch size.

        Positions are resampled, and so are the weights of the patches; a stride that equals the patch size follows it.

        Raises:
            ValueError: if the image is smaller than a patch.
        """
        embed = self.patch_embed
        new = PatchEmbed(
            embed.img_size if img_size is None else img_size,
            embed.patch_size if patch_size is None else patch_size,
            embed.stride if patch_size is None or embed.stride != embed.patch_size else patch_size,
            self.in_chans,
            self.embed_dim,
            device="meta",
        )
        with torch.no_grad():
            pos_embed = resize_pos_embed(self.pos_embed, embed.grid_size, new.grid_size)
            self.pos_embed = nn.Parameter(pos_embed.detach().clone(), requires_grad=self.pos_embed.requires_grad)
            weight, bias = embed.proj.weight, embed.proj.bias
            resampled = resample_patch_embed(weight, list(new.patch_size))
        new.proj.weight = nn.Parameter(resampled, requires_grad=weight.requires_grad)
        new.proj.bias = bias
        self.patch_embed = new.train(embed.training)
        for info in self.feature_info:
            info["reduction"] = max(new.stride)

    def _embed(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to the residual stream, `[B, M + 1, D]` in fp32."""
        embed = self.patch_embed
        patches = embed(check_image(x, embed.img_size, embed.patch_size, self.dynamic_img_size))
        pos_embed = self.pos_embed
        if self.dynamic_img_size:
            pos_embed = resize_pos_embed(pos_embed, embed.grid_size, (patches.shape[2], patches.shape[3]))
        x = insert_middle(patches.flatten(2).transpose(1, 2), self.cls_token.expand(patches.shape[0], -1, -1))
        return norms.at_least_fp32(self.pos_drop(x + pos_embed))

    def forward_features(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to all tokens after the last norm, `[B, M + 1, D]`, the class token at index M // 2."""
        x = self._embed(x)
        for layer in self.layers:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(layer, x)
            else:
                x = layer(x)
        return self.norm_f(x).to(self.cls_token.dtype)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool == "token":
            x = x[:, (x.shape[1] - 1) // 2]
        elif self.global_pool == "avg":
            x = without_middle(x).mean(1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The residual stream after certain blocks, without the class token.

        Args:
            x: images.
            indices: the last n blocks for an int, these blocks for a list, all if absent.
            norm: apply the last norm to each.
            stop_early: compute no block beyond the last wanted one.
            output_fmt: `"NCHW"` for maps `[B, D, h, w]`, `"NLC"` for tokens `[B, M, D]`.
            intermediates_only: leave out the output of `forward_features`.

        Raises:
            ValueError: for another `output_fmt`.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC' (got {output_fmt!r})")
        take, last = feature_take_indices(len(self.layers), indices)
        height, width = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
        x = self._embed(x)
        intermediates = []
        for i, layer in enumerate(self.layers[: last + 1] if stop_early else self.layers):
            x = checkpoint(layer, x) if self.grad_checkpointing else layer(x)
            if i in take:
                y = without_middle(self.norm_f(x) if norm else x).to(self.cls_token.dtype)
                if output_fmt == "NCHW":
                    y = y.transpose(1, 2).unflatten(2, (height, width)).contiguous()
                intermediates.append(y)
        if intermediates_only:
            return intermediates
        return self.norm_f(x).to(self.cls_token.dtype), intermediates

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the wanted intermediates do not need; returns their indices."""
        take, last = feature_take_indices(len(self.layers), indices)
        self.layers = self.layers[: last + 1]
        if prune_norm:
            self.norm_f = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take


def check_pool(global_pool: str) -> None:
    if global_pool not in POOLS:
        raise ValueError(f"global_pool must be {', '.join(map(repr, POOLS))} (got {global_pool!r})")


def _both_ways(name: str, dim: int, options: Mapping[str, Any], optional: frozenset[str]) -> Mixer:
    """A mixer that sees both directions. Sizes that are Vim's own (`optional`) go to mixers that know them."""
    kwargs = {key: value for key, value in options.items() if key in mixer_options(name) or key not in optional}
    return Bidirectional(name, dim, **kwargs) if mixer_class(name).causal else build_mixer(name, dim, **kwargs)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: Vim) -> dict[str, Tensor]:
    """Weights of the authors, or ours, for `model`: unwrapped, with positions resampled to the model's grid.

    Raises:
        ValueError: if the checkpoint is for another model, or its positions are of a grid that is not square and not
            the model's, which its length alone cannot tell.
    """
    inner = state_dict.get("model", state_dict)
    state: dict[str, Tensor] = {name.removeprefix("module."): tensor for name, tensor in inner.items()}
    pos_embed = state.get("pos_embed")
    if pos_embed is not None and pos_embed.shape[1] != model.pos_embed.shape[1]:
        patches = pos_embed.shape[1] - 1
        side = math.isqrt(patches)
        if side * side != patches:
            raise ValueError(
                f"the checkpoint's pos_embed has {patches} positions, which is no square grid; build the model with "
                "the checkpoint's img_size, load it, then call set_input_size"
            )
        state["pos_embed"] = resize_pos_embed(pos_embed, (side, side), model.patch_embed.grid_size)
    check_weights(state, model, adapted=("head.", "patch_embed.proj.weight"))
    return state


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "origin_url": "https://github.com/hustvl/Vim",
        "paper_name": "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
        "paper_ids": "arXiv:2401.09417",
        **kwargs,
    }


_NANO = Path(__file__).with_name("weights") / "vim_nano.fashion_mnist.safetensors"
_NANO_CFG = _cfg(
    num_classes=10,
    input_size=(1, 28, 28),
    crop_pct=1.0,
    mean=(0.2860,),
    std=(0.3530,),
    label_names=(
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
)

default_cfgs = generate_default_cfgs(
    {
        "vim_tiny_patch16_224.untrained": _cfg(),
        "vim_tiny_patch16_stride8_224.untrained": _cfg(),
        "vim_small_patch16_224.untrained": _cfg(),
        "vim_small_patch16_stride8_224.untrained": _cfg(),
        "vim_base_patch16_224.untrained": _cfg(),
        # `file` makes timm list the weights: only where they are installed.
        **(
            {"vim_nano.fashion_mnist": {**_NANO_CFG, "file": str(_NANO)}}
            if _NANO.exists()
            else {"vim_nano.untrained": _NANO_CFG}
        ),
        "test_vim.untrained": _cfg(input_size=(3, 64, 64)),
    }
)


def _create_vim(variant: str, pretrained: bool, sizes: dict[str, Any], kwargs: dict[str, Any]) -> Vim:
    args = {**sizes, **kwargs}
    depth = args["depth"]
    # Four depths, evenly spread: blocks 5, 11, 17, 23 of 24, as in the reference's segmentation.
    quarters = tuple(sorted({max(depth * k // 4 - 1, 0) for k in (1, 2, 3, 4)}))
    out_indices = args.pop("out_indices", quarters)
    model: Vim = build_model_with_cfg(
        Vim,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **args,
    )
    return model


@register_vision_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti, 7.1 M parameters."""
    return _create_vim("vim_tiny_patch16_224", pretrained, {"embed_dim": 192, "depth": 24}, kwargs)


@register_vision_model
def vim_tiny_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti+: overlapping patches, 27 x 27 of them at 224 pixels."""
    sizes = {"stride": 8, "embed_dim": 192, "depth": 24}
    return _create_vim("vim_tiny_patch16_stride8_224", pretrained, sizes, kwargs)


@register_vision_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S, 25.8 M parameters."""
    return _create_vim("vim_small_patch16_224", pretrained, {"embed_dim": 384, "depth": 24}, kwargs)


@register_vision_model
def vim_small_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S+: overlapping patches, 27 x 27 of them at 224 pixels."""
    sizes = {"stride": 8, "embed_dim": 384, "depth": 24}
    return _create_vim("vim_small_patch16_stride8_224", pretrained, sizes, kwargs)


@register_vision_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-B, 97.6 M parameters."""
    return _create_vim("vim_base_patch16_224", pretrained, {"embed_dim": 768, "depth": 24}, kwargs)


@register_vision_model
def vim_nano(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Ours, for images of 28 to 64 pixels."""
    sizes = {"img_size": 28, "patch_size": 4, "embed_dim": 96, "depth": 8, "d_state": 8}
    return _create_vim("vim_nano", pretrained, {**sizes, "in_chans": 1, "num_classes": 10}, kwargs)


@register_vision_model
def test_vim(pretrained: bool = False, **kwargs: Any) -> Vim:  # noqa: PT028  (a model, not a test)
    """For tests: small enough to run in milliseconds."""
    sizes = {"img_size": 64, "embed_dim": 32, "depth": 4, "d_state": 8}
    return _create_vim("test_vim", pretrained, sizes, kwargs)
