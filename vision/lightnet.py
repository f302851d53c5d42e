"""LightNet: every patch sees all others through one softmax over the patches, in time linear in their number.

    x ← x + MDTPE(x)                                                ahead of the first layer
    x ← x + lightnet_noncausal(RMSNorm(x));   x ← x + SwiGLU(RMSNorm(x))

There is no order in which patches are visited. Where they are is known from two kinds of positions: MD-TPE, sums along
each axis of the grid, and MD-LRPE, phases of queries and keys in every layer. Grids have one to three axes: with three
numbers in `img_size` and `patch_size`, a model reads clips `[B, C, T, H, W]`.

Paper: Qin, Mao, Shen, Li, Li, Sun, Dai and Zhong, "You Only Scan Once: Efficient Multi-dimension Sequential Modeling
with LightNet" (arXiv 2405.21022). The paper's sizes and weights for pictures are not public: widths, depths and heads
here are DeiT's and the names are ours.

Shapes: B batch, T patches, D width.
"""

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from sinuous.core import checks, norms
from sinuous.core.building import create
from sinuous.core.checkpoints import unwrapped
from sinuous.core.checks import check_arguments, check_sizes
from sinuous.core.isotropic import Isotropic
from sinuous.core.isotropic_checkpoints import fit_checkpoint
from sinuous.core.mixers.heads import per_head
from sinuous.core.ops.operators import operators
from sinuous.core.patches import Sides
from sinuous.core.registry import register_vision_model
from sinuous.vision.registration import family_cfgs

__all__ = ["MDTPE", "LightNet", "checkpoint_filter_fn"]

SIZES: dict[str, dict[str, Any]] = {
    "lightnet_tiny_patch16_224": {"embed_dim": 192, "num_heads": 3},
    "lightnet_small_patch16_224": {"embed_dim": 384, "num_heads": 6},
    "lightnet_base_patch16_224": {"embed_dim": 768, "num_heads": 12},
    "lightnet_nano": {
        "img_size": 28,
        "patch_size": 4,
        "in_chans": 1,
        "num_classes": 10,
        "embed_dim": 64,
        "depth": 6,
        "num_heads": 4,
    },
    "test_lightnet": {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2},
}


