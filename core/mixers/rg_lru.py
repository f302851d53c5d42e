r"""RG-LRU: the recurrent block of Griffin and Hawk, a gated real recurrence that keeps the size of its state.

    u = conv_1d(linear_x(x))
    r_t = σ(W_a u_t + b_a);   i_t = σ(W_x u_t + b_x)            both matrices block-diagonal, a block per head
    log a_t = -8 r_t softplus(Λ)
    h_t = a_t ⊙ h_{t-1} + √(1 - a_t²) ⊙ i_t ⊙ u_t               at the first step of a sequence without the root
    out = linear_out( h ⊙ gelu(linear_y(x)) )

Source: De et al., "Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient Language Models" (arXiv
2402.19427), sections 2.3 and 2.4 and appendix A; names of parameters as in google-deepmind/recurrentgemma's
`RecurrentBlock`.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinuous.core import norms
from sinuous.core.checks import check_sizes
from sinuous.core.mixers import positions
from sinuous.core.mixers.contract import Mixer, register_mixer, register_state
from sinuous.core.mixers.heads import heads_of, per_head
from sinuous.core.mixers.states import zero_states
from sinuous.core.ops.operators import operators


@register_state
class RGLRUState(NamedTuple):
    """conv_1d: the last W-1 inputs of the convolution, `[B, W-1, E]`; rg_lru: the recurrence's state, `[B, E]`, fp32 or
    fp64; position: how many steps have been seen, int64 `[B]`."""

    conv_1d: Tensor
    rg_lru: Tensor
    position: Tensor


def bounded_sqrt(x: Tensor, slope: float = 1000.0) -> Tensor:
    """Square root of x with a gradient of at most `slope`; that of √(1 - a²) grows without bound as a goes to 1."""
    least = 0.25 / slope**2
    straight = torch.sqrt(x).detach() + slope * (x - x.detach())
    return torch.where(x > least, torch.sqrt(x.clamp(min=least)), straight)


class BlockDiagonalLinear(nn.Module):
    """Linear layer `y = x W + b` with one block of W per head: w `[H, E/H, E/H]`, inputs first, and b `[H, E/H]`."""

    def __init__(self, width: int, heads: int, **dd: Any) -> None:
        super().__init__()
        self.heads = heads
        self.w = nn.Parameter(torch.empty(heads, width // heads, width // heads, **dd))
        self.b = nn.Parameter(torch.empty(heads, width // heads, **dd))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.w, std=self.w.shape[1] ** -0.5)
        nn.init.zeros_(self.b)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bthi,hij->bthj", x.unflatten(-1, [self.heads, x.shape[-1] // self.heads]), self.w)
        return (norms.at_least_fp32(y) + self.b).flatten(-2)


class TemporalConvolution(nn.Module):
    """Weights of a depthwise causal convolution: w `[W, E]`, the newest step last, and b `[E]`."""

    def __init__(self, width: int, taps: int, **dd: Any) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(taps, width, **dd))
        self.b = nn.Parameter(torch.empty(width, **dd))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.w, std=math.sqrt(0.01 / self.w.shape[0]))
        nn.init.zeros_(self.b)


class Recurrence(nn.Module):
    """Parameters of the recurrence: Λ and the gates."""

    def __init__(self, width: int, heads: int, r_min: float, r_max: float, **dd: Any) -> None:
        super().__init__()
        self.r_min = r_min
        self.r_max = r_max
        self.a_param = nn.Parameter(torch.empty(width, **dd))
        self.input_gate = BlockDiagonalLinear(width, heads, **dd)
        self.a_gate = BlockDiagonalLinear(width, heads, **dd)

    def reset_parameters(self) -> None:
        """Start `exp(-softplus(Λ))` uniform by area in the ring between r_min and r_max."""
        self.input_gate.reset_parameters()
        self.a_gate.reset_parameters()
        with torch.no_grad():
            area = torch.rand_like(self.a_param, dtype=torch.float32)
            log_radius = 0.5 * torch.log(area * (self.r_max**2 - self.r_min**2) + self.r_min**2)
            self.a_param.copy_(torch.expm1(-log_radius).log())  # the inverse of softplus

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Compute log a and i, `[B, T, E]`, at least fp32."""
        log_a = -8 * torch.sigmoid(self.a_gate(u)) * F.softplus(norms.at_least_fp32(self.a_param))
        return log_a, torch.sigmoid(self.input_gate(u))


