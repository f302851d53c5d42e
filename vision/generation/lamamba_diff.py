r"""LaMamba-Diff: a U-Net that removes noise by scans of the whole map and attention in windows.

    c = MLP(sincos(t)) + E(y)
    h ← h + g₁ ⊙ SS2D(LN(h) ⊙ (1 + a₁) + b₁)
    h ← h + g₂ ⊙ window_attention(LN(h) ⊙ (1 + a₂) + b₂)
    h ← h + g₃ ⊙ MLP(LN(h) ⊙ (1 + a₃) + b₃)                       b, a, g = W silu(P c), zero at the start

Four stages down of widths D, 2D, 4D, 4D at 1, 1/2, 1/4 and 1/4 of the sides, a middle, four stages up, each a block
deeper, to which the maps of the way down are added.

Paper: Fu, Chen and Yu, "LaMamba-Diff: Linear-Time High-Fidelity Diffusion Models Based on Local Attention and Mamba"
(arXiv 2408.02615). Reference: https://github.com/yunxiangfu2001/LaMamba-Diff (Apache-2.0). This is an independent
implementation with the reference's names of parameters, which reads its files:

    model = sinuous.create_model("lamamba_diff_xl", checkpoint_path="0400000.pt", d_state=1)

Beyond the reference: maps of any height and width. Merging pads an odd side and expanding crops it, windows mask what
pads them, and positions and relative biases are resampled. The reference means to start with an output of zero and
misses its last layer; `zero_init_output=False` starts as it does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from timm.layers import Mlp
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from sinuous.core.checkpoints import unwrapped
from sinuous.core.checks import check_arguments, check_positive, check_sizes, described, is_whole
from sinuous.core.mixers import SS2D, Bidirectional, Mixer, build_mixer, mixer_class
from sinuous.core.registry import check_weights
from sinuous.core.scan_routes import to_cells, to_sequence
from sinuous.vision.generation.windows import Sides, WindowAttention, resampled, table_sides

__all__ = ["LaMambaDiff"]

ROUTES = ("serpentine", "column_serpentine")
"""Orders in which mixers of a row visit the map, block by block in turn."""

_FREQUENCIES = 256


class TimestepEmbedder(nn.Module):
    """`[B]` steps to `[B, dim]`: cosines, then sines, of 128 frequencies from 1 to 1/10000, through two layers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, timestep: Tensor) -> Tensor:
        half = _FREQUENCIES // 2
        exponents = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
        angles = timestep.float().unsqueeze(-1) * torch.exp(-math.log(10000) * exponents)
        embedding = torch.cat([angles.cos(), angles.sin()], -1)
        return cast("Tensor", self.mlp(embedding.to(next(self.mlp.parameters()).dtype)))


