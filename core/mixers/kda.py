"""Kimi delta attention: the gated delta rule with a decay for every channel of the keys.

    q, k, v = silu(conv(q_proj(x))), …;    q, k ← of length 1 per head
    g_t = -exp(A_log) softplus(f_proj(x_t) + dt_bias)             per channel, A_log per head; or, with a lower bound,
    g_t = lower_bound · σ(exp(A_log) (f_proj(x_t) + dt_bias))
    β_t = σ(b_proj(x_t))
    S_t = (I - β_t k_t k_tᵀ) diag(exp g_t) S_{t-1} + β_t k_t v_tᵀ;    o_t = K^{-1/2} S_tᵀ q_t
    out = o_proj(norm(o) ⊙ σ(g_proj(x)))

Source: Kimi Team, "Kimi Linear" (arXiv 2510.26692), sections 3 and 4; names of parameters as in
fla-org/flash-linear-attention's `KimiDeltaAttention`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinuous.core import norms
from sinuous.core.checks import check_sizes
from sinuous.core.mixers.contract import register_mixer
from sinuous.core.mixers.decay_init import init_A_log_uniform, init_dt_bias
from sinuous.core.mixers.heads import heads_of, per_head
from sinuous.core.mixers.matrix_mixer import QueryKeyValueMixer
from sinuous.core.ops.operators import operators

HEAD_SIZE = 128


@register_mixer("kda")
class KDA(QueryKeyValueMixer):
    """Kimi delta attention.

    Args:
        dim: width of the model.
        num_heads: heads of queries and keys; `None` makes them of 128 channels or the next size that divides.
        num_v_heads: H, heads of values, gates and state, several per key where there are more; `None` is `num_heads`.
        head_dim: K; `None` is dim / num_heads.
        expand_v: V / K.
        use_short_conv: short convolutions behind q_proj, k_proj, v_proj.
        conv_size: their taps; conv_bias: their biases.
        allow_neg_eigval: β in (0, 2) instead of (0, 1).
        lower_bound: bound of g from below, itself below 0, with the second form of the gate; `None` for the first form.
        norm_eps: added under the root of the norm.

    Raises:
        ValueError: if a size is less than 1, `num_v_heads` is no multiple of `num_heads`, or `lower_bound` is not
            negative.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        num_v_heads: int | None = None,
        head_dim: int | None = None,
        expand_v: float = 1.0,
        use_short_conv: bool = True,
        conv_size: int = 4,
        conv_bias: bool = False,
        allow_neg_eigval: bool = False,
        lower_bound: float | None = None,
        norm_eps: float = 1e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        heads = heads_of(dim, HEAD_SIZE) if num_heads is None else num_heads
        v_heads = heads if num_v_heads is None else num_v_heads
        head_dim = per_head(dim, heads, "dim") if head_dim is None else head_dim
        head_v_dim = int(head_dim * expand_v)
        check_sizes(num_heads=heads, head_dim=head_dim, head_v_dim=head_v_dim)
        if lower_bound is not None and lower_bound >= 0:
            raise ValueError(f"lower_bound must be negative (got {lower_bound}); it bounds the logarithm of a decay")
        groups = per_head(v_heads, heads, "num_v_heads")
        keys, values = heads * head_dim, v_heads * head_v_dim
        taps = conv_size if use_short_conv else None
        super().__init__(dim, (v_heads, head_dim, head_v_dim), values, (keys, keys, values), taps, conv_bias, dd)
        self.head_k_dim = head_dim
        self.head_v_dim = head_v_dim
        self.groups = groups
        self.greatest_beta = 2.0 if allow_neg_eigval else 1.0
        self.lower_bound = lower_bound
        self.f_proj = nn.Sequential(
            nn.Linear(dim, head_v_dim, bias=False, **dd), nn.Linear(head_v_dim, v_heads * head_dim, bias=False, **dd)
        )
        self.b_proj = nn.Linear(dim, v_heads, bias=False, **dd)
        self.A_log = nn.Parameter(torch.empty(v_heads, **dd))
        self.dt_bias = nn.Parameter(torch.empty(v_heads * head_dim, **dd))
        self.g_proj = nn.Sequential(nn.Linear(dim, head_v_dim, bias=False, **dd), nn.Linear(head_v_dim, values, **dd))
        self.o_norm = norms.GatedRMSNorm(head_v_dim, norm_eps, activation="sigmoid", **dd)
        self.init_weights()

    def init_weights(self) -> None:
        super().init_weights()
        if self.lower_bound is None:
            init_A_log_uniform(self.A_log, 1.0, 16.0)
        else:
            nn.init.zeros_(self.A_log)
        init_dt_bias(self.dt_bias)

    def no_weight_decay(self) -> set[str]:
        return {"A_log", "dt_bias"}

    def _log_decay(self, x: Tensor) -> Tensor:
        """Compute g, `[B, T, H, K]`."""
        z = norms.at_least_fp32(self.f_proj(x)) + norms.at_least_fp32(self.dt_bias)
        z, rate = z.unflatten(-1, [-1, self.head_k_dim]), torch.exp(norms.at_least_fp32(self.A_log)).unsqueeze(-1)
        if self.lower_bound is None:
            return -rate * F.softplus(z)
        else:
            return self.lower_bound * torch.sigmoid(rate * z)

    def _recur(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, memory: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self.q_conv1d is None:
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        q = norms.unit_length(q.unflatten(-1, [-1, self.head_k_dim]))
        k = norms.unit_length(k.unflatten(-1, [-1, self.head_k_dim]))
        if self.groups > 1:
            q, k = q.repeat_interleave(self.groups, -2), k.repeat_interleave(self.groups, -2)
        log_decay = self._log_decay(x)
        beta = torch.sigmoid(norms.at_least_fp32(self.b_proj(x))) * self.greatest_beta
        written, v = k * beta.unsqueeze(-1), v.unflatten(-1, [-1, self.head_v_dim])
        o, memory, _ = operators.dplr(
            q, written, v, log_decay, k * torch.exp(log_decay), -written, initial_state=memory, cu_seqlens=cu_seqlens
        )
        return o, memory

    def _normed(self, x: Tensor, o: Tensor) -> Tensor:
        y: Tensor = self.o_norm(o, self.g_proj(x).unflatten(-1, [-1, self.head_v_dim]))
        return y.flatten(-2)
