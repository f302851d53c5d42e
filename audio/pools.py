"""Pools of SaShiMi: p steps become one that is wider, and back, with what a step at a time needs to carry.

    down    y_j = W [x_{jp}; …; x_{jp+p-1}] + b                    `[B, T, D]` to `[B, T/p, E]`
    up      [y_{jp}; …; y_{jp+p-1}] = W x_{j-1} + b                `[B, T/p, E]` to `[B, T, D]`, zeros for j = 0

The p steps lie side by side in each channel: column h p + s of the matrix is channel h at step s of its group. A step
of the narrow stream sees only groups that ended before it, so that a net of pools stays causal. Without the shift,
`[y_{jp}; …] = W x_j + b`.

Source: Goel et al. (arXiv 2202.09729), section 4.1; names of parameters as in state-spaces/s4.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinuous.core import norms


class WeightNormLinear(nn.Module):
    """Linear layer whose rows have a learned length: `y = (g v / ‖v‖) x + b`, the norm taken over each row of v.

    Source: Salimans and Kingma (arXiv 1602.07868); names of parameters as torch's `weight_norm` has them.
    """

    def __init__(self, in_features: int, out_features: int, **dd: Any) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(out_features, 1, **dd))
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features, **dd))
        self.bias = nn.Parameter(torch.empty(out_features, **dd))
        self.reset_parameters()

    @property
    def weight(self) -> Tensor:
        """The matrix `[out, in]`."""
        length: Tensor = torch.linalg.vector_norm(self.weight_v, dim=1, keepdim=True)
        return self.weight_v * (self.weight_g / length)

    def reset_parameters(self) -> None:
        """As torch's linear layers start."""
        bound = 1 / math.sqrt(self.weight_v.shape[1])
        nn.init.uniform_(self.weight_v, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)
        with torch.no_grad():
            self.weight_g.copy_(torch.linalg.vector_norm(self.weight_v, dim=1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Pool(nn.Module):
    """What both pools have: p and a linear layer, weight-normed on request."""

    def __init__(self, in_features: int, out_features: int, pool: int, weight_norm: bool, dd: dict[str, Any]) -> None:
        super().__init__()
        self.pool = pool
        self.linear = (WeightNormLinear if weight_norm else nn.Linear)(in_features, out_features, **dd)

    def project(self, x: Tensor) -> Tensor:
        """Apply the linear layer in its own dtype, and keep the stream in at least fp32."""
        y: Tensor = self.linear(x.to(self.linear.bias.dtype))
        return norms.at_least_fp32(y)


class DownPool(Pool):
    """Makes one step of width `wide` out of `pool` steps of width `narrow`.

    Args:
        narrow: D.
        wide: E.
        pool: p.
        weight_norm: the linear layer is weight-normed.
        whole: the last group is filled up with zeros; else it is left out until it is whole.
        dd: device and dtype of the parameters.
    """

    def __init__(self, narrow: int, wide: int, pool: int, weight_norm: bool, whole: bool, dd: dict[str, Any]) -> None:
        super().__init__(narrow * pool, wide, pool, weight_norm, dd)
        self.whole = whole

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, D]` to `[B, T/p, E]`, of any T."""
        if self.whole:
            x = F.pad(x, (0, 0, 0, -x.shape[1] % self.pool))
        return self._groups(x[:, : x.shape[1] // self.pool * self.pool])

    def prefill(self, x: Tensor, gathered: Tensor) -> tuple[Tensor, Tensor]:
        """Go on from the steps `[B, 0 … p-1, D]` of a group that is not whole; returns wide steps and such a group."""
        x = torch.cat([gathered.to(x.dtype), x], 1)
        groups = x.shape[1] // self.pool * self.pool
        return self._groups(x[:, :groups]), x[:, groups:]

    def _groups(self, x: Tensor) -> Tensor:
        return self.project(x.unflatten(1, (x.shape[1] // self.pool, self.pool)).transpose(2, 3).flatten(2))


class UpPool(Pool):
    """Makes `pool` steps of width `narrow` out of one of width `wide`, which is the group's before them.

    Args:
        wide: E.
        narrow: D.
        pool: p.
        weight_norm: the linear layer is weight-normed.
        shift: steps are made of the group before them, zeros in the first one; else of their own.
        dd: device and dtype of the parameters.
    """

    def __init__(self, wide: int, narrow: int, pool: int, weight_norm: bool, shift: bool, dd: dict[str, Any]) -> None:
        super().__init__(wide, narrow * pool, pool, weight_norm, dd)
        self.narrow, self.shift = narrow, shift

    def forward(self, x: Tensor, length: int) -> Tensor:
        """`[B, T/p, E]` to `[B, T, D]`, the first `length` steps of them."""
        steps = self._steps(x)
        if self.shift:
            steps = F.pad(steps, (0, 0, self.pool, 0))
        return steps[:, :length]

    def prefill(self, x: Tensor, queued: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Go on from steps `[B, 1 … p, D]` that are made but not given; returns `length` steps and those left."""
        steps = queued
        if x.shape[1]:
            made = self._steps(x)
            steps = torch.cat([queued.to(made.dtype), made], 1)
        return steps[:, :length], steps[:, length:]

    def _steps(self, x: Tensor) -> Tensor:
        steps: Tensor = self.project(x).unflatten(2, (self.narrow, self.pool)).transpose(2, 3).flatten(1, 2)
        return steps
