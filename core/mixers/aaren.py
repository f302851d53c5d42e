"""Aaren: attention of one learnt query to all that came before, as a recurrence.

    s_t = K^{-1/2} (q_proj(query) · k_proj(x_t))              per head
    o_t = Σ_{s≤t} exp(s_s) v_proj(x_s) / Σ_{s≤t} exp(s_s)
    y_t = o_proj(o_t)

The query does not depend on the step, so that the state is the numerator, the denominator and their common scale. This
is additive decay with a single key channel per head, s, and a query of 1.

Source: Feng et al., "Attention as an RNN" (arXiv 2405.13956), the module that it calls Aaren. We know of no code by its
authors; names of parameters are ours.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinuous.core.mixers.contract import Mixer, register_mixer, register_state
from sinuous.core.mixers.heads import per_head
from sinuous.core.mixers.states import zero_states
from sinuous.core.ops.operators import operators


@register_state
class AarenState(NamedTuple):
    """mean: weighted mean of the values so far, `[B, H, 1, V]`; log_weight: logarithm of their weights' sum,
    `[B, H, 1]`, -inf at first; both fp32 or fp64."""

    mean: Tensor
    log_weight: Tensor


@register_mixer("aaren")
class Aaren(Mixer):
    """Aaren's mixer.

    Args:
        dim: width of the model.
        num_heads: H, each with K = V = dim / H.

    Raises:
        ValueError: if `dim` is no multiple of the heads.
    """

    causal: ClassVar[bool] = True
    constant_state: ClassVar[bool] = True

    def __init__(self, dim: int, num_heads: int = 4, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.head_dim = num_heads, per_head(dim, num_heads, "dim")
        self.query = nn.Parameter(torch.empty(dim, **dd))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=False, **dd) for _ in range(4))
        self.init_weights()

    def init_weights(self) -> None:
        """Start layers by torch's rule, and the query like a token that comes out of a norm."""
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            layer.reset_parameters()
        nn.init.normal_(self.query)

    def output_weights(self) -> set[str]:
        return {"o_proj.weight"}

    def no_weight_decay(self) -> set[str]:
        return {"query"}

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, grid: list[int] | None = None) -> Tensor:
        return self._attend(x, None, None, cu_seqlens)[0]

    def _attend(
        self, x: Tensor, mean: Tensor | None, log_weight: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        # One query: its product with the projection of the keys comes first, and keys are not needed.
        query = self.q_proj(self.query).unflatten(0, [self.num_heads, 1, self.head_dim])
        onto_query = (query @ self.k_proj.weight.unflatten(0, [self.num_heads, self.head_dim])).squeeze(1)
        s = (F.linear(x, onto_query) * self.head_dim**-0.5).unsqueeze(-1)
        v = self.v_proj(x).unflatten(-1, [self.num_heads, self.head_dim])
        o, mean, log_weight, _, _ = operators.additive_decay(
            torch.ones_like(s), s, v, initial_S=mean, initial_z=log_weight, cu_seqlens=cu_seqlens, scale=1.0
        )
        return self.o_proj(o.flatten(-2)), mean, log_weight

    def prefill(self, x: Tensor, state: AarenState | None = None) -> tuple[Tensor, AarenState]:
        mean, log_weight = (None, None) if state is None else state
        y, mean, log_weight = self._attend(x, mean, log_weight, None)
        return y, AarenState(mean, log_weight)

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> AarenState:
        shape = (batch_size, self.num_heads, 1, self.head_dim)
        _, mean, log_weight = zero_states(self.query, device, dtype, (0,), shape, shape[:-1])
        return AarenState(mean, log_weight.fill_(-math.inf))
