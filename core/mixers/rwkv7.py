r"""RWKV-7's time mixing: a delta rule with a decay and a rate for every channel.

    δ_t = x_{t-1} - x_t;    x^r, x^w, x^k, x^v, x^a, x^g = x + δ ⊙ μ_r, …, x + δ ⊙ μ_g
    r, k, v = r_proj(x^r), k_proj(x^k), v_proj(x^v)
    g_t = -e^{-1/2} σ(w_lora(x^w));    α = σ(a_lora(x^a));    γ = g_lora(x^g)
    κ = k ⊙ k_k / |k ⊙ k_k| per head;    k ← k ⊙ (1 + (α - 1) ⊙ k_a)
    v ← v + (v_first - v) ⊙ σ(v_lora(x^v))                 with a value residual
    S_t = diag(exp g_t) S_{t-1} - (κ ⊙ α)(κᵀ S_{t-1}) + k vᵀ;    o_t = S_tᵀ r_t
    out = o_proj((norm(o) + (Σ r ⊙ r_k ⊙ k) v) ⊙ γ)

The value residual belongs to every layer but the first; v_first are the values of the first. A `SequenceModel` hands
them from block to block. Elsewhere, layers with `value_residual=True` get them from the one before:

    y, _, shared = first.mix_sharing(x)
    y, _, shared = later.mix_sharing(y, shared)           or later(y, v_first=shared[0])

Source: Peng et al., "RWKV-7 Goose" (arXiv 2503.14456), section 4.1, and BlinkDL/RWKV-LM for the initialisation; names
of parameters as in fla-org/flash-linear-attention's `RWKV7Attention`.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinuous.core import norms
from sinuous.core.checks import check_place
from sinuous.core.mixers.contract import Shared, register_mixer
from sinuous.core.mixers.heads import heads_of, per_head
from sinuous.core.mixers.matrix_mixer import MatrixMixer, MatrixState
from sinuous.core.mixers.projections import LowRank
from sinuous.core.mixers.rwkv6 import HEAD_SIZE
from sinuous.core.ops.operators import operators


def rank_of(dim: int, factor: float) -> int:
    """Rank by the authors' rule: a multiple of 32 near factor · √dim."""
    return max(32, round(factor * math.sqrt(dim) / 32) * 32)


