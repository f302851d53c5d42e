"""Gated slot attention: softmax attention over a fixed number of slots that forget.

    g_t = logsigmoid(f_proj(x_t)) / 8,    s_t = 1 - exp g_t                          one of each per slot, M slots
    K̃_t = diag(exp g_t) K̃_{t-1} + s_t k_tᵀ,    Ṽ_t = diag(exp g_t) Ṽ_{t-1} + s_t v_tᵀ
    o_t = Ṽ_tᵀ softmax(scale · K̃_t q_t)

Two diagonal recurrences with a softmax between: the first decays its values, the second its keys.

Source: Zhang et al., "Gated Slot Attention" (arXiv 2409.07146), section 3.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinuous.core import norms
from sinuous.core.checks import check_sizes
from sinuous.core.mixers.contract import register_mixer, register_state
from sinuous.core.mixers.feature_maps import build_feature_map
from sinuous.core.mixers.matrix_mixer import GroupedMixer
from sinuous.core.mixers.states import zero_states
from sinuous.core.ops.operators import operators

FEATURE_MAPS = ("swish", "relu", "t2r")


@register_state
class GSAState(NamedTuple):
    """conv: as in `MatrixState`; keys: the keys of the slots, `[B, H, K, M]`; values: theirs, `[B, H, M, V]`."""

    conv: Tensor
    keys: Tensor
    values: Tensor


@register_mixer("gsa")
class GSA(GroupedMixer):
    """Gated slot attention's mixer. Names of parameters as in fla-org/flash-linear-attention's `GatedSlotAttention`.

    Args:
        dim: width of the model.
        num_heads: H.
        num_kv_heads: heads of keys, values and gates, each shared by H / num_kv_heads queries; `None` is H.
        num_slots: M; `None` is the width of a head's keys.
        expand_k: width of the keys of all heads over `dim`; expand_v: that of the values.
        feature_map: of queries and keys, `swish`, `relu` or `t2r`.
        use_short_conv: short convolutions with silu behind q_proj, k_proj, v_proj.
        conv_size: their taps; conv_bias: their biases.
        gate_logit_normalizer: divides logsigmoid, so that little is forgotten at the start.
        scale: of the logits.
        norm_eps: added under the root of the norm.

    Raises:
        ValueError: if a width is no multiple of its heads, there is no slot, or the feature map is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        num_slots: int | None = None,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        feature_map: str = "swish",
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        gate_logit_normalizer: float = 8.0,
        scale: float = 1.0,
        norm_eps: float = 1e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        taps = conv_size if use_short_conv else None
        key_dim, value_dim = round(dim * expand_k), round(dim * expand_v)
        super().__init__(dim, key_dim, value_dim, num_heads, num_kv_heads, taps, conv_bias, dd)
        self.num_slots = self.head_k_dim if num_slots is None else num_slots
        check_sizes(num_slots=self.num_slots)
        self.feature_map = build_feature_map(feature_map, self.head_k_dim, dd, FEATURE_MAPS)
        self.f_proj = nn.Linear(dim, num_heads // self.kv_groups * self.num_slots, bias=False, **dd)
        self.gate_logit_normalizer = float(gate_logit_normalizer)
        self.scale = float(scale)
        self.g_norm = norms.HeadRMSNorm(value_dim, norm_eps, **dd)
        self.init_weights()

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, grid: list[int] | None = None) -> Tensor:
        return self._attend(x, None, None, None, cu_seqlens)[0]

    def _attend(
        self,
        x: Tensor,
        conv: Tensor | None,
        slot_keys: Tensor | None,
        slot_values: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v, conv = self._streams(x, conv, cu_seqlens)
        q = self.feature_map(q.unflatten(-1, [-1, self.head_k_dim]))
        k = self.feature_map(self._shared(k, self.head_k_dim))
        v = F.silu(self._shared(v, self.head_v_dim))
        log_decay = F.logsigmoid(norms.at_least_fp32(self.f_proj(x))) / self.gate_logit_normalizer
        log_decay = self._shared(log_decay, self.num_slots)
        write = (-torch.expm1(log_decay)).to(q.dtype)
        logits, slot_keys, _ = operators.gla(
            q, k, write, log_decay, initial_state=slot_keys, cu_seqlens=cu_seqlens, scale=self.scale, on_values=True
        )
        weights = torch.softmax(norms.at_least_fp32(logits), -1).to(q.dtype)
        o, slot_values, _ = operators.gla(
            weights, write, v, log_decay, initial_state=slot_values, cu_seqlens=cu_seqlens, scale=1.0
        )
        return self.o_proj(self.g_norm(F.silu(o.flatten(-2)))), conv, slot_keys, slot_values

    def prefill(  # type: ignore[override]
        self, x: Tensor, state: GSAState | None = None
    ) -> tuple[Tensor, GSAState]:
        conv, keys, values = (None, None, None) if state is None else state
        y, conv, keys, values = self._attend(x, conv, keys, values, None)
        return y, GSAState(conv, keys, values)

    def initial_state(  # type: ignore[override]
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> GSAState:
        keys = (batch_size, self.num_heads, self.head_k_dim, self.num_slots)
        values = (batch_size, self.num_heads, self.num_slots, self.head_v_dim)
        return GSAState(*zero_states(self.o_proj.weight, device, dtype, (batch_size, *self.conv_shape), keys, values))
