r"""S5: one state-space model of all channels, diagonal and complex, discretised with one step size per mode.

    x'(t) = Λ x(t) + B u(t)                              in discrete time, with Δ = exp(log_step):
    λ = exp(ΛΔ),                B̄ = (λ - 1) / Λ · B      zoh, or
    λ = (1 + ΛΔ/2) / (1 - ΛΔ/2),  B̄ = Δ / (1 - ΛΔ/2) · B    bilinear
    x_t = λ ⊙ x_{t-1} + B̄ u_t
    y_t = 2 Re(C x_t) + D ⊙ u_t                          the 2 for the conjugate modes, which are not computed

y is read as in `sinuous.core.mixers.lru`.

Source: Smith et al., "Simplified State Space Layers for Sequence Modeling" (arXiv 2208.04933), sections 3 and 4 and
appendix B; names of parameters as in lindermanlab/S5.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sinuous.core import norms
from sinuous.core.checks import check_choice, check_sizes
from sinuous.core.hippo import normal_part
from sinuous.core.mixers.contract import register_mixer
from sinuous.core.mixers.heads import per_head
from sinuous.core.mixers.lru import ConstantFactorMixer
from sinuous.core.ops.lti_conv import DISCRETIZATIONS

C_INITS = ("trunc_standard_normal", "lecun_normal", "complex_normal")


def lecun_normal(*shape: int, fan_in: int) -> Tensor:
    """Draw from a normal distribution of variance 1 / fan_in, cut at two standard deviations; fp64 on the CPU."""
    std = fan_in**-0.5 / 0.87962566103423978  # the cut makes the deviation smaller by this factor
    return nn.init.trunc_normal_(torch.empty(shape, dtype=torch.float64, device="cpu"), std=std, a=-2 * std, b=2 * std)


@register_mixer("s5")
class S5(ConstantFactorMixer):
    """S5's mixer.

    Args:
        dim: width of the model.
        d_state: P, size of the state, conjugate modes included; `None` is dim, or dim + 1 where that is odd.
        blocks: J, blocks of the matrix that Λ starts from.
        conj_sym: the modes come in conjugate pairs, of which one is computed; without, all P are.
        discretization: `zoh` or `bilinear`.
        dt_min, dt_max: steps are log-uniform between these at the start.
        step_rescale: factor of the steps, for inputs that are sampled at another rate than those of training.
        clip_eigs: keep the real part of Λ below -0.0001. Without, as in the authors' own runs, training can make the
            model unstable.
        C_init: `trunc_standard_normal` or `lecun_normal`, both in the basis of HiPPO, or `complex_normal` in that of
            the modes.
        activation: how y is read: `full_glu`, `half_glu1`, `half_glu2`, `gelu` or `none`.

    Raises:
        ValueError: if a size is less than 1, P is no multiple of J, a block of a conjugate model is odd, or a choice is
            unknown.
    """

    def __init__(
        self,
        dim: int,
        d_state: int | None = None,
        blocks: int = 1,
        conj_sym: bool = True,
        discretization: str = "zoh",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        step_rescale: float = 1.0,
        clip_eigs: bool = True,
        C_init: str = "trunc_standard_normal",
        activation: str = "half_glu1",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        state = dim + dim % 2 if d_state is None else d_state
        check_sizes(dim=dim, d_state=state, blocks=blocks)
        block = per_head(state, blocks, "d_state")
        if conj_sym and block % 2:
            raise ValueError(f"a block must be even for conjugate pairs (got {block}); or give conj_sym=False")
        check_choice("discretization", discretization, DISCRETIZATIONS)
        check_choice("C_init", C_init, C_INITS)
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"dt_min and dt_max must be 0 < dt_min ≤ dt_max (got {dt_min} and {dt_max})")
        modes = state // 2 if conj_sym else state
        super().__init__(dim, modes, activation, dd)
        self.d_state = state
        self.blocks = blocks
        self.conj_sym = conj_sym
        self.discretization = discretization
        self.dt_min = dt_min
        self.dt_max = dt_max
        self.step_rescale = step_rescale
        self.clip_eigs = clip_eigs
        self.C_init = C_init
        self.Lambda_re = nn.Parameter(torch.empty(modes, **dd))
        self.Lambda_im = nn.Parameter(torch.empty(modes, **dd))
        self.B = nn.Parameter(torch.empty(modes, dim, 2, **dd))
        self.C = nn.Parameter(torch.empty(dim, modes, 2, **dd))
        self.log_step = nn.Parameter(torch.empty(modes, 1, **dd))
        self.init_weights()

    def init_weights(self) -> None:
        super().init_weights()
        dim, state = self.D.shape[0], self.d_state
        eigenvalues, vectors = normal_part("legs", state // self.blocks)
        modes = self.hidden_width // self.blocks  # of conjugate pairs, the first half
        basis = torch.block_diag(*[vectors[:, :modes]] * self.blocks)
        with torch.no_grad():
            self.Lambda_re.copy_(eigenvalues.real[:modes].repeat(self.blocks))
            self.Lambda_im.copy_(eigenvalues.imag[:modes].repeat(self.blocks))
            self.B.copy_(torch.view_as_real(basis.mH @ lecun_normal(state, dim, fan_in=state).to(basis.dtype)))
            if self.C_init == "complex_normal":
                self.C.normal_(std=0.5**0.5)
            else:
                fan_in = state if self.C_init == "trunc_standard_normal" else state * dim
                C = torch.view_as_complex(lecun_normal(dim, state, 2, fan_in=fan_in))
                self.C.copy_(torch.view_as_real(C @ basis))
            self.log_step.uniform_(math.log(self.dt_min), math.log(self.dt_max))

    def no_weight_decay(self) -> set[str]:
        return {"Lambda_re", "Lambda_im", "log_step", "B"}

    def _system(self) -> tuple[Tensor, Tensor, Tensor]:
        real = norms.at_least_fp32(self.Lambda_re)
        real = real.clamp(max=-1e-4) if self.clip_eigs else real
        eigenvalue = torch.complex(real, norms.at_least_fp32(self.Lambda_im))
        step = self.step_rescale * torch.exp(norms.at_least_fp32(self.log_step).squeeze(1))
        if self.discretization == "zoh":
            factor, gain = torch.exp(eigenvalue * step), torch.expm1(eigenvalue * step) / eigenvalue
        else:
            factor = (1 + 0.5 * eigenvalue * step) / (1 - 0.5 * eigenvalue * step)
            gain = step / (1 - 0.5 * eigenvalue * step)
        B = gain.unsqueeze(1) * torch.view_as_complex(norms.at_least_fp32(self.B).contiguous())
        C = norms.at_least_fp32(self.C) * (2.0 if self.conj_sym else 1.0)
        into = torch.cat([torch.real(B), torch.imag(B)])
        return factor, into, torch.cat([C[..., 0], -C[..., 1]], 1)
