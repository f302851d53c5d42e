"""Linear attention without a decay, with a fixed one per head, and with one from the input.

S_t = exp(g_t) S_{t-1} + k_t v_tᵀ,    o_t = scale · S_tᵀ q_t

linear_attention   g = 0; φ(q), φ(k);  o_t / (scale · φ(q_t) · Σ_{s≤t} φ(k_s))
retention          g = log(1 - 2^{-5-h}) in head h; q and k turned by their positions
simple_gla         g_t = logsigmoid(gk_proj(x_t)) / 16, one per head
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinuous.core import norms
from sinuous.core.checks import check_choice
from sinuous.core.mixers import positions
from sinuous.core.mixers.contract import register_mixer, register_state
from sinuous.core.mixers.feature_maps import ELEMENTWISE, NEVER_NEGATIVE, Hedgehog, build_feature_map, features
from sinuous.core.mixers.heads import per_head
from sinuous.core.mixers.matrix_mixer import GroupedMixer, SwishGatedMixer
from sinuous.core.mixers.projections import gate_of
from sinuous.core.ops.operators import operators
from sinuous.kernels.precision import real_dtype


@register_mixer("linear_attention")
class LinearAttention(GroupedMixer):
    """Linear attention (Katharopoulos et al., arXiv 2006.16236, section 3). Names of parameters as in
    fla-org/flash-linear-attention's `LinearAttention`, whose defaults are `feature_map="elementwise_product"`,
    `normalize=False`, `output_norm="rms"`.

    Args:
        dim: width of the model.
        num_heads: H.
        num_kv_heads: heads of keys and values, each shared by H / num_kv_heads queries; `None` is H.
        expand_k: width of the keys of all heads over `dim`; expand_v: that of the values.
        feature_map: φ, one of `elu` (+ 1), `relu`, `t2r`, `hedgehog`, `dpfp`, `elementwise_product`, `swish`,
            `identity`.
        tie_feature_map_qk: one learnt map for queries and keys.
        normalize: divide by the sum of the weights, as the paper does.
        norm_q: divide the features of a query by their sum; norm_k: those of a key.
        output_norm: `none`, or `rms` for an RMS norm of each head.
        norm_eps: added under its root.

    Raises:
        ValueError: if a width is no multiple of its heads, a choice is unknown, or features that may be negative are
            to be normalised.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        feature_map: str = "elu",
        tie_feature_map_qk: bool = False,
        normalize: bool = True,
        norm_q: bool = False,
        norm_k: bool = False,
        output_norm: str = "none",
        norm_eps: float = 1e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_choice("output_norm", output_norm, ("none", "rms"))
        key_dim, value_dim = round(dim * expand_k), round(dim * expand_v)
        head_k_dim = per_head(key_dim, num_heads, "the width of the keys")
        head_v_dim = per_head(value_dim, num_heads, "the width of the values")
        shape = (num_heads, features(feature_map, head_k_dim), head_v_dim + normalize)
        super().__init__(dim, key_dim, value_dim, num_heads, num_kv_heads, None, False, dd, shape)
        self.feature_map_q = build_feature_map(feature_map, head_k_dim, dd)
        self.feature_map_k = (
            self.feature_map_q if tie_feature_map_qk else build_feature_map(feature_map, head_k_dim, dd)
        )
        if normalize and feature_map not in NEVER_NEGATIVE:
            raise ValueError(
                f"normalize=True needs features that are never negative, of which {feature_map!r} is not sure; "
                f"use one of {', '.join(NEVER_NEGATIVE)}, or normalize=False with output_norm='rms'"
            )
        self.normalize = normalize
        self.norm_q = norm_q
        self.norm_k = norm_k
        self.norm = norms.HeadRMSNorm(head_v_dim, norm_eps, **dd) if output_norm == "rms" else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        super().init_weights()
        for module in (self.feature_map_q, self.feature_map_k):
            if isinstance(module, Hedgehog):
                module.init_weights()

    def _recur(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, memory: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        q = self.feature_map_q(q.unflatten(-1, [-1, self.head_k_dim]))
        k = self.feature_map_k(self._shared(k, self.head_k_dim))
        v = self._shared(v, self.head_v_dim)
        if self.norm_q:
            q = q / (q.sum(-1, keepdim=True) + 1e-4)
        if self.norm_k:
            k = k / (k.sum(-1, keepdim=True) + 1e-4)
        if self.normalize:  # a channel of ones gathers the sum of the keys, in every form of the recurrence alike
            v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        o, memory, _ = operators.ssd(q, k, v, initial_state=memory, cu_seqlens=cu_seqlens)
        if self.normalize:
            o = o[..., :-1] / (o[..., -1:] + 1e-10)
        return o, memory

    def _normed(self, x: Tensor, o: Tensor) -> Tensor:
        y: Tensor = self.norm(o)
        return y.flatten(-2)


@register_state
class RetentionState(NamedTuple):
    """conv, memory: as in `MatrixState`; position: steps so far, int64 `[B]`."""

    conv: Tensor
    memory: Tensor
    position: Tensor


@register_mixer("retention")
class Retention(SwishGatedMixer):
    """Multi-scale retention (Sun et al., arXiv 2307.08621, section 2.3), with an RMS norm of each head. Names of
    parameters as in fla-org/flash-linear-attention's `MultiScaleRetention`.

    Args:
        dim: width of the model.
        num_heads: H; head h forgets at the rate 2^{-5-h}.
        num_kv_heads: heads of keys and values, each shared by H / num_kv_heads queries; `None` is H.
        expand_k: width of the keys of all heads over `dim`; expand_v: that of the values.
        feature_map: of queries and keys before they are rotated: `identity`, `elu` (+ 1), `relu`, `swish`.
        rope_theta: base of the rotary positions.
        use_short_conv: short convolutions with silu behind q_proj, k_proj, v_proj.
        conv_size: their taps; conv_bias: their biases.
        use_output_gate: gate the output by silu(g_proj(x)).
        norm_eps: added under the root of the norm.

    Raises:
        ValueError: if a width is no multiple of its heads, or the width of a head's keys is odd.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        expand_k: float = 1.0,
        expand_v: float = 2.0,
        feature_map: str = "identity",
        rope_theta: float = 10_000.0,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        use_output_gate: bool = True,
        norm_eps: float = 1e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        taps = conv_size if use_short_conv else None
        key_dim, value_dim = round(dim * expand_k), round(dim * expand_v)
        super().__init__(
            dim, key_dim, value_dim, num_heads, num_kv_heads, taps, conv_bias, use_output_gate, norm_eps, dd
        )
        self.rope_theta = float(rope_theta)
        if self.head_k_dim % 2:
            raise ValueError(f"expand_k · dim / num_heads must be even, to be rotated in pairs (got {self.head_k_dim})")
        self.feature_map = build_feature_map(feature_map, self.head_k_dim, dd, ELEMENTWISE)
        self.init_weights()

    def init_weights(self) -> None:
        """Start with the gains of the authors' code: 2^-2.5 for input projections, 2^-1 for the output's."""
        super().init_weights()
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.g_proj):
            if layer is not None:
                nn.init.xavier_uniform_(layer.weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.o_proj.weight, gain=2**-1)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, grid: list[int] | None = None) -> Tensor:
        return self._retain(x, None, None, None, cu_seqlens)[0]

    def _retain(
        self,
        x: Tensor,
        conv: Tensor | None,
        memory: Tensor | None,
        position: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, conv = self._streams(x, conv, cu_seqlens)
        q, k = q.unflatten(-1, [-1, self.head_k_dim]), k.unflatten(-1, [-1, self.head_k_dim])
        steps = positions.steps(x, position, cu_seqlens)
        q = positions.rotate(self.feature_map(q), steps, self.rope_theta)
        k = positions.rotate(self.feature_map(k), steps, self.rope_theta)
        k, v = self._shared(k.flatten(-2), self.head_k_dim), self._shared(v, self.head_v_dim)
        decay = multi_scale_decay(x, self.num_heads)
        o, memory, _ = operators.ssd(q, k, v, decay, initial_state=memory, cu_seqlens=cu_seqlens)
        return self.o_proj(self._normed(x, o)), conv, memory

    def prefill(  # type: ignore[override]
        self, x: Tensor, state: RetentionState | None = None
    ) -> tuple[Tensor, RetentionState]:
        conv, memory, position = (None, None, None) if state is None else state
        y, conv, memory = self._retain(x, conv, memory, position, None)
        start = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device) if position is None else position
        return y, RetentionState(conv, memory, start + x.shape[1])

    def initial_state(  # type: ignore[override]
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> RetentionState:
        conv, memory = super().initial_state(batch_size, device, dtype)
        return RetentionState(conv, memory, torch.zeros(batch_size, dtype=torch.int64, device=conv.device))


@torch.fx.wrap
def multi_scale_decay(x: Tensor, heads: int) -> Tensor:
    """Logarithms of decays, `log(1 - 2^{-5-h})`, `[H]`, in at least fp32 and on the device of x."""
    dtype = real_dtype(x.dtype)
    return torch.log1p(-torch.exp2(-5 - torch.arange(heads, device=x.device, dtype=dtype)))


@register_mixer("simple_gla")
class SimpleGLA(SwishGatedMixer):
    """Gated linear attention with one gate per head: a gated RetNet without positions (Yang et al., arXiv 2312.06635,
    section 4.1; Peng et al., arXiv 2103.02143). Names of parameters as in fla-org/flash-linear-attention's
    `SimpleGatedLinearAttention`.

    Args:
        dim: width of the model.
        num_heads: H.
        num_kv_heads: heads of keys and values, each shared by H / num_kv_heads queries; `None` is H.
        expand_k: width of the keys of all heads over `dim`; expand_v: that of the values.
        feature_map: of queries and keys: `identity`, `elu` (+ 1), `relu`, `swish`.
        use_short_conv: short convolutions with silu behind q_proj, k_proj, v_proj.
        conv_size: their taps; conv_bias: their biases.
        gate_logit_normalizer: divides logsigmoid, so that little is forgotten at the start.
        norm_eps: added under the root of the norm.

    Raises:
        ValueError: if a width is no multiple of its heads.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        feature_map: str = "identity",
        use_short_conv: bool = True,
        conv_size: int = 4,
        conv_bias: bool = False,
        gate_logit_normalizer: float = 16.0,
        norm_eps: float = 1e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        taps = conv_size if use_short_conv else None
        key_dim, value_dim = round(dim * expand_k), round(dim * expand_v)
        super().__init__(dim, key_dim, value_dim, num_heads, num_kv_heads, taps, conv_bias, True, norm_eps, dd)
        self.gk_proj = nn.Linear(dim, num_heads, **dd)
        self.feature_map = build_feature_map(feature_map, self.head_k_dim, dd, ELEMENTWISE)
        self.gate_logit_normalizer = float(gate_logit_normalizer)
        self.init_weights()

    def _recur(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, memory: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        q = self.feature_map(q.unflatten(-1, [-1, self.head_k_dim]))
        k, v = self.feature_map(self._shared(k, self.head_k_dim)), self._shared(v, self.head_v_dim)
        log_decay = F.logsigmoid(gate_of(x, self.gk_proj.weight, self.gk_proj.bias)) / self.gate_logit_normalizer
        o, memory, _ = operators.ssd(q, k, v, log_decay, initial_state=memory, cu_seqlens=cu_seqlens)
        return o, memory
