r"""GateLoop: a complex factor per channel and step, whose modulus forgets and whose angle is a position.

    q, k, v = to_qkv(x);    α, β = to_a(x)
    a_t = σ(α_t) exp(iβ_t)
    h_t = a_t ⊙ h_{t-1} + k_t ⊙ v_t
    out = to_out( norm(q_t ⊙ Re h_t) ⊙ silu(to_gates(x_t)) )

Source: Katsch, "GateLoop: Fully Data-Controlled Linear Recurrence for Sequence Modeling" (arXiv 2311.01927), sections 3
and 4, with heads of one channel, as in its experiments; names of parameters as in
lucidrains/gateloop-transformer's `GateLoopedAttention`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sinuous.core import norms
from sinuous.core.checks import check_choice, check_sizes
from sinuous.core.mixers.contract import register_mixer
from sinuous.core.mixers.elementwise import ElementwiseMixer
from sinuous.core.ops.operators import operators

TRANSITIONS = ("polar", "cartesian")


@register_mixer("gate_loop")
class GateLoop(ElementwiseMixer):
    """GateLoop's mixer.

    Args:
        dim: width of the model.
        expand: E / dim.
        transition: `"polar"`, the equation above, is the paper's. `"cartesian"` is that of lucidrains'
            implementation: with w = α + iβ, a_t = σ(|w|) w / |w|.
        swish_gate: the gate behind the recurrence, and with it to_out where E is dim.
        sub_ln: a layer norm in front of that gate.

    Raises:
        ValueError: if a size is less than 1, or the transition is unknown.
    """

    def __init__(
        self,
        dim: int,
        expand: float = 1,
        transition: str = "polar",
        swish_gate: bool = True,
        sub_ln: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = int(expand * dim)
        check_sizes(dim=dim, d_inner=inner)
        check_choice("transition", transition, TRANSITIONS)
        super().__init__(inner, complex_hidden=True)
        self.transition = transition
        self.to_qkv = nn.Linear(dim, 3 * inner, bias=False, **dd)
        self.to_a = nn.Sequential(nn.Linear(dim, 2 * inner, **dd))
        self.maybe_sub_ln = norms.LayerNorm(inner, **dd) if sub_ln else nn.Identity()
        gates = (nn.Linear(dim, inner, bias=False, **dd), nn.SiLU())
        self.to_gates = nn.Sequential(*gates) if swish_gate else None
        lead_back = swish_gate or inner != dim
        self.to_out = nn.Linear(inner, dim, bias=False, **dd) if lead_back else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.LayerNorm):
                layer.reset_parameters()

    def output_weights(self) -> set[str]:
        return {"to_out.weight"} if isinstance(self.to_out, nn.Linear) else set()

    def _mix(
        self, x: Tensor, conv: Tensor | None, hidden: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.to_qkv(x).chunk(3, dim=-1)
        alpha, beta = norms.at_least_fp32(self.to_a(x)).unflatten(-1, [self.hidden_width, 2]).unbind(-1)
        if self.transition == "cartesian":
            vector = torch.complex(alpha, beta)
            a = torch.polar(torch.sigmoid(vector.abs()), vector.angle())
        else:
            a = torch.polar(torch.sigmoid(alpha), beta)
        kv = norms.at_least_fp32(k) * norms.at_least_fp32(v)
        kv = torch.complex(kv, torch.zeros_like(kv))
        h, hidden, _ = operators.linear_scan(kv, a, initial_state=hidden, cu_seqlens=cu_seqlens)
        y = self.maybe_sub_ln((q * torch.real(h)).to(q.dtype))
        if self.to_gates is not None:
            y = y * self.to_gates(x)
        return self.to_out(y), q.new_zeros([q.shape[0], 0, 0]), hidden
