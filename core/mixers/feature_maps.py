"""Feature maps φ of linear attention, applied to queries and keys, `[…, K]` to `[…, F]`.

    elu                    elu(x) + 1                             Katharopoulos et al. (arXiv 2006.16236), section 3.2
    relu, swish, identity
    t2r                    relu(W x)                              Kasai et al. (arXiv 2103.13076), section 3
    hedgehog               softmax([2 (W x + b), -2 (W x + b)])   Zhang et al. (arXiv 2402.04347), section 4; F = 2K
    dpfp                   r ⊙ roll(r, j), j = 1 … 4              Schlag et al. (arXiv 2102.11174), section 5.2; F = 8K,
                           with r = relu([x, -x])
    elementwise_product    (W x + b) ⊙ (W' x + b')

Names of parameters as in fla-org/flash-linear-attention, where dpfp is relu(x) and its negative instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinuous.core.checks import check_choice

DPFP_SHIFTS = 4


class Fixed(nn.Module):
    """Map without parameters, by its name."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "elu":
            return F.elu(x) + 1
        if self.kind == "relu":
            return F.relu(x)
        if self.kind == "swish":
            return F.silu(x)
        return x

    def extra_repr(self) -> str:
        return self.kind


class DPFP(nn.Module):
    """The map `dpfp`."""

    def __init__(self, head_dim: int, **dd: Any) -> None:
        super().__init__()
        self.shifts = DPFP_SHIFTS

    def forward(self, x: Tensor) -> Tensor:
        r = F.relu(torch.cat([x, -x], -1))
        return torch.cat([r * r.roll(j, -1) for j in range(1, self.shifts + 1)], -1)


class T2R(nn.Module):
    """The map `t2r`."""

    def __init__(self, head_dim: int, **dd: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(head_dim, head_dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x))


class Hedgehog(nn.Module):
    """The map `hedgehog`, which starts as the softmax of ±2x."""

    def __init__(self, head_dim: int, **dd: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(head_dim, head_dim, **dd)

    def init_weights(self) -> None:
        nn.init.eye_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = 2 * self.layer(x)
        return torch.cat([y, -y], -1).softmax(-1)


class ElementwiseProduct(nn.Module):
    """The map `elementwise_product`."""

    def __init__(self, head_dim: int, **dd: Any) -> None:
        super().__init__()
        self.layer1 = nn.Linear(head_dim, head_dim, **dd)
        self.layer2 = nn.Linear(head_dim, head_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer1(x) * self.layer2(x)
        return y


WIDER_OR_LEARNT: dict[str, Callable[..., nn.Module]] = {
    "dpfp": DPFP,
    "t2r": T2R,
    "hedgehog": Hedgehog,
    "elementwise_product": ElementwiseProduct,
}
ELEMENTWISE = ("identity", "elu", "relu", "swish")
NEVER_NEGATIVE = ("elu", "relu", "t2r", "hedgehog", "dpfp")
FEATURE_MAPS = (*ELEMENTWISE, *WIDER_OR_LEARNT)
_EXPANSION = {"hedgehog": 2, "dpfp": 2 * DPFP_SHIFTS}


def build_feature_map(kind: str, head_dim: int, dd: dict[str, Any], allowed: Sequence[str] = FEATURE_MAPS) -> nn.Module:
    """Build a map by its name.

    Args:
        kind: its name.
        head_dim: K.
        dd: device and dtype.
        allowed: names to choose from.

    Raises:
        ValueError: if it is not `allowed`.
    """
    check_choice("feature_map", kind, allowed)
    return WIDER_OR_LEARNT[kind](head_dim, **dd) if kind in WIDER_OR_LEARNT else Fixed(kind)


def features(kind: str, head_dim: int) -> int:
    """Number F of features that the map makes of K."""
    return head_dim * _EXPANSION.get(kind, 1)
