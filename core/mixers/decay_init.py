"""Starting values of decays: of the rates A, and of the step sizes Δ that they are multiplied by."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def init_dt(projection: nn.Linear) -> None:
    """Start step sizes as `init_dt_bias` does, spread by a projection that preserves variance.

    Source: Mamba (arXiv 2312.00752), section 3.6, and state-spaces/mamba.
    """
    bound = projection.in_features**-0.5
    nn.init.uniform_(projection.weight, -bound, bound)
    init_dt_bias(projection.bias)


def init_dt_bias(bias: Tensor, dt_min: float = 1e-3, dt_max: float = 0.1, floor: float = 1e-4) -> None:
    """Fill `bias` so that step sizes, `softplus(bias)` where nothing is added, are log-uniform in [dt_min, dt_max]."""
    with torch.no_grad():
        span = torch.rand_like(bias, dtype=torch.float32) * math.log(dt_max / dt_min)
        dt = torch.exp(span + math.log(dt_min)).clamp(min=floor)
        bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus


def init_A_log_s4d_real(A_log: Tensor) -> None:
    """Fill `A_log`, `[channels, N]`, so that `A = -exp(A_log) = -(1, …, N)` in every channel.

    Source: S4D-Real (arXiv 2206.11893), section 4.
    """
    with torch.no_grad():
        A_log.copy_(
            torch.arange(1, A_log.shape[1] + 1, dtype=torch.float32, device=A_log.device).log().expand_as(A_log)
        )


def init_A_log_uniform(A_log: Tensor, least: float, greatest: float) -> None:
    """Fill `A_log`, `[heads]`, so that `-A = exp(A_log)` is uniform between `least`, at least 1e-4, and `greatest`.

    Source: Mamba-2 (arXiv 2405.21060) as in state-spaces/mamba.
    """
    with torch.no_grad():
        A_log.copy_(torch.empty_like(A_log, dtype=torch.float32).uniform_(least, greatest).clamp(min=1e-4).log())
