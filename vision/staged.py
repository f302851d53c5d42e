"""What staged backbones share: a stem of stride 4, stages that each end in a down-sampling, a norm and a classifier.

    x_0 = stem(image);   y_s = blocks_s(x_s);   x_{s+1} = downsample_s(y_s)         maps [B, D_s, h_s, w_s]
    logits = head(mean over cells of norm(y_S))

The features of a stage are its y, ahead of its down-sampling: strides 4, 8, 16 and 32. Images of any size run. The
blocks of a stage are a `Stack`, which reads the map as a grid or window by window, or anything that turns a map into a
map of the same shape.

Shapes: B batch, C channels of the image, H × W its pixels, D_s width and h_s × w_s cells of stage s.
"""

# Annotations stay objects: FX copies that of `forward` into its graphs, and TorchScript cannot read a string there.
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from timm.layers import (
    LayerNorm2d,
    LayerScale2d,
    get_device_dtype,
    register_notrace_module,
    trunc_normal_,
)
from timm.models import checkpoint
from timm.models._input import update_model_input_size
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from sinuous.core import norms
from sinuous.core.checks import check_arguments, check_choice, check_indices, check_range, check_sizes, described
from sinuous.core.mixers import list_mixers, mixer_class
from sinuous.core.mixers.calls import check_output, check_place
from sinuous.core.parts import drop_path_rates
from sinuous.core.patches import Sides, check_images, sides
from sinuous.core.stack import Stack

__all__ = ["MergeDownsample", "StackStage", "Stage", "StagedBackbone", "Stem", "conv_downsample", "stage_rates"]

STRIDE = 4
"""Stride of every stem."""

POOLS = ("avg", "")

# FX cannot follow the checks of a grid whose sides are traced: a mixer that reads one stays a node.
for _name in list_mixers():
    if mixer_class(_name).reads_grid:
        register_notrace_module(mixer_class(_name))


def stage_rates(depths: Sequence[int], drop_path_rate: float) -> list[list[float]]:
    """Rates of stochastic depth of all blocks, stage by stage, rising linearly from 0 at the first block of all."""
    rates = drop_path_rates(sum(depths), drop_path_rate)
    starts = [sum(depths[:stage]) for stage in range(len(depths))]
    return [rates[start : start + depth] for start, depth in zip(starts, depths, strict=True)]


def check_stages(name: str, values: Sequence[Any], stages: int = 4) -> None:
    """Refuse a list that does not have one whole number, at least 1, for each stage.

    Raises:
        ValueError: naming the argument.
    """
    if len(values) != stages:
        raise ValueError(f"{name} must have one number for each of the {stages} stages (got {described(values)})")
    for value in values:
        check_sizes(**{name: value})


def layer_norm_2d(dim: int, **dd: Any) -> LayerNorm2d:
    """Layer norm over the channels of a map, with torch's ε of 1e-5."""
    return LayerNorm2d(dim, eps=1e-5, **dd)


