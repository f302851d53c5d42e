"""Registered operators, with the types that `torch.ops` keeps from type checkers: `operators` is `torch.ops.sinuous`.

Layers call these, since TorchScript, FX and torch.export take them as they are; people call the public functions of
`sinuous.core.ops`. Arguments, their order and defaults are those of the records in `sinuous.kernels.arguments`; the
last one, `backend`, is empty for the fastest that can run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from sinuous.core.ops import permutations  # noqa: F401  (registers take_orders and sum_orders)

One = Callable[..., Tensor]
Two = Callable[..., tuple[Tensor, Tensor]]
Three = Callable[..., tuple[Tensor, Tensor, Tensor]]
Five = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
Seven = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]
Ten = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]


class Operators(Protocol):
    """Outputs of each operator: those of the public function, then what only its backward pass reads."""

    additive_decay: Five
    causal_conv1d: Two
    dag_scan: Two
    delta_rule: Three
    dplr: Three
    gla: Three
    grid_scan: Three
    linear_scan: Three
    longhorn: Three
    lti_conv: Two
    mlstm: Seven
    selective_scan: Three
    slstm: Ten
    ssd: Three
    sum_orders: One
    take_orders: One


if TYPE_CHECKING:
    operators: Operators
else:
    operators = torch.ops.sinuous
