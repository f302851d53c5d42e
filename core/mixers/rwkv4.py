r"""RWKV-4's time mixing: an average of all values so far, with weights that decay and a bonus for the newest.

    k, v, r = key(x^k), value(x^v), receptance(x^r);    x^k = μ_k ⊙ x_t + (1 - μ_k) ⊙ x_{t-1}, and so on
    wkv_t = (Σ_{s<t} e^{-(t-1-s) w + k_s} ⊙ v_s + e^{u + k_t} ⊙ v_t) / (Σ_{s<t} e^{-(t-1-s) w + k_s} + e^{u + k_t})
    y = output(σ(r) ⊙ wkv)                                  w = e^{time_decay}, u = time_first, a number per channel

Both sums are scans of single channels. A scale e^m keeps them from overflow whatever the keys are; the quotient does
not depend on it, and no gradient passes it:

    m_t = max(m_{t-1} - w, k_t)
    (a, b)_t = e^{m_{t-1} - w - m_t} ⊙ (a, b)_{t-1} + e^{k_t - m_t} ⊙ (v_t, 1)
    wkv_t = (e^{m_{t-1}} ⊙ a_{t-1} + e^{u + k_t} ⊙ v_t) / (e^{m_{t-1}} ⊙ b_{t-1} + e^{u + k_t})

Source: Peng et al., "RWKV: Reinventing RNNs for the Transformer Era" (arXiv 2305.13048), the equations of its WKV
operator; names of parameters and initialisation as in BlinkDL/RWKV-LM's `RWKV_TimeMix` of version 4. In transformers'
`RwkvSelfAttention` the three mixings are called time_mix_key, time_mix_value and time_mix_receptance.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from sinuous.core import norms
from sinuous.core.checks import check_place, check_sizes
from sinuous.core.mixers import positions
from sinuous.core.mixers.contract import Mixer, register_mixer, register_state
from sinuous.core.mixers.states import zero_states
from sinuous.core.ops.operators import operators


@register_state
class RWKV4State(NamedTuple):
    """conv: the last input, `[B, 1, dim]`; sums: the numerator and the denominator over e^{log_scale}, `[B, 2 E]`;
    log_scale: m, `[B, E]`, -inf at first; the last two fp32 or fp64."""

    conv: Tensor
    sums: Tensor
    log_scale: Tensor


@torch.fx.wrap
def decaying_max(k: Tensor, w: Tensor, before: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Compute `m_t = max(m_{t-1} - w, k_t) = max_{s ≤ t}(k_s + s w) - t w`, m₀ among them.

    In packed sequences, which a running maximum would cross, the same takes log₂ T passes; each doubles the steps that
    m is the maximum over.

    Args:
        k: `[B, T, E]`.
        w: `[E]`.
        before: m before the first step, `[B, E]`; not read with packed sequences, which start from none.
        cu_seqlens: boundaries of packed sequences.
    """
    if cu_seqlens is None and k.shape[1] == 1:  # ONNX has no running maximum
        return torch.maximum(before.double().unsqueeze(1) - w.double(), k.double()).to(k.dtype)
    past = positions.steps(k, None, cu_seqlens)[0].unsqueeze(-1)
    if cu_seqlens is None:
        drift = (past + 1) * w.double()  # in fp32 it would swallow k over long sequences
        risen = torch.cat([before.double().unsqueeze(1), k.double() + drift], 1)
        return (risen.cummax(1)[0][:, 1:] - drift).to(k.dtype)
    m = k
    span = 1
    while span < k.shape[1]:
        older = torch.cat([m[:, :span], m[:, :-span] - span * w], 1)
        m = torch.where(past >= span, torch.maximum(m, older), m)
        span *= 2
    return m


