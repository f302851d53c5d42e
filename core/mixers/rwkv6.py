"""RWKV-6's time mixing: a decay from the input for every channel, and a bonus for the newest token.

    δ_t = x_{t-1} - x_t
    m_r, m_w, m_k, m_v, m_g = W₂ tanh(W₁ (x + δ ⊙ μ)) + x_bias                    data-dependent mixing, low rank
    r, k, v, g = r_proj(x + δ ⊙ m_r), …;    log w = -exp(low rank of (x + δ ⊙ m_w))
    o_t = (S_{t-1} + diag(u) k_t v_tᵀ)ᵀ r_t;    S_t = diag(w_t) S_{t-1} + k_t v_tᵀ
    out = o_proj(norm(o) ⊙ silu(g))

Source: Peng et al., "Eagle and Finch" (arXiv 2404.05892), sections 4.2 and 4.3, and BlinkDL/RWKV-LM for the
initialisation; names of parameters as in fla-org/flash-linear-attention's `RWKV6Attention`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinuous.core.mixers.contract import register_mixer
from sinuous.core.mixers.heads import heads_of, per_head
from sinuous.core.mixers.matrix_mixer import MatrixMixer
from sinuous.core.mixers.projections import LowRank
from sinuous.core.norms import MultiHeadLayerNorm
from sinuous.core.ops.operators import operators

STREAMS = 5  # r, w, k, v, g
HEAD_SIZE = 64


class LerpLinear(nn.Module):
    """Linear layer of `x + δ ⊙ μ`."""

    def __init__(self, dim: int, out_features: int, **dd: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out_features, bias=False, **dd)
        self.mu = nn.Parameter(torch.empty(dim, **dd))

    def forward(self, x: Tensor, delta: Tensor) -> Tensor:
        y: Tensor = self.linear(x + delta * self.mu)
        return y


class MixedLinear(nn.Module):
    """Linear layer of `x + δ ⊙ m`."""

    def __init__(self, dim: int, out_features: int, **dd: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out_features, bias=False, **dd)

    def forward(self, x: Tensor, delta: Tensor, mix: Tensor) -> Tensor:
        y: Tensor = self.linear(x + delta * mix)
        return y


class MixedLowRank(nn.Module):
    """Low-rank layer of `x + δ ⊙ m`."""

    def __init__(self, dim: int, out_features: int, rank: int, **dd: Any) -> None:
        super().__init__()
        self.linear = LowRank(dim, out_features, rank, **dd)

    def forward(self, x: Tensor, delta: Tensor, mix: Tensor) -> Tensor:
        y: Tensor = self.linear(x + delta * mix)
        return y


@register_mixer("rwkv6")
class RWKV6(MatrixMixer):
    """RWKV-6's mixer.

    Args:
        dim: width of the model.
        num_heads: H; `None` makes them of 64 channels or the next size that divides.
        expand_k: width of the keys of all heads over `dim`; expand_v: that of the values.
        proj_low_rank_dim: rank of each of the five mixings; gate_low_rank_dim: that of the decay.
        norm_eps: added to the variance in the norm; the authors have 64e-5.
        relative_depth: 0 in the first layer, 1 in the last; how the mixings, decays and bonuses spread at the start
            depends on it.

    Raises:
        ValueError: if a width is no multiple of the heads, or `relative_depth` lies outside [0, 1].
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        proj_low_rank_dim: int = 32,
        gate_low_rank_dim: int = 64,
        norm_eps: float = 1e-5,
        relative_depth: float = 0.5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if not 0 <= relative_depth <= 1:
            raise ValueError(f"relative_depth must be in [0, 1] (got {relative_depth})")
        key_dim, value_dim = round(dim * expand_k), round(dim * expand_v)
        heads = heads_of(key_dim, HEAD_SIZE) if num_heads is None else num_heads
        head_k_dim = per_head(key_dim, heads, "the width of the keys")
        head_v_dim = per_head(value_dim, heads, "the width of the values")
        # The newest token but one is what a convolution of two taps keeps.
        super().__init__(dim, (heads, head_k_dim, head_v_dim), value_dim, dim, 2, dd)
        self.dim = dim
        self.rank = proj_low_rank_dim
        self.relative_depth = relative_depth
        self.head_k_dim = head_k_dim
        self.head_v_dim = head_v_dim
        self.x_proj = nn.ModuleDict(
            {
                "0": LerpLinear(dim, STREAMS * proj_low_rank_dim, **dd),
                "2": nn.Linear(STREAMS * proj_low_rank_dim, dim, bias=False, **dd),
            }
        )
        self.x_bias = nn.Parameter(torch.empty(STREAMS, dim, **dd))
        self.r_proj = MixedLinear(dim, key_dim, **dd)
        self.w_proj = MixedLowRank(dim, key_dim, gate_low_rank_dim, **dd)
        self.k_proj = MixedLinear(dim, key_dim, **dd)
        self.v_proj = MixedLinear(dim, value_dim, **dd)
        self.g_proj = MixedLinear(dim, value_dim, **dd)
        self.bonus = nn.Parameter(torch.empty(heads, head_k_dim, **dd))
        self.g_norm = MultiHeadLayerNorm(heads, head_v_dim, norm_eps, bias=True, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        """Start mixings, decays and bonuses as the authors' code does, and dense layers by torch's rule."""
        super().init_weights()
        lerp, mixing = cast("LerpLinear", self.x_proj["0"]), cast("nn.Linear", self.x_proj["2"])
        down, up = (cast("nn.Linear", self.w_proj.linear.lora[name]) for name in ("0", "2"))
        depth = self.relative_depth
        channel = torch.arange(self.dim, dtype=torch.float64) / self.dim
        early = 1 - channel ** (1 - depth)
        half = 1 - channel ** (0.5 * (1 - depth))
        key = torch.arange(up.out_features, dtype=torch.float64)
        far = key / max(up.out_features - 1, 1)
        decay = -6 + 5 * far ** (0.7 + 1.3 * depth)
        bonus = depth * (1 - far) + ((key + 1) % 3 - 1) * 0.1
        with torch.no_grad():
            lerp.mu.copy_(early)
            self.x_bias.copy_(torch.stack([half, early, early, early - 0.3 * depth, half]))  # r, w, k, v, g
            up.bias.copy_(decay)
            self.bonus.copy_(bonus.view(self.bonus.shape))
        for zero in (lerp.linear, down):
            nn.init.zeros_(zero.weight)
        for small in (mixing, up):
            nn.init.uniform_(small.weight, -0.01, 0.01)

    def no_weight_decay(self) -> set[str]:
        return {"bonus", "x_bias", "x_proj.0.mu"}

    def _mix(
        self, x: Tensor, conv: Tensor | None, memory: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        one = x.new_ones([self.dim])
        delta, conv = operators.causal_conv1d(x, torch.stack([one, -one], 1), initial_state=conv, cu_seqlens=cu_seqlens)
        low_rank = torch.tanh(self.x_proj["0"](x, delta)).unflatten(-1, [-1, self.rank])
        raised = self.x_proj["2"].weight.unflatten(-1, [-1, self.rank])  # type: ignore[operator]
        mixes = torch.einsum("btnr,dnr->nbtd", low_rank, raised) + self.x_bias.unsqueeze(1).unsqueeze(1)
        r, w, k, v, g = mixes.unbind(0)
        keys, values = [-1, self.head_k_dim], [-1, self.head_v_dim]
        o, memory, _ = operators.gla(
            self.r_proj(x, delta, r).unflatten(-1, keys), self.k_proj(x, delta, k).unflatten(-1, keys),
            self.v_proj(x, delta, v).unflatten(-1, values), -torch.exp(self.w_proj(x, delta, w)).unflatten(-1, keys),
            bonus=self.bonus, initial_state=memory, cu_seqlens=cu_seqlens, scale=1.0,
        )  # fmt: skip
        return self.o_proj(self.g_norm(o) * F.silu(self.g_proj(x, delta, g))), conv, memory
