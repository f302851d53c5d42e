"""DiT, by which the denoisers here are judged, as diffusers has it: the paper's sizes, and one of a given size.

    model = dit("dit_s", sample_size=64)
    model = dit_of(1_400_213, sample_size=32, in_channels=1, out_channels=1, num_classes=10)

diffusers' blocks have an embedding of step and class each, where the paper's share one: S has 39.8 million parameters
here, 33 in the paper. Each embedding would also drop labels by itself in training, so that nearly every label gets
through; here none does, and the task draws.

Source: Peebles and Xie, "Scalable Diffusion Models with Transformers" (arXiv 2212.09748), table 1.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, ModelMixin
from torch import Tensor, nn

from sinuous.core.checks import check_choice, check_positive, check_sizes

DITS: dict[str, dict[str, int]] = {
    "dit_s": {"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64},
    "dit_b": {"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64},
    "dit_l": {"num_layers": 24, "num_attention_heads": 16, "attention_head_dim": 64},
    "dit_xl": {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72},
}
"""The paper's sizes, with patches of 2."""

WIDTH_PER_LAYER = 32
"""Of DiT-S, the smallest: width 384 in 12 layers. What is searched for comes near it."""


# A pipeline loads a part only if the module of its class has the name ModelMixin, too.
class DiT(DiTTransformer2DModel, ModelMixin):  # type: ignore[misc]
    """diffusers' DiT, called as `LaMambaDiff` is: a step may be a number, and without one, or without classes, it is 0
    and none."""

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float | None = None,
        class_labels: Tensor | int | None = None,
        **options: Any,
    ) -> Any:
        batch, device = hidden_states.shape[0], hidden_states.device
        none = self.config.num_embeds_ada_norm
        step = torch.as_tensor(0 if timestep is None else timestep, device=device).expand(batch)
        label = torch.as_tensor(none if class_labels is None else class_labels, device=device).expand(batch)
        return super().forward(hidden_states, step, label, **options)


def dit(name: str, **options: Any) -> Any:
    """DiT of a size of `DITS`, as `with_options` builds it.

    Raises:
        ValueError: if there is no such size.
    """
    check_choice("name", name, list(DITS))
    return with_options(**DITS[name], **options)


def dit_of(parameters: int, *, tolerance: float = 0.05, head_dim: int = 16, **options: Any) -> Any:
    """DiT with about as many parameters as another model.

    Of the widths and depths that meet the tolerance, the one whose width is nearest to `WIDTH_PER_LAYER` times its
    depth; of equally near ones, the one with the nearest count.

    Args:
        parameters: that it should have.
        tolerance: largest share by which it may miss them.
        head_dim: width of a head, of which there are as many as the width holds.
        **options: as of `with_options`.

    Raises:
        ValueError: if no width and depth come near enough.
    """
    check_sizes(parameters=parameters, head_dim=head_dim)
    check_positive(tolerance=tolerance)
    near = []
    for heads in range(1, 1 + 2048 // head_dim):
        outside, block = _counts(heads, head_dim, tuple(sorted(options.items())))
        layers = max(1, round((parameters - outside) / block))
        miss = abs(outside + layers * block - parameters) / parameters
        if miss <= tolerance:
            shape = abs(heads * head_dim / (layers * WIDTH_PER_LAYER) - 1)
            near.append((shape, miss, heads, layers))
        if outside + block > parameters * (1 + tolerance):
            break
    if not near:
        raise ValueError(
            f"no DiT of heads of width {head_dim} has about {parameters} parameters; choose another head_dim, or a "
            f"tolerance above {tolerance}"
        )
    _, _, heads, layers = min(near)
    return with_options(num_layers=layers, num_attention_heads=heads, attention_head_dim=head_dim, **options)


def with_options(
    *,
    num_layers: int,
    num_attention_heads: int,
    attention_head_dim: int,
    sample_size: int = 32,
    in_channels: int = 4,
    out_channels: int | None = None,
    num_classes: int = 1000,
    patch_size: int = 2,
) -> DiT:
    """diffusers' DiT with the paper's random start, whose own dropout of labels is 0.

    Args:
        num_layers: blocks.
        num_attention_heads: of each block.
        attention_head_dim: width of a head; all of them are the model's width.
        sample_size: side of the square pictures or latents; no other can be denoised.
        in_channels: C.
        out_channels: 2 C if absent, as `LaMambaDiff` has it.
        num_classes: of the condition; one more row is for no class.
        patch_size: side of the patches that are the tokens.
    """
    model = DiT(
        num_layers=num_layers,
        num_attention_heads=num_attention_heads,
        attention_head_dim=attention_head_dim,
        sample_size=sample_size,
        in_channels=in_channels,
        out_channels=2 * in_channels if out_channels is None else out_channels,
        num_embeds_ada_norm=num_classes,
        patch_size=patch_size,
    )
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    _start(model)
    return model


def _start(model: Any) -> None:
    """Fill the weights anew as the paper's code does, which diffusers leaves out: blocks are identities, the output is
    zero, and no other layer starts as torch has it."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    patches = model.pos_embed.proj
    nn.init.xavier_uniform_(patches.weight.view(patches.out_channels, -1))
    nn.init.zeros_(patches.bias)
    zero = [model.proj_out_1, model.proj_out_2]
    for block in model.transformer_blocks:
        embedder = block.norm1.emb
        nn.init.normal_(embedder.class_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(embedder.timestep_embedder.linear_1.weight, std=0.02)
        nn.init.normal_(embedder.timestep_embedder.linear_2.weight, std=0.02)
        zero.append(block.norm1.linear)
    for layer in zero:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


@functools.cache
def _counts(heads: int, head_dim: int, options: tuple[tuple[str, Any], ...]) -> tuple[int, int]:
    """Parameters outside the blocks, and those of a block."""
    sizes: dict[str, Any] = {"num_attention_heads": heads, "attention_head_dim": head_dim, **dict(options)}
    with torch.device("meta"):
        model = with_options(num_layers=1, **sizes)
    block = sum(p.numel() for p in model.transformer_blocks.parameters())
    return sum(p.numel() for p in model.parameters()) - block, block
