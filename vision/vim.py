"""Vision Mamba: image patches in a row, scanned from both ends, with the class token in the middle.

Paper: Zhu, Liao, Zhang, Wang, Liu and Wang, "Vision Mamba: Efficient Visual Representation Learning with Bidirectional
State Space Model" (arXiv 2401.09417, ICML 2024). Reference: https://github.com/hustvl/Vim (Apache-2.0). This is an
independent implementation; parameters have the reference's names, so that its `model` dictionaries load as they are:

    model = sinuous.create_model("vim_tiny_patch16_224", checkpoint_path="vim_t_midclstok_76p1acc.pth")

Shapes: B batch, M patches, D width, L tokens: the patches and, at M // 2 unless told otherwise, the class token. Mixers
that read a grid leave no place for it, and L = M.
"""

# Annotations stay objects: FX copies that of `forward` into its graphs, and TorchScript cannot read a string there.
import math
import operator
from pathlib import Path
from typing import Any, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    get_device_dtype,
    lecun_normal_,
    register_notrace_function,
    resample_abs_pos_embed,
    resample_patch_embed,
    to_2tuple,
    trunc_normal_,
)
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from sinuous.core import norms
from sinuous.core.checks import check_arguments, check_choice, check_range, check_sizes, described
from sinuous.core.mixers import mixer_class
from sinuous.core.mixers.calls import check_output, check_place
from sinuous.core.registry import check_weights, register_vision_model
from sinuous.core.stack import Stack
from sinuous.core.weights import shipped_cfgs

__all__ = ["Vim", "checkpoint_filter_fn"]

IntOrPair = int | tuple[int, int]

POOLS = ("token", "avg", "")
CLASS_TOKENS = ("middle", "head", "tail", "none")
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
    "test_vim": {"patch_size": 8, "embed_dim": 32, "depth": 4, "d_state": 8},
}