@register_mixer("rwkv7")
class RWKV7(MatrixMixer):
    """RWKV-7's mixer.

    Args:
        dim: width of the model, and of the keys of all heads.
        num_heads: H; `None` makes them of 64 channels or the next size that divides.
        value_dim: width of the values of all heads; `None` is `dim`.
        decay_low_rank_dim, gate_low_rank_dim, a_low_rank_dim, v_low_rank_dim: ranks of w_lora, g_lora, a_lora and
            v_lora; `None` is the authors' rule, 2.5, 5, 2.5 and 1.7 √dim (all but the second times K / 64) to the next
            multiple of 32.
        value_residual: a layer after the first, which mixes `v_first` into its values.
        norm_eps: the norm adds K times this to the variance.
        block_index: place of the layer in its model of num_blocks; mixings, decays and the norm's weight start by it.

    Raises:
        ValueError: if a width is no multiple of the heads, or `block_index` is not one of `num_blocks`.
    """

    shared_option: ClassVar[str | None] = "value_residual"

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        value_dim: int | None = None,
        decay_low_rank_dim: int | None = None,
        gate_low_rank_dim: int | None = None,
        a_low_rank_dim: int | None = None,
        v_low_rank_dim: int | None = None,
        value_residual: bool = False,
        norm_eps: float = 1e-5,
        block_index: int = 0,
        num_blocks: int = 1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_place(block_index, num_blocks)
        value_dim = dim if value_dim is None else value_dim
        heads = heads_of(dim, HEAD_SIZE) if num_heads is None else num_heads
        keys = per_head(dim, heads, "dim")
        values = per_head(value_dim, heads, "value_dim")
        # The newest token but one is what a convolution of two taps keeps.
        super().__init__(dim, (heads, keys, values), value_dim, dim, 2, dd)
        self.dim = dim
        self.head_k_dim = keys
        self.head_v_dim = values
        self.block_index = block_index
        self.num_blocks = num_blocks
        self.least_log_decay = -math.exp(-0.5)

        def rank(option: int | None, factor: float) -> int:
            return rank_of(dim, factor) if option is None else option

        wider = keys / HEAD_SIZE
        self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g = (
            nn.Parameter(torch.empty(1, 1, dim, **dd)) for _ in range(6)
        )
        self.k_k = nn.Parameter(torch.empty(dim, **dd))
        self.k_a = nn.Parameter(torch.empty(dim, **dd))
        self.r_k = nn.Parameter(torch.empty(heads, keys, **dd))
        self.r_proj, self.k_proj, self.v_proj = (
            nn.Linear(dim, width, bias=False, **dd) for width in (dim, dim, value_dim)
        )
        self.w_lora = LowRank(dim, dim, rank(decay_low_rank_dim, 2.5 * wider), **dd)
        self.v_lora: LowRank | None = None
        if value_residual:
            self.v_lora = LowRank(dim, value_dim, rank(v_low_rank_dim, 1.7 * wider), "identity", **dd)
        self.a_lora = LowRank(dim, dim, rank(a_low_rank_dim, 2.5 * wider), "identity", **dd)
        self.g_lora = LowRank(dim, value_dim, rank(gate_low_rank_dim, 5), "sigmoid", bias=False, **dd)
        self.g_norm = norms.MultiHeadLayerNorm(heads, values, keys * norm_eps, bias=True, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        """Start all parameters as the authors' code does: o_proj at zero, so that it alone gets a gradient at first."""
        super().init_weights()
        place = self.block_index / max(self.num_blocks - 1, 1)
        left = 1 - self.block_index / self.num_blocks
        channel = torch.arange(self.dim, dtype=torch.float64)
        share, far = channel / self.dim, channel / max(self.dim - 1, 1)
        within = channel % self.head_k_dim / max(self.head_k_dim - 1, 1) * 2 - 1
        zigzag = within * within.abs()
        powers = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
        loras = [self.w_lora, self.a_lora, self.g_lora]
        with torch.no_grad():
            for name, power in powers.items():
                self.get_parameter(f"x_{name}").copy_(1 - share ** (power * left))
            self.k_k.copy_(0.71 - 0.1 * (far - 0.5))
            self.k_a.fill_(1.02)
            self.r_k.fill_(-0.04)
            _bias(self.w_lora).copy_(-6 + 6 * far ** (1 + place**0.3) + 0.5 + 2.5 * zigzag)
            _bias(self.a_lora).copy_(-0.19 + 0.3 * zigzag + 0.4 * (far - 0.5))
            if self.v_lora is not None:
                loras.append(self.v_lora)
                values = torch.linspace(-0.5, 0.5, _bias(self.v_lora).shape[0], dtype=torch.float64)
                _bias(self.v_lora).copy_(0.73 - 0.4 * values)
            for lora in loras:
                down, up = (cast("Tensor", lora.lora[name].weight) for name in ("0", "2"))
                down.zero_()
                _orthogonal(up, 0.1 * max(1.0, math.sqrt(up.shape[1] / up.shape[0])))
            for layer, gain in ((self.r_proj, 1.0), (self.k_proj, 0.1), (self.v_proj, 1.0)):
                _orthogonal(layer.weight, gain)
            self.g_norm.weight.fill_(((self.block_index + 1) / self.num_blocks) ** 0.7)
            self.o_proj.weight.zero_()

    def no_weight_decay(self) -> set[str]:
        return {"x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "k_k", "k_a", "r_k"}

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        grid: list[int] | None = None,
        v_first: Tensor | None = None,
    ) -> Tensor:
        """Mix a batch of sequences.

        Args:
            x: `[B, T, dim]`; packed sequences are `[1, ΣT, dim]` with `cu_seqlens`.
            cu_seqlens: boundaries of packed sequences, `[sequences + 1]`.
            grid: not looked at.
            v_first: values of the first layer, `[B, T, value_dim]`, for a layer with a value residual.
        """
        return self._mix_with(x, None, None, cu_seqlens, v_first)[0]

    def prefill(
        self, x: Tensor, state: MatrixState | None = None, v_first: Tensor | None = None
    ) -> tuple[Tensor, MatrixState]:
        conv, memory = (None, None) if state is None else state
        y, conv, memory, _ = self._mix_with(x, conv, memory, None, v_first)
        return y, MatrixState(conv, memory)

    def step(self, x_t: Tensor, state: MatrixState, v_first: Tensor | None = None) -> tuple[Tensor, MatrixState]:
        y, state = self.prefill(x_t.unsqueeze(1), state, None if v_first is None else v_first.unsqueeze(1))
        return y.squeeze(1), state

    def mix_sharing(
        self, x: Tensor, shared: Shared = (), state: MatrixState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, MatrixState, Shared]:
        """Run as the contract says; what is shared is the values of the first layer, `[B, T, value_dim]`."""
        conv, memory = (None, None) if state is None else state
        y, conv, memory, v = self._mix_with(x, conv, memory, cu_seqlens, shared[0] if shared else None)
        return y, MatrixState(conv, memory), shared or (v,)

    def _shift(self, x: Tensor, conv: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        one = x.new_ones([self.dim])
        return operators.causal_conv1d(x, torch.stack([one, -one], 1), initial_state=conv, cu_seqlens=cu_seqlens)

    def _mix_with(
        self,
        x: Tensor,
        conv: Tensor | None,
        memory: Tensor | None,
        cu_seqlens: Tensor | None,
        v_first: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute the output, the states after the last step, and the values."""
        delta, conv = self._shift(x, conv, cu_seqlens)
        values_in = x + delta * self.x_v
        r, k, v = self.r_proj(x + delta * self.x_r), self.k_proj(x + delta * self.x_k), self.v_proj(values_in)
        if self.v_lora is not None:
            if v_first is None:
                raise ValueError("value_residual needs v_first; pass the values that the first layer shares")
            v = torch.lerp(v, v_first, torch.sigmoid(self.v_lora(values_in)).to(v.dtype))
        log_decay = self.least_log_decay * torch.sigmoid(self.w_lora(x + delta * self.x_w))
        rate = torch.sigmoid(self.a_lora(x + delta * self.x_a))
        gate = self.g_lora(x + delta * self.x_g)

        keys, wide = [-1, self.head_k_dim], norms.at_least_fp32(k)
        kappa = F.normalize((wide * self.k_k).unflatten(-1, keys), dim=-1)
        k = torch.addcmul(wide, wide * (rate - 1), self.k_a.to(wide.dtype)).to(k.dtype).unflatten(-1, keys)
        r, heads = r.unflatten(-1, keys), v.unflatten(-1, [-1, self.head_v_dim])
        o, memory, _ = operators.dplr(
            r, k, heads, log_decay.unflatten(-1, keys), -kappa, kappa * rate.unflatten(-1, keys),
            initial_state=memory, cu_seqlens=cu_seqlens, scale=1.0,
        )  # fmt: skip
        bonus = (norms.at_least_fp32(r) * k * self.r_k).sum(-1, keepdim=True) * heads
        mixed = self.g_norm(o) + bonus.flatten(-2).to(o.dtype)
        return self.o_proj(mixed * gate), conv, memory, v


def _bias(lora: LowRank) -> Tensor:
    return cast("Tensor", lora.lora["2"].bias)


def _orthogonal(weight: Tensor, gain: float) -> None:
    wide = torch.empty_like(weight, dtype=torch.float32)  # there is no orthogonal start in half precision
    weight.copy_(nn.init.orthogonal_(wide, gain))
