"""pLSTM-Vis: linear recurrences over the grid of patches from its four corners, where the classifier reads them too.

    x ← x + plstm_grid(RMSNorm(x));   x ← x + W2 gelu(W1 RMSNorm(x))      modes P and D in turn

Paper: Pöppel, Freinschlag, Schmied, Lin and Hochreiter, "pLSTM: parallelizable Linear Source Transition Mark networks"
(arXiv 2506.11997, NeurIPS 2025). Reference: https://github.com/ml-jku/plstm (MIT). This is an independent
implementation that reads the reference's state dictionaries. A super-block of theirs is two layers here. With
`stable=False` outputs are theirs; the mixer's page says what that keeps:

    model = sinuous.create_model("plstm_vis_tiny_patch16_224", stable=False, checkpoint_path="plstm_vis_t.pth")

Shapes: B batch, h × w patches, D width.
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from sinuous.core import norms
from sinuous.core.building import create
from sinuous.core.checkpoints import unwrapped
from sinuous.core.checks import check_arguments, check_choice
from sinuous.core.isotropic import Isotropic
from sinuous.core.isotropic_checkpoints import fit_checkpoint
from sinuous.core.mixers.plstm import CORNERS, small_
from sinuous.core.patches import Sides
from sinuous.core.registry import register_vision_model
from sinuous.vision.registration import PICO, family_cfgs

__all__ = ["PLSTMVis", "checkpoint_filter_fn"]

SIZES: dict[str, dict[str, Any]] = {
    "plstm_vis_tiny_patch16_224": {"embed_dim": 192, "num_heads": 3},
    "plstm_vis_small_patch16_224": {"embed_dim": 384, "num_heads": 6},
    "plstm_vis_base_patch16_224": {"embed_dim": 768, "num_heads": 12},
    "plstm_vis_nano": {
        "img_size": 28,
        "patch_size": 4,
        "in_chans": 1,
        "num_classes": 10,
        "embed_dim": 64,
        "depth": 6,
        "num_heads": 4,
    },
    "plstm_vis_pico_patch16_96": {
        "img_size": 96,
        "patch_size": 16,
        "num_classes": 2,
        "embed_dim": 64,
        "depth": 4,
        "num_heads": 4,
        "gate_weights": False,
        "dynamic_img_size": True,
    },
    "test_plstm_vis": {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2},
}


class PLSTMVis(Isotropic):
    """pLSTM-Vis.

    Args:
        img_size: height and width in pixels, or one number for both; any aspect.
        patch_size: side of a patch.
        in_chans: channels of the image.
        num_classes: outputs of the head; 0 for features.
        global_pool: what the head reads: `"corners"` the four tokens at the corners of the grid, 4 D wide, in the order
            top left, bottom left, top right, bottom right; `"avg"` the mean over patches, `""` everything.
        embed_dim: D, width of the residual stream.
        depth: number of layers.
        pos_embed: learned positions, added to the tokens.
        num_heads: H of the mixers that have them; the mixer's own if absent.
        mlp_ratio: width of the MLPs over D.
        modes: modes of `plstm_grid`, `"P"` or `"D"`, taken in turn by the layers. Other mixers have none, and leave
            this, `stable` and `gate_weights` unread.
        init_values: start of a learned scale, per channel, of what mixers and MLPs add; `None` for none.
        stable: keep the states of mode P bounded. The authors' models do not.
        gate_weights: gates depend on the input from the start, as in the models for ImageNet; else their weights start
            at 0, as in the arrow-pointing task.
        mixer: `"plstm_grid"`, or any other registered mixer; a causal one gets a twin that runs from the end. Mixers
            are told the grid.
        mixer_options: further keyword arguments of the mixer, such as `chirality="R"`.
        route: the order in which mixers that read a row visit the patches, a name of `list_routes()`, or several, taken
            in turn by the layers.
        drop_rate: dropout after the position embedding.
        drop_path_rate: stochastic depth of the last layer, rising linearly from 0 at the first.
        dynamic_img_size: accept images of every size; position embeddings are then resampled in each call.

    Raises:
        ValueError: if an image is smaller than a patch, or `global_pool`, `mixer`, `route` or one of `modes` is
            unknown.
        TypeError: if the mixer has no such option.
    """

    pools: ClassVar[tuple[str, ...]] = ("corners", "avg", "")
    default_pool: ClassVar[str | None] = "corners"

    @check_arguments
    def __init__(
        self,
        img_size: Sides = 224,
        patch_size: Sides = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = "corners",
        embed_dim: int = 192,
        depth: int = 12,
        pos_embed: bool = True,
        num_heads: int | None = None,
        mlp_ratio: float = 4.0,
        modes: tuple[str, ...] = ("P", "D"),
        init_values: float | None = None,
        stable: bool = True,
        gate_weights: bool = True,
        mixer: str = "plstm_grid",
        mixer_options: dict[str, Any] | None = None,
        route: str | list[str] = "raster",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        heads = {} if num_heads is None else {"num_heads": num_heads}
        by_layer = [{**heads, **(mixer_options or {})}]
        if mixer == "plstm_grid":
            gates = {"stable": stable, "gate_weights": gate_weights}
            by_layer = [{"mode": mode, **gates, **by_layer[0]} for mode in _checked(modes)]
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
            mixer_options=by_layer,
            route=route,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            dynamic_img_size=dynamic_img_size,
            stack={
                "causal": False,
                "mlp": "gelu",
                "mlp_ratio": mlp_ratio,
                "mlp_bias": True,
                "init_values": init_values,
                "weight_init": "small",
            },
            norm=norms.RMSNorm,
            device=device,
            dtype=dtype,
        )
        self.init_weights()

    def _init_tokens(self) -> None:
        small_(self.patch_embed.proj.weight)
        if self.pos_embed is not None:
            small_(self.pos_embed)

    def _new_head(self, **dd: Any) -> nn.Module:
        # As timm has it: heads of others are built on `num_features` where the model has no classes.
        self.num_features = self.embed_dim if self.num_classes else self.head_hidden_size
        return super()._new_head(**dd)

    def _init_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=2e-5)
            nn.init.zeros_(self.head.bias)

    def _pooled(self, x: Tensor, grid: list[int]) -> Tensor:
        if self.global_pool == "corners":
            pooled: Tensor = corners(x, grid)
            return pooled
        return x.mean(1) if self.global_pool == "avg" else x

    def _pooled_width(self) -> int:
        return self.embed_dim * (CORNERS if self.global_pool == "corners" else 1)


def _checked(modes: tuple[str, ...]) -> tuple[str, ...]:
    if not modes:
        raise ValueError("modes must name at least one of 'P' and 'D' (got none); leave it out for both in turn")
    for mode in modes:
        check_choice("modes", mode, ("P", "D"))
    return modes


@torch.fx.wrap
def corners(x: Tensor, grid: list[int]) -> Tensor:
    """Tokens `[B, h·w, D]` at the corners of their grid, `[B, 4 D]`: top left, bottom left, top right, bottom right."""
    height, width = grid[0], grid[1]
    if height * width != x.shape[1]:
        raise ValueError(
            f"the corners of {x.shape[1]} tokens need their grid (got {height} x {width}); give forward_head the grid, "
            "or call the model"
        )
    last_row = (height - 1) * width
    return torch.cat([x[:, 0], x[:, last_row], x[:, width - 1], x[:, last_row + width - 1]], 1)


_NAMES = {
    "norm.scale": "norm.weight",
    "norm2.scale": "norm2.weight",
    "scale1.scale": "ls1.gamma",
    "scale2.scale": "ls2.gamma",
}
_PREFIXES = {"upproj.": "mlp.fc1.", "downproj.": "mlp.fc2.", "interaction_module.": "mixer."}


def _our_name(name: str) -> str:
    match = re.fullmatch(r"block_stack\.blocks\.(\d+)\.block([01])\.(.+)", name)
    if match is None:
        return _NAMES.get(name, name)
    part = _NAMES.get(match[3], match[3])
    for prefix, ours in _PREFIXES.items():
        if part.startswith(prefix):
            part = ours + part.removeprefix(prefix)
    return f"layers.{2 * int(match[1]) + int(match[2])}.{part}"


def _from_authors(theirs: Mapping[str, Tensor], model: PLSTMVis) -> tuple[dict[str, Tensor], tuple[int, ...] | None]:
    """Weights of the reference by our names, and the grid of their positions."""
    state = {_our_name(name): tensor for name, tensor in theirs.items()}
    for name, tensor in state.items():
        if re.search(r"\.mixer\.orientation_(bias|weight)$", name):
            # The reference's code reads the flat order of [corner, head] as [head, corner].
            state[name] = tensor.reshape(tensor.shape[1], CORNERS, *tensor.shape[2:]).transpose(0, 1)
    if not any(re.search(r"\.source\w*\.weight$", name) for name in state):
        # Gates of the file's model are constants. It has weights of transitions all the same, and leaves them unread.
        for name, parameter in model.state_dict().items():
            if re.search(r"\.mixer\.(source|mark|transition)\w*\.(eigenvalues_)?weight$", name):
                state[name] = torch.zeros_like(parameter)
    positions = state.pop("pos_embed.embed", None)
    if positions is None:
        return state, None
    state["pos_embed"] = positions.flatten(1, 2)
    return state, tuple(positions.shape[1:3])


def checkpoint_filter_fn(state_dict: dict[str, Any], model: PLSTMVis) -> dict[str, Tensor]:
    """The authors' checkpoints, or our own, as `model` needs them: unwrapped, renamed and resampled to its grid and
    patch.

    Raises:
        ValueError: if the weights are of another model, or if their grid cannot be told from their number.
    """
    state, grid = unwrapped(state_dict), None
    if any(name.startswith("block_stack.") for name in state):
        state, grid = _from_authors(state, model)
    fit_checkpoint(state, model, grid)
    return state


default_cfgs = family_cfgs(
    SIZES,
    {"plstm_vis_pico_patch16_96": PICO},
    first_conv="patch_embed.proj",
    license="mit",
    paper_name="pLSTM: parallelizable Linear Source Transition Mark networks",
    paper_ids="arXiv:2506.11997",
    origin_url="https://github.com/ml-jku/plstm",
)


def _create_plstm_vis(variant: str, pretrained: bool = False, **kwargs: Any) -> PLSTMVis:
    sizes = dict(SIZES[variant])
    if kwargs.get("mixer", "plstm_grid") != "plstm_grid":
        sizes = {name: size for name, size in sizes.items() if name not in ("num_heads", "gate_weights")}
    return create(PLSTMVis, variant, pretrained, checkpoint_filter_fn, {"depth": 12, **sizes, **kwargs})


@register_vision_model
def plstm_vis_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> PLSTMVis:
    """pLSTM-Vis-T: 75.2 % on ImageNet-1k in the paper."""
    return _create_plstm_vis("plstm_vis_tiny_patch16_224", pretrained, **kwargs)


@register_vision_model
def plstm_vis_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> PLSTMVis:
    """pLSTM-Vis-S: 80.7 % in the paper."""
    return _create_plstm_vis("plstm_vis_small_patch16_224", pretrained, **kwargs)


@register_vision_model
def plstm_vis_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> PLSTMVis:
    """pLSTM-Vis-B: 82.5 % in the paper."""
    return _create_plstm_vis("plstm_vis_base_patch16_224", pretrained, **kwargs)


@register_vision_model
def plstm_vis_nano(pretrained: bool = False, **kwargs: Any) -> PLSTMVis:
    """For images of 28 to 64 pixels, small enough to train on a laptop's CPU; ours, not the paper's."""
    return _create_plstm_vis("plstm_vis_nano", pretrained, **kwargs)


@register_vision_model
def plstm_vis_pico_patch16_96(pretrained: bool = False, **kwargs: Any) -> PLSTMVis:
    """For two classes of drawn images of 96 pixels and more, with gates that start at constants; ours, not the
    paper's."""
    return _create_plstm_vis("plstm_vis_pico_patch16_96", pretrained, **kwargs)


@register_vision_model
def test_plstm_vis(pretrained: bool = False, **kwargs: Any) -> PLSTMVis:  # noqa: PT028
    """For tests: every mechanism at the smallest size."""
    return _create_plstm_vis("test_plstm_vis", pretrained, **kwargs)