@register_mixer("rwkv4")
class RWKV4(Mixer):
    """RWKV-4's mixer.

    Args:
        dim: width of the model.
        attention_hidden_size: E, the width of keys and values; `None` is `dim`.
        block_index: place of the layer in its model of num_blocks; mixings and decays start by it.

    Raises:
        ValueError: if a width is less than 1, or `block_index` is not one of `num_blocks`.
    """

    causal: ClassVar[bool] = True
    constant_state: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        attention_hidden_size: int | None = None,
        block_index: int = 0,
        num_blocks: int = 1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        width = dim if attention_hidden_size is None else attention_hidden_size
        check_sizes(dim=dim, attention_hidden_size=width)
        check_place(block_index, num_blocks)
        self.dim = dim
        self.width = width
        self.block_index = block_index
        self.num_blocks = num_blocks
        self.time_decay, self.time_first = (nn.Parameter(torch.empty(width, **dd)) for _ in range(2))
        self.time_mix_k, self.time_mix_v, self.time_mix_r = (
            nn.Parameter(torch.empty(1, 1, dim, **dd)) for _ in range(3)
        )
        self.key, self.value, self.receptance = (nn.Linear(dim, width, bias=False, **dd) for _ in range(3))
        self.output = nn.Linear(width, dim, bias=False, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        """Start all parameters as the authors' code does: key, receptance and output at zero.

        So output alone gets a gradient in the first step of training, and the average of the second one is plain but
        for decay and bonus.
        """
        place = self.block_index / max(self.num_blocks - 1, 1)
        left = 1 - self.block_index / self.num_blocks
        share = torch.arange(self.dim, dtype=torch.float64) / self.dim
        channel = torch.arange(self.width, dtype=torch.float64)
        far = channel / max(self.width - 1, 1)
        with torch.no_grad():
            self.time_decay.copy_(-5 + 8 * far ** (0.7 + 1.3 * place))
            self.time_first.copy_(math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1))
            self.time_mix_k.copy_(share**left)
            self.time_mix_v.copy_(share**left + 0.3 * place)
            self.time_mix_r.copy_(share ** (0.5 * left))
            wide = torch.empty_like(self.value.weight, dtype=torch.float32)  # no orthogonal start in half precision
            nn.init.orthogonal_(wide, max(1.0, math.sqrt(self.width / self.dim)))
            self.value.weight.copy_(wide)
            for layer in (self.key, self.receptance, self.output):
                layer.weight.zero_()

    def output_weights(self) -> set[str]:
        return {"output.weight"}

    def no_weight_decay(self) -> set[str]:
        return {"time_decay", "time_first", "time_mix_k", "time_mix_v", "time_mix_r"}

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, grid: list[int] | None = None) -> Tensor:
        return self._mix(x, None, None, None, cu_seqlens)[0]

    def prefill(self, x: Tensor, state: RWKV4State | None = None) -> tuple[Tensor, RWKV4State]:
        conv, sums, log_scale = (None, None, None) if state is None else state
        y, conv, sums, log_scale = self._mix(x, conv, sums, log_scale, None)
        return y, RWKV4State(conv, sums, log_scale)

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> RWKV4State:
        shapes = ((batch_size, 1, self.dim), (batch_size, 2 * self.width), (batch_size, self.width))
        conv, sums, log_scale = zero_states(self.time_decay, device, dtype, *shapes)
        return RWKV4State(conv, sums, log_scale.fill_(-math.inf))

    def _mix(
        self, x: Tensor, conv: Tensor | None, sums: Tensor | None, log_scale: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        one = x.new_ones([self.dim])
        delta, conv = operators.causal_conv1d(x, torch.stack([one, -one], 1), initial_state=conv, cu_seqlens=cu_seqlens)
        k = norms.at_least_fp32(self.key(x + delta * (1 - self.time_mix_k)))
        v = norms.at_least_fp32(self.value(x + delta * (1 - self.time_mix_v)))
        r = torch.sigmoid(self.receptance(x + delta * (1 - self.time_mix_r)))
        w = torch.exp(norms.at_least_fp32(self.time_decay))

        none = k.new_zeros([k.shape[0], self.width])
        m_0 = none - math.inf if log_scale is None else log_scale
        first = torch.cat([none, none], -1) if sums is None else sums
        m = decaying_max(k.detach(), w.detach(), m_0, cu_seqlens)
        all_m = torch.cat([m_0.unsqueeze(1), m], 1)
        m_before = _first_steps(all_m[:, :-1], m_0, cu_seqlens)
        # In this order the difference of two large numbers is exact, and rounding is of the size of what is left.
        weight, decay = torch.exp(k - m), torch.exp((m_before - m) - w)
        added, decays = torch.cat([weight * v, weight], -1), torch.cat([decay, decay], -1)
        h, after, _ = operators.linear_scan(added, decays, initial_state=sums, cu_seqlens=cu_seqlens)
        h_before = _first_steps(torch.cat([first.unsqueeze(1), h], 1)[:, :-1], first, cu_seqlens)
        log_bonus = norms.at_least_fp32(self.time_first) + k
        top = torch.maximum(m_before, log_bonus).detach()
        past, newest = torch.exp(m_before - top), torch.exp(log_bonus - top)
        numerator, denominator = h_before.chunk(2, -1)
        wkv = (past * numerator + newest * v) / (past * denominator + newest)
        return self.output(r * wkv.to(r.dtype)), conv, after, all_m[:, -1]


def _first_steps(late: Tensor, start: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Put `start`, `[1, E]`, at the first step of each packed sequence of `late`, `[B, T, E]`, values one step back."""
    if cu_seqlens is None:
        return late
    is_first = positions.steps(late, None, cu_seqlens)[0].unsqueeze(-1) == 0
    return torch.where(is_first, start.unsqueeze(1), late)
