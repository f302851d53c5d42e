"""Backbones of one width and one resolution: patches, positions, a class token where there is one, blocks, a head.

What families share: where the class token stands, in what order blocks visit the patches, pictures of several sizes in
one row, timm's whole interface, and checkpoints for another size. A family says its blocks, the names of its parts, and
how its weights start.

Shapes: B batch, M patches, D width, L tokens: the patches and, where there is one, the class token.
"""

# Annotations stay objects: FX copies that of `forward` into its graphs, and TorchScript cannot read a string there.
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from timm.layers import get_device_dtype, lecun_normal_, register_notrace_function, trunc_normal_
from timm.models._input import update_model_args, update_model_input_size
from torch import Tensor, nn

from sinuous.core import norms, patches
from sinuous.core.checks import check_arguments, check_choice, check_indices, check_range, check_sizes, described
from sinuous.core.mixers import mixer_class
from sinuous.core.patches import (  # some by their bare names: FX looks for its leaves among a module's own
    CLASS_TOKENS,
    PatchEmbed,
    Sides,
    check_images,
    class_row,
    fit_pos_embed,
    grid_sides,
    with_class_token,
    without_class_token,
)
from sinuous.core.scan_routes import check_route, row_order
from sinuous.core.stack import Stack

POOLS = ("token", "avg", "")


