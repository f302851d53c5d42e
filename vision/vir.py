"""ViR: a vision transformer with retention for attention, which reads a picture as a row of patches.

    x ← x + ls1(retention(norm1(x)));   x ← x + ls2(mlp(norm2(x)))

Retention is causal. The class token therefore stands at the tail, where it sees all patches, and a picture can be read
in strips of rows, with a state whose size depends neither on the picture nor on how much of it was read:

    state = model.initial_state(batch_size)
    for strip in strips:                                    # [B, C, k · patch, W], any k
        logits, state = model.prefill(strip, state)         # the answer to the rows so far; at last that to the picture

Paper: Hatamizadeh, Ranzinger, Lan, Alvarez, Fidler and Kautz, "ViR: Towards Efficient Vision Retention Backbones"
(arXiv 2310.19731). Reference: the code that its authors posted, https://github.com/anom63931/ViR. This is an
independent implementation; parameters have the reference's names, so that its files load as they are. There are no
published weights.

Shapes: B batch, C channels, M patches, D width, L tokens: the patches and, at their tail unless told otherwise, the
class token.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import trunc_normal_
from torch import Tensor, nn

from sinuous.core import norms, patches
from sinuous.core.blocks import ResidualBlock, Sharing
from sinuous.core.building import create
from sinuous.core.checkpoints import unwrapped
from sinuous.core.checks import check_arguments, check_range, described
from sinuous.core.isotropic import Isotropic
from sinuous.core.isotropic_checkpoints import fit_checkpoint
from sinuous.core.mixers import Mixer, mixer_class, register_state
from sinuous.core.mixers.calls import check_batch_size
from sinuous.core.mixers.vir import SMALLEST
from sinuous.core.patches import Sides
from sinuous.core.registry import register_vision_model
from sinuous.vision.registration import family_cfgs

__all__ = ["RowsState", "ViR", "ViRBlock", "checkpoint_filter_fn"]

RETENTIONS = ("vir_retention", "vir_retention_grid")

SIZES: dict[str, dict[str, Any]] = {
    "vir_small_patch16_224": {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6},
    "vir_base_patch16_224": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
    "vir_large_patch16_224": {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16},
    "vir_large_patch14_224": {"patch_size": 14, "embed_dim": 1024, "depth": 24, "num_heads": 16},
    "vir_nano": {
        "img_size": 28,
        "patch_size": 4,
        "in_chans": 1,
        "num_classes": 10,
        "embed_dim": 64,
        "depth": 6,
        "num_heads": 4,
        "mlp_ratio": 2.0,
        "init_values": 0.0,
    },
    "test_vir": {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2},
}


@register_state
class RowsState(NamedTuple):
    """What is carried from strip to strip of pictures.

    blocks: states of the mixers, first block first; rows: rows of patches that were read, int64 `[B]`; size: height and
    width of the whole pictures in pixels, int64 `[B, 2]`; total: sum of the tokens that the head averages, `[B, D]`.
    """

    blocks: tuple[Any, ...]
    rows: Tensor
    size: Tensor
    total: Tensor


class ViRBlock(ResidualBlock):
    """A `ResidualBlock` with ViR's names: `norm1`, `retention`, `ls1`, `norm2`, `mlp`, `ls2`."""

    norm_name: ClassVar[str] = "norm1"
    mixer_name: ClassVar[str] = "retention"
    __jit_unused_properties__: ClassVar[list[str]] = ["norm", "mixer"]

    @property
    def norm(self) -> nn.Module:  # type: ignore[override]
        return cast("nn.Module", self.norm1)

    @property
    def mixer(self) -> Mixer:  # type: ignore[override]
        return cast("Mixer", self.retention)

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        grid: list[int] | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        return self._after_mixer(x, self.retention(self._before_mixer(x), cu_seqlens, grid))  # type: ignore[operator]

    def _before_mixer(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm1(x)  # type: ignore[operator]
        return normed

    def init_weights(self) -> None:
        """Start the MLP as the reference does, N(0, 0.02²) cut at ±2, or by torch's rule in narrower models than the
        reference's, and the rest as other blocks do."""
        super().init_weights()
        for module in self.mlp.modules():
            if isinstance(module, nn.Linear) and min(module.weight.shape) >= SMALLEST:
                trunc_normal_(module.weight, std=0.02)


class SharingViRBlock(Sharing, ViRBlock):  # type: ignore[misc]
    """The `ViRBlock` of mixers that share."""


class ViR(Isotropic):
    """ViR's backbone.

    Args:
        img_size: height and width in pixels, or one number for both; any aspect.
        patch_size: side of a patch.
        stride: distance of patches; the patch size if absent.
        in_chans: channels of the image.
        num_classes: outputs of the head; 0 for features.
        global_pool: what the head reads: `"token"` the class token, `"avg"` the mean over patches, `""` everything.
            `None` is `"token"`, or `"avg"` where there is no class token.
        class_token: its place in the row of patches, `"middle"`, `"head"` or `"tail"`, or `"none"`. `None` is `"tail"`,
            or `"none"` for mixers that read the patches as a grid, which has no cell for it.
        embed_dim: D, width of the residual stream.
        depth: number of blocks.
        num_heads: heads of retention; one for each 64 channels if absent.
        mlp_ratio: width of the MLP over D.
        init_values: start of the learned scales of what mixers and MLPs add; `None` or 0 for no scales.
        pos_embed: learned positions, added to the patches; the class token has none.
        mode: how retention is computed, `"parallel"`, `"chunkwise"` or `"recurrent"`, with equal results; `None` is the
            quickest in time linear in the patches.
        softmax: the parallel mode of the posted code, with a softmax that lets every token see all others.
        mixer: `"vir_retention"`, or any other registered mixer, at `blocks.N.retention` too. Without a class token,
            mixers are told the grid.
        mixer_options: further keyword arguments of the mixer.
        route: the order in which mixers visit the patches, one or several in turn.
        drop_rate: dropout after the position embedding.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        dynamic_img_size: accept images of every size; position embeddings are then resampled in each call.

    Raises:
        ValueError: if an image is smaller than a patch, `global_pool`, `class_token`, `mode`, `route` or `mixer` is
            unknown, a mixer that reads a grid is given a class token, or there is none for `global_pool` to read.
        TypeError: if the mixer has no such option.
    """

    blocks_name: ClassVar[str] = "blocks"
    default_class_token: ClassVar[str] = "tail"
    embeds_class_token: ClassVar[bool] = False

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
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int | None = None,
        mlp_ratio: float = 4.0,
        init_values: float | None = 1e-5,
        pos_embed: bool = True,
        mode: str | None = None,
        softmax: bool = False,
        mixer: str = "vir_retention",
        mixer_options: dict[str, Any] | None = None,
        route: str | list[str] = "raster",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = {"num_heads": num_heads, "mode": mode, "softmax": softmax or None}
        options = {name: value for name, value in sizes.items() if value is not None}
        options.update(mixer_options or {})
        check_range(0, math.inf, init_values=init_values)
        stack = {
            "causal": mixer_class(mixer).causal,
            "mlp": "gelu",
            "mlp_ratio": mlp_ratio,
            "mlp_bias": True,
            "norm": "layer",
            "norm_eps": 1e-6,
            "init_values": init_values or None,
            "blocks": (ViRBlock, SharingViRBlock),
        }
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
            stack=stack,
            norm=lambda dim, **dd: norms.LayerNorm(dim, eps=1e-6, **dd),
            device=device,
            dtype=dtype,
        )
        self.init_weights()

    def _mix(self, x: Tensor, grid: list[int] | None, orders: list[Tensor] | None) -> Tensor:
        stream: Tensor = self.blocks(x, None, grid, orders)  # type: ignore[operator]
        return stream

    @torch.jit.ignore
    @check_arguments
    def initial_state(self, batch_size: int, img_size: Sides | None = None) -> RowsState:
        """What is known of pictures of which nothing was read.

        Args:
            batch_size: B.
            img_size: height and width of the whole pictures, which the last strip completes; the model's own if absent.
                Another one needs a model of any size (`dynamic_img_size=True` or `pos_embed=False`), whose positions
                are resampled for it in every call; `set_input_size` resamples them once.

        Raises:
            ValueError: if this model cannot read by rows, or pictures are not of the size that it is made for.
        """
        self._check_rows()
        check_batch_size(batch_size)
        embed = self.patch_embed
        size = embed.img_size if img_size is None else patches.sides("img_size", img_size, 2)
        grid = self._grid_of_pictures(size)
        if self.pos_embed is not None:
            patches.fit_pos_embed(self.pos_embed, list(embed.grid_size), grid, self.any_size, self.pos_class_token)
        weight = embed.proj.weight
        return RowsState(
            self.stack.initial_state(batch_size),
            torch.zeros(batch_size, dtype=torch.int64, device=weight.device),
            torch.tensor([size] * batch_size, dtype=torch.int64, device=weight.device).view(batch_size, 2),
            torch.zeros(batch_size, self.embed_dim, dtype=weight.dtype, device=weight.device),
        )

    @torch.jit.ignore
    def prefill(self, x: Tensor, state: RowsState | None = None) -> tuple[Tensor, RowsState]:
        """Read a strip of pictures, and answer for the rows read so far.

        Args:
            x: the next rows of pixels, `[B, C, k · patch, W]` with any k, across the whole width.
            state: after the strip before; `None` at the top of pictures of the model's own size.

        Returns:
            Logits `[B, num_classes]`, those of the whole pictures after the last strip, and the next state.

        Raises:
            ValueError: if this model cannot read by rows, or the strip is not the next one of these pictures.
        """
        self._check_rows()
        embed = self.patch_embed
        x = patches.check_images(x, embed.patch_size, self.in_chans)
        state = self.initial_state(x.shape[0]) if state is None else state
        if not isinstance(state, RowsState) or state.rows.shape[0] != x.shape[0]:
            kind = f"of {state.rows.shape[0]}" if isinstance(state, RowsState) else described(state)
            raise ValueError(
                f"state must be the state of the {x.shape[0]} pictures of this strip (got {kind}); "
                "give what initial_state or prefill returned for them"
            )
        size = state.size[0].tolist() if len(state.size) else list(embed.img_size)
        height, width = self._grid_of_pictures(size)
        strip = self._rows_of_strip(x, size, int(state.rows.max()) if len(state.rows) else 0)
        tokens = embed(x).flatten(2).transpose(1, 2)
        if self.pos_embed is not None:
            pos_embed = patches.fit_pos_embed(
                self.pos_embed, list(embed.grid_size), [height, width], self.any_size, self.pos_class_token
            )
            places = state.rows.unsqueeze(1) * width + torch.arange(strip * width, device=x.device)
            tokens = tokens + pos_embed[0, places]
        stream, blocks = self.stack.prefill(norms.at_least_fp32(self.pos_drop(tokens)), state.blocks)
        rows = state.rows + strip
        total = state.total + self._finish(stream).sum(1)
        if self.global_pool == "token":
            token = cast("Tensor", self.cls_token)[:, 0].expand(x.shape[0], -1)
            pooled = self._finish(self.stack.step(norms.at_least_fp32(self.pos_drop(token)), blocks)[0])
        else:
            pooled = total / (rows * width).unsqueeze(1).to(total.dtype)
        return self.head(pooled), RowsState(blocks, rows, state.size, total)

    def _grid_of_pictures(self, size: Sequence[int]) -> list[int]:
        patch = self.patch_embed.patch_size
        grid = patches.grid_of(size, patch, patch)
        if min(grid) < 1:
            raise ValueError(f"img_size must be at least patch_size {patch} (got {tuple(size)}); give larger pictures")
        return grid

    def _rows_of_strip(self, x: Tensor, size: Sequence[int], read: int) -> int:
        """Count the rows of patches of a strip, the next one after so many rows of pictures of this size."""
        patch, height, width = self.patch_embed.patch_size[0], x.shape[2], x.shape[3]
        if width != size[1]:
            raise ValueError(
                f"a strip must be as wide as the picture, {size[1]} pixels (got {width}); cut whole rows, or give the "
                "picture's size to initial_state"
            )
        if height % patch:
            raise ValueError(
                f"the height of a strip must be a multiple of the patch's, {patch} (got {height}); keep the rows that "
                "are left for the next strip"
            )
        left = size[0] // patch - read
        if height // patch > left:
            raise ValueError(
                f"a strip must have at most the {left * patch} rows of pixels that pictures {size[0]} high have left "
                f"in patches (got {height}); give the picture's size to initial_state, or begin anew"
            )
        return height // patch

    def _check_rows(self) -> None:
        """Refuse models whose answer depends on more than the rows so far."""
        why = None
        if any(getattr(block.mixer, "softmax", False) for block in cast("Any", self.stack)):
            why = "softmax must be False", "True", "lets every patch see all others"
        elif not self.stack.causal:
            why = "mixer must be causal", repr(self.stack.pattern[0]), "looks at rows to come"
        elif self.has_routes:
            why = "route must be 'raster'", " and ".join(map(repr, self.routes)), "visits patches in another order"
        elif self.patch_embed.stride != self.patch_embed.patch_size:
            why = "stride must be patch_size", f"{self.patch_embed.stride}", "makes patches reach into the next strip"
        elif self.class_token not in ("tail", "none"):
            why = "class_token must be 'tail' or 'none'", repr(self.class_token), "puts it ahead of rows to come"
        elif not self.global_pool:
            why = "global_pool must be 'token' or 'avg'", "''", "gives tokens and no answer"
        if why is not None:
            raise ValueError(f"{why[0]} for pictures read by rows (got {why[1]}, which {why[2]}); call the model")


