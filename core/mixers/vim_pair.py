"""Vim's mixer: two selective scans, from either end, between one pair of projections.

    x, z = in_proj(u)
    y = S6(silu(conv1d(x))) ⊙ silu(z)  +  S6_b(silu(conv1d_b(x))) ⊙ silu(z)      the second runs from the last token
    out = out_proj(y / 2)

Each direction has its own convolution, x_proj, dt_proj, A and D; the projections and the gate are shared.

Source: Zhu et al., "Vision Mamba" (arXiv 2401.09417), algorithm 1; names of parameters as in hustvl/Vim
(`bimamba_type="v2"`, `if_divide_out=True`).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinuous.core.checks import check_choice, check_sizes
from sinuous.core.mixers.contract import Mixer, register_mixer
from sinuous.core.mixers.decay_init import init_A_log_s4d_real, init_dt
from sinuous.core.mixers.mamba import depthwise, s6
from sinuous.core.ops.operators import operators


@register_mixer("vim_pair")
class VimPair(Mixer):
    """Vim's bidirectional mixer (version 2).

    Args:
        dim: width of the model.
        d_state: N, size of the state per channel.
        d_conv: W, taps of the convolutions.
        expand: E / dim.
        dt_rank: R; `None` is ceil(dim / 16).
        divide_out: halve the sum of the directions, as all released models do.
        backward_dt_init: `"matched"` starts the step sizes of the second direction like those of the first, in
            [0.001, 0.1]. `"reference"` starts them as the authors' code does, whose global pass over all linear layers
            zeroes this bias and spares only the first one: at softplus(0) = 0.693, so that the scan from the end
            forgets within a few tokens.

        bias: biases in `in_proj` and `out_proj`.
        conv_bias: biases in the convolutions.

    Raises:
        ValueError: if a size is less than 1, or `backward_dt_init` is unknown.
    """

    causal: ClassVar[bool] = False
    constant_state: ClassVar[bool] = False

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | None = None,
        divide_out: bool = True,
        backward_dt_init: str = "matched",
        bias: bool = False,
        conv_bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("backward_dt_init", backward_dt_init, ("matched", "reference"))
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = int(expand * dim)
        check_sizes(dim=dim, d_state=d_state, d_conv=d_conv, d_inner=inner)
        rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.divide_out = divide_out
        self.backward_dt_init = backward_dt_init
        self.in_proj = nn.Linear(dim, 2 * inner, bias=bias, **dd)
        self.conv1d = depthwise(inner, d_conv, conv_bias, dd)
        self.x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False, **dd)
        self.dt_proj = nn.Linear(rank, inner, **dd)
        self.A_log = nn.Parameter(torch.empty(inner, d_state, **dd))
        self.D = nn.Parameter(torch.empty(inner, **dd))
        self.A_b_log = nn.Parameter(torch.empty(inner, d_state, **dd))
        self.conv1d_b = depthwise(inner, d_conv, conv_bias, dd)
        self.x_proj_b = nn.Linear(inner, rank + 2 * d_state, bias=False, **dd)
        self.dt_proj_b = nn.Linear(rank, inner, **dd)
        self.D_b = nn.Parameter(torch.empty(inner, **dd))
        self.out_proj = nn.Linear(inner, dim, bias=bias, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        for layer in (self.in_proj, self.conv1d, self.conv1d_b, self.x_proj, self.x_proj_b, self.out_proj):
            layer.reset_parameters()
        init_dt(self.dt_proj)
        if self.backward_dt_init == "matched":
            init_dt(self.dt_proj_b)
        else:
            self.dt_proj_b.reset_parameters()
            nn.init.zeros_(self.dt_proj_b.bias)
        init_A_log_s4d_real(self.A_log)
        init_A_log_s4d_real(self.A_b_log)
        nn.init.ones_(self.D)
        nn.init.ones_(self.D_b)

    def output_weights(self) -> set[str]:
        return {"out_proj.weight"}

    def no_weight_decay(self) -> set[str]:
        return {"A_log", "A_b_log", "D", "D_b"}

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, grid: list[int] | None = None) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x_f, _ = operators.causal_conv1d(
            x, self.conv1d.weight.squeeze(1), self.conv1d.bias, cu_seqlens=cu_seqlens, silu=True
        )
        x_b, _ = operators.causal_conv1d(
            x, self.conv1d_b.weight.squeeze(1), self.conv1d_b.bias, cu_seqlens=cu_seqlens, silu=True, reverse=True
        )
        dt, dt_b = self.dt_proj, self.dt_proj_b
        y_f, _ = s6(x_f, z, self.x_proj(x_f), dt.weight, dt.bias, self.A_log, self.D, None, cu_seqlens, False)
        y_b, _ = s6(x_b, z, self.x_proj_b(x_b), dt_b.weight, dt_b.bias, self.A_b_log, self.D_b, None, cu_seqlens, True)
        # Halving the small weight is exact and spares a pass over the long sequence.
        weight = self.out_proj.weight * 0.5 if self.divide_out else self.out_proj.weight
        return F.linear(y_f.add_(y_b), weight, self.out_proj.bias)