class Stem(nn.Sequential):
    """Layers that turn images `[B, C, H, W]` into a map of stride 4; an image of the wrong dtype or place is told.

    Args:
        img_size: height and width in pixels, or one number for both. It is written down and binds nothing.
        layers: as for `nn.Sequential`.

    Raises:
        ValueError: if an image is smaller than 4 × 4 pixels.
    """

    def __init__(self, img_size: Sides, *layers: Any) -> None:
        super().__init__(*layers)
        self.patch_size = (STRIDE, STRIDE)
        self.set_input_size(img_size)

    @torch.jit.ignore
    def set_input_size(self, img_size: Sides) -> None:
        """Write another image size down."""
        height, width = sides("img_size", img_size, 2)
        if min(height, width) < STRIDE:
            raise ValueError(
                f"img_size must be at least a patch of {STRIDE} x {STRIDE} pixels (got {height} x {width}); "
                "give larger images"
            )
        self.img_size = (height, width)

    def __call__(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return cast("Tensor", super().__call__(x))
        try:
            y: Tensor = super().__call__(x)
        except RuntimeError:
            check_place(self, x)
            raise
        check_output(self, x, y)
        return y


def conv_downsample(dim: int, out_dim: int, **dd: Any) -> nn.Sequential:
    """A convolution of side 3 and stride 2, and a layer norm: ⌈h/2⌉ × ⌈w/2⌉ cells.

    Identities keep the numbers of the layers in published weights, whose code changes the layout of the map there."""
    conv = nn.Conv2d(dim, out_dim, 3, 2, 1, **dd)
    return nn.Sequential(nn.Identity(), conv, nn.Identity(), layer_norm_2d(out_dim, **dd))


class MergeDownsample(PatchMerging):
    """Swin's patch merging, for a map `[B, D, h, w]`: the four cells of a square side by side, a norm, a projection.

    A map of an odd side gets a row or column of zeros."""

    def forward(self, x: Tensor) -> Tensor:  # written anew, since TorchScript knows no super()
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        batch, dim, height, width = x.shape
        squares = x.reshape(batch, dim, height // 2, 2, width // 2, 2).permute(0, 2, 4, 5, 3, 1).flatten(3)
        merged: Tensor = self.reduction(self.norm(squares))
        return merged.permute(0, 3, 1, 2)


class Stage(nn.Module):
    """Blocks from maps `[B, D, h, w]` to maps of the same shape, then a down-sampling.

    Args:
        blocks: one after another; each takes a map and gives one.
        downsample: `nn.Identity` in the last stage.
    """

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def features(self, x: Tensor) -> Tensor:
        """Map ahead of the down-sampling."""
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():  # type: ignore[attr-defined]
                x = checkpoint(block, x)
            else:
                x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.downsample(self.features(x))
        return y


class StackStage(nn.Module):
    """A `Stack` over the cells of a map, then a down-sampling.

    Args:
        blocks: reads the cells row by row and is told the grid.
        downsample: `nn.Identity` in the last stage.
        window_size: side of square windows, each of which is a sequence of its own; 0 for the whole map. A map that
            windows do not fill gets zeros below and to the right, each axis by itself, and loses them afterwards.
    """

    def __init__(self, blocks: Stack, downsample: nn.Module, window_size: int = 0) -> None:
        super().__init__()
        self.blocks = blocks
        self.downsample = downsample
        self.window_size = window_size

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.blocks.set_grad_checkpointing(enable)

    def features(self, x: Tensor) -> Tensor:
        """Map ahead of the down-sampling, in the dtype of the map that comes in."""
        dtype, side = x.dtype, self.window_size
        height, width = x.shape[2], x.shape[3]
        x = norms.at_least_fp32(x)
        if side == 0:
            x = self.blocks(x.flatten(2).mT, None, [height, width]).mT.unflatten(2, [height, width])
            return x.to(dtype)
        x = F.pad(x, [0, -width % side, 0, -height % side])
        rows, columns = x.shape[2] // side, x.shape[3] // side
        x = x.unflatten(3, [columns, side]).unflatten(2, [rows, side]).permute(0, 2, 4, 3, 5, 1)
        x = self.blocks(x.flatten(3, 4).flatten(0, 2), None, [side, side])
        x = x.unflatten(0, [-1, rows, columns]).unflatten(3, [side, side]).permute(0, 5, 1, 3, 2, 4)
        return x.flatten(4, 5).flatten(2, 3)[:, :, :height, :width].to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.downsample(self.features(x))
        return y


class StagedBackbone(nn.Module):
    """Stem, stages, norm and classifier, with timm's interface.

    A family's constructor makes the parts, hands them over and calls `init_weights`. A family with names of its own for
    them says so in `stages_name`, `norm_name` and `head_name`, and replaces `_run`, `_norm` and `_classify`, which
    TorchScript compiles.

    Args:
        patch_embed: the stem, of stride 4.
        layers: the stages.
        widths: D of each stage.
        norm: of the last stage's map.
        in_chans: channels of the image.
        num_classes: outputs of the head; 0 for features.
        global_pool: `"avg"` for the mean over cells, `""` for a map of logits.
        drop_rate: dropout ahead of the classifier.

    Raises:
        ValueError: if a size is not allowed or `global_pool` is unknown.
    """

    output_fmt = "NCHW"
    stages_name: ClassVar[str] = "layers"
    norm_name: ClassVar[str] = "norm"
    head_name: ClassVar[str] = "head"
    __jit_unused_properties__: ClassVar[list[str]] = ["stages"]

    if TYPE_CHECKING:
        layers: nn.ModuleList
        norm: nn.Module
        head: nn.Module

    def __init__(
        self,
        patch_embed: Stem,
        layers: Sequence[nn.Module],
        widths: Sequence[int],
        norm: nn.Module,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        **dd: Any,
    ) -> None:
        super().__init__()
        check_sizes(in_chans=in_chans)
        check_range(0, math.inf, num_classes=num_classes)
        check_range(0, 1, drop_rate=drop_rate)
        check_choice("global_pool", global_pool, POOLS)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.embed_dim = widths[0]
        self.num_features = self.head_hidden_size = widths[-1]
        self.global_pool = global_pool
        self.grad_checkpointing = False
        self.patch_embed = patch_embed
        setattr(self, self.stages_name, nn.ModuleList(layers))
        self.feature_info = [
            {"module": f"{self.stages_name}.{stage}.blocks", "num_chs": width, "reduction": STRIDE * 2**stage}
            for stage, width in enumerate(widths)
        ]
        for name in (self.norm_name, self.head_name):
            if "." in name:
                self.add_module(name.partition(".")[0], nn.ModuleDict())
        self.set_submodule(self.norm_name, norm)
        self.head_drop = nn.Dropout(drop_rate)
        self.set_submodule(self.head_name, self._new_head(**dd))

    @property
    def stages(self) -> nn.ModuleList:
        return cast("nn.ModuleList", getattr(self, self.stages_name))

    def _new_head(self, **dd: Any) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        return nn.Linear(self.num_features, self.num_classes, **dd)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Fill every parameter and buffer anew.

        Linear layers are N(0, 0.02²), cut at ±2, with biases of 0, as the references have them; what makes step sizes
        (`dt_proj`) and everything else in mixers starts by their own rules, convolutions and norms by torch's."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.LayerNorm | LayerScale2d):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, Stack):
                module.init_weights()
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not name.endswith("dt_proj"):
                _init_linear(module)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay should leave alone."""
        return {
            f"{name}.{parameter}"
            for name, module in self.named_modules()
            if isinstance(module, Stack)
            for parameter in module.no_weight_decay()
        }

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that sort parameters by depth, for layer-wise learning rates."""
        stage = rf"^{self.stages_name}\.(\d+)"
        last = (rf"^{re.escape(self.norm_name)}\.", (99999,))
        fine = [(rf"{stage}\.downsample", (0,)), (rf"{stage}\.blocks\.(\d+)", None), last]
        return {"stem": r"^patch_embed", "blocks": stage if coarse else fine}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable
        for stage in self.stages:
            cast("Any", stage).set_grad_checkpointing(enable)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The linear layer behind the pooling."""
        return self.get_submodule(self.head_name)

    @torch.jit.ignore
    @check_arguments
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head with the device, dtype and mode of the model, none for 0 classes. Pooling stays if absent."""
        dd = get_device_dtype(self)
        check_range(0, math.inf, num_classes=num_classes)
        if global_pool is not None:
            check_choice("global_pool", global_pool, POOLS)
            self.global_pool = global_pool
        self.num_classes = num_classes
        head = self._new_head(**dd).train(self.training)
        if isinstance(head, nn.Linear):
            _init_linear(head)
        self.set_submodule(self.head_name, head)

    @torch.jit.ignore
    @check_arguments
    def set_input_size(self, img_size: Sides | None = None) -> None:
        """Write another image size down; every size runs without it.

        Raises:
            ValueError: if it is less than 4 × 4 pixels.
        """
        if img_size is not None:
            self.patch_embed.set_input_size(img_size)
        update_model_input_size(self, self.patch_embed.img_size)

    def forward_features(self, x: Tensor) -> Tensor:
        """Image `[B, C, H, W]` to the normed map of the last stage, `[B, D, h, w]`."""
        x = self.patch_embed(check_images(x, self.patch_embed.patch_size, self.in_chans))
        return self._norm(self._run(x))

    def _run(self, x: Tensor) -> Tensor:
        for stage in self.layers:
            x = stage(x)
        return x

    def _norm(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        return y

    def _classify(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x)
        return logits

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
        """Maps of chosen stages, ahead of their down-sampling.

        Args:
            x: image `[B, C, H, W]`.
            indices: which stages; an int is the last so many, None is all.
            norm: apply the final norm to the map of the last stage, whose width it has.
            stop_early: leave out the stages after the last of them.
            output_fmt: `"NCHW"`.
            intermediates_only: return them alone, else `(forward_features(x), them)`.

        Raises:
            ValueError: if `output_fmt` is another.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW' (got {output_fmt!r}); permute the maps for another")
        taken, last = check_indices(len(self.stages), indices, "stages")
        x = self.patch_embed(check_images(x, self.patch_embed.patch_size, self.in_chans))
        stages = list(self.stages)
        intermediates = []
        for i, stage in enumerate(stages[: last + 1] if stop_early else stages):
            y = cast("Any", stage).features(x)
            x = cast("Any", stage).downsample(y)
            if i in taken:
                intermediates.append(self._norm(y) if norm and i == len(stages) - 1 else y)
        if intermediates_only:
            return intermediates
        return self._norm(x) if not stop_early or last == len(stages) - 1 else x, intermediates

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what intermediates at `indices` do not need; returns the indices kept.

        The norm goes with the last stage, whose width it has."""
        taken, last = check_indices(len(self.stages), indices, "stages")
        if last < len(self.stages) - 1:
            del self.stages[last + 1 :]
            cast("Any", self.stages[last]).downsample = nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
            prune_norm = True
        if prune_norm:
            self.set_submodule(self.norm_name, nn.Identity())
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map `[B, D, h, w]` to logits `[B, K]`, or to what the classifier reads; without pooling, maps of both."""
        if self.global_pool == "avg":
            x = self.head_drop(x.mean([2, 3]))
            return x if pre_logits else self._classify(x)
        x = self.head_drop(x)
        return x if pre_logits else self._classify(x.movedim(1, -1)).movedim(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _init_linear(layer: nn.Linear) -> None:
    trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