def checkpoint_filter_fn(state_dict: dict[str, Any], model: ViR) -> dict[str, Tensor]:
    """The reference's files, or our own, as `model` needs them: unwrapped and resampled to its grid and patch.

    Raises:
        ValueError: if the weights are of another model or only one of the two has a class token, or if their grid
            cannot be told from their number.
    """
    state = unwrapped(state_dict)
    fit_checkpoint(state, model)
    return state


default_cfgs = family_cfgs(
    SIZES,
    crop_pct=0.9,
    mean=IMAGENET_INCEPTION_MEAN,
    std=IMAGENET_INCEPTION_STD,
    first_conv="patch_embed.proj",
    paper_name="ViR: Towards Efficient Vision Retention Backbones",
    paper_ids="arXiv:2310.19731",
    origin_url="https://github.com/NVlabs/ViR",
)


def _create_vir(variant: str, pretrained: bool = False, **kwargs: Any) -> ViR:
    sizes = dict(SIZES[variant])
    if kwargs.get("mixer", "vir_retention") not in RETENTIONS:
        del sizes["num_heads"]
    sizes.update(kwargs)
    return create(ViR, variant, pretrained, checkpoint_filter_fn, sizes)


@register_vision_model
def vir_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> ViR:
    """ViR-S/16."""
    return _create_vir("vir_small_patch16_224", pretrained, **kwargs)


@register_vision_model
def vir_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> ViR:
    """ViR-B/16."""
    return _create_vir("vir_base_patch16_224", pretrained, **kwargs)


@register_vision_model
def vir_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> ViR:
    """ViR-L/16."""
    return _create_vir("vir_large_patch16_224", pretrained, **kwargs)


@register_vision_model
def vir_large_patch14_224(pretrained: bool = False, **kwargs: Any) -> ViR:
    """ViR-L/14."""
    return _create_vir("vir_large_patch14_224", pretrained, **kwargs)


@register_vision_model
def vir_nano(pretrained: bool = False, **kwargs: Any) -> ViR:
    """For images of 28 to 64 pixels, small enough to train on a laptop's CPU; ours, not the paper's."""
    return _create_vir("vir_nano", pretrained, **kwargs)


@register_vision_model
def test_vir(pretrained: bool = False, **kwargs: Any) -> ViR:  # noqa: PT028
    """For tests: every mechanism at the smallest size."""
    return _create_vir("test_vir", pretrained, **kwargs)
