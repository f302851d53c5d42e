"""Weights of another size or patch, made those of an isotropic model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from sinuous.core import patches
from sinuous.core.registry import check_weights

if TYPE_CHECKING:
    from sinuous.core.isotropic import Isotropic


def fit_checkpoint(state: dict[str, Tensor], model: Isotropic, pos_grid: Sequence[int] | None = None) -> None:
    """Make weights those of `model`'s grid and patch, in place, and refuse those of another model.

    Args:
        state: weights by the names of `model`.
        model: to load them into.
        pos_grid: of the position embeddings, where the file says it.

    Raises:
        ValueError: if the weights are of another model or only one of the two has a class token, or if their grid
            cannot be told from their number.
    """
    embed = model.patch_embed
    kernel, pos_embed = state.get("patch_embed.proj.weight"), state.get("pos_embed")
    if kernel is not None and "cls_token" in state and model.cls_token is None:
        _refuse_class_token("'middle', or where it stood")
    if kernel is not None and "cls_token" not in state and model.cls_token is not None:
        _refuse_class_token("'none'")
    if kernel is not None and kernel.ndim == embed.proj.weight.ndim:
        if pos_embed is not None and model.pos_embed is not None:
            tokens = pos_embed.shape[1] - int(model.pos_class_token != "none")
            grid = pos_grid or _grid_of_checkpoint(model, tokens, tuple(kernel.shape[2:]))
            if tuple(grid) != embed.grid_size:
                state["pos_embed"] = patches.resize_pos_embed(
                    pos_embed, list(grid), list(embed.grid_size), model.pos_class_token
                )
        state["patch_embed.proj.weight"] = patches.fit_patch_kernel(kernel, embed.patch_size)
    check_weights(state, model, adapted=("head.", "patch_embed.proj.weight"))


def _refuse_class_token(value: str) -> None:
    raise ValueError(
        f"of the checkpoint and the model only one has a class token; build the model with class_token={value}"
    )


def _grid_of_checkpoint(model: Isotropic, tokens: int, patch_size: tuple[int, ...]) -> Sequence[int]:
    embed = model.patch_embed
    if made_for := getattr(model, "pretrained_model_args", {}).get("img_size"):  # as files of ours say of themselves
        stride = embed.stride if patch_size == embed.patch_size else patch_size
        grid = patches.grid_of(patches.sides("img_size", made_for, embed.axes), patch_size, stride)
        if tokens == math.prod(grid):
            return grid
    square = patches.square_of(tokens)
    if square is not None and embed.axes == 2:
        return square
    if tokens == math.prod(embed.grid_size):
        return embed.grid_size
    raise ValueError(
        f"the checkpoint has {tokens} patches, which is no square, so that their grid is not known; build the model "
        "with the img_size of the checkpoint, then call set_input_size"
    )
