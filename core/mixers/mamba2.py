"""Mamba-2: a gated linear recurrence with one decay per head, behind one projection and a short convolution.

    z0, x0, z, xBC, Δ = in_proj(u)                             z0, x0 only if d_ssm < E: a gated MLP beside
    x, B, C = silu(causal_conv1d(xBC))
    Δ = softplus(Δ + dt_bias);   A = -exp(A_log)               one of each per head
    S_t = exp(Δ_t A) S_{t-1} + B_t (Δ_t x_t)ᵀ;   y_t = S_tᵀ C_t + D ⊙ x_t
    out = out_proj([silu(z0) ⊙ x0, norm(y ⊙ silu(z))])

Source: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), section 7 and figure 6; names of parameters as in
state-spaces/mamba's `Mamba2`.
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
from sinuous.core.mixers.convolutions import ShortConvolution
from sinuous.core.mixers.decay_init import init_A_log_uniform, init_dt_bias
from sinuous.core.mixers.heads import heads_of
from sinuous.core.mixers.matrix_mixer import MatrixState
from sinuous.core.mixers.states import zero_states
from sinuous.core.ops.operators import operators


@register_mixer("mamba2")
class Mamba2(Mixer):
    """Mamba-2's mixer.

    Args:
        dim: width of the model.
        d_state: N, keys of the state.
        d_conv: W, taps of the convolution.
        expand: E / dim.
        headdim: P, values per head; `None` is 64 where that divides `d_ssm`, else the next size that does.
        d_ssm: channels of the recurrence; the rest of E is a gated MLP. `None` is all of E.
        ngroups: sets of B and C, shared by the heads of a group.
        rmsnorm: norm the output together with its gate; without, the gate alone.
        norm_before_gate: norm first, then gate.
        dt_limit: the least and the greatest Δ.
        bias: in the projections; conv_bias: in the convolution.
        D_has_hdim: D for every channel of the recurrence, and not for every head.
        A_init_range: -A is uniform in this range at the start.
        norm_eps: added under the root of the norm.

    Raises:
        ValueError: if a size is less than 1 or does not divide what it must.
    """

    causal: ClassVar[bool] = True
    constant_state: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: float = 2,
        headdim: int | None = None,
        d_ssm: int | None = None,
        ngroups: int = 1,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        D_has_hdim: bool = False,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        norm_eps: float = 1e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = int(expand * dim)
        d_ssm = inner if d_ssm is None else d_ssm
        check_sizes(dim=dim, d_state=d_state, d_conv=d_conv, d_inner=inner, d_ssm=d_ssm, ngroups=ngroups)
        if d_ssm > inner:
            raise ValueError(f"d_ssm must be at most expand · dim = {inner} (got {d_ssm})")
        if not 0 < A_init_range[0] <= A_init_range[1]:
            raise ValueError(f"A_init_range must be two positive numbers in order (got {A_init_range})")
        headdim = d_ssm // heads_of(d_ssm, 64) if headdim is None else headdim
        if headdim < 1 or d_ssm % headdim:
            raise ValueError(f"headdim must divide d_ssm = {d_ssm} (got {headdim})")
        self.headdim, self.nheads = headdim, d_ssm // headdim
        if self.nheads % ngroups:
            raise ValueError(f"ngroups must divide the {self.nheads} heads (got {ngroups})")
        self.d_mlp, self.d_ssm, self.d_state, self.ngroups = inner - d_ssm, d_ssm, d_state, ngroups
        self.dt_min, self.dt_max = float(dt_limit[0]), float(dt_limit[1])
        self.A_init_range = A_init_range
        channels = d_ssm + 2 * ngroups * d_state
        self.conv_shape = (d_conv - 1, channels)
        self.in_proj = nn.Linear(dim, 2 * self.d_mlp + d_ssm + channels + self.nheads, bias=bias, **dd)
        self.conv1d = ShortConvolution(channels, d_conv, conv_bias, **dd)
        self.dt_bias = nn.Parameter(torch.empty(self.nheads, **dd))
        self.A_log = nn.Parameter(torch.empty(self.nheads, **dd))
        self.D = nn.Parameter(torch.empty(d_ssm if D_has_hdim else self.nheads, **dd))
        norm = norms.GatedRMSNorm(d_ssm, norm_eps, d_ssm // ngroups, norm_before_gate, **dd) if rmsnorm else None
        self.norm = norm
        self.out_proj = nn.Linear(inner, dim, bias=bias, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        for layer in (self.in_proj, self.conv1d, self.out_proj):
            layer.reset_parameters()
        if self.norm is not None:
            self.norm.reset_parameters()
        init_dt_bias(self.dt_bias)
        init_A_log_uniform(self.A_log, *self.A_init_range)
        nn.init.ones_(self.D)

    def output_weights(self) -> set[str]:
        return {"out_proj.weight"}

    def no_weight_decay(self) -> set[str]:
        return {"A_log", "D", "dt_bias"}

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, grid: list[int] | None = None) -> Tensor:
        return self._mix(x, None, None, cu_seqlens)[0]

    def _mix(
        self, x: Tensor, conv: Tensor | None, memory: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        groups, heads = self.ngroups * self.d_state, [self.nheads, self.headdim]
        widths = [self.d_mlp, self.d_mlp, self.d_ssm, self.d_ssm + 2 * groups, self.nheads]
        z0, x0, z, xBC, dt = self.in_proj(x).split(widths, -1)
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        xBC, conv = operators.causal_conv1d(xBC, weight, bias, initial_state=conv, cu_seqlens=cu_seqlens, silu=True)
        flat, B, C = xBC.split([self.d_ssm, groups, groups], -1)
        u = flat.unflatten(-1, heads)
        dt = F.softplus(norms.at_least_fp32(dt) + norms.at_least_fp32(self.dt_bias)).clamp(self.dt_min, self.dt_max)
        log_decay = -dt * torch.exp(norms.at_least_fp32(self.A_log))
        B, C = B.unflatten(-1, [self.ngroups, self.d_state]), C.unflatten(-1, [self.ngroups, self.d_state])
        v = (u * dt.unsqueeze(-1)).to(u.dtype)
        o, memory, _ = operators.ssd(C, B, v, log_decay, initial_state=memory, cu_seqlens=cu_seqlens, scale=1.0)
        y = (o + self.D.to(u.dtype).unflatten(0, [self.nheads, -1]) * u).flatten(-2)
        y = y * F.silu(z) if self.norm is None else self.norm(y, z)
        if self.d_mlp > 0:
            y = torch.cat([F.silu(z0) * x0, y], -1)
        return self.out_proj(y), conv, memory

    def prefill(self, x: Tensor, state: MatrixState | None = None) -> tuple[Tensor, MatrixState]:
        conv, memory = (None, None) if state is None else state
        y, conv, memory = self._mix(x, conv, memory, None)
        return y, MatrixState(conv, memory)

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> MatrixState:
        memory = (batch_size, self.nheads, self.d_state, self.headdim)
        return MatrixState(*zero_states(self.in_proj.weight, device, dtype, (batch_size, *self.conv_shape), memory))
