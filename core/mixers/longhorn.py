"""Longhorn: Mamba's block around a recurrence that learns online to recall its input from its key.

    x, z = in_proj(u)                       two halves of width E = expand · dim
    x = silu(causal_conv1d(x))
    Δ, k, q = x_proj(x)                     Δ of rank R, raised to E by dt_head
    y = out_proj(longhorn(x, Δ, k, q, D) ⊙ silu(z))

Source: Liu et al. (arXiv 2407.14207), section 3; names of parameters as in Cranial-XIX/longhorn.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinuous.core.checks import check_sizes
from sinuous.core.mixers.contract import register_mixer
from sinuous.core.mixers.mamba import ChannelStateMixer, depthwise
from sinuous.core.ops.operators import operators


@register_mixer("longhorn")
class Longhorn(ChannelStateMixer):
    """Longhorn's mixer.

    Args:
        dim: width of the model.
        d_state: N, size of keys and queries, and of the state per channel.
        d_conv: W, taps of the convolution.
        expand: E / dim.
        dt_rank: R; `None` is ceil(dim / 16).
        bias: biases in `in_proj` and `out_proj`.
        conv_bias: a bias in the convolution.

    Raises:
        ValueError: if a size is less than 1.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | None = None,
        bias: bool = False,
        conv_bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, d_state, d_conv, expand)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        width, rank = self.d_inner, math.ceil(dim / 16) if dt_rank is None else dt_rank
        check_sizes(dt_rank=rank)
        self.in_proj = nn.Linear(dim, 2 * width, bias=bias, **dd)
        self.conv1d = depthwise(width, d_conv, conv_bias, dd)
        self.x_proj = nn.Linear(width, rank + 2 * d_state, bias=False, **dd)
        self.dt_head = nn.Linear(rank, width, **dd)
        self.D = nn.Parameter(torch.empty(width, **dd))
        self.out_proj = nn.Linear(width, dim, bias=bias, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        """Start as the published models do: β = 1/2 where nothing is added to the bias."""
        for layer in (self.in_proj, self.conv1d, self.x_proj, self.dt_head, self.out_proj):
            layer.reset_parameters()
        nn.init.zeros_(self.dt_head.bias)
        nn.init.ones_(self.D)

    def no_weight_decay(self) -> set[str]:
        return {"D"}

    def _mix(
        self, x: Tensor, conv_state: Tensor | None, ssm_state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        x, conv_state = operators.causal_conv1d(
            x, weight, bias, initial_state=conv_state, cu_seqlens=cu_seqlens, silu=True
        )
        dt, k, q = self.x_proj(x).split([self.dt_head.in_features, self.d_state, self.d_state], dim=-1)
        dt = F.linear(dt, self.dt_head.weight)
        y, ssm_state, _ = operators.longhorn(
            x, dt, k, q, D=self.D, z=z, dt_bias=self.dt_head.bias, initial_state=ssm_state, cu_seqlens=cu_seqlens
        )
        return self.out_proj(y), conv_state, ssm_state