class LabelEmbedder(nn.Module):
    """Classes to `[B, dim]`; the row after the last class, which every larger number takes, is for none."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, class_labels: Tensor) -> Tensor:
        return cast("Tensor", self.embedding_table(class_labels.clamp(max=self.num_classes)))


class PatchEmbed(nn.Module):
    """`[B, C, h, w]` to a map `[B, ⌈h/p⌉, ⌈w/p⌉, dim]` with a norm; zeros fill the last patches."""

    def __init__(self, in_channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        patch = self.patch_size
        x = F.pad(x, (0, -x.shape[3] % patch, 0, -x.shape[2] % patch)) if patch > 1 else x
        return cast("Tensor", self.norm(self.proj(x).permute(0, 2, 3, 1)))


class PatchExpanding(nn.Module):
    """A map `[B, H, W, dim]` to one of `factor` times the sides, `[B, factor H, factor W, out_dim]`, with a norm."""

    def __init__(self, dim: int, out_dim: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.expand = nn.Linear(dim, factor**2 * out_dim, bias=False)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.expand(x).unflatten(-1, [self.factor, self.factor, -1])
        return cast("Tensor", self.norm(x.transpose(2, 3).flatten(3, 4).flatten(1, 2)))


class LaMambaBlock(nn.Module):
    """A mixer of the whole map, attention in windows and an MLP, each shifted, scaled and gated by the condition.

    Args:
        dim: width.
        condition_dim: width of the condition.
        project: bring the condition to the block's width.
        mixer: of tokens.
        route: order in which the mixer visits the map; `None` for one that is told the grid.
        attention: of windows.
        mlp_ratio: width inside the MLP over `dim`.
    """

    def __init__(
        self,
        dim: int,
        condition_dim: int,
        project: bool,
        mixer: Mixer,
        route: str | None,
        attention: WindowAttention,
        mlp_ratio: float,
    ) -> None:
        super().__init__()
        self.route = route
        self.condition_projection = nn.Linear(condition_dim, dim) if project else nn.Identity()
        self.norm_swin = nn.LayerNorm(dim)
        self.attn = attention
        self.norm = nn.LayerNorm(dim)
        self.op = mixer
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 9 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(self.condition_projection(condition))[:, None, None]
        b1, a1, g1, b2, a2, g2, b3, a3, g3 = modulation.chunk(9, -1)
        x = torch.addcmul(x, g1, self._mix(torch.addcmul(b1, self.norm(x), 1 + a1)))
        x = torch.addcmul(x, g2, self.attn(torch.addcmul(b2, self.norm_swin(x), 1 + a2)))
        return torch.addcmul(x, g3, self.mlp(torch.addcmul(b3, self.norm2(x), 1 + a3)))

    def _mix(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        tokens = x.flatten(1, 2)
        if self.route is None:
            y = self.op(tokens, None, [height, width])
        else:
            y = to_cells(self.op(to_sequence(tokens, self.route, height, width)), self.route, height, width)
        return cast("Tensor", y.unflatten(1, [height, width]))


class Stage(nn.Module):
    """Blocks at one width, with a change of resolution ahead of them (`upsample`) or after them (`downsample`)."""

    def __init__(self, blocks: Sequence[LaMambaBlock], **resampling: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        for name, module in resampling.items():
            self.add_module(name, module)


class LaMambaDiff(ModelMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]
    """LaMamba-Diff's denoiser, called as diffusers' `DiTTransformer2DModel` is.

    Args:
        sample_size: height and width of what it denoises, or one number for both; other sizes run, too.
        in_channels: C.
        out_channels: 2 C if absent: what is predicted, then the share of the two bounds in the step's log variance.
        num_classes: of the condition; one more row is for no class.
        embed_dim: D, width of the first stage.
        depths: blocks of each stage on the way down; the way up has one more each.
        bottleneck_depth: blocks in the middle.
        num_heads: of the attention in windows, at every stage.
        window_size: side of a window.
        patch_size: side of the patches that are the map's cells.
        d_state: of SS2D; the released configuration has 1, the paper's GFLOPs are those of 16.
        expand: width inside SS2D over that of the stage.
        conv_bias: a bias in SS2D's convolution.
        mlp_ratio: width inside the MLPs over that of the stage.
        zero_init_output: start with an output of zero.
        mixer: another mixer by name in SS2D's place. It reads a single row, along the two serpentines in turn from
            block to block, as in ZigMa (arXiv 2403.13802); a causal one gets a twin that runs from the end.
        mixer_options: keyword arguments of the mixer.

    Labels are not dropped in here, nor is there any other dropout: what the model computes is the same in training.

    Raises:
        ValueError: if a size is not allowed, or the heads do not divide the widths.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["LaMambaBlock"]
    _keep_in_fp32_modules: ClassVar[list[str]] = ["A_logs", "Ds", "dt_projs_bias"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["pos_embed", "norm", "A_logs", "Ds", "dt_projs"]

    @register_to_config
    @check_arguments
    def __init__(
        self,
        sample_size: int | Sequence[int] = 32,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_classes: int = 1000,
        embed_dim: int = 320,
        depths: Sequence[int] = (2, 2, 2, 2),
        bottleneck_depth: int = 2,
        num_heads: int = 16,
        window_size: int = 8,
        patch_size: int = 1,
        d_state: int = 16,
        expand: float = 2.0,
        conv_bias: bool = False,
        mlp_ratio: float = 4.0,
        zero_init_output: bool = True,
        mixer: str = "ss2d",
        mixer_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        out_channels = 2 * in_channels if out_channels is None else out_channels
        self.register_to_config(out_channels=out_channels)
        sides = _sides(sample_size)
        _check(sides, depths, embed_dim, num_heads)
        check_sizes(in_channels=in_channels, out_channels=out_channels, bottleneck_depth=bottleneck_depth)
        check_sizes(window_size=window_size, patch_size=patch_size, d_state=d_state, num_classes=num_classes + 1)
        check_positive(mlp_ratio=mlp_ratio, expand=expand)
        self.in_channels, self.num_classes, self.patch_size = in_channels, num_classes, patch_size
        self.zero_init_output = zero_init_output
        self.gradient_checkpointing = False
        options: dict[str, Any] = dict(mixer_options or {})
        if mixer == "ss2d":
            ss2d = {"d_state": d_state, "expand": expand, "conv_bias": conv_bias, "routes": "serpentine"}
            options = {**ss2d, **options}

        stages = len(depths)
        widths = [embed_dim * 2 ** min(stage, stages - 2) for stage in range(stages)]
        grid = (-(-sides[0] // patch_size), -(-sides[1] // patch_size))
        grids = [grid]
        for stage in range(1, stages):
            grids.append((-(-grids[-1][0] // 2), -(-grids[-1][1] // 2)) if stage < stages - 1 else grids[-1])
        condition_dim, count = widths[-1], 0

        def blocks(stage: int, depth: int, project: bool) -> list[LaMambaBlock]:
            nonlocal count
            made, dim = [], widths[stage]
            for k in range(depth):
                attention = WindowAttention(dim, num_heads, window_size, grids[stage], shifted=k % 2 == 1)
                route = None if mixer == "ss2d" else ROUTES[count % 2]
                project_here = project or dim != condition_dim
                made.append(
                    LaMambaBlock(
                        dim, condition_dim, project_here, _mixer(mixer, dim, options), route, attention, mlp_ratio
                    )
                )
                count += 1
            return made

        self.pos_embed = nn.Parameter(torch.empty(1, *grid, embed_dim))
        self.t_embedder = TimestepEmbedder(condition_dim)
        self.y_embedder = LabelEmbedder(num_classes, condition_dim)
        self.patch_embed = PatchEmbed(in_channels, embed_dim, patch_size)
        self.layers = nn.ModuleList()
        for stage, depth in enumerate(depths):
            down = PatchMerging(widths[stage], widths[stage + 1]) if stage < stages - 2 else nn.Identity()
            self.layers.append(Stage(blocks(stage, depth, project=False), downsample=down))
        self.mid_layer = Stage(blocks(stages - 1, bottleneck_depth, project=False))
        self.layers_up = nn.ModuleList()
        for stage in reversed(range(stages)):
            below = {"upsample": PatchExpanding(widths[stage + 1], widths[stage], 2)} if stage < stages - 2 else {}
            self.layers_up.append(Stage(blocks(stage, depths[stage] + 1, project=True), **below))
        self.final_up = PatchExpanding(embed_dim, embed_dim, patch_size)
        self.final_condition_projection = nn.Linear(condition_dim, embed_dim)
        self.norm_final = nn.LayerNorm(embed_dim, eps=1e-6, elementwise_affine=False)
        self.final_adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(embed_dim, 2 * embed_dim))
        self.final_linear = nn.Linear(embed_dim, out_channels)
        self.init_weights()

    def init_weights(self) -> None:
        """Fill every parameter anew, as the reference starts; see `zero_init_output`."""
        inside = {module for mixer in self.modules() if isinstance(mixer, Mixer) for module in mixer.modules()}
        for mixer in self.modules():
            if isinstance(mixer, Mixer):
                mixer.init_weights()
        for module in self.modules():
            if isinstance(module, nn.Linear) and (module not in inside or self.config.mixer == "ss2d"):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, WindowAttention):
                nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.patch_embed.proj.out_channels, -1))
        nn.init.zeros_(cast("Tensor", self.patch_embed.proj.bias))
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in self.t_embedder.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        with torch.no_grad():
            self.pos_embed.copy_(_sincos(self.pos_embed.shape[1:]))
        zeros = [block.adaLN_modulation[1] for block in self.modules() if isinstance(block, LaMambaBlock)]
        zeros += [self.final_adaLN_modulation[1], *([self.final_linear] if self.zero_init_output else [])]
        for layer in zeros:
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float | None = None,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict what the scheduler asks for.

        Args:
            hidden_states: noisy pictures or latents `[B, C, h, w]`, of any height and width.
            timestep: steps `[B]`, of 0 to 999, whole or not, or one for all; 0 if absent.
            class_labels: `[B]`, from 0; numbers from `num_classes` on, and absent ones, are no class.
            return_dict: a `Transformer2DModelOutput`; a tuple if False.

        Raises:
            ValueError: if a tensor has another shape.
        """
        x = hidden_states
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"hidden_states must have shape [B, {self.in_channels}, h, w] (got {list(x.shape)}); give latents of "
                "the model's channels"
            )
        height, width = x.shape[2:]
        condition = self.t_embedder(self._per_sample("timestep", timestep, 0, x))
        labels = self._per_sample("class_labels", class_labels, self.num_classes, x)
        condition = condition + self.y_embedder(labels.long())
        x = self.patch_embed(x)
        x = x + resampled(self.pos_embed[0], x.shape[1:3])
        skips = []
        for stage in cast("list[Any]", self.layers):
            x = self._run(stage, x, condition)
            skips.append(x)
            x = stage.downsample(x)
        x = x + self._run(self.mid_layer, x, condition)
        for stage in cast("list[Any]", self.layers_up):
            skip = skips.pop()
            if hasattr(stage, "upsample"):
                x = stage.upsample(x)[:, : skip.shape[1], : skip.shape[2]]
            x = self._run(stage, x + skip, condition)
        x = self.final_up(x)[:, :height, :width]
        shift, scale = self.final_adaLN_modulation(self.final_condition_projection(condition))[:, None, None].chunk(
            2, -1
        )
        sample = self.final_linear(self.norm_final(x) * (1 + scale) + shift).permute(0, 3, 1, 2)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def fit_weights(self, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
        """The authors' weights, or our own, as this model has them, positions and relative biases resampled.

        Raises:
            ValueError: if the weights are of another model.
        """
        state = {
            name: tensor
            for name, tensor in unwrapped(state_dict).items()
            if not name.endswith((".attn_mask", ".relative_position_index"))
        }
        pos_embed = state.get("pos_embed")
        if pos_embed is None or pos_embed.ndim != 4:
            check_weights(state, self)
            return state
        state["pos_embed"] = resampled(pos_embed[0], self.pos_embed.shape[1:3])[None]
        theirs, ours = pos_embed.shape[1:3], self.pos_embed.shape[1:3]
        for name, module in self.named_modules():
            table = state.get(f"{name}.relative_position_bias_table")
            if isinstance(module, WindowAttention) and table is not None:
                sides = table_sides(_at_stage(name, theirs, self), module.window_size)
                if table.ndim == 2 and len(table) == math.prod(sides) and theirs != ours:
                    fitted = resampled(table.unflatten(0, sides), module.table_sides)
                    state[f"{name}.relative_position_bias_table"] = fitted.flatten(0, 1)
        check_weights(state, self)
        return state

    def _run(self, stage: nn.Module, x: Tensor, condition: Tensor) -> Tensor:
        for block in cast("Stage", stage).blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, condition)
            else:
                x = block(x, condition)
        return x

    def _per_sample(self, name: str, value: Tensor | float | None, absent: int, x: Tensor) -> Tensor:
        given = torch.as_tensor(absent if value is None else value, device=x.device)
        if given.ndim > 1 or (given.ndim == 1 and given.shape[0] not in (1, x.shape[0])):
            raise ValueError(f"{name} must have shape [{x.shape[0]}] or be a number (got {described(value)})")
        return given.expand(x.shape[0])


def _mixer(name: str, dim: int, options: Mapping[str, Any]) -> Mixer:
    if name == "ss2d":
        return SS2D(dim, **options)
    return Bidirectional(name, dim, **options) if mixer_class(name).causal else build_mixer(name, dim, **options)


def _sides(sample_size: int | Sequence[int]) -> Sides:
    sides = (sample_size, sample_size) if is_whole(sample_size) else tuple(cast("Sequence[int]", sample_size))
    if len(sides) != 2:
        raise ValueError(f"sample_size must be one number or a height and a width (got {described(sample_size)})")
    check_sizes(height=cast("int", sides[0]), width=cast("int", sides[1]))
    return cast("Sides", sides)


def _check(sides: Sides, depths: Sequence[int], embed_dim: int, num_heads: int) -> None:
    check_sizes(embed_dim=embed_dim, num_heads=num_heads)
    if len(depths) < 2:
        raise ValueError(f"depths must name at least two stages (got {described(depths)})")
    for depth in depths:
        check_sizes(depth=depth)
    if embed_dim % num_heads:
        raise ValueError(f"num_heads must divide embed_dim {embed_dim} (got {num_heads}); choose a divisor")
    if embed_dim % 4:
        raise ValueError(f"embed_dim must be a multiple of 4, for sines and cosines of two axes (got {embed_dim})")


def _sincos(shape: Sequence[int]) -> Tensor:
    """Sines and cosines of the column, then of the row, `[height, width, dim]`."""
    height, width, dim = shape
    frequencies = 1 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64, device="cpu") / (dim // 4))

    def along(length: int) -> Tensor:
        angles = torch.arange(length, dtype=torch.float64, device="cpu")[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], -1)

    columns, rows = along(width)[None].expand(height, -1, -1), along(height)[:, None].expand(-1, width, -1)
    return torch.cat([columns, rows], -1).float()


def _at_stage(name: str, grid: Sequence[int], model: LaMambaDiff) -> Sides:
    """Sides of the map at the module `name` of a model whose first map has the sides `grid`."""
    last, place = len(model.layers) - 1, name.split(".")
    stage = int(place[1]) if place[0] == "layers" else last - int(place[1]) if place[0] == "layers_up" else last
    height, width = grid
    for _ in range(min(stage, last - 1)):
        height, width = -(-height // 2), -(-width // 2)
    return height, width
