"""Mamba: a gated selective scan behind a short convolution.

    x, z = in_proj(u)                       two halves of width E = expand · dim
    x = silu(causal_conv1d(x))
    Δ, B, C = x_proj(x)                     Δ of rank R, raised to E by dt_proj
    y = out_proj(selective_scan(x, Δ, A, B, C, D) ⊙ silu(z))

Source: Gu and Dao (arXiv 2312.00752), section 3.4 and figure 3; names of parameters as in state-spaces/mamba.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinuous.core import norms
from sinuous.core.checks import check_sizes
from sinuous.core.mixers.contract import Mixer, register_mixer, register_state
from sinuous.core.mixers.decay_init import init_A_log_s4d_real, init_dt
from sinuous.core.mixers.states import zero_states
from sinuous.core.ops.operators import operators


@register_state
class MambaState(NamedTuple):
    """conv: the last W-1 inputs of the convolution, `[B, W-1, E]`; ssm: the recurrence's state, `[B, E, N]`, fp32 or
    fp64."""

    conv: Tensor
    ssm: Tensor


def s6(
    x: Tensor,
    z: Tensor | None,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Scan in one direction, and gate: outputs `[B, T, E]`, and the state after the last step.

    Args:
        x: output of the convolution, `[B, T, E]`.
        z: gate before its activation, `[B, T, E]`; no gate if absent.
        projected: `x_proj(x)`, `[B, T, R + 2N]`, in the order Δ, B, C.
        dt_weight: `[E, R]`; dt_bias, D: `[E]`; A_log: `[E, N]`.
        initial_state: state before the first step, `[B, E, N]`; zeros if absent.
        cu_seqlens: boundaries of packed sequences.
        reverse: scan from the last step to the first.
    """
    rank, state = dt_weight.shape[1], A_log.shape[1]
    dt, B, C = projected.split([rank, state, state], dim=-1)
    A = -torch.exp(norms.at_least_fp32(A_log))
    y, final, _ = operators.selective_scan(
        x, F.linear(dt, dt_weight), A, B, C, D=D, z=z, dt_bias=dt_bias,
        initial_state=initial_state, cu_seqlens=cu_seqlens, reverse=reverse,
    )  # fmt: skip
    return y, final


def depthwise(channels: int, width: int, bias: bool, dd: dict[str, Any]) -> nn.Conv1d:
    """A causal convolution of every channel alone, under the names of torch's."""
    return nn.Conv1d(channels, channels, width, groups=channels, padding=width - 1, bias=bias, **dd)


class ChannelStateMixer(Mixer):
    """Base of mixers with N numbers of state for each of E channels, behind a short convolution.

    A subclass has `in_proj`, `_mix` and `init_weights`.

    Args:
        dim: width of the model.
        d_state: N.
        d_conv: W, taps of the convolution.
        expand: E / dim.

    Raises:
        ValueError: if a size is less than 1.
    """

    causal: ClassVar[bool] = True
    constant_state: ClassVar[bool] = True

    def __init__(self, dim: int, d_state: int, d_conv: int, expand: float) -> None:
        super().__init__()
        check_sizes(dim=dim, d_state=d_state, d_conv=d_conv, d_inner=int(expand * dim))
        self.d_inner = int(expand * dim)
        self.d_state = d_state
        self.d_conv = d_conv

    def output_weights(self) -> set[str]:
        return {"out_proj.weight"}

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, grid: list[int] | None = None) -> Tensor:
        return self._mix(x, None, None, cu_seqlens)[0]

    def _mix(
        self, x: Tensor, conv_state: Tensor | None, ssm_state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the output, and the states of the convolution and the recurrence after the last step."""
        raise NotImplementedError

    def prefill(self, x: Tensor, state: MambaState | None = None) -> tuple[Tensor, MambaState]:
        conv, ssm = (None, None) if state is None else state
        y, conv, ssm = self._mix(x, conv, ssm, None)
        return y, MambaState(conv, ssm)

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> MambaState:
        conv, ssm = (batch_size, self.d_conv - 1, self.d_inner), (batch_size, self.d_inner, self.d_state)
        return MambaState(*zero_states(self.get_parameter("in_proj.weight"), device, dtype, conv, ssm))


@register_mixer("mamba")
class Mamba(ChannelStateMixer):
    """Mamba's mixer.

    Args:
        dim: width of the model.
        d_state: N, size of the state per channel.
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
        rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.in_proj = nn.Linear(dim, 2 * self.d_inner, bias=bias, **dd)
        self.conv1d = depthwise(self.d_inner, d_conv, conv_bias, dd)
        self.x_proj = nn.Linear(self.d_inner, rank + 2 * d_state, bias=False, **dd)
        self.dt_proj = nn.Linear(rank, self.d_inner, **dd)
        self.A_log = nn.Parameter(torch.empty(self.d_inner, d_state, **dd))
        self.D = nn.Parameter(torch.empty(self.d_inner, **dd))
        self.out_proj = nn.Linear(self.d_inner, dim, bias=bias, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        for layer in (self.in_proj, self.conv1d, self.x_proj, self.out_proj):
            layer.reset_parameters()
        init_dt(self.dt_proj)
        init_A_log_s4d_real(self.A_log)
        nn.init.ones_(self.D)

    def no_weight_decay(self) -> set[str]:
        return {"A_log", "D"}

    def _mix(
        self, x: Tensor, conv_state: Tensor | None, ssm_state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        x, conv_state = operators.causal_conv1d(
            x, weight, bias, initial_state=conv_state, cu_seqlens=cu_seqlens, silu=True
        )
        y, ssm_state = s6(
            x,
            z,
            self.x_proj(x),
            self.dt_proj.weight,
            self.dt_proj.bias,
            self.A_log,
            self.D,
            ssm_state,
            cu_seqlens,
            False,
        )
        return self.out_proj(y), conv_state, ssm_state