class Isotropic(nn.Module):
    """A backbone of one width, as a family fills it in.

    Args:
        img_size: height and width in pixels, or one number for both; three sides for clips `[B, C, T, H, W]`, in
            families that read them.
        patch_size: sides of a patch.
        stride: distance of patches; the patch size if absent.
        in_chans: channels of the image.
        num_classes: outputs of the head; 0 for features.
        global_pool: what the head reads, one of the class's `pools`; `None` is `default_pool`, where there is one, else
            `"token"`, or `"avg"` where there is no class token.
        class_token: its place in the row of patches, one of `CLASS_TOKENS`; `None` is `default_class_token`, or
            `"none"` for mixers that read the patches as a grid, which has no cell for it.
        embed_dim: D, width of the residual stream.
        depth: number of blocks.
        pos_embed: learned positions, added to the tokens.
        mixer: any registered mixer. Without a class token, it is told the grid.
        mixer_options: keyword arguments of the mixer; or a list of such, taken in turn by the blocks.
        route: the order in which mixers visit the patches, a name of `list_routes()`, or several, taken in turn by the
            blocks. Tokens stay in raster order outside of the blocks, and the class token keeps its place in every
            order. Mixers that read a grid visit it in their own order, whatever the route.
        drop_rate: dropout after the position embedding.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        dynamic_img_size: accept images of every size; position embeddings are then resampled in each call. Without
            position embeddings every size is accepted anyhow.
        stack: further options of the `Stack`.
        norm: makes the last norm of a width.

    Raises:
        ValueError: if an image is smaller than a patch, `global_pool`, `class_token`, `mixer` or `route` is unknown, a
            mixer that reads a grid is given a class token, or there is none for `global_pool` to read.
        TypeError: if the mixer has no such option.
    """

    output_fmt = "NLC"
    blocks_name: ClassVar[str] = "layers"
    """Attribute that holds the stack, and with `norm_name` part of the names of parameters. A family with names of its
    own replaces `_mix` and `_norm` too, which TorchScript compiles."""
    norm_name: ClassVar[str] = "norm"
    pools: ClassVar[tuple[str, ...]] = POOLS
    default_pool: ClassVar[str | None] = None
    default_class_token: ClassVar[str] = "none"
    reads_clips: ClassVar[bool] = False
    """Three sides in `img_size` or `patch_size` make a model of clips."""
    embeds_class_token: ClassVar[bool] = True
    """The class token has a row among the position embeddings."""

    def __init__(
        self,
        img_size: Sides,
        patch_size: Sides,
        stride: Sides | None,
        in_chans: int,
        num_classes: int,
        global_pool: str | None,
        class_token: str | None,
        embed_dim: int,
        depth: int,
        pos_embed: bool,
        mixer: str,
        mixer_options: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        route: str | Sequence[str],
        drop_rate: float,
        drop_path_rate: float,
        dynamic_img_size: bool,
        stack: Mapping[str, Any],
        norm: Callable[..., nn.Module],
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_sizes(in_chans=in_chans, embed_dim=embed_dim, depth=depth)
        check_range(0, math.inf, num_classes=num_classes)
        check_range(0, 1, drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        self.class_token = self._class_token(class_token, mixer)
        self.num_prefix_tokens = 1 if self.class_token == "head" else 0
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.embed_dim = embed_dim
        self.global_pool = self._pool(global_pool)
        self.head_hidden_size = self._pooled_width()
        self.dynamic_img_size = dynamic_img_size

        self.patch_embed = PatchEmbed(
            img_size, patch_size, stride, in_chans, embed_dim, self._axes(img_size, patch_size), **dd
        )
        if self.patch_embed.axes != 2:
            self._traits = {"fixed_input_size": False}  # timm's sizes are those of pictures; clips have theirs from us
        self.routes = _routes(route, mixer, self.patch_embed.axes)
        self.has_routes = any(name != "raster" for name in self.routes)
        has_token = self.class_token != "none"
        self.pos_class_token = self.class_token if self.embeds_class_token else "none"
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd)) if has_token else None
        rows = math.prod(self._pos_grid()) + int(self.pos_class_token != "none")
        self.pos_embed = nn.Parameter(torch.empty(1, rows, embed_dim, **dd)) if pos_embed else None
        self.any_size = dynamic_img_size or not pos_embed
        self.pos_drop = nn.Dropout(drop_rate)
        by_place = [mixer_options] if isinstance(mixer_options, Mapping) else list(mixer_options)
        pattern = (mixer,) * len(by_place)
        blocks = Stack(embed_dim, depth, pattern, by_place, drop_path_rate=drop_path_rate, **{**stack, **dd})
        setattr(self, self.blocks_name, blocks)
        self.feature_info = [
            {"module": f"{self.blocks_name}.{i}", "num_chs": embed_dim, "reduction": max(self.patch_embed.stride[-2:])}
            for i in range(depth)
        ]
        setattr(self, self.norm_name, norm(embed_dim, **dd))
        self.head = self._new_head(**dd)

    @property
    def stack(self) -> Stack:
        return cast("Stack", getattr(self, self.blocks_name))

    __jit_unused_properties__: ClassVar[list[str]] = ["stack"]

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Fill every parameter anew: patches as LeCun, positions and head truncated normal of 0.02, blocks by their own
        rules."""
        nn.init.zeros_(cast("Tensor", self.patch_embed.proj.bias))
        self._init_tokens()
        self.stack.init_weights()
        norm = getattr(self, self.norm_name)
        if not isinstance(norm, nn.Identity):
            norm.reset_parameters()
        self._init_head()

    def _init_tokens(self) -> None:
        lecun_normal_(self.patch_embed.proj.weight)
        for parameter in (self.cls_token, self.pos_embed):
            if parameter is not None:
                trunc_normal_(parameter, std=0.02)

    def _new_head(self, **dd: Any) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        return nn.Linear(self.head_hidden_size, self.num_classes, **dd)

    def _init_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        own = {name for name in ("cls_token", "pos_embed") if getattr(self, name) is not None}
        return own | {f"{self.blocks_name}.{name}" for name in self.stack.no_weight_decay()}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": [(rf"^{self.blocks_name}\.(\d+)", None), (rf"^{self.norm_name}", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.stack.set_grad_checkpointing(enable)

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
            self.global_pool = self._pool(global_pool)
            self.head_hidden_size = self._pooled_width()
        self.num_classes = num_classes
        self.head = self._new_head(**dd)
        self.head.train(self.training)
        self._init_head()

    @torch.jit.ignore
    @check_arguments
    def set_input_size(self, img_size: Sides | None = None, patch_size: Sides | None = None) -> None:
        """Another image size or patch size: position embeddings and patch kernel are resampled.

        Raises:
            ValueError: if images are smaller than patches.
        """
        embed = self.patch_embed
        old_grid = self._pos_grid()
        embed.set_input_size(img_size, patch_size)
        if self._pos_grid() != old_grid and self.pos_embed is not None:
            resized = patches.resize_pos_embed(
                self.pos_embed.detach(), old_grid, self._pos_grid(), self.pos_class_token
            )
            self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)
        for info in self.feature_info:
            info["reduction"] = max(embed.stride[-2:])
        sizes = {"patch_size": embed.patch_size}
        if embed.stride != embed.patch_size or "stride" in getattr(self, "_model_args", {}):
            sizes["stride"] = embed.stride
        if embed.axes == 2:
            update_model_input_size(self, embed.img_size, **sizes)
        else:
            update_model_args(self, img_size=embed.img_size, **sizes)

    @torch.jit.ignore
    def _pos_grid(self) -> list[int]:
        """Sides of the grid whose cells have a row among the position embeddings."""
        return [int(side) for side in self.patch_embed.grid_size]

    def _grid(self, x: Tensor) -> list[int]:
        """Sides of a map `[B, D, …]` of patches, constants where the model has one size."""
        if self.any_size:
            grid: list[int] = grid_sides(x)
            return grid
        return [int(side) for side in self.patch_embed.grid_size]

    def _checked(self, x: Tensor) -> Tensor:
        """`x`, or a ValueError where it is no batch that the model takes."""
        checked: Tensor = check_images(x, self.patch_embed.patch_size, self.in_chans)
        return checked

    def _positions(self, x: Tensor) -> Tensor | None:
        """What is added to the tokens of a map `[B, D, …]` of patches."""
        pos_embed = self.pos_embed
        if pos_embed is not None:
            pos_embed = fit_pos_embed(
                pos_embed, self.patch_embed.grid_size, grid_sides(x), self.any_size, self.pos_class_token
            )
        return pos_embed

    def _embed(self, x: Tensor) -> tuple[Tensor, list[int]]:
        """Image `[B, C, H, W]` to the residual stream `[B, L, D]`, in fp32 at least, and the grid of its patches."""
        x = self.patch_embed(self._checked(x))
        grid, pos_embed = self._grid(x), self._positions(x)
        x = x.flatten(2).transpose(1, 2)
        if pos_embed is not None and self.pos_class_token == "none":
            x = x + pos_embed
        if self.cls_token is not None:
            x = with_class_token(x, self.cls_token.expand(x.shape[0], -1, -1), self.class_token)
        if pos_embed is not None and self.pos_class_token != "none":
            x = x + pos_embed
        return self._placed(norms.at_least_fp32(self.pos_drop(x)), grid), grid

    def _placed(self, x: Tensor, grid: list[int]) -> Tensor:
        """The stream ahead of the blocks, where a family has positions of its own to add."""
        return x

    def _mix(self, x: Tensor, grid: list[int] | None, orders: list[Tensor] | None) -> Tensor:
        stream: Tensor = self.layers(x, None, grid, orders)  # type: ignore[operator]
        return stream

    def _norm(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x)  # type: ignore[operator]
        return normed

    def _finish(self, x: Tensor) -> Tensor:
        return self._norm(x).to(self.patch_embed.proj.weight.dtype)

    def _orders(self, x: Tensor, grid: list[int]) -> list[Tensor] | None:
        if self.has_routes:
            return self._route_orders(x, grid)
        return None

    @torch.jit.unused
    def _route_orders(self, x: Tensor, grid: list[int]) -> list[Tensor]:
        orders: list[Tensor] = route_orders(x, self.routes, grid, self.class_token)
        return orders

    def _features(self, x: Tensor) -> tuple[Tensor, list[int]]:
        x, grid = self._embed(x)
        orders = self._orders(x, grid)
        return self._finish(self._mix(x, grid if self.cls_token is None else None, orders)), grid

    def forward_features(self, x: Tensor) -> Tensor:
        """Image `[B, C, H, W]` to tokens `[B, L, D]`, the class token, if there is one, among them."""
        return self._features(x)[0]

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
        taken, _ = check_indices(len(self.stack), indices)
        x, grid = self._embed(x)
        orders = self._orders(x, grid)
        x, taps = self.stack.forward_intermediates(
            x, None, grid if self.cls_token is None else None, orders, taps=taken, stop_early=stop_early
        )
        intermediates = []
        for tap in taps:
            tap = self._finish(tap) if norm else tap.to(self.patch_embed.proj.weight.dtype)
            tap = without_class_token(tap, self.class_token)
            intermediates.append(tap.mT.unflatten(2, tuple(grid)) if output_fmt == "NCHW" else tap)
        return intermediates if intermediates_only else (self._finish(x), intermediates)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what intermediates at `indices` do not need; returns the indices kept."""
        taken, last = check_indices(len(self.stack), indices)
        del self.stack[last + 1 :]
        if prune_norm:
            setattr(self, self.norm_name, nn.Identity())
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    @torch.jit.ignore
    def forward_packed(self, images: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Pictures of different sizes in one row, without padding: the outputs of the separate calls.

        Args:
            images: `[C, H, W]` each. Sizes may differ where the model takes every size (`dynamic_img_size=True` or
                `pos_embed=False`).

        Returns:
            `[pictures, num_classes]`, or a list of tokens where `global_pool` is `""`.

        Raises:
            ValueError: if the mixer reads a grid, or a picture is not as the model takes it.
        """
        if any(block.mixer.reads_grid for block in cast("Any", self.stack)):
            name = self.stack.pattern[0]
            raise ValueError(
                f"mixer {name!r} reads the patches of a picture as a grid, and pictures in one row have none; call the "
                "model for each size, or build it with a mixer that reads a row"
            )
        if isinstance(images, Tensor) or not all(isinstance(image, Tensor) for image in images):
            raise ValueError(f"images must be a list of tensors [C, H, W] (got {described(images)}); use list(images)")
        if not images:
            nothing: Tensor = self.head(self.patch_embed.proj.weight.new_empty(0, self.head_hidden_size))
            return nothing
        embedded = [self._embed(image.unsqueeze(0)) for image in images]
        lengths = [stream.shape[1] for stream, _ in embedded]
        x = torch.cat([stream for stream, _ in embedded], 1)
        bounds = torch.tensor([0, *lengths], device=x.device).cumsum(0).to(torch.int32)
        orders = None
        if self.has_routes:
            alone = [self._route_orders(x, grid) for _, grid in embedded]
            orders = [
                torch.cat([order + start for order, start in zip(rows, bounds.tolist(), strict=False)], 1)
                for rows in zip(*alone, strict=True)
            ]
        tokens = self._finish(self.stack(x, bounds, None, orders)).split(lengths, 1)
        outputs = [self.forward_head(t, False, grid) for t, (_, grid) in zip(tokens, embedded, strict=True)]
        return torch.cat(outputs) if self.global_pool else outputs

    def forward_head(self, x: Tensor, pre_logits: bool = False, grid: list[int] | None = None) -> Tensor:
        """Tokens `[B, L, D]` to logits, or to what the classifier reads.

        Args:
            x: as from `forward_features`.
            pre_logits: leave the classifier out.
            grid: of the patches, for a pooling that looks for places in it; that of `img_size` if absent.
        """
        x = self._pooled(x, [int(side) for side in self.patch_embed.grid_size] if grid is None else grid)
        return x if pre_logits else self.head(x)

    def _pooled(self, x: Tensor, grid: list[int]) -> Tensor:
        if self.global_pool == "token":
            return x[:, class_row(x.shape[1] - 1, self.class_token)]
        if self.global_pool == "avg":
            return without_class_token(x, self.class_token).mean(1)
        return x

    def forward(self, x: Tensor) -> Tensor:
        x, grid = self._features(x)
        return self.forward_head(x, False, grid)

    def _axes(self, *sizes: Sides) -> int:
        return 3 if self.reads_clips and any(not isinstance(size, int) and len(size) == 3 for size in sizes) else 2

    def _pooled_width(self) -> int:
        """Width of what the classifier reads."""
        return self.embed_dim

    def _class_token(self, class_token: str | None, mixer: str) -> str:
        reads_grid = mixer_class(mixer).reads_grid
        if class_token is None:
            return "none" if reads_grid else self.default_class_token
        check_choice("class_token", class_token, CLASS_TOKENS)
        if reads_grid and class_token != "none":
            raise ValueError(
                f"class_token must be 'none' for mixer {mixer!r}, which reads the patches as a grid without a cell for "
                f"it (got {class_token!r}); leave it out, or choose a mixer that reads a row"
            )
        return class_token

    def _pool(self, global_pool: str | None) -> str:
        if global_pool is None:
            return self.default_pool or ("avg" if self.class_token == "none" else "token")
        check_choice("global_pool", global_pool, self.pools)
        if global_pool == "token" and self.class_token == "none":
            raise ValueError("global_pool='token' reads the class token and the model has none; use 'avg' or ''")
        return global_pool


@register_notrace_function
def route_orders(x: Tensor, routes: Sequence[str], grid: list[int], class_token: str) -> list[Tensor]:
    """Orders of the tokens of a picture for a `Stack`, one for each route."""
    height, width = grid
    row = -1 if class_token == "none" else class_row(height * width, class_token)
    return [row_order(route, height, width, row).to(x.device) for route in routes]


def _routes(route: str | Sequence[str], mixer: str, axes: int) -> tuple[str, ...]:
    routes = (route,) if isinstance(route, str) else tuple(route)
    if not routes:
        raise ValueError("route must name at least one order (got none); leave it out for rows of patches")
    for name in routes:
        check_route(name)
    if any(name != "raster" for name in routes):
        if axes != 2:
            raise ValueError(f"route is for pictures, of two axes (got {described(route)} for {axes}); leave it out")
        if mixer_class(mixer).reads_grid:
            warnings.warn(f"mixer {mixer!r} reads a grid in its own order; route {routes} has no effect", stacklevel=4)
            return ("raster",)
    return routes