def grid_of(img_size: tuple[int, int], patch_size: tuple[int, int], stride: tuple[int, int]) -> tuple[int, int]:
    """Patches per axis: floor((size - patch) / stride) + 1."""
    height, width = ((s - p) // d + 1 for s, p, d in zip(img_size, patch_size, stride, strict=True))
    return height, width


def class_row(patches: int, class_token: str) -> int:
    """Place of the class token in a row of so many patches."""
    if class_token == "head":
        return 0
    return patches if class_token == "tail" else patches // 2


def with_class_token(x: Tensor, token: Tensor, class_token: str) -> Tensor:
    """Patches `[B, M, D]` and a token `[B, 1, D]` as `[B, M+1, D]`."""
    row = class_row(x.shape[1], class_token)
    return torch.cat([x[:, :row], token, x[:, row:]], 1)


def without_class_token(x: Tensor, class_token: str) -> Tensor:
    """Patches `[B, M, D]` of tokens `[B, M+1, D]`, or all tokens where `class_token` is `"none"`."""
    if class_token == "none":
        return x
    row = class_row(x.shape[1] - 1, class_token)
    return torch.cat([x[:, :row], x[:, row + 1 :]], 1)


def resize_pos_embed(
    pos_embed: Tensor, old_grid: list[int], new_grid: list[int], class_token: str = "middle"
) -> Tensor:
    """Position embeddings `[1, L, D]` for another grid: those of patches are interpolated bicubically, that of the
    class token stays as it is."""
    patches = without_class_token(pos_embed, class_token)
    resampled: Tensor = resample_abs_pos_embed(patches, new_grid, old_grid, num_prefix_tokens=0)
    if class_token == "none":
        return resampled
    row = class_row(patches.shape[1], class_token)
    return with_class_token(resampled, pos_embed[:, row : row + 1], class_token)


@register_notrace_function
def fit_pos_embed(
    pos_embed: Tensor, grid: list[int], height: int, width: int, dynamic: bool, class_token: str
) -> Tensor:
    """Position embeddings for a map of `height` × `width` patches, resampled if `dynamic`."""
    if height == grid[0] and width == grid[1]:
        return pos_embed
    if not dynamic:
        raise ValueError(
            f"the image has {height} x {width} patches and the model is made for {grid[0]} x {grid[1]}; resize the "
            "image, call set_input_size, or build the model with dynamic_img_size=True"
        )
    return resize_pos_embed(pos_embed, grid, [height, width], class_token)


@register_notrace_function
def at_least_a_patch(x: Tensor, patch_size: list[int], in_chans: int) -> Tensor:
    """`x`, or a ValueError where it is no batch of images with room for one patch each."""
    if not isinstance(x, Tensor):
        raise ValueError(f"images must be a tensor [B, C, H, W] (got {type(x)}); convert them with torch.as_tensor")
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(
            f"images must have shape [B, C, H, W] with {in_chans} channels (got {x.shape}); add the axes that are "
            "missing, or build the model with in_chans"
        )
    height, width = x.shape[2], x.shape[3]
    if height < patch_size[0] or width < patch_size[1]:
        raise ValueError(
            f"images must be at least as large as a patch of {patch_size[0]} x {patch_size[1]} "
            f"(got {height} x {width}); give larger images or a smaller patch_size"
        )
    return x


class PatchEmbed(nn.Module):
    """A convolution that cuts an image into patches `[B, D, h, w]`; patches overlap where the stride is smaller."""

    def __init__(
        self,
        img_size: IntOrPair,
        patch_size: IntOrPair,
        stride: IntOrPair | None,
        in_chans: int,
        embed_dim: int,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.img_size = to_2tuple(img_size)
        self.patch_size = to_2tuple(patch_size)
        self.stride = self.patch_size if stride is None else to_2tuple(stride)
        self.grid_size = self._grid()
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.stride, device=device, dtype=dtype)

    def __call__(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return cast("Tensor", super().__call__(x))
        try:
            patches: Tensor = super().__call__(x)
        except RuntimeError:
            check_place(self, x)
            raise
        check_output(self, x, patches)
        return patches

    def _grid(self) -> tuple[int, int]:
        sides = {"img_size": self.img_size, "patch_size": self.patch_size, "stride": self.stride}
        for name, sizes in sides.items():
            for size in sizes:
                check_sizes(**{name: size})
        if any(size < patch for size, patch in zip(self.img_size, self.patch_size, strict=True)):
            raise ValueError(
                f"img_size must be at least patch_size {self.patch_size} (got {self.img_size}); "
                "give larger images or a smaller patch_size"
            )
        return grid_of(self.img_size, self.patch_size, self.stride)

    @torch.jit.ignore
    def set_input_size(self, img_size: IntOrPair | None = None, patch_size: IntOrPair | None = None) -> None:
        """Another image size; another patch size resamples the kernel and keeps the share of the patch that the stride
        skips."""
        old_size, old_patch, old_stride = self.img_size, self.patch_size, self.stride
        self.img_size = self.img_size if img_size is None else to_2tuple(img_size)
        if patch_size is not None:
            self.patch_size = to_2tuple(patch_size)
            ratios = zip(old_stride, self.patch_size, old_patch, strict=True)
            self.stride = tuple(max(1, round(s * new / old)) for s, new, old in ratios)
        try:
            self.grid_size = self._grid()
        except ValueError:
            self.img_size, self.patch_size, self.stride = old_size, old_patch, old_stride
            raise
        if self.patch_size != old_patch:
            weight = resample_patch_embed(self.proj.weight.detach(), list(self.patch_size))
            self.proj.weight = nn.Parameter(weight, requires_grad=self.proj.weight.requires_grad)
            self.proj.kernel_size, self.proj.stride = self.patch_size, self.stride

    def forward(self, x: Tensor) -> Tensor:
        patches: Tensor = self.proj(x)
        return patches


class Vim(nn.Module):
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

    output_fmt = "NLC"

    @check_arguments
    def __init__(
        self,
        img_size: IntOrPair = 224,
        patch_size: IntOrPair = 16,
        stride: IntOrPair | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        class_token: str | None = None,
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int | None = None,
        d_conv: int | None = None,
        expand: float | None = None,
        mixer: str = "vim_pair",
        mixer_options: dict[str, Any] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_sizes(in_chans=in_chans, embed_dim=embed_dim, depth=depth)
        check_range(0, math.inf, num_classes=num_classes)
        check_range(0, 1, drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        self.class_token = _class_token(class_token, mixer)
        self.num_prefix_tokens = 1 if self.class_token == "head" else 0
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.global_pool = _pool(global_pool, self.class_token)
        self.dynamic_img_size = dynamic_img_size

        self.patch_embed = PatchEmbed(img_size, patch_size, stride, in_chans, embed_dim, **dd)
        has_token = self.class_token != "none"
        rows = math.prod(self.patch_embed.grid_size) + int(has_token)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd)) if has_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, rows, embed_dim, **dd))
        self.pos_drop = nn.Dropout(drop_rate)
        sizes = {"d_state": d_state, "d_conv": d_conv, "expand": expand}
        options = {name: value for name, value in sizes.items() if value is not None}
        options.update(mixer_options or {})
        self.layers = Stack(
            embed_dim, depth, mixer, {mixer: options}, causal=False, drop_path_rate=drop_path_rate, **dd
        )
        self.feature_info = [
            {"module": f"layers.{i}", "num_chs": embed_dim, "reduction": max(self.patch_embed.stride)}
            for i in range(depth)
        ]
        self.norm_f: nn.Module = norms.RMSNorm(embed_dim, **dd)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Fill every parameter anew, with the reference's distributions."""
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(cast("Tensor", self.patch_embed.proj.bias))
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)
        self.layers.init_weights()
        if isinstance(self.norm_f, norms.RMSNorm):
            self.norm_f.reset_parameters()
        self._init_head()

    def _init_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        own = {"pos_embed"} if self.cls_token is None else {"cls_token", "pos_embed"}
        return own | {f"layers.{name}" for name in self.layers.no_weight_decay()}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.layers.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    @torch.jit.ignore
    @check_arguments
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head with the device, dtype and mode of the model, none for 0 classes. Pooling stays if absent."""
        dd = get_device_dtype(self)
        check_range(0, math.inf, num_classes=num_classes)
        if global_pool is not None:
            self.global_pool = _pool(global_pool, self.class_token)
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)
        self._init_head()

    @torch.jit.ignore
    @check_arguments
    def set_input_size(self, img_size: IntOrPair | None = None, patch_size: IntOrPair | None = None) -> None:
        """Another image size or patch size: position embeddings and patch kernel are resampled.

        Raises:
            ValueError: if images are smaller than patches.
        """
        old_grid = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size, patch_size)
        grid = self.patch_embed.grid_size
        if grid != old_grid:
            resized = resize_pos_embed(self.pos_embed.detach(), list(old_grid), list(grid), self.class_token)
            self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)
        for info in self.feature_info:
            info["reduction"] = max(self.patch_embed.stride)
        update_model_input_size(
            self,
            self.patch_embed.img_size,
            patch_size=self.patch_embed.patch_size,
            stride=self.patch_embed.stride,
        )

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int] | None]:
        """Image `[B, C, H, W]` to the residual stream `[B, L, D]`, in fp32 at least, and the grid if it is one."""
        x = self.patch_embed(at_least_a_patch(x, self.patch_embed.patch_size, self.in_chans))
        height, width = x.shape[2], x.shape[3]
        pos_embed = fit_pos_embed(
            self.pos_embed, self.patch_embed.grid_size, height, width, self.dynamic_img_size, self.class_token
        )
        x = x.flatten(2).transpose(1, 2)
        grid: tuple[int, int] | None = None
        if self.cls_token is not None:
            x = with_class_token(x, self.cls_token.expand(x.shape[0], -1, -1), self.class_token)
        else:
            grid = (height, width)
        return norms.at_least_fp32(self.pos_drop(x + pos_embed)), grid

    def _finish(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm_f(x)
        return normed.to(self.pos_embed.dtype)

    def forward_features(self, x: Tensor) -> Tensor:
        """Image `[B, C, H, W]` to tokens `[B, L, D]`, the class token, if there is one, among them."""
        x, grid = self._embed(x)
        return self._finish(self.layers(x, None, grid))

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
        """The residual stream after chosen blocks, without the class token.

        Args:
            x: image `[B, C, H, W]`.
            indices: which blocks; an int is the last so many, None is all.
            norm: apply the final norm to them.
            stop_early: leave out the blocks after the last of them.
            output_fmt: `"NCHW"` for maps `[B, D, h, w]`, `"NLC"` for `[B, M, D]`.
            intermediates_only: return them alone, else `(forward_features(x), them)`.

        Raises:
            ValueError: if `output_fmt` is neither.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC' (got {output_fmt!r})")
        taken, _ = _take(len(self.layers), indices)
        x = at_least_a_patch(x, self.patch_embed.patch_size, self.in_chans)
        stride, patch = self.patch_embed.stride, self.patch_embed.patch_size
        height, width = grid_of((x.shape[2], x.shape[3]), patch, stride)
        x, grid = self._embed(x)
        x, taps = self.layers.forward_intermediates(x, None, grid, taps=taken, stop_early=stop_early)
        intermediates = []
        for tap in taps:
            tap = self._finish(tap) if norm else tap.to(self.pos_embed.dtype)
            tap = without_class_token(tap, self.class_token)
            intermediates.append(tap.mT.unflatten(2, (height, width)) if output_fmt == "NCHW" else tap)
        return intermediates if intermediates_only else (self._finish(x), intermediates)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what intermediates at `indices` do not need; returns the indices kept."""
        taken, last = _take(len(self.layers), indices)
        del self.layers[last + 1 :]
        if prune_norm:
            self.norm_f = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens `[B, L, D]` to logits, or to what the classifier reads."""
        if self.global_pool == "token":
            x = x[:, class_row(x.shape[1] - 1, self.class_token)]
        elif self.global_pool == "avg":
            x = without_class_token(x, self.class_token).mean(1)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _take(blocks: int, indices: int | list[int] | None) -> tuple[list[int], int]:
    try:
        taken, last = feature_take_indices(blocks, indices)
        taken = [operator.index(block) for block in taken]
    except (AssertionError, TypeError) as error:
        raise ValueError(
            f"indices must be blocks from {-blocks} to {blocks - 1}, or how many of the last of {blocks} "
            f"(got {described(indices)})"
        ) from error
    return taken, last


