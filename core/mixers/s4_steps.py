"""Steps of S4 from systems that are discretised once, for models that make many steps with the same parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from sinuous.kernels.torch.discretization import as_complex, conj, dot

if TYPE_CHECKING:
    from sinuous.core.mixers.s4 import S4, LTIState


class S4System(NamedTuple):
    """A discretised system for each channel, in the dtype of its state, fp32 or fp64.

        x_t = λ ⊙ x_{t-1} - Σ_r p_r (q_r^* x_{t-1}) + b u_t,   q^* x = 2 Re(Σ_m conj(q_m) x_m)
        y_t = 2 Re(Σ_m C_m x_m) + D u_t

    Attributes:
        factor: λ, `[E, M, 2]`, one of each conjugate pair as real and imaginary part; E = channels · H, M = N/2.
        b: input, `[E, M, 2]`.
        p, q: low rank, `[R, E, M, 2]`; None for diagonal systems.
        C: readout, `[E, M, 2]`.
        D: skip weight, `[E]`.
    """

    factor: Tensor
    b: Tensor
    p: Tensor | None
    q: Tensor | None
    C: Tensor
    D: Tensor


class S4Steps(nn.Module):
    """The steps of an `S4`. Prefills are the mixer's own, and so is what stands behind the system."""

    def __init__(self, mixer: S4) -> None:
        super().__init__()
        self.mixer = mixer
        system = mixer.discrete()
        self.factor, self.b = as_complex(system.factor), as_complex(system.b)
        self.p = None if system.p is None else as_complex(system.p)
        self.q, self.readout, self.D = system.q, conj(system.C), system.D

    def prefill(self, x: Tensor, state: LTIState | None = None) -> tuple[Tensor, LTIState]:
        return self.mixer.prefill(x, state)

    def step(self, x_t: Tensor, state: LTIState) -> tuple[Tensor, LTIState]:
        """One step: `[B, H]` and a state to `[B, H]` and the next state."""
        u = x_t if self.mixer.channels == 1 else x_t.repeat(1, self.mixer.channels)
        past = state.hidden.to(self.D.dtype)
        hidden = self.factor * as_complex(past) + self.b * u.unsqueeze(-1)
        if self.p is not None and self.q is not None:
            hidden = hidden - (self.p * dot(self.q, past.unsqueeze(1)).unsqueeze(-1)).sum(1)
        after = torch.view_as_real(hidden)
        y = dot(self.readout, after) + self.D * u
        return self.mixer.finish(y.to(x_t.dtype)), state._replace(hidden=after)

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> LTIState:
        return self.mixer.initial_state(batch_size, device, dtype)
