"""VideoMamba: the patches of all frames in one row, scanned from both ends, with the class token at the head.

    tokens = [cls + P_0; patch_{t,i} + P_i + F_t]         positions P in the frame, and F in time
    scan   spatial_first: frame by frame;  temporal_first: place by place, each through time;
           spatiotemporal: the blocks take the two in turn

Paper: Li, Li, Wang, He, Wang, Wang and Qiao, "VideoMamba: State Space Model for Efficient Video Understanding" (arXiv
2403.06977, ECCV 2024). Reference: https://github.com/OpenGVLab/VideoMamba (Apache-2.0), whose released models scan
spatially first. This is an independent implementation; parameters have the reference's names, so that its files load:

    model = sinuous.create_model("videomamba_tiny", num_frames=16, checkpoint_path="videomamba_t16_k400_f16_res224.pth")

The mixer is Vim's pair with the sum of the directions as it is (`divide_out=False`). The class token stands first, so
that it reads the clip through the scan from the end alone.

Shapes: B batch, T frames, H and W pixels, t × h × w patches, D width, L = 1 + t·h·w tokens.
"""

# Annotations stay objects: FX copies that of `forward` into its graphs, and TorchScript cannot read a string there.
import math
import warnings
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import trunc_normal_
from timm.models import adapt_input_conv, generate_default_cfgs
from timm.models._input import update_model_args
from torch import Tensor, nn

from sinuous.core import norms, patches
from sinuous.core.building import create
from sinuous.core.checkpoints import unwrapped
from sinuous.core.checks import check_arguments, check_choice, check_sizes
from sinuous.core.isotropic import Isotropic
from sinuous.core.patches import Sides, check_images, fit_pos_embed, grid_sides
from sinuous.core.registry import check_weights, register_vision_model
from sinuous.core.scan_routes import time_first_order
from sinuous.core.weights import shipped_cfgs

__all__ = ["VideoMamba", "checkpoint_filter_fn"]

SCANS = {
    "spatial_first": ("spatial",),
    "temporal_first": ("temporal",),
    "spatiotemporal": ("spatial", "temporal"),
}
"""Orders that the blocks take in turn."""

SIZES: dict[str, dict[str, Any]] = {
    "videomamba_tiny": {"embed_dim": 192, "depth": 24},
    "videomamba_small": {"embed_dim": 384, "depth": 24},
    "videomamba_middle": {"embed_dim": 576, "depth": 32},
    "videomamba_nano": {
        "img_size": 32,
        "patch_size": 8,
        "tubelet_size": 8,
        "in_chans": 1,
        "embed_dim": 128,
        "depth": 4,
        "class_token": "none",
        "global_pool": "avg",
    },
    "test_videomamba": {"num_frames": 4, "patch_size": 8, "embed_dim": 32, "depth": 4},
}


