"""MambaVision's mixer: half of the channels through a selective scan, the other half past it.

    x, z = in_proj(u)                               two halves of width E / 2, E = expand · dim
    x = silu(conv1d_x(x)),   z = silu(conv1d_z(z))  each step with its two neighbours
    Δ, B, C = x_proj(x)                             Δ of rank R, raised to E / 2 by dt_proj
    out = out_proj([S6(x, Δ, A, B, C, D), z])       from the first token to the last; z is no gate

The scan runs one way only; the convolutions look one step ahead, and so does the mixer. As published, the bias of
`dt_proj` is added twice: Δ = softplus(W r + 2 b).

Source: Hatamizadeh and Kautz, "MambaVision: A Hybrid Mamba-Transformer Vision Backbone" (arXiv 2407.08083), section
3.2; names of parameters as in NVlabs/MambaVision.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinuous.core.checks import check_sizes
from sinuous.core.mixers.contract import Mixer, register_mixer
from sinuous.core.mixers.convolutions import centred_conv1d, check_centred
from sinuous.core.mixers.decay_init import init_A_log_s4d_real, init_dt
from sinuous.core.mixers.mamba import s6


@register_mixer("mambavision")
class MambaVisionMixer(Mixer):
    """MambaVision's mixer.

    Args:
        dim: width of the model.
        d_state: N, size of the state per channel.
        d_conv: taps of the convolutions, odd and at most 15.
        expand: E / dim; E is even.
        dt_rank: R; `None` is ceil(dim / 16).
        bias: in `in_proj` and `out_proj`; conv_bias: in the convolutions.

    Step sizes start log-uniform in [0.001, 0.1]. The authors' code means the same, but sets the bias to 0 afterwards,
    so that they start at softplus(0) = 0.693.

    Raises:
        ValueError: if a size is less than 1, E is odd, or `d_conv` is even or too large.
    """

    causal: ClassVar[bool] = False
    constant_state: ClassVar[bool] = False

    def __init__(
        self,
        dim: int,
        d_state: int = 8,
        d_conv: int = 3,
        expand: float = 1,
        dt_rank: int | None = None,
        bias: bool = False,
        conv_bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = int(expand * dim)
        rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        check_sizes(dim=dim, d_state=d_state, d_inner=inner, dt_rank=rank)
        check_centred(d_conv)
        if inner % 2:
            raise ValueError(f"expand · dim must be even, as it is cut in halves (got {inner}); choose another width")
        half = inner // 2
        self.d_half = half
        self.in_proj = nn.Linear(dim, inner, bias=bias, **dd)
        self.conv1d_x = nn.Conv1d(half, half, d_conv, padding=d_conv // 2, groups=half, bias=conv_bias, **dd)
        self.conv1d_z = nn.Conv1d(half, half, d_conv, padding=d_conv // 2, groups=half, bias=conv_bias, **dd)
        self.x_proj = nn.Linear(half, rank + 2 * d_state, bias=False, **dd)
        self.dt_proj = nn.Linear(rank, half, **dd)
        self.A_log = nn.Parameter(torch.empty(half, d_state, **dd))
        self.D = nn.Parameter(torch.empty(half, **dd))
        self.out_proj = nn.Linear(inner, dim, bias=bias, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        for layer in (self.in_proj, self.conv1d_x, self.conv1d_z, self.x_proj, self.out_proj):
            layer.reset_parameters()
        init_dt(self.dt_proj)
        with torch.no_grad():
            self.dt_proj.bias.div_(2)  # it counts twice
        init_A_log_s4d_real(self.A_log)
        nn.init.ones_(self.D)

    def output_weights(self) -> set[str]:
        return {"out_proj.weight"}

    def no_weight_decay(self) -> set[str]:
        return {"A_log", "D"}

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, grid: list[int] | None = None) -> Tensor:
        x = self.in_proj(x)
        x, z = x[..., : self.d_half], x[..., self.d_half :]
        x = F.silu(centred_conv1d(x, self.conv1d_x.weight.squeeze(1), self.conv1d_x.bias, cu_seqlens))
        z = F.silu(centred_conv1d(z, self.conv1d_z.weight.squeeze(1), self.conv1d_z.bias, cu_seqlens))
        y, _ = s6(
            x,
            None,
            self.x_proj(x),
            self.dt_proj.weight,
            2 * self.dt_proj.bias,
            self.A_log,
            self.D,
            None,
            cu_seqlens,
            False,
        )
        out: Tensor = self.out_proj(torch.cat([y, z], -1))
        return out
