"""Delta rule: a new value replaces the value that the memory holds under the same key.

    S ← exp(g_t) S                                                 gated forms only
    S ← S + β_{t,j} k_{t,j} (v_{t,j} - Sᵀ k_{t,j})ᵀ,  j = 1 … n    n = 1 but for the products
    o_t = K^{-1/2} S_tᵀ q_t

    delta_net             β_t = σ(b_proj(x_t)), keys and queries of length 1
    gated_delta_net       and g_t = -exp(A_log) softplus(a_proj(x_t) + dt_bias), one per head
    delta_product         n factors per step, without g; β in (0, 2)
    gated_delta_product   n factors per step, with g; β in (0, 2)

The eigenvalues of a factor are 1 and 1 - β: `allow_neg_eigval` doubles β, so that a factor can reflect and two can
rotate (Grazzi et al., arXiv 2411.12537). Names of parameters as in fla-org/flash-linear-attention.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinuous.core import norms
from sinuous.core.checks import check_choice, check_sizes
from sinuous.core.mixers.contract import register_mixer
from sinuous.core.mixers.decay_init import init_A_log_uniform, init_dt_bias
from sinuous.core.mixers.feature_maps import Fixed
from sinuous.core.mixers.heads import per_head
from sinuous.core.mixers.matrix_mixer import QueryKeyValueMixer
from sinuous.core.ops.operators import operators

GATES = {"silu": "silu", "swish": "silu", "sigmoid": "sigmoid"}
ACTIVATIONS = {"silu": "swish", "relu": "relu", "elu": "elu", "identity": "identity"}


class DeltaRuleMixer(QueryKeyValueMixer):
    """Base of the four: a norm of each head, with a gate or without one."""

    def __init__(
        self,
        dim: int,
        memory_shape: tuple[int, int, int],
        widths: tuple[int, int, int],
        conv_size: int | None,
        conv_bias: bool,
        use_gate: bool,
        norm_eps: float,
        dd: dict[str, Any],
        conv_silu: bool = True,
        gate_activation: str = "silu",
    ) -> None:
        heads, head_k_dim, head_v_dim = memory_shape
        super().__init__(dim, memory_shape, heads * head_v_dim, widths, conv_size, conv_bias, dd, conv_silu)
        self.head_k_dim = head_k_dim
        self.head_v_dim = head_v_dim
        self.g_proj = nn.Linear(dim, heads * head_v_dim, bias=False, **dd) if use_gate else None
        self.o_norm: nn.Module
        if use_gate:
            self.o_norm = norms.GatedRMSNorm(head_v_dim, norm_eps, activation=gate_activation, **dd)
        else:
            self.o_norm = norms.HeadRMSNorm(head_v_dim, norm_eps, **dd)

    def _normed(self, x: Tensor, o: Tensor) -> Tensor:
        if self.g_proj is None:
            y: Tensor = self.o_norm(o)
        else:
            y = self.o_norm(o, self.g_proj(x).unflatten(-1, [-1, self.head_v_dim]))
        return y.flatten(-2)


@register_mixer("delta_net")
class DeltaNet(DeltaRuleMixer):
    """DeltaNet (Schlag et al., arXiv 2102.11174; Yang et al., arXiv 2406.06484, section 3). Names of parameters as in
    fla-org/flash-linear-attention's `DeltaNet`.

    Args:
        dim: width of the model.
        num_heads: H.
        expand_k: width of the keys of all heads over `dim`; expand_v: that of the values.
        use_beta: β from the input; without, 1.
        use_gate: gate the output by silu(g_proj(x)).
        use_short_conv: short convolutions behind q_proj, k_proj, v_proj.
        conv_size: their taps; conv_bias: their biases.
        allow_neg_eigval: β in (0, 2) instead of (0, 1).
        qk_activation: of queries and keys, `silu`, `relu`, `elu` (+ 1) or `identity`; that of the values is silu.
        qk_norm: `l2` for queries and keys of length 1, `sum` for entries that add to 1.
        norm_eps: added under the root of the norm.

    Raises:
        ValueError: if a width is no multiple of the heads, or a choice is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        use_beta: bool = True,
        use_gate: bool = False,
        use_short_conv: bool = True,
        conv_size: int = 4,
        conv_bias: bool = False,
        allow_neg_eigval: bool = False,
        qk_activation: str = "silu",
        qk_norm: str = "l2",
        norm_eps: float = 1e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_choice("qk_activation", qk_activation, ACTIVATIONS)
        check_choice("qk_norm", qk_norm, ("l2", "sum"))
        keys, values = round(dim * expand_k), round(dim * expand_v)
        shape = (
            num_heads,
            per_head(keys, num_heads, "the width of the keys"),
            per_head(values, num_heads, "the width of the values"),
        )
        taps, silu = conv_size if use_short_conv else None, qk_activation == "silu"
        super().__init__(dim, shape, (keys, keys, values), taps, conv_bias, use_gate, norm_eps, dd, silu)
        self.b_proj = nn.Linear(dim, num_heads, bias=False, **dd) if use_beta else None
        self.activated = use_short_conv and silu
        self.activation = Fixed(ACTIVATIONS[qk_activation])
        self.qk_norm = qk_norm
        self.greatest_beta = 2.0 if allow_neg_eigval else 1.0
        self.init_weights()

    def _recur(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, memory: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if not self.activated:
            q, k, v = self.activation(q), self.activation(k), F.silu(v)
        q, k = q.unflatten(-1, [-1, self.head_k_dim]), k.unflatten(-1, [-1, self.head_k_dim])
        if self.qk_norm == "l2":
            q, k = norms.unit_length(q), norms.unit_length(k)
        else:
            q, k = q / q.sum(-1, keepdim=True), k / k.sum(-1, keepdim=True)
        if self.b_proj is None:
            beta = torch.ones_like(norms.at_least_fp32(q[..., 0]))
        else:
            beta = torch.sigmoid(norms.at_least_fp32(self.b_proj(x)))
        v, beta = v.unflatten(-1, [-1, self.head_v_dim]), beta * self.greatest_beta
        o, memory, _ = operators.delta_rule(q, k, v, beta, initial_state=memory, cu_seqlens=cu_seqlens)
        return o, memory


class ProductMixer(DeltaRuleMixer):
    """Delta rule with n factors per step, with a forget gate or without one; n = 1 is the gated DeltaNet."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_v_heads: int | None,
        head_dim: int | None,
        expand_v: float,
        num_householder: int,
        use_forget_gate: bool,
        use_output_gate: bool,
        use_short_conv: bool,
        conv_size: int,
        conv_bias: bool,
        allow_neg_eigval: bool,
        norm_eps: float,
        dd: dict[str, Any],
        gate_activation: str = "silu",
    ) -> None:
        v_heads = num_heads if num_v_heads is None else num_v_heads
        head_dim = max(dim * 3 // (4 * max(num_heads, 1)), 1) if head_dim is None else head_dim
        head_v_dim = int(head_dim * expand_v)
        check_sizes(num_heads=num_heads, head_dim=head_dim, head_v_dim=head_v_dim, num_householder=num_householder)
        groups = per_head(v_heads, num_heads, "num_v_heads")
        keys, values = num_heads * head_dim, v_heads * head_v_dim
        widths = (keys, num_householder * keys, num_householder * values)
        taps = conv_size if use_short_conv else None
        shape = (v_heads, head_dim, head_v_dim)
        super().__init__(
            dim, shape, widths, taps, conv_bias, use_output_gate, norm_eps, dd, gate_activation=gate_activation
        )
        self.factors = num_householder
        self.groups = groups
        self.greatest_beta = 2.0 if allow_neg_eigval else 1.0
        self.b_proj = nn.Linear(dim, num_householder * v_heads, bias=False, **dd)
        self.a_proj = nn.Linear(dim, v_heads, bias=False, **dd) if use_forget_gate else None
        self.A_log = nn.Parameter(torch.empty(v_heads, **dd)) if use_forget_gate else None
        self.dt_bias = nn.Parameter(torch.empty(v_heads, **dd)) if use_forget_gate else None
        self.init_weights()

    def init_weights(self) -> None:
        super().init_weights()
        if self.A_log is not None and self.dt_bias is not None:
            init_A_log_uniform(self.A_log, 0.0, 16.0)
            init_dt_bias(self.dt_bias)

    def no_weight_decay(self) -> set[str]:
        return set() if self.A_log is None else {"A_log", "dt_bias"}

    def _log_decay(self, x: Tensor) -> Tensor | None:
        if self.a_proj is not None and self.A_log is not None and self.dt_bias is not None:
            dt = F.softplus(norms.at_least_fp32(self.a_proj(x)) + norms.at_least_fp32(self.dt_bias))
            return -torch.exp(norms.at_least_fp32(self.A_log)) * dt
        else:
            return None

    def _recur(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, memory: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self.q_conv1d is None:
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        beta = torch.sigmoid(norms.at_least_fp32(self.b_proj(x))) * self.greatest_beta
        q = norms.unit_length(q.unflatten(-1, [-1, self.head_k_dim]))
        k = norms.unit_length(k.unflatten(-1, [-1, self.head_k_dim]))
        v = v.unflatten(-1, [-1, self.head_v_dim])
        if self.factors > 1:
            k, v = k.unflatten(2, [self.factors, -1]), v.unflatten(2, [self.factors, -1])
            beta = beta.unflatten(-1, [self.factors, -1])
        if self.groups > 1:
            q, k = q.repeat_interleave(self.groups, -2), k.repeat_interleave(self.groups, -2)
        o, memory, _ = operators.delta_rule(
            q, k, v, beta, self._log_decay(x), initial_state=memory, cu_seqlens=cu_seqlens
        )
        return o, memory


@register_mixer("gated_delta_net")
class GatedDeltaNet(ProductMixer):
    """Gated DeltaNet (Yang et al., arXiv 2412.06464, section 3). Names of parameters as in
    fla-org/flash-linear-attention's `GatedDeltaNet`.

    Args:
        dim: width of the model.
        num_heads: heads of queries and keys.
        num_v_heads: H, heads of values, gates and state, several per key where there are more; `None` is `num_heads`.
        head_dim: K; `None` is 3/4 dim / num_heads, the published proportion.
        expand_v: V / K.
        use_gate: gate the output by f(g_proj(x)).
        use_short_conv: short convolutions behind q_proj, k_proj, v_proj.
        conv_size: their taps; conv_bias: their biases.
        allow_neg_eigval: β in (0, 2) instead of (0, 1).
        norm_eps: added under the root of the norm.
        output_gate_activation: f, `silu`, which is also called `swish`, or `sigmoid`.

    Raises:
        ValueError: if a size is less than 1, `num_v_heads` is no multiple of `num_heads`, or a choice is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 6,
        num_v_heads: int | None = None,
        head_dim: int | None = None,
        expand_v: float = 2.0,
        use_gate: bool = True,
        use_short_conv: bool = True,
        conv_size: int = 4,
        conv_bias: bool = False,
        allow_neg_eigval: bool = False,
        norm_eps: float = 1e-5,
        output_gate_activation: str = "silu",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_choice("output_gate_activation", output_gate_activation, GATES)
        super().__init__(
            dim, num_heads, num_v_heads, head_dim, expand_v, 1, True, use_gate, use_short_conv, conv_size, conv_bias,
            allow_neg_eigval, norm_eps, dd, GATES[output_gate_activation],
        )  # fmt: skip


@register_mixer("gated_delta_product")
class GatedDeltaProduct(ProductMixer):
    """Gated DeltaProduct: a product of n generalised Householder matrices per step (Siems et al., arXiv 2502.10297,
    section 4). Names of parameters as in fla-org/flash-linear-attention's `GatedDeltaProduct`.

    Args:
        dim: width of the model.
        num_heads: heads of queries and keys.
        num_v_heads: H, heads of values, gates and state, several per key where there are more; `None` is `num_heads`.
        head_dim: K; `None` is 3/4 dim / num_heads.
        expand_v: V / K.
        num_householder: n.
        use_output_gate: gate the output by silu(g_proj(x)).
        use_short_conv: short convolutions behind q_proj, k_proj, v_proj.
        conv_size: their taps; conv_bias: their biases.
        allow_neg_eigval: β in (0, 2) instead of (0, 1).
        norm_eps: added under the root of the norm.

    Raises:
        ValueError: if a size is less than 1, or `num_v_heads` is no multiple of `num_heads`.
    """

    forget_gate: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 6,
        num_v_heads: int | None = None,
        head_dim: int | None = None,
        expand_v: float = 2.0,
        num_householder: int = 2,
        use_output_gate: bool = True,
        use_short_conv: bool = True,
        conv_size: int = 4,
        conv_bias: bool = False,
        allow_neg_eigval: bool = True,
        norm_eps: float = 1e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            dim, num_heads, num_v_heads, head_dim, expand_v, num_householder, self.forget_gate, use_output_gate,
            use_short_conv, conv_size, conv_bias, allow_neg_eigval, norm_eps, dd,
        )  # fmt: skip


@register_mixer("delta_product")
class DeltaProduct(GatedDeltaProduct):
    """DeltaProduct (Siems et al., arXiv 2502.10297, section 4): the same without a forget gate, which is fla's layer
    with `use_forget_gate=False`. The arguments are `GatedDeltaProduct`'s."""

    forget_gate: ClassVar[bool] = False
