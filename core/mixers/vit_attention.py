r"""Attention of every token to every other, as a Vision Transformer has it.

    q, k, v = qkv(x)                     H heads of K channels each
    y_t = Σ_s softmax_s( q_t·k_s / √K ) v_s
    out = proj(y)

There are no positions in it.

Source: Dosovitskiy et al. (arXiv 2010.11929), appendix A; names of parameters as in timm's `Attention`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sinuous.core.checks import check_sizes
from sinuous.core.mixers import positions
from sinuous.core.mixers.attention import dot_product
from sinuous.core.mixers.contract import Mixer, register_mixer
from sinuous.core.mixers.heads import heads_of


@register_mixer("vit_attention")
class ViTAttention(Mixer):
    """Vision Transformer's attention.

    Args:
        dim: width of the model.
        num_heads: H, a divisor of `dim`; `None` is the largest one that leaves heads of 64 channels or more.
        qkv_bias: biases in the projection to queries, keys and values.

    Raises:
        ValueError: if a size is less than 1, or H does not divide `dim`.
    """

    causal: ClassVar[bool] = False
    constant_state: ClassVar[bool] = False

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        qkv_bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        heads = heads_of(dim, 64) if num_heads is None else num_heads
        check_sizes(dim=dim, num_heads=heads)
        if dim % heads:
            raise ValueError(f"num_heads must divide dim {dim} (got {heads}); choose a divisor")
        self.num_heads = heads
        self.head_dim = dim // heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        self.qkv.reset_parameters()
        self.proj.reset_parameters()

    def output_weights(self) -> set[str]:
        return {"proj.weight"}

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, grid: list[int] | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, [3, self.num_heads, self.head_dim]).unbind(2)
        mask: Tensor | None = None
        if cu_seqlens is not None:
            segment = positions.segments(x, cu_seqlens)
            mask = (segment.unsqueeze(1) == segment.unsqueeze(2)).unsqueeze(1)
        y: Tensor = self.proj(dot_product(q, k, v, mask, False).flatten(2))
        return y