class VideoMamba(Isotropic):
    """VideoMamba.

    Args:
        img_size: height and width of a frame in pixels, or one number for both.
        patch_size: sides of a patch in a frame.
        num_frames: T, the length of the clips.
        tubelet_size: frames of a patch; patches do not overlap, and T must be a multiple.
        in_chans: channels of a frame.
        num_classes: outputs of the head; 0 for features.
        global_pool: what the head reads: `"token"` the class token, `"avg"` the mean over patches, `""` everything.
            `None` is `"token"`, or `"avg"` where there is no class token.
        class_token: `"head"` or `"none"`. `None` is `"head"`, or `"none"` for mixers that
            read the patches as a grid, which has no cell for it.
        embed_dim: D, width of the residual stream.
        depth: number of blocks.
        mixer: `"vim_pair"`, or any other registered mixer; a causal one gets a twin that runs from the end.
        mixer_options: keyword arguments of the mixer, such as `d_state`.
        scan: `"spatial_first"`, `"temporal_first"` or `"spatiotemporal"`, where the blocks take the two in turn.
        drop_rate: dropout after the positions.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        dynamic_img_size: accept frames of every size; positions in the frame are then resampled in each call.

    Raises:
        ValueError: if a frame is smaller than a patch, T is no multiple of the tubelet, `global_pool`, `class_token`,
            `mixer` or `scan` is unknown, or a mixer that reads a grid is given a class token.
        TypeError: if the mixer has no such option.
    """

    norm_name: ClassVar[str] = "norm_f"
    default_class_token: ClassVar[str] = "head"
    reads_clips: ClassVar[bool] = True

    @check_arguments
    def __init__(
        self,
        img_size: Sides = 224,
        patch_size: Sides = 16,
        num_frames: int = 8,
        tubelet_size: int = 1,
        in_chans: int = 3,
        num_classes: int = 400,
        global_pool: str | None = None,
        class_token: str | None = None,
        embed_dim: int = 192,
        depth: int = 24,
        mixer: str = "vim_pair",
        mixer_options: dict[str, Any] | None = None,
        scan: str = "spatial_first",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes(num_frames=num_frames, tubelet_size=tubelet_size)
        check_choice("scan", scan, SCANS)
        if class_token is not None:
            check_choice("class_token", class_token, ("head", "none"))
        _check_tubelets(num_frames, tubelet_size)
        options = {"divide_out": False} if mixer == "vim_pair" else {}
        super().__init__(
            img_size=(num_frames, *patches.sides("img_size", img_size, 2)),
            patch_size=(tubelet_size, *patches.sides("patch_size", patch_size, 2)),
            stride=None,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            class_token=class_token,
            embed_dim=embed_dim,
            depth=depth,
            pos_embed=True,
            mixer=mixer,
            mixer_options={**options, **(mixer_options or {})},
            route="raster",
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            dynamic_img_size=dynamic_img_size,
            stack={"causal": False},
            norm=norms.RMSNorm,
            device=device,
            dtype=dtype,
        )
        self.scan = scan
        self.num_frames = num_frames
        self.has_routes = scan != "spatial_first"
        frames = self.patch_embed.grid_size[0]
        self.temporal_pos_embedding = nn.Parameter(torch.empty(1, frames, embed_dim, device=device, dtype=dtype))
        self.init_weights()

    @torch.jit.ignore
    def _pos_grid(self) -> list[int]:
        return [int(side) for side in self.patch_embed.grid_size[1:]]

    def _init_tokens(self) -> None:
        self.patch_embed.proj.reset_parameters()
        nn.init.zeros_(self.patch_embed.proj.bias)  # type: ignore[arg-type]
        if self.cls_token is not None:
            nn.init.zeros_(self.cls_token)
        trunc_normal_(self.pos_embed, std=0.02)
        # Every frame starts as the picture that it is for an image model.
        nn.init.zeros_(self.temporal_pos_embedding)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        inherited: set[str] = super().no_weight_decay()
        return inherited | {"temporal_pos_embedding"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            **super().group_matcher(coarse),
            "stem": r"^cls_token|^pos_embed|^temporal_pos_embedding|^patch_embed",
        }

    @torch.jit.ignore
    @check_arguments
    def set_input_size(
        self, img_size: Sides | None = None, patch_size: Sides | None = None, num_frames: int | None = None
    ) -> None:
        """Other sizes of frames and patches, or another number of frames: positions and patch kernel are resampled,
        those in time linearly.

        Raises:
            ValueError: if frames are smaller than patches, or their number is no multiple of the tubelet.
        """
        embed = self.patch_embed
        tubelet, frames = int(embed.patch_size[0]), self.num_frames if num_frames is None else num_frames
        check_sizes(num_frames=frames)
        _check_tubelets(frames, tubelet)
        sides = embed.img_size[1:] if img_size is None else patches.sides("img_size", img_size, 2)
        patch = None if patch_size is None else (tubelet, *patches.sides("patch_size", patch_size, 2))
        super().set_input_size((frames, *sides), patch)
        if frames != self.num_frames:
            resampled = resample_frames(self.temporal_pos_embedding.detach(), embed.grid_size[0])
            kept = self.temporal_pos_embedding.requires_grad
            self.temporal_pos_embedding = nn.Parameter(resampled, requires_grad=kept)
        self.num_frames = frames
        update_model_args(self, img_size=embed.img_size[1:], patch_size=embed.patch_size[1:], num_frames=frames)

    def _checked(self, x: Tensor) -> Tensor:
        checked: Tensor = check_clips(
            x,
            self.patch_embed.patch_size,  # type: ignore[arg-type]
            self.in_chans,
            self.num_frames,
        )
        return checked

    def _positions(self, x: Tensor) -> Tensor | None:
        positions: Tensor = clip_positions(
            x,
            self.pos_embed,  # type: ignore[arg-type]
            self.temporal_pos_embedding,
            self.patch_embed.grid_size,  # type: ignore[arg-type]
            self.dynamic_img_size,
            self.pos_class_token,
        )
        return positions

    def _norm(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm_f(x)  # type: ignore[operator]
        return normed

    @torch.jit.unused
    def _route_orders(self, x: Tensor, grid: list[int]) -> list[Tensor]:
        orders: list[Tensor] = clip_orders(x, self.scan, grid, self.class_token)
        return orders


# FX looks for leaves in the module of `forward`, which is another, and for functions that are wrapped.
@torch.fx.wrap
def check_clips(x: Tensor, patch_size: list[int], in_chans: int, num_frames: int) -> Tensor:
    """`x`, or a ValueError where it is no batch `[B, C, T, H, W]` with the number of frames of the model."""
    check_images(x, patch_size, in_chans)
    if x.shape[2] != num_frames:
        raise ValueError(
            f"images must be clips of {num_frames} frames (got {x.shape[2]}); choose {num_frames} of them, or call "
            f"set_input_size(num_frames={x.shape[2]})"
        )
    return x


@torch.fx.wrap
def clip_positions(
    x: Tensor, pos_embed: Tensor, temporal: Tensor, grid: list[int], dynamic: bool, class_token: str
) -> Tensor:
    """Positions `[1, L, D]` of the tokens of a map `[B, D, t, h, w]`, from those in a frame and those in time
    `[1, t, D]`."""
    places = fit_pos_embed(pos_embed, grid[1:], grid_sides(x)[1:], dynamic, class_token)
    prefix = 0 if class_token == "none" else 1
    patches = (places[:, None, prefix:] + temporal[:, :, None]).flatten(1, 2)
    return torch.cat([places[:, :prefix], patches], 1)


@torch.fx.wrap
def clip_orders(x: Tensor, scan: str, grid: list[int], class_token: str) -> list[Tensor]:
    """Orders of the tokens of a clip for a `Stack`, one for each that the blocks take in turn."""
    frames, height, width = grid
    prefix = int(class_token != "none")
    row_by_row = torch.arange(prefix + frames * height * width, device=x.device).expand(2, -1)
    through_time = time_first_order(frames, height * width, prefix - 1).to(x.device)
    return [through_time if order == "temporal" else row_by_row for order in SCANS[scan]]


def resample_frames(temporal: Tensor, frames: int) -> Tensor:
    """Positions in time `[1, t, D]` for another number of them, interpolated linearly."""
    resampled = F.interpolate(temporal.mT.float(), size=[frames], mode="linear", align_corners=False)
    return resampled.mT.to(temporal.dtype)


def _check_tubelets(num_frames: int, tubelet_size: int) -> None:
    if num_frames % tubelet_size:
        raise ValueError(
            f"num_frames must be a multiple of tubelet_size={tubelet_size} (got {num_frames}); "
            f"give {max(1, num_frames // tubelet_size) * tubelet_size}"
        )


def checkpoint_filter_fn(state_dict: dict[str, Any], model: VideoMamba) -> dict[str, Tensor]:
    """The authors' checkpoints, or our own, as `model` needs them: unwrapped, and resampled to its frames and patches.

    Weights of one of their models of images, whose patch kernel has two sides, become those of a model of clips: the
    kernel lies in the middle frame of the tubelet, positions in time are zero, and the model keeps its own head, which
    is to be trained.

    Raises:
        ValueError: if the weights are of another model or only one of the two has a class token, if their tubelet has
            another length, or if their grid cannot be told from their number.

    Warns:
        UserWarning: if the weights are of a model of images.
    """
    state = unwrapped(state_dict)
    embed = model.patch_embed
    if ("cls_token" in state) != (model.cls_token is not None):
        takes = "'head'" if "cls_token" in state else "'none'"
        raise ValueError(
            f"of the checkpoint and the model only one has a class token; build the model with class_token={takes}"
        )
    kernel = state.get("patch_embed.proj.weight")
    if kernel is not None and kernel.ndim == 4:
        state = _inflated(state, model)
        kernel = state["patch_embed.proj.weight"]
    if kernel is not None and kernel.ndim == 5:
        frames, height, width = kernel.shape[2:]
        if kernel.shape[1] != model.in_chans:
            kernel = adapt_input_conv(model.in_chans, kernel.flatten(2, 3)).unflatten(2, (frames, height))
        old_patch = (height, width)
        state["patch_embed.proj.weight"] = patches.fit_patch_kernel(kernel, embed.patch_size)
        if (places := state.get("pos_embed")) is not None:
            old_grid = _frame_grid(model, places.shape[1] - int(model.class_token != "none"), old_patch)
            new_grid = [int(side) for side in embed.grid_size[1:]]
            state["pos_embed"] = patches.resize_pos_embed(places, old_grid, new_grid, model.pos_class_token)
    if (temporal := state.get("temporal_pos_embedding")) is not None:
        state["temporal_pos_embedding"] = resample_frames(temporal, embed.grid_size[0])
    check_weights(state, model, adapted=("head.",))
    return state


def _inflated(state: dict[str, Tensor], model: VideoMamba) -> dict[str, Tensor]:
    """Weights of a model of images for clips, with the model's own head."""
    flat = state["patch_embed.proj.weight"]
    tubelet = int(model.patch_embed.patch_size[0])
    kernel = flat.new_zeros(*flat.shape[:2], tubelet, *flat.shape[2:])
    kernel[:, :, tubelet // 2] = flat
    inflated = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    inflated["patch_embed.proj.weight"] = kernel
    inflated["temporal_pos_embedding"] = torch.zeros_like(model.temporal_pos_embedding, device=flat.device)
    if isinstance(model.head, nn.Linear):
        warnings.warn(
            "the weights are of a model of images: they are used for clips, with a head of random weights, which must "
            "be trained",
            UserWarning,
            stacklevel=3,
        )
        inflated |= {f"head.{name}": tensor for name, tensor in model.head.state_dict().items()}
    return inflated


def _frame_grid(model: VideoMamba, rows: int, patch_size: tuple[int, int]) -> list[int]:
    """Sides of the grid of a checkpoint's patches in a frame."""
    embed = model.patch_embed
    for size in (getattr(model, "pretrained_model_args", {}).get("img_size"), embed.img_size[1:]):
        if size is not None:
            grid = patches.grid_of(patches.sides("img_size", size, 2), patch_size, patch_size)
            if math.prod(grid) == rows:
                return grid
    square = patches.square_of(rows)
    if square is None:
        raise ValueError(
            f"the checkpoint has {rows} patches in a frame, which is no square, so that their grid is not known; build "
            "the model with the img_size of the checkpoint, then call set_input_size"
        )
    return square


def _cfgs() -> dict[str, Any]:
    cfg: dict[str, Any] = {
        "num_classes": 400,
        "input_size": (3, 224, 224),  # of a frame: timm knows no clips
        "pool_size": None,
        "fixed_input_size": True,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_name": "VideoMamba: State Space Model for Efficient Video Understanding",
        "paper_ids": "arXiv:2403.06977",
        "origin_url": "https://github.com/OpenGVLab/VideoMamba",
    }
    small = {
        "videomamba_nano": {"input_size": (1, 32, 32), "num_classes": 16, "mean": (0.4,), "std": (0.2,)},
        "test_videomamba": {"input_size": (3, 64, 64), "num_classes": 10},
    }
    folder = Path(__file__).parent / "weights"
    cfgs: dict[str, Any] = {}
    for name in SIZES:
        cfgs |= shipped_cfgs(folder, name, {**cfg, **small.get(name, {})})
    return cfgs


default_cfgs = generate_default_cfgs(_cfgs())


def _create_videomamba(variant: str, pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    return create(VideoMamba, variant, pretrained, checkpoint_filter_fn, {**SIZES[variant], **kwargs})


@register_vision_model(domain="video")
def videomamba_tiny(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-Ti: 76.9 % on Kinetics-400 with 8 frames in the paper."""
    return _create_videomamba("videomamba_tiny", pretrained, **kwargs)


@register_vision_model(domain="video")
def videomamba_small(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-S: 79.3 % on Kinetics-400 with 8 frames in the paper."""
    return _create_videomamba("videomamba_small", pretrained, **kwargs)


@register_vision_model(domain="video")
def videomamba_middle(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-M: 80.6 % on Kinetics-400 with 8 frames in the paper."""
    return _create_videomamba("videomamba_middle", pretrained, **kwargs)


@register_vision_model(domain="video")
def videomamba_nano(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """For gray clips of 32 pixels, small enough to train on a laptop's CPU; ours, not the paper's."""
    return _create_videomamba("videomamba_nano", pretrained, **kwargs)


@register_vision_model(domain="video")
def test_videomamba(pretrained: bool = False, **kwargs: Any) -> VideoMamba:  # noqa: PT028
    """For tests: every mechanism at the smallest size."""
    return _create_videomamba("test_videomamba", pretrained, **kwargs)