@register_mixer("rg_lru")
class RGLRU(Mixer):
    """Griffin's recurrent block.

    Args:
        dim: width of the model.
        lru_width: E; `None` is dim.
        num_heads: H, blocks of the gates; `None` is the largest divisor of E that leaves 256 channels or more in each,
            as the published models have.
        conv1d_temporal_width: W, taps of the convolution.
        r_min, r_max: the ring of `exp(-softplus(Λ))` at the start; a is its eighth power where r is 1.
        allow_neg_eigval: 2a - 1, in (-1, 1), instead of a, in the root too, so that the state can count modulo 2
            (Grazzi et al., arXiv 2411.12537).

    Raises:
        ValueError: if a size is less than 1, E is no multiple of H, or the radii are not 0 < r_min < r_max < 1.
    """

    causal: ClassVar[bool] = True
    constant_state: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        lru_width: int | None = None,
        num_heads: int | None = None,
        conv1d_temporal_width: int = 4,
        r_min: float = 0.9,
        r_max: float = 0.999,
        allow_neg_eigval: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        width = dim if lru_width is None else lru_width
        check_sizes(dim=dim, lru_width=width, conv1d_temporal_width=conv1d_temporal_width)
        heads = heads_of(width, 256) if num_heads is None else num_heads
        per_head(width, heads, "lru_width")
        if not 0 < r_min < r_max < 1:
            raise ValueError(f"r_min and r_max must be 0 < r_min < r_max < 1 (got {r_min} and {r_max})")
        self.width = width
        self.taps = conv1d_temporal_width
        self.allow_neg_eigval = allow_neg_eigval
        self.linear_y = nn.Linear(dim, width, **dd)
        self.linear_x = nn.Linear(dim, width, **dd)
        self.linear_out = nn.Linear(width, dim, **dd)
        self.conv_1d = TemporalConvolution(width, conv1d_temporal_width, **dd)
        self.rg_lru = Recurrence(width, heads, r_min, r_max, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        for layer in (self.linear_x, self.linear_y, self.linear_out):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)
        self.conv_1d.reset_parameters()
        self.rg_lru.reset_parameters()

    def output_weights(self) -> set[str]:
        return {"linear_out.weight"}

    def no_weight_decay(self) -> set[str]:
        return {"rg_lru.a_param"}

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, grid: list[int] | None = None) -> Tensor:
        return self._mix(x, None, None, None, cu_seqlens)[0]

    def _mix(
        self,
        x: Tensor,
        conv: Tensor | None,
        hidden: Tensor | None,
        position: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        u, conv = operators.causal_conv1d(
            self.linear_x(x), self.conv_1d.w.t(), self.conv_1d.b, initial_state=conv, cu_seqlens=cu_seqlens
        )
        log_a, gate = self.rg_lru(u)
        a = torch.exp(log_a)
        if self.allow_neg_eigval:
            rest = -4 * a * torch.expm1(log_a)  # 1 - (2a - 1)²
            a = 2 * a - 1
        else:
            rest = -torch.expm1(2 * log_a)
        first = positions.steps(u, position, cu_seqlens) == 0
        size = torch.where(first.unsqueeze(-1), torch.ones_like(rest), bounded_sqrt(rest))
        u = (size * gate * u).to(u.dtype)
        h, hidden, _ = operators.linear_scan(u, a, initial_state=hidden, cu_seqlens=cu_seqlens)
        return self.linear_out(h * F.gelu(self.linear_y(x), approximate="tanh")), conv, hidden

    def prefill(self, x: Tensor, state: RGLRUState | None = None) -> tuple[Tensor, RGLRUState]:
        state = self.initial_state(x.shape[0], x.device) if state is None else state
        y, conv, hidden = self._mix(x, state.conv_1d, state.rg_lru, state.position, None)
        return y, RGLRUState(conv, hidden, state.position + x.shape[1])

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> RGLRUState:
        shapes = ((batch_size, self.taps - 1, self.width), (batch_size, self.width))
        conv, hidden = zero_states(self.linear_x.weight, device, dtype, *shapes)
        return RGLRUState(conv, hidden, torch.zeros(batch_size, device=conv.device, dtype=torch.long))