@torch.fx.wrap
def decaying_sums(x: Tensor, decay: Tensor, grid: list[int], axis: int) -> Tensor:
    """Sums y_n = x_n + λ y_{n-1} along one axis of a grid; x `[B, T, D]`, λ `[D]`."""
    after = 1
    for side in grid[axis + 1 :]:
        after = after * side
    rows = x.unflatten(1, [x.shape[1] // max(grid[axis] * after, 1), grid[axis], after]).transpose(2, 3)
    y = operators.linear_scan(rows.flatten(0, 2), decay)[0]
    return y.view(rows.shape).transpose(2, 3).flatten(1, 3)


class AxisTPE(nn.Module):
    """LightNet's additive positions along one axis: `Linear(norm((q_h · k_h) Σ_{j ≤ n} λ_h^{n-j} x_j))`, head by head.

    The norm is an RMS norm of each head.
    """

    def __init__(self, dim: int, num_heads: int, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.heads = [num_heads, dim // num_heads]
        self.q, self.k = (nn.Parameter(torch.empty(dim, **dd)) for _ in range(2))
        self.decay = nn.Parameter(torch.empty(num_heads, **dd))
        self.norm = norms.MultiHeadRMSNorm(num_heads, dim // num_heads, **dd)
        self.proj = nn.Linear(dim, dim, bias=False, **dd)

    def init_weights(self) -> None:
        """Gains of 1, and sums that reach over 2 to 50 cells, head by head."""
        for vector in (self.q, self.k):
            nn.init.constant_(vector, self.heads[1] ** -0.5)
        with torch.no_grad():
            self.decay.copy_(torch.linspace(0, 4, self.heads[0]) if self.heads[0] > 1 else torch.full((1,), 2.0))
        self.norm.reset_parameters()
        self.proj.reset_parameters()

    def forward(self, x: Tensor, grid: list[int], axis: int) -> Tensor:
        x = norms.at_least_fp32(x)
        decay = torch.sigmoid(self.decay.to(x.dtype)).repeat_interleave(self.heads[1])
        gain = (self.q * self.k).unflatten(0, self.heads).sum(1, keepdim=True)
        sums = decaying_sums(x, decay, grid, axis).unflatten(2, self.heads)
        normed: Tensor = self.norm(gain * sums).flatten(2).to(self.proj.weight.dtype)
        y: Tensor = self.proj(normed)
        return y


class MDTPE(nn.Module):
    r"""LightNet's additive positions, MD-TPE: decaying sums of the embedding along each axis of a grid.

        y = Σ_s Linear_s(norm_s(u_s)),    u_{s,n} = (q_s · k_s) Σ_{j ≤ n_s} λ_s^{n_s - j} x_{n_1 … j … n_m}

    Each axis s has vectors q and k, decays λ = σ(parameter) and an RMS norm, all head by head, and a linear layer. The
    backbone adds y to x.

    Args:
        dim: D.
        num_heads: H.
        axes: m, of the grid.

    Raises:
        ValueError: if `dim` is no multiple of `num_heads`, or there is no axis.

    Source: LightNet (arXiv 2405.21022), its MD-TPE.
    """

    @check_arguments
    def __init__(
        self, dim: int, num_heads: int, axes: int = 2, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        check_sizes(dim=dim, num_heads=num_heads, axes=axes)
        per_head(dim, num_heads, "dim")
        self.axes = nn.ModuleList(AxisTPE(dim, num_heads, device, dtype) for _ in range(axes))
        self.init_weights()

    def init_weights(self) -> None:
        for axis in self.axes:
            cast("AxisTPE", axis).init_weights()

    def forward(self, x: Tensor, grid: list[int]) -> Tensor:
        """Positions `[B, T, D]` of tokens x `[B, T, D]`, the cells of a grid, its last axis fastest.

        Raises:
            ValueError: if the grid has another number of axes, or of cells than there are tokens.
        """
        checks.check_grid(grid, x.shape[1], None, axes=len(self.axes))
        parts: list[Tensor] = []
        for i, axis in enumerate(self.axes):
            parts.append(axis(x, grid, i))
        y = parts[0]
        for part in parts[1:]:
            y = y + part
        return y


class LightNet(Isotropic):
    """LightNet.

    Args:
        img_size: height and width in pixels, or one number for both; with three numbers, frames, height and width of
            clips.
        patch_size: sides of a patch, of as many axes.
        in_chans: channels of the image.
        num_classes: outputs of the head; 0 for features.
        global_pool: what the head reads: `"avg"` the mean over patches, `""` everything.
        embed_dim: D, width of the residual stream.
        depth: number of layers.
        pos_embed: learned positions, added to the tokens ahead of MD-TPE.
        num_heads: H of MD-TPE, and of the mixers that have them; one for 64 channels, and the mixer's own, if absent.
        mlp_ratio: width of the MLPs over D, rounded up to a multiple of 64.
        mixer: `"lightnet_noncausal"`, or any other registered mixer; a causal one gets a twin that runs from the end.
            Mixers are told the grid.
        mixer_options: further keyword arguments of the mixer, such as `theta=100.0`.
        route: the order in which mixers that read a row visit the patches, a name of `list_routes()`, or several, taken
            in turn by the layers.
        drop_rate: dropout after the position embedding.
        drop_path_rate: stochastic depth of the last layer, rising linearly from 0 at the first.
        dynamic_img_size: accept images of every size; position embeddings are then resampled in each call.

    Raises:
        ValueError: if an image is smaller than a patch, `global_pool`, `mixer` or `route` is unknown, or `embed_dim` is
            no multiple of the heads.
        TypeError: if the mixer has no such option.
    """

    pools: ClassVar[tuple[str, ...]] = ("avg", "")
    reads_clips: ClassVar[bool] = True

    @check_arguments
    def __init__(
        self,
        img_size: Sides = 224,
        patch_size: Sides = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = "avg",
        embed_dim: int = 192,
        depth: int = 12,
        pos_embed: bool = True,
        num_heads: int | None = None,
        mlp_ratio: float = 8 / 3,
        mixer: str = "lightnet_noncausal",
        mixer_options: dict[str, Any] | None = None,
        route: str | list[str] = "raster",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options: dict[str, Any] = {} if num_heads is None else {"num_heads": num_heads}
        if mixer == "lightnet_noncausal" and num_heads is not None:
            options["expand_ratio"] = None  # K = V
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            stride=None,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            class_token="none",
            embed_dim=embed_dim,
            depth=depth,
            pos_embed=pos_embed,
            mixer=mixer,
            mixer_options={**options, **(mixer_options or {})},
            route=route,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            dynamic_img_size=dynamic_img_size,
            stack={"causal": False, "mlp": "swiglu", "mlp_ratio": mlp_ratio, "mlp_multiple_of": 64},
            norm=norms.RMSNorm,
            device=device,
            dtype=dtype,
        )
        heads = max(1, embed_dim // 64) if num_heads is None else num_heads
        self.mdtpe = MDTPE(embed_dim, heads, self.patch_embed.axes, device=device, dtype=dtype)
        self.init_weights()

    def _init_tokens(self) -> None:
        super()._init_tokens()
        self.mdtpe.init_weights()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        vectors = {f"mdtpe.{name}" for name, parameter in self.mdtpe.named_parameters() if "proj" not in name}
        inherited: set[str] = super().no_weight_decay()
        return inherited | vectors

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {**super().group_matcher(coarse), "stem": r"^mdtpe|^pos_embed|^patch_embed"}

    def _placed(self, x: Tensor, grid: list[int]) -> Tensor:
        placed: Tensor = x + self.mdtpe(x, grid)
        return placed


def checkpoint_filter_fn(state_dict: dict[str, Any], model: LightNet) -> dict[str, Tensor]:
    """Checkpoints of ours as `model` needs them: unwrapped and resampled to its grid and patch.

    Raises:
        ValueError: if the weights are of another model, or if their grid cannot be told from their number.
    """
    state = unwrapped(state_dict)
    fit_checkpoint(state, model)
    return state


default_cfgs = family_cfgs(
    SIZES,
    first_conv="patch_embed.proj",
    paper_name="You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet",
    paper_ids="arXiv:2405.21022",
    origin_url="https://github.com/OpenNLPLab/LightNet",
)


def _create_lightnet(variant: str, pretrained: bool = False, **kwargs: Any) -> LightNet:
    sizes = dict(SIZES[variant])
    if kwargs.get("mixer", "lightnet_noncausal") != "lightnet_noncausal":
        del sizes["num_heads"]
    sizes = {"depth": 12, **sizes, **kwargs}
    return create(LightNet, variant, pretrained, checkpoint_filter_fn, sizes)


@register_vision_model
def lightnet_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> LightNet:
    """LightNet in the size of DeiT-Ti; the size is ours."""
    return _create_lightnet("lightnet_tiny_patch16_224", pretrained, **kwargs)


@register_vision_model
def lightnet_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> LightNet:
    """LightNet in the size of DeiT-S; the size is ours."""
    return _create_lightnet("lightnet_small_patch16_224", pretrained, **kwargs)


@register_vision_model
def lightnet_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> LightNet:
    """LightNet in the size of DeiT-B; the size is ours."""
    return _create_lightnet("lightnet_base_patch16_224", pretrained, **kwargs)


@register_vision_model
def lightnet_nano(pretrained: bool = False, **kwargs: Any) -> LightNet:
    """For images of 28 to 64 pixels, small enough to train on a laptop's CPU; ours, not the paper's."""
    return _create_lightnet("lightnet_nano", pretrained, **kwargs)


@register_vision_model
def test_lightnet(pretrained: bool = False, **kwargs: Any) -> LightNet:  # noqa: PT028
    """For tests: every mechanism at the smallest size."""
    return _create_lightnet("test_lightnet", pretrained, **kwargs)
