"""Hydra: two gated linear recurrences from either end, each one step behind, and a diagonal of its own.

    z, xBC, Δ = in_proj(u)
    x, (B, C), (B', C') = silu(conv1d(xBC))                  a centred filter, which sees both neighbours
    Δ, Δ' = softplus(Δ + dt_bias), softplus(Δ' + dt_bias);   A = -exp(A_log)
    p = ssd(C, B, Δ x, Δ A) from the first step;   f = ssd(C', B', Δ' x, Δ' A) from the last
    y_t = p_{t-1} + f_{t+1} + (fc_D(x_t) + D) ⊙ x_t          p before the first step and f after the last are 0
    out = out_proj(norm(y) ⊙ silu(z))

As a matrix over time this is quasiseparable: p is its strictly lower triangle, f its strictly upper one, both of low
rank, and the diagonal is free, where the sum of two causal mixers would count it twice.

Source: Hwang et al., "Hydra: Bidirectional State Space Models Through Generalized Matrix Mixers" (arXiv 2407.09941),
sections 2.3 and 3; names of parameters as in goombalab/hydra.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinuous.core import norms
from sinuous.core.checks import check_sizes
from sinuous.core.mixers.contract import Mixer, register_mixer
from sinuous.core.mixers.convolutions import centred_conv1d, check_centred
from sinuous.core.mixers.decay_init import init_dt_bias
from sinuous.core.mixers.delay import one_step_late
from sinuous.core.mixers.heads import heads_of
from sinuous.core.ops.operators import operators
from sinuous.kernels.torch.packing import sequence_count


@register_mixer("hydra")
class Hydra(Mixer):
    """Hydra's mixer.

    Args:
        dim: width of the model.
        d_state: N, keys of each state.
        d_conv: W, taps of the convolution, odd and at most 15.
        expand: E / dim.
        headdim: P, values per head; `None` is 64 where that divides E, else the next size that does.
        ngroups: sets of B and C in each direction, shared by the heads of a group.
        dt_limit: the least and the greatest Δ.
        learnable_init_states: both recurrences begin at a learnt state, the same for either.
        bias: in the projections; conv_bias: in the convolution.

    Raises:
        ValueError: if a size is less than 1 or does not divide what it must, or `d_conv` is even or too large.
    """

    causal: ClassVar[bool] = False
    constant_state: ClassVar[bool] = False

    def __init__(
        self,
        dim: int,
        d_state: int = 64,
        d_conv: int = 7,
        expand: float = 2,
        headdim: int | None = None,
        ngroups: int = 1,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        learnable_init_states: bool = False,
        bias: bool = False,
        conv_bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = int(expand * dim)
        check_sizes(dim=dim, d_state=d_state, d_conv=d_conv, d_inner=inner, ngroups=ngroups)
        check_centred(d_conv)
        headdim = inner // heads_of(inner, 64) if headdim is None else headdim
        if headdim < 1 or inner % headdim:
            raise ValueError(f"headdim must divide expand · dim = {inner} (got {headdim})")
        self.headdim, self.nheads = headdim, inner // headdim
        if self.nheads % ngroups:
            raise ValueError(f"ngroups must divide the {self.nheads} heads (got {ngroups})")
        self.d_inner, self.d_state, self.ngroups = inner, d_state, ngroups
        self.dt_min, self.dt_max = float(dt_limit[0]), float(dt_limit[1])
        channels = inner + 4 * ngroups * d_state
        self.in_proj = nn.Linear(dim, inner + channels + 2 * self.nheads, bias=bias, **dd)
        self.conv1d = nn.Conv1d(channels, channels, d_conv, padding=d_conv // 2, groups=channels, bias=conv_bias, **dd)
        self.init_states = (
            nn.Parameter(torch.empty(self.nheads, headdim, d_state, **dd)) if learnable_init_states else None
        )
        self.dt_bias = nn.Parameter(torch.empty(self.nheads, **dd))
        self.A_log = nn.Parameter(torch.empty(self.nheads, **dd))
        self.D = nn.Parameter(torch.empty(self.nheads, **dd))
        self.fc_D = nn.Linear(inner, self.nheads, bias=False, **dd)
        self.norm = norms.GatedRMSNorm(inner, 1e-5, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=bias, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        for layer in (self.in_proj, self.conv1d, self.fc_D, self.norm, self.out_proj):
            layer.reset_parameters()
        init_dt_bias(self.dt_bias)
        nn.init.zeros_(self.A_log)
        nn.init.ones_(self.D)
        if self.init_states is not None:
            nn.init.zeros_(self.init_states)

    def output_weights(self) -> set[str]:
        return {"out_proj.weight"}

    def no_weight_decay(self) -> set[str]:
        return {"A_log", "D", "dt_bias"} | ({"init_states"} if self.init_states is not None else set())

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, grid: list[int] | None = None) -> Tensor:
        groups, heads = 2 * self.ngroups * self.d_state, [self.nheads, self.headdim]
        widths = [self.d_inner, self.d_inner + 2 * groups, self.nheads, self.nheads]
        z, xBC, dt_past, dt_future = self.in_proj(x).split(widths, -1)
        xBC = F.silu(centred_conv1d(xBC, self.conv1d.weight.squeeze(1), self.conv1d.bias, cu_seqlens))
        flat, past, future = xBC.split([self.d_inner, groups, groups], -1)
        u = flat.unflatten(-1, heads)
        y = self._behind(u, past, dt_past, cu_seqlens, False) + self._behind(u, future, dt_future, cu_seqlens, True)
        diagonal = self.fc_D(flat) + self.D.to(flat.dtype)
        out: Tensor = self.out_proj(self.norm((y + diagonal.unsqueeze(-1) * u).flatten(-2), z))
        return out

    def _behind(self, u: Tensor, BC: Tensor, dt: Tensor, cu_seqlens: Tensor | None, reverse: bool) -> Tensor:
        """Run the recurrence of one direction and read it one step late, `[B, T, H, P]`."""
        B, C = BC.unflatten(-1, [2, self.ngroups, self.d_state]).unbind(2)
        dt = F.softplus(norms.at_least_fp32(dt) + norms.at_least_fp32(self.dt_bias)).clamp(self.dt_min, self.dt_max)
        log_decay = -dt * torch.exp(norms.at_least_fp32(self.A_log))
        initial: Tensor | None = None
        if self.init_states is not None:
            count = sequence_count(u, cu_seqlens)
            initial = self.init_states.transpose(1, 2).expand([count, -1, -1, -1])
        v = (u * dt.unsqueeze(-1)).to(u.dtype)
        y, _, _ = operators.ssd(
            C, B, v, log_decay, initial_state=initial, cu_seqlens=cu_seqlens, scale=1.0, reverse=reverse
        )
        return one_step_late(y, cu_seqlens, reverse)
