"""Patches of pictures and clips, and the positions and class token that go with them.

A picture `[B, C, H, W]` is cut into h × w patches, a clip `[B, C, T, H, W]` into t × h × w; tokens are rows of patches,
the last axis fastest. A class token may stand among them: at their head, in their middle (M // 2) or at their tail.
"""

# Annotations stay objects: TorchScript and FX read those of functions that models call in `forward`.
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function, resample_abs_pos_embed, resample_patch_embed
from torch import Tensor, nn

from sinuous.core.checks import check_sizes, described
from sinuous.core.mixers.calls import check_output, check_place

CLASS_TOKENS = ("middle", "head", "tail", "none")

Sides = int | tuple[int, ...]
"""One number for all axes, or one for each; any sequence will do."""


def grid_of(img_size: Sequence[int], patch_size: Sequence[int], stride: Sequence[int]) -> list[int]:
    """Patches per axis: floor((size - patch) / stride) + 1."""
    return [(size - patch) // step + 1 for size, patch, step in zip(img_size, patch_size, stride, strict=True)]


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


def resize_pos_embed(pos_embed: Tensor, old_grid: list[int], new_grid: list[int], class_token: str) -> Tensor:
    """Position embeddings `[1, L, D]` for another grid: those of patches are interpolated, bicubically in height and
    width and linearly in time; that of the class token stays as it is."""
    patches = without_class_token(pos_embed, class_token)
    resampled = _resize_patches(patches, old_grid, new_grid)
    if class_token == "none":
        return resampled
    row = class_row(patches.shape[1], class_token)
    return with_class_token(resampled, pos_embed[:, row : row + 1], class_token)


def _resize_patches(patches: Tensor, old_grid: list[int], new_grid: list[int]) -> Tensor:
    if len(old_grid) == 2:
        resampled: Tensor = resample_abs_pos_embed(patches, new_grid, old_grid, num_prefix_tokens=0)
        return resampled
    frames, height, width = old_grid
    dim = patches.shape[2]
    by_cell = patches.reshape(frames, height * width, dim).transpose(0, 1).reshape(1, height * width, frames * dim)
    by_cell = resample_abs_pos_embed(by_cell, new_grid[1:], [height, width], num_prefix_tokens=0)
    series = by_cell.reshape(-1, frames, dim).transpose(1, 2)  # cells, channels, frames
    series = F.interpolate(series.float(), size=[new_grid[0]], mode="linear", align_corners=False)
    return series.permute(2, 0, 1).reshape(1, -1, dim).to(patches.dtype)


@register_notrace_function
def fit_pos_embed(pos_embed: Tensor, grid: list[int], new_grid: list[int], dynamic: bool, class_token: str) -> Tensor:
    """Position embeddings for a picture of `new_grid` patches, resampled if `dynamic`."""
    if list(grid) == list(new_grid):
        return pos_embed
    if not dynamic:
        patches, own = " x ".join([str(side) for side in new_grid]), " x ".join([str(side) for side in grid])
        raise ValueError(
            f"the image has {patches} patches and the model is made for {own}; resize the "
            "image, call set_input_size, or build the model with dynamic_img_size=True"
        )
    return resize_pos_embed(pos_embed, grid, new_grid, class_token)


@register_notrace_function
def grid_sides(x: Tensor) -> list[int]:
    """Sides of a map `[B, D, …]`."""
    return [x.shape[axis] for axis in range(2, x.ndim)]


@register_notrace_function
def check_images(x: Tensor, patch_size: list[int], in_chans: int) -> Tensor:
    """`x`, or a ValueError where it is no batch of pictures or clips with room for one patch each."""
    axes = "H, W" if len(patch_size) == 2 else "T, H, W"
    if not isinstance(x, Tensor):
        raise ValueError(f"images must be a tensor [B, C, {axes}] (got {type(x)}); convert them with torch.as_tensor")
    if x.ndim != len(patch_size) + 2 or x.shape[1] != in_chans:
        raise ValueError(
            f"images must have shape [B, C, {axes}] with {in_chans} channels (got {x.shape}); add the axes that are "
            "missing, or build the model with in_chans"
        )
    small = False
    for axis, patch in enumerate(patch_size):
        small = small or x.shape[axis + 2] < patch
    if small:
        patch_sides = " x ".join([str(side) for side in patch_size])
        sides = " x ".join([str(x.shape[axis]) for axis in range(2, x.ndim)])
        raise ValueError(
            f"images must be at least as large as a patch of {patch_sides} "
            f"(got {sides}); give larger images or a smaller patch_size"
        )
    return x


def sides(name: str, size: Sides, axes: int) -> tuple[int, ...]:
    """`size` as so many whole numbers, one for all axes or one for each.

    Raises:
        ValueError: naming `name`, if it is neither.
    """
    numbers = (size,) * axes if isinstance(size, int) else tuple(size)
    if len(numbers) != axes:
        raise ValueError(f"{name} must be one number or {axes} (got {described(size)}); give one for each axis")
    for number in numbers:
        check_sizes(**{name: number})
    return numbers


class PatchEmbed(nn.Module):
    """A convolution that cuts pictures into patches `[B, D, h, w]`, or clips into `[B, D, t, h, w]`; patches overlap
    where the stride is smaller.

    Args:
        img_size: sides of what is cut, in frames and pixels; one number stands for all.
        patch_size: sides of a patch.
        stride: distance of patches; the patch size if absent.
        in_chans: C.
        embed_dim: D.
        axes: 2 for pictures, 3 for clips.

    Raises:
        ValueError: if a size is not positive or has another number of sides, or a picture is smaller than a patch.
    """

    def __init__(
        self,
        img_size: Sides,
        patch_size: Sides,
        stride: Sides | None,
        in_chans: int,
        embed_dim: int,
        axes: int = 2,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.axes = axes
        self.img_size = sides("img_size", img_size, self.axes)
        self.patch_size = sides("patch_size", patch_size, self.axes)
        self.stride = self.patch_size if stride is None else sides("stride", stride, self.axes)
        self.grid_size = self._grid()
        conv: Any = nn.Conv2d if self.axes == 2 else nn.Conv3d
        self.proj = conv(in_chans, embed_dim, self.patch_size, self.stride, device=device, dtype=dtype)

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

    def _grid(self) -> tuple[int, ...]:
        if any(size < patch for size, patch in zip(self.img_size, self.patch_size, strict=True)):
            raise ValueError(
                f"img_size must be at least patch_size {self.patch_size} (got {self.img_size}); "
                "give larger images or a smaller patch_size"
            )
        return tuple(grid_of(self.img_size, self.patch_size, self.stride))

    @torch.jit.ignore
    def set_input_size(self, img_size: Sides | None = None, patch_size: Sides | None = None) -> None:
        """Another image size; another patch size resamples the kernel and keeps the share of the patch that the stride
        skips."""
        old_size, old_patch, old_stride = self.img_size, self.patch_size, self.stride
        new_size = old_size if img_size is None else sides("img_size", img_size, self.axes)
        if patch_size is not None:
            self.patch_size = sides("patch_size", patch_size, self.axes)
            ratios = zip(old_stride, self.patch_size, old_patch, strict=True)
            self.stride = tuple(max(1, round(s * new / old)) for s, new, old in ratios)
        self.img_size = new_size
        try:
            self.grid_size = self._grid()
            weight = fit_patch_kernel(self.proj.weight.detach(), self.patch_size)
        except ValueError:
            self.img_size, self.patch_size, self.stride = old_size, old_patch, old_stride
            self.grid_size = self._grid()
            raise
        if self.patch_size != old_patch:
            self.proj.weight = nn.Parameter(weight, requires_grad=self.proj.weight.requires_grad)
            self.proj.kernel_size, self.proj.stride = self.patch_size, self.stride

    def forward(self, x: Tensor) -> Tensor:
        patches: Tensor = self.proj(x)
        return patches


def fit_patch_kernel(kernel: Tensor, patch_size: Sequence[int]) -> Tensor:
    """A patch kernel `[D, C, …]` for another height and width of patches.

    Raises:
        ValueError: for another number of frames.
    """
    if kernel.ndim == 4:
        resampled: Tensor = resample_patch_embed(kernel, list(patch_size))
        return resampled
    if kernel.shape[2] != patch_size[0]:
        raise ValueError(
            f"patch_size must keep its {kernel.shape[2]} frames, as kernels are not resampled in time "
            f"(got {patch_size[0]}); build the model anew"
        )
    frames: Tensor = resample_patch_embed(kernel.flatten(1, 2), list(patch_size[1:])).unflatten(1, kernel.shape[1:3])
    return frames


def square_of(patches: int) -> list[int] | None:
    """Sides of a square grid of so many patches, if it is one."""
    side = math.isqrt(patches)
    return [side, side] if side * side == patches else None