def _class_token(class_token: str | None, mixer: str) -> str:
    reads_grid = mixer_class(mixer).reads_grid
    if class_token is None:
        return "none" if reads_grid else "middle"
    check_choice("class_token", class_token, CLASS_TOKENS)
    if reads_grid and class_token != "none":
        raise ValueError(
            f"class_token must be 'none' for mixer {mixer!r}, which reads the patches as a grid without a cell for it "
            f"(got {class_token!r}); leave it out, or choose a mixer that reads a row"
        )
    return class_token


def _pool(global_pool: str | None, class_token: str) -> str:
    if global_pool is None:
        return "avg" if class_token == "none" else "token"
    check_choice("global_pool", global_pool, POOLS)
    if global_pool == "token" and class_token == "none":
        raise ValueError("global_pool='token' reads the class token and the model has none; use 'avg' or ''")
    return global_pool


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Vim) -> dict[str, Tensor]:
    """The authors' checkpoints, or our own, as `model` needs them: unwrapped and resampled to its grid and patch.

    Unlike the authors' fine-tuning script, which takes the first rows of `pos_embed` for the class token's, this takes
    the row where it lies.

    Raises:
        ValueError: if the weights are of another model or only one of the two has a class token, or if their grid
            cannot be told from their number.
    """
    for wrapper in ("model", "state_dict"):
        state_dict = state_dict.get(wrapper, state_dict)
    state = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    embed = model.patch_embed
    kernel, pos_embed = state.get("patch_embed.proj.weight"), state.get("pos_embed")
    if pos_embed is not None and ("cls_token" in state) is not (model.class_token != "none"):
        value = "'middle', or where it stood" if "cls_token" in state else "'none'"
        raise ValueError(
            f"of the checkpoint and the model only one has a class token; build the model with class_token={value}"
        )
    if kernel is not None and kernel.ndim == 4 and pos_embed is not None:
        patches = pos_embed.shape[1] - int(model.class_token != "none")
        grid = _grid_of_checkpoint(model, patches, (kernel.shape[2], kernel.shape[3]))
        if grid != embed.grid_size:
            state["pos_embed"] = resize_pos_embed(pos_embed, list(grid), list(embed.grid_size), model.class_token)
        state["patch_embed.proj.weight"] = resample_patch_embed(kernel, list(embed.patch_size))
    check_weights(state, model, adapted=("head.", "patch_embed.proj.weight"))
    return state


