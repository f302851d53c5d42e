r"""LRU: a complex recurrence whose factors do not depend on the input, between dense matrices.

    λ = exp(-exp(ν) + i exp(θ))                          |λ| < 1 whatever ν and θ are
    h_t = λ ⊙ h_{t-1} + exp(γ) ⊙ (B x_t)                 γ starts where it undoes the gain of the recurrence
    y_t = Re(C h_t) + D ⊙ x_t

y is read through a gated linear unit by default:

    full_glu     out1(g) ⊙ σ(out2(g)),   g = gelu(y)     half_glu1    g ⊙ σ(out2(g))
    half_glu2    y ⊙ σ(out2(g))                          gelu         g          none    y

Source: Orvieto et al., "Resurrecting Recurrent Neural Networks for Long Sequences" (arXiv 2303.06349), section 3 and
appendix A; names of parameters as in NicolasZucchet/minimal-LRU.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinuous.core import norms
from sinuous.core.checks import check_choice, check_sizes
from sinuous.core.mixers.contract import register_mixer
from sinuous.core.mixers.elementwise import ElementwiseMixer
from sinuous.core.ops.operators import operators

ACTIVATIONS = ("full_glu", "half_glu1", "half_glu2", "gelu", "none")


class ConstantFactorMixer(ElementwiseMixer):
    """Base of LRU and S5: input matrix, complex recurrence with constant factors, output matrix, gated linear unit.

    A subclass has `_system`, and calls `init_weights`.

    Args:
        dim: width of the model.
        modes: N, complex numbers of state.
        activation: how y is read, see above.
    """

    def __init__(self, dim: int, modes: int, activation: str, dd: dict[str, Any]) -> None:
        check_choice("activation", activation, ACTIVATIONS)
        super().__init__(modes, complex_hidden=True)
        self.activation = activation
        self.out1 = nn.Linear(dim, dim, **dd) if activation == "full_glu" else nn.Identity()
        self.out2 = nn.Linear(dim, dim, **dd) if "glu" in activation else nn.Identity()
        self.D = nn.Parameter(torch.empty(dim, **dd))

    def init_weights(self) -> None:
        nn.init.normal_(self.D)
        for layer in (self.out1, self.out2):
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()

    def output_weights(self) -> set[str]:
        if self.activation == "full_glu":
            return {"out1.weight", "out1.bias"}  # the bias goes through the gate, which depends on the input
        return {"D"} | {name for name, _ in self.named_parameters() if name in ("C", "C_re", "C_im")}

    def _system(self) -> tuple[Tensor, Tensor, Tensor]:
        """Compute λ, complex `[N]`; the input matrix `[2N, dim]`, real parts above imaginary ones; and the output
        matrix (Re C, -Im C), `[dim, 2N]`. All are at least fp32."""
        raise NotImplementedError

    def _mix(
        self, x: Tensor, conv: Tensor | None, hidden: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        factor, into, out_of = self._system()
        real, imag = norms.at_least_fp32(F.linear(x, into.to(x.dtype))).chunk(2, dim=-1)
        u = torch.complex(real, imag)
        h, hidden, _ = operators.linear_scan(u, factor, initial_state=hidden, cu_seqlens=cu_seqlens)
        y = F.linear(torch.cat([torch.real(h), torch.imag(h)], -1).to(x.dtype), out_of.to(x.dtype))
        return self._read(y + (self.D * x).to(y.dtype)), x.new_zeros([x.shape[0], 0, 0]), hidden

    def _read(self, y: Tensor) -> Tensor:
        if self.activation == "none":
            return y
        g = F.gelu(y, approximate="tanh")
        if self.activation == "gelu":
            return g
        gate = torch.sigmoid(self.out2(g))
        if self.activation == "half_glu2":
            return y * gate
        gated: Tensor = self.out1(g) * gate
        return gated


@register_mixer("lru")
class LRU(ConstantFactorMixer):
    """LRU's mixer.

    Args:
        dim: width of the model.
        d_state: N, complex numbers of state; `None` is dim.
        r_min, r_max: λ lies at the start in the ring between these radii, uniformly by area. Long dependencies need
            r_min near 1, 0.9 and more.
        max_phase: and between the angles 0 and this; the paper takes a tenth of π for its longest task.
        activation: how y is read: `full_glu`, `half_glu1`, `half_glu2`, `gelu` or `none`.

    Raises:
        ValueError: if a size is less than 1, the radii are not 0 ≤ r_min < r_max ≤ 1, or the activation is unknown.
    """

    def __init__(
        self,
        dim: int,
        d_state: int | None = None,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
        activation: str = "full_glu",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        modes = dim if d_state is None else d_state
        check_sizes(dim=dim, d_state=modes)
        if not 0 <= r_min < r_max <= 1:
            raise ValueError(f"r_min and r_max must be 0 ≤ r_min < r_max ≤ 1 (got {r_min} and {r_max})")
        super().__init__(dim, modes, activation, dd)
        self.r_min = r_min
        self.r_max = r_max
        self.max_phase = max_phase
        self.nu_log = nn.Parameter(torch.empty(modes, **dd))
        self.theta_log = nn.Parameter(torch.empty(modes, **dd))
        self.gamma_log = nn.Parameter(torch.empty(modes, **dd))
        self.B_re = nn.Parameter(torch.empty(modes, dim, **dd))
        self.B_im = nn.Parameter(torch.empty(modes, dim, **dd))
        self.C_re = nn.Parameter(torch.empty(dim, modes, **dd))
        self.C_im = nn.Parameter(torch.empty(dim, modes, **dd))
        self.init_weights()

    def init_weights(self) -> None:
        super().init_weights()
        modes, dim = self.B_re.shape
        for matrix, variance in ((self.B_re, 2 * dim), (self.B_im, 2 * dim), (self.C_re, modes), (self.C_im, modes)):
            nn.init.normal_(matrix, std=variance**-0.5)
        with torch.no_grad():
            # Open at both ends: a radius of 0 or 1 and an angle of 0 have no logarithm.
            area, turn = torch.rand(2, modes, device=self.nu_log.device).clamp(1e-6, 1 - 1e-6).unbind(0)
            squared = area * (self.r_max**2 - self.r_min**2) + self.r_min**2
            self.nu_log.copy_(torch.log(-0.5 * torch.log(squared)))
            self.theta_log.copy_(torch.log(self.max_phase * turn))
            self.gamma_log.copy_(0.5 * torch.log1p(-squared))

    def no_weight_decay(self) -> set[str]:
        return {"nu_log", "theta_log", "gamma_log", "B_re", "B_im"}

    def _system(self) -> tuple[Tensor, Tensor, Tensor]:
        decay = torch.exp(-torch.exp(norms.at_least_fp32(self.nu_log)))
        factor = torch.polar(decay, torch.exp(norms.at_least_fp32(self.theta_log)))
        gain = torch.exp(norms.at_least_fp32(self.gamma_log)).repeat(2).unsqueeze(1)
        return factor, gain * torch.cat([self.B_re, self.B_im]), torch.cat([self.C_re, -self.C_im], 1)
