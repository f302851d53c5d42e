"""Linear attention with a decay for every channel of the keys.

S_t = diag(exp g_t) S_{t-1} + k_t v_tᵀ,    o_t = K^{-1/2} S_tᵀ q_t

gla     g_t = logsigmoid(W₂ W₁ x_t + b) / 16
hgrn2   g_t = log(λ + (1 - λ) σ(f_proj(x_t))),    k_t = 1 - exp g_t
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinuous.core import norms
from sinuous.core.mixers.contract import register_mixer
from sinuous.core.mixers.convolutions import convolve_together, short_convolutions
from sinuous.core.mixers.feature_maps import ELEMENTWISE, build_feature_map
from sinuous.core.mixers.heads import heads_of, per_head
from sinuous.core.mixers.matrix_mixer import MatrixMixer, SwishGatedMixer
from sinuous.core.ops.operators import operators


@register_mixer("gla")
class GLA(SwishGatedMixer):
    """Gated linear attention (Yang et al., arXiv 2312.06635, section 4). Names of parameters as in
    fla-org/flash-linear-attention's `GatedLinearAttention`.

    Args:
        dim: width of the model.
        num_heads: H.
        num_kv_heads: heads of keys, values and gates, each shared by H / num_kv_heads queries; `None` is H.
        expand_k: width of the keys of all heads over `dim`; expand_v: that of the values.
        feature_map: of queries and keys: `identity`, `elu` (+ 1), `relu`, `swish`.
        use_short_conv: short convolutions with silu behind q_proj, k_proj, v_proj.
        conv_size: their taps; conv_bias: their biases.
        use_output_gate: gate the output by silu(g_proj(x)).
        gate_logit_normalizer: divides logsigmoid, so that little is forgotten at the start.
        gate_low_rank_dim: rank of the layer that gives the gates.
        clamp_min: bound of g from below; `None` for no bound.
        norm_eps: added under the root of the norm.

    Raises:
        ValueError: if a width is no multiple of its heads, or `clamp_min` is positive.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        feature_map: str = "identity",
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        use_output_gate: bool = True,
        gate_logit_normalizer: float = 16.0,
        gate_low_rank_dim: int = 16,
        clamp_min: float | None = None,
        norm_eps: float = 1e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if clamp_min is not None and clamp_min > 0:
            raise ValueError(f"clamp_min bounds a logarithm of at most 0 from below (got {clamp_min})")
        taps = conv_size if use_short_conv else None
        key_dim, value_dim = round(dim * expand_k), round(dim * expand_v)
        super().__init__(
            dim, key_dim, value_dim, num_heads, num_kv_heads, taps, conv_bias, use_output_gate, norm_eps, dd
        )
        self.gk_proj = nn.Sequential(
            nn.Linear(dim, gate_low_rank_dim, bias=False, **dd),
            nn.Linear(gate_low_rank_dim, key_dim // self.kv_groups, **dd),
        )
        self.feature_map = build_feature_map(feature_map, self.head_k_dim, dd, ELEMENTWISE)
        self.gate_logit_normalizer = float(gate_logit_normalizer)
        self.clamp_min = -math.inf if clamp_min is None else float(clamp_min)
        self.init_weights()

    def _recur(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, memory: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        q = self.feature_map(q.unflatten(-1, [-1, self.head_k_dim]))
        k, v = self.feature_map(self._shared(k, self.head_k_dim)), self._shared(v, self.head_v_dim)
        log_decay = F.logsigmoid(norms.at_least_fp32(self.gk_proj(x))) / self.gate_logit_normalizer
        log_decay = self._shared(log_decay.clamp(min=self.clamp_min), self.head_k_dim)
        o, memory, _ = operators.gla(q, k, v, log_decay, initial_state=memory, cu_seqlens=cu_seqlens)
        return o, memory


@register_mixer("hgrn2")
class HGRN2(MatrixMixer):
    """HGRN2: a gated linear recurrence whose forget gate is also its key (Qin et al., arXiv 2404.07904, section 3).
    Names of parameters as in fla-org/flash-linear-attention's `HGRN2Attention`.

    Args:
        dim: width of the model.
        num_heads: H, each with K = V = dim / H; `None` makes them of `expand_ratio` or the next size that divides.
        expand_ratio: K, states per channel.
        use_short_conv: short convolutions behind q_proj, f_proj, i_proj.
        conv_size: their taps; conv_bias: their biases.
        lower_bound: λ, the least decay, in [0, 1). The papers learn one per layer that rises with depth from 0.
        channel_bounds: keep λ with the weights as a buffer `bounds`, a number for every channel, `lower_bound` at the
            start. Published models have learnt them.
        norm_eps: added under the root of the norm.

    Raises:
        ValueError: if `dim` is no multiple of the heads, or the bound lies outside [0, 1).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        expand_ratio: int = 128,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        lower_bound: float = 0.0,
        channel_bounds: bool = False,
        norm_eps: float = 1e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if not 0 <= lower_bound < 1:
            raise ValueError(f"lower_bound must be at least 0 and less than 1 (got {lower_bound})")
        heads = heads_of(dim, expand_ratio) if num_heads is None else num_heads
        size, taps = per_head(dim, heads, "dim"), conv_size if use_short_conv else None
        super().__init__(dim, (heads, size, size), dim, 3 * dim, taps, dd)
        self.size = size
        self.lower_bound = float(lower_bound)
        self.bounds: Tensor | None
        self.register_buffer("bounds", torch.empty(dim, **dd) if channel_bounds else None)
        self.q_proj, self.f_proj, self.i_proj = (nn.Linear(dim, dim, bias=False, **dd) for _ in range(3))
        self.q_conv1d, self.f_conv1d, self.i_conv1d = short_convolutions((dim, dim, dim), taps, conv_bias, dd)
        self.g_norm = norms.HeadRMSNorm(dim, norm_eps, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        super().init_weights()
        if self.bounds is not None:
            nn.init.constant_(self.bounds, self.lower_bound)

    def _streams(
        self, x: Tensor, conv: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, f, i = self.q_proj(x), self.f_proj(x), self.i_proj(x)
        if self.q_conv1d is None or self.f_conv1d is None or self.i_conv1d is None:
            return q, f, i, q.new_zeros([q.shape[0], 0, 0])
        else:
            weights = [self.q_conv1d.weight, self.f_conv1d.weight, self.i_conv1d.weight]
            biases = [self.q_conv1d.bias, self.f_conv1d.bias, self.i_conv1d.bias]
            return convolve_together(q, f, i, weights, biases, conv, cu_seqlens, False)

    def _recur(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, memory: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        log_decay = F.logsigmoid(norms.at_least_fp32(k))
        if self.bounds is not None:
            bounds = norms.at_least_fp32(self.bounds)
            log_decay = torch.logaddexp(torch.log(bounds), torch.log1p(-bounds) + log_decay)  # a bound may be 0
        elif self.lower_bound > 0:
            log_decay = torch.log(self.lower_bound + (1 - self.lower_bound) * torch.exp(log_decay))
        keys, heads = -torch.expm1(log_decay), [-1, self.size]
        o, memory, _ = operators.gla(
            F.silu(q).unflatten(-1, heads), keys.to(q.dtype).unflatten(-1, heads), v.unflatten(-1, heads),
            log_decay.unflatten(-1, heads), initial_state=memory, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        return o, memory

    def _normed(self, x: Tensor, o: Tensor) -> Tensor:
        y: Tensor = self.g_norm(o.flatten(-2))
        return y
