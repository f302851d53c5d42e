r"""S4: a linear system for each channel, read through a gated linear unit. S4D is S4 with a diagonal system.

    Δ = exp(inv_dt) or softplus(inv_dt), times the rate;    A = -exp(A_real) - i A_imag    (minus P P^* in S4)
    x' = A x + B u,   y = 2 Re(C x) + D ⊙ u                 discretised by Δ: the op `lti_conv`
    out = GLU(W gelu(y) + b)

The real part is negative whatever the parameters are, and so is that of `A - P P^*`: the recurrence cannot blow up.
Channel h reads the system h mod n_ssm. The layers of both directions add a second readout C, from the other end and
over the steps after the current one.

C is the recurrence's own. The authors' S4 stores `C (1 - Ā^L)` once it has been run, with L in `l_kernel`; such a state
dict is converted back to C when it is loaded. Those of S4D store C itself.

Training: A, B, P and Δ need a small learning rate and no weight decay; `learning_rates` and `no_weight_decay` say which
parameters to `sinuous train`, and so does the attribute `_optim` to the authors' trainers.

Source: Gu, Goel and Ré (arXiv 2111.00396), S4; Gu et al. (2206.11893), S4D, section 4; Goel et al. (2202.09729),
section 4.2, for the sign of the low rank; Gupta et al. (2203.14343), DSS, section 3; names of parameters as in
state-spaces/s4, version 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinuous.core import hippo, norms
from sinuous.core.checks import check_choice, check_sizes
from sinuous.core.mixers.contract import Mixer, register_mixer, register_state
from sinuous.core.mixers.delay import one_step_late
from sinuous.core.mixers.s4_steps import S4Steps, S4System
from sinuous.core.mixers.states import zero_states
from sinuous.core.ops.operators import operators
from sinuous.kernels.torch.discretization import conj, discretize, matrix

DISCRETIZATIONS = {"dplr": ("bilinear",), "diag": ("zoh", "bilinear", "dss")}
INITS = {"dplr": "legs", "diag": "diag-lin"}
FINAL_ACTS = ("glu", "id")
SPECIAL = ("A_real", "A_imag", "B", "P", "inv_dt")


@register_state
class LTIState(NamedTuple):
    """hidden: one of each conjugate pair of numbers of state, as real and imaginary part, `[B, E, M, 2]`, E channels,
    fp32 or fp64."""

    hidden: Tensor


def true_readout(readout: Tensor, steps: int, dt: Tensor, A: Tensor, B: Tensor, P: Tensor) -> Tensor:
    """Solve for C, given `C (1 - Ā^steps)`, in pairs `[…, D, M, 2]`.

    dt, A, B and P are those of `lti_conv`, discretised by the trapezoidal rule.
    """
    factor, _, p, q = discretize(dt.double(), A.double(), B.double(), P.double(), "bilinear")
    assert p is not None
    assert q is not None
    power = torch.linalg.matrix_power(matrix(factor, p, q), steps)
    left = torch.eye(power.shape[-1], dtype=power.dtype, device=power.device) - power
    rows = conj(readout.double()).flatten(-2).unsqueeze(-2)
    solution: Tensor = torch.linalg.solve(left, rows, left=False)
    return conj(solution.squeeze(-2).unflatten(-1, (-1, 2))).to(readout)


class S4Kernel(nn.Module):
    """Parameters of the systems: `forward` returns dt `[H]`, A and B `[H, M, 2]`, or `[M, 2]` where there is one
    system, C `[readouts, H, M, 2]`, and P `[R, H, M, 2]` or `[R, M, 2]`, or None."""

    def __init__(
        self, dim: int, modes: int, systems: int, readouts: int, rank: int, dt_transform: str, dd: dict[str, Any]
    ) -> None:
        super().__init__()
        self.dt_transform = dt_transform
        self.repeats = dim // systems
        self.shared = systems == 1
        self.C = nn.Parameter(torch.empty(readouts, dim, modes, 2, **dd))
        self.inv_dt = nn.Parameter(torch.empty(dim, 1, **dd))
        self.B = nn.Parameter(torch.empty(1, systems, modes, 2, **dd))
        self.A_real = nn.Parameter(torch.empty(systems, modes, **dd))
        self.A_imag = nn.Parameter(torch.empty(systems, modes, **dd))
        self.P = nn.Parameter(torch.empty(rank, systems, modes, 2, **dd)) if rank else None

    def reset_parameters(self, start: hippo.Start, dt_min: float, dt_max: float) -> None:
        nn.init.normal_(self.C, std=0.5**0.5)
        with torch.no_grad():
            dt = torch.empty(self.inv_dt.shape, device=self.inv_dt.device).uniform_(math.log(dt_min), math.log(dt_max))
            self.inv_dt.copy_(dt if self.dt_transform == "exp" else torch.log(torch.expm1(torch.exp(dt))))
            self.A_real.copy_(torch.log((-start.A.real).clamp_min(1e-4)))
            self.A_imag.copy_(-start.A.imag)
            self.B.copy_(torch.view_as_real(start.B))
            if self.P is not None:
                self.P.copy_(torch.view_as_real(start.P.resolve_conj()))

    def _of_channels(self, t: Tensor) -> Tensor:
        """Repeat the systems, on the third axis from the end, for the channels; drop the axis where all share one."""
        if self.shared:
            return t.squeeze(-3)
        return torch.cat([t] * self.repeats, -3)

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        raw = norms.at_least_fp32(self.inv_dt).squeeze(1)
        dt = torch.exp(raw) if self.dt_transform == "exp" else F.softplus(raw)
        A = torch.stack([-torch.exp(norms.at_least_fp32(self.A_real)), -norms.at_least_fp32(self.A_imag)], -1)
        B = norms.at_least_fp32(self.B).squeeze(0)
        P = self.P
        low_rank = None if P is None else self._of_channels(norms.at_least_fp32(P))
        return dt, self._of_channels(A), self._of_channels(B), norms.at_least_fp32(self.C), low_rank

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.take_length_out(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def take_length_out(self, state_dict: MutableMapping[str, Tensor], prefix: str) -> None:
        """Replace C in the authors' layout by that of the recurrence, and drop the length that it was made for.

        `prefix` is the kernel's place in `state_dict`, with a dot behind it.
        """
        steps = state_dict.pop(prefix + "l_kernel", None)
        if self.P is not None and steps is not None and int(steps) > 0:
            state_dict[prefix + "C"] = self._true_readout(state_dict, prefix, int(steps))

    def _true_readout(self, stored: Mapping[str, Tensor], prefix: str, steps: int) -> Tensor:
        raw, A_real, A_imag, B, P, C = (
            stored[prefix + name].double() for name in ("inv_dt", "A_real", "A_imag", "B", "P", "C")
        )
        dt = (torch.exp(raw) if self.dt_transform == "exp" else F.softplus(raw)).squeeze(1)
        A = self._of_channels(torch.stack([-torch.exp(A_real), -A_imag], -1))
        return true_readout(C, steps, dt, A, self._of_channels(B.squeeze(0)), self._of_channels(P))


class S4Conv(nn.Module):
    """Parameters of the convolution and its skip weight D `[readouts, H]`; `S4` applies them."""

    def __init__(self, kernel: S4Kernel, channels: int, dim: int, dropout: float, dd: dict[str, Any]) -> None:
        super().__init__()
        self.D = nn.Parameter(torch.empty(channels, dim, **dd))
        self.kernel = kernel
        self.drop = nn.Dropout(dropout)


@register_mixer("s4")
class S4(Mixer):
    """S4's mixer: A is diagonal plus low rank, discretised by the trapezoidal rule.

    Args:
        dim: width of the model, H.
        d_state: N, size of each state, conjugates included.
        init: start of the systems, see `sinuous.core.hippo.start`; `None` is `legs` in S4, `diag-lin` in
            S4D.
        disc: rule that discretises them: `bilinear` in S4; `zoh`, `bilinear` or `dss` in S4D, where it is zero-order
            hold with the response divided by its sum over `l_max` steps, mode by mode. `None` is the first of these.
        rank: R, rank of P in S4; `None` is as many as the start needs.
        n_ssm: systems (A, B, P), which channels share; must divide `dim`. `None` is one for each channel.
        channels: readouts of each system, C and D, which the output matrix mixes.
        dt_min, dt_max: steps are log-uniform between these at the start.
        dt_transform: `exp`, or `softplus`, as in the authors' later runs.
        rate: factor of the steps, for inputs that are sampled at another rate than those of training: 2 for half as
            many samples.
        l_max: steps that `dss` divides over.
        lr: peak learning rate of A, B, P and Δ, which `learning_rates` reports; `None` for that of all parameters.
        final_act: activation behind the output matrix: `glu`, for which it has twice as many rows, or `id`.
        dropout: rate behind the convolution and again behind its activation.

    Raises:
        ValueError: if a size is less than 1 or does not divide what it must, a choice is unknown, the rank is too low,
            or `dss` has no `l_max`.
    """

    causal: ClassVar[bool] = True
    constant_state: ClassVar[bool] = True
    mode: ClassVar[str] = "dplr"

    def __init__(
        self,
        dim: int,
        d_state: int = 64,
        init: str | None = None,
        disc: str | None = None,
        rank: int | None = None,
        n_ssm: int | None = None,
        channels: int = 1,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_transform: str = "exp",
        rate: float = 1.0,
        l_max: int | None = None,
        lr: float | None = 0.001,
        final_act: str = "glu",
        dropout: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        systems = dim if n_ssm is None else n_ssm
        check_sizes(dim=dim, d_state=d_state, n_ssm=systems, channels=channels)
        if dim % systems:
            raise ValueError(f"n_ssm must divide dim = {dim} (got {systems})")
        known = DISCRETIZATIONS[self.mode]
        disc = known[0] if disc is None else disc
        check_choice("disc", disc, known)
        if disc == "dss" and l_max is None:
            raise ValueError("disc='dss' divides by a sum over time; pass its number of steps as l_max")
        check_choice("dt_transform", dt_transform, ("exp", "softplus"))
        check_choice("final_act", final_act, FINAL_ACTS)
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"dt_min and dt_max must be 0 < dt_min ≤ dt_max (got {dt_min} and {dt_max})")
        if rank is not None and self.mode == "diag":
            raise ValueError(f"a diagonal system has no rank (got {rank}); use mixer 's4'")
        self.d_state, self.systems, self.channels = d_state, systems, channels
        self.init = INITS[self.mode] if init is None else init
        self.rank, self.dt_min, self.dt_max, self.rate, self.lr = rank, dt_min, dt_max, rate, lr
        self.discretization = "zoh" if disc == "dss" else disc
        self.normalised_steps = float(l_max) if disc == "dss" and l_max is not None else 0.0
        ranks = self._start().P.shape[0]
        self.two_sided = not self.causal
        readouts = 2 * channels if self.two_sided else channels
        kernel = S4Kernel(dim, d_state // 2, systems, readouts, ranks, dt_transform, dd)
        self.layer = S4Conv(kernel, channels, dim, dropout, dd)
        self.drop = nn.Dropout(dropout)
        gated = final_act == "glu"
        self.output_linear = nn.Sequential(
            nn.Linear(channels * dim, 2 * dim if gated else dim, **dd), nn.GLU(-1) if gated else nn.Identity()
        )
        self.init_weights()

    def _start(self) -> hippo.Start:
        try:
            start = hippo.start(self.init, self.d_state, self.systems, self.rank)
        except ValueError as error:
            raise ValueError(f"init, d_state or rank make no start (got {self.init!r}): {error}") from None
        if self.mode == "diag":
            return start._replace(P=start.P[:0])
        if not start.P.any():  # where its gradient is 0 as well
            raise ValueError(
                f"init={self.init!r} has no low rank; use mixer 's4d', or 'legs', 'legt', 'fout' or 'hippo'"
            )
        return start

    def init_weights(self) -> None:
        self.layer.kernel.reset_parameters(self._start(), self.dt_min, self.dt_max)
        nn.init.normal_(self.layer.D)
        for layer in self.output_linear:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        for name in SPECIAL:
            parameter = getattr(self.layer.kernel, name)
            if parameter is not None:
                parameter._optim = {"weight_decay": 0.0} | ({} if self.lr is None else {"lr": self.lr})

    def output_weights(self) -> set[str]:
        return {"output_linear.0.weight"}

    def no_weight_decay(self) -> set[str]:
        kernel = self.layer.kernel
        return {f"layer.kernel.{name}" for name in SPECIAL if getattr(kernel, name) is not None}

    def learning_rates(self) -> dict[str, float]:
        """Learning rates, by name, of parameters that need another one than the rest; absolute."""
        return {} if self.lr is None else dict.fromkeys(sorted(self.no_weight_decay()), self.lr)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, grid: list[int] | None = None) -> Tensor:
        return self._mix(x, None, cu_seqlens)[0]

    def prefill(self, x: Tensor, state: LTIState | None = None) -> tuple[Tensor, LTIState]:
        if self.two_sided:
            super().prefill(x)  # which refuses
        y, hidden = self._mix(x, None if state is None else state.hidden, None)
        return y, LTIState(hidden)

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> LTIState:
        if self.two_sided:
            super().initial_state(batch_size)  # which refuses
        shape = (batch_size, self.layer.D.numel(), self.d_state // 2, 2)
        return LTIState(zero_states(self.layer.D, device, dtype, (0,), shape)[1])

    def _normalised(self, C: Tensor, dt: Tensor, A: Tensor) -> Tensor:
        """Divide C by 2 Σ_l exp(ΔA l) (exp(ΔA) - 1) over l < l_max, which is 2 (exp(ΔA l_max) - 1).

        The 2 is there because DSS reads the real part once.
        """
        z = dt.unsqueeze(-1).unsqueeze(-1) * A * self.normalised_steps
        size, turn = torch.exp(z[..., 0]), z[..., 1]
        eigenvalue = torch.complex(A[..., 0], A[..., 1])
        x = torch.complex(size * torch.cos(turn) - 1, size * torch.sin(turn)) * eigenvalue
        # As the authors: bounded where the sum of a mode that turns with the length is next to nothing.
        scale = torch.conj_physical(x) / (torch.real(x).square() + torch.imag(x).square() + 1e-7) * eigenvalue
        scaled = 0.5 * torch.complex(C[..., 0], C[..., 1]) * scale
        return torch.stack([torch.real(scaled), torch.imag(scaled)], -1)

    def _continuous(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        """dt, A, B, C `[readouts, H, M, 2]`, P and D of every channel of every readout."""
        dt, A, B, C, P = self.layer.kernel()
        dt, channels = dt * self.rate, self.channels
        if self.normalised_steps > 0:
            C = self._normalised(C, dt, A)
        if channels > 1:
            dt = dt.repeat(channels)
            if not self.layer.kernel.shared:
                A, B = A.repeat(channels, 1, 1), B.repeat(channels, 1, 1)
                P = None if P is None else P.repeat(1, channels, 1, 1)
        return dt, A, B, C, P, norms.at_least_fp32(self.layer.D).flatten()

    def discrete(self) -> S4System:
        """The recurrence of a step, discretised in double precision as `lti_conv` does it.

        Raises:
            NotImplementedError: if the mixer looks at the future.
        """
        if self.two_sided:
            super().initial_state(1)  # which refuses
        dt, A, B, C, P, D = self._continuous()
        parts = discretize(dt, A, B, P, self.discretization)
        factor, b, p, q = (None if part is None else part.to(C.dtype) for part in parts)
        assert factor is not None
        assert b is not None
        return S4System(factor, b, p, q, C.flatten(0, 1), D)

    def for_steps(self) -> nn.Module:
        """A mixer that makes the same steps, with systems discretised once; it does not see later changes of them."""
        return self if self.two_sided else S4Steps(self)

    def _mix(self, x: Tensor, hidden: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute the output, and the hidden state after the last step."""
        dt, A, B, C, P, D = self._continuous()
        channels = self.channels
        if channels > 1:
            x = x.repeat(1, 1, channels)
        past = C[:channels].flatten(0, 1)
        rule = self.discretization
        y, hidden = operators.lti_conv(
            x, dt, A, B, past, P=P, D=D, initial_state=hidden, cu_seqlens=cu_seqlens, discretization=rule
        )
        if self.two_sided:
            future = C[channels:].flatten(0, 1)
            back, _ = operators.lti_conv(
                x, dt, A, B, future, P=P, cu_seqlens=cu_seqlens, discretization=rule, reverse=True
            )
            y = y + one_step_late(back, cu_seqlens, True)
        return self.finish(y), hidden

    def finish(self, y: Tensor) -> Tensor:
        """The output of what all channels read, `[..., channels H]` to `[..., H]`."""
        mixed: Tensor = self.output_linear(self.drop(F.gelu(self.layer.drop(y))))
        return mixed


@register_mixer("s4d")
class S4D(S4):
    """S4D's mixer: A is diagonal, discretised by zero-order hold. The arguments are those of `S4`."""

    mode: ClassVar[str] = "diag"


@register_mixer("s4_bidirectional")
class S4Bidirectional(S4):
    """S4 with a second readout C from the other end, `y_t + Σ_{j≥1} K'_{j-1} u_{t+j}`, and shared A, B and P."""

    causal: ClassVar[bool] = False
    constant_state: ClassVar[bool] = False


@register_mixer("s4d_bidirectional")
class S4DBidirectional(S4Bidirectional):
    """S4D with a second readout from the other end, see `S4Bidirectional`."""

    mode: ClassVar[str] = "diag"