def _grid_of_checkpoint(model: Vim, patches: int, patch_size: tuple[int, int]) -> tuple[int, int]:
    height, width = model.patch_embed.grid_size
    if made_for := getattr(model, "pretrained_model_args", {}).get("img_size"):  # as files of ours say of themselves
        stride = model.patch_embed.stride if patch_size == model.patch_embed.patch_size else patch_size
        grid = grid_of(to_2tuple(made_for), patch_size, stride)
        if patches == grid[0] * grid[1]:
            return grid
    side = math.isqrt(patches)
    if side * side == patches:
        return side, side
    if patches == height * width:
        return height, width
    raise ValueError(
        f"the checkpoint has {patches} patches, which is no square, so that their grid is not known; build the model "
        "with the img_size of the checkpoint, then call set_input_size"
    )


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_name": "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
        "paper_ids": "arXiv:2401.09417",
        "origin_url": "https://github.com/hustvl/Vim",
        **kwargs,
    }


_CFGS = {
    "vim_nano": _cfg(input_size=(1, 28, 28), num_classes=10, mean=(0.5,), std=(0.5,), crop_pct=1.0),
    "test_vim": _cfg(input_size=(3, 64, 64)),
}

default_cfgs = generate_default_cfgs(
    {
        name_and_tag: cfg
        for name in SIZES
        for name_and_tag, cfg in shipped_cfgs(Path(__file__).parent / "weights", name, _CFGS.get(name, _cfg())).items()
    }
)


def _create_vim(variant: str, pretrained: bool = False, **kwargs: Any) -> Vim:
    sizes = dict(SIZES[variant])
    if kwargs.get("mixer", "vim_pair") != "vim_pair":
        sizes = {name: size for name, size in sizes.items() if name not in MIXER_SIZES}
    sizes.update(kwargs)
    depth = sizes.get("depth", 24)
    quarters = tuple(sorted({max(0, depth * (k + 1) // 4 - 1) for k in range(4)}))
    vim: Vim = build_model_with_cfg(
        Vim,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": quarters, "feature_cls": "getter"},
        **sizes,
    )
    return vim


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
def test_vim(pretrained: bool = False, **kwargs: Any) -> Vim:  # noqa: PT028
    """For tests: every mechanism at the smallest size."""
    return _create_vim("test_vim", pretrained, **kwargs)
