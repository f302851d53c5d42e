"""Linear layers that several mixers have: for gates, of low rank, and block-diagonal."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinuous.core import norms
from sinuous.core.mixers.heads import per_head


def gate_of(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return `W x + b`, the bias added in at least fp32.

    A bias of -10 in half precision, autocast's included, leaves a logarithm that is off by 3 %.
    """
    return norms.at_least_fp32(F.linear(x, weight)) + norms.at_least_fp32(bias)


class LowRank(nn.Module):
    """Linear layer of low rank, `W₂ f(W₁ x) + b`, with f `tanh`, `sigmoid` or `identity`.

    A bias is added in at least fp32. Names of parameters as in fla-org/flash-linear-attention's `LoRA`.

    Args:
        dim: features of the input.
        out_features: features of the output.
        rank: features between the two matrices.
        activation: f.
        bias: add b.
    """

    def __init__(
        self, dim: int, out_features: int, rank: int, activation: str = "tanh", bias: bool = True, **dd: Any
    ) -> None:
        super().__init__()
        self.activation = activation
        self.lora = nn.ModuleDict(
            {"0": nn.Linear(dim, rank, bias=False, **dd), "2": nn.Linear(rank, out_features, bias=bias, **dd)}
        )

    def forward(self, x: Tensor) -> Tensor:
        low_rank, up = self.lora["0"](x), self.lora["2"]
        if self.activation == "tanh":
            low_rank = torch.tanh(low_rank)
        elif self.activation == "sigmoid":
            low_rank = torch.sigmoid(low_rank)
        if up.bias is None:
            return F.linear(low_rank, up.weight)  # type: ignore[arg-type]
        return gate_of(low_rank, up.weight, up.bias)  # type: ignore[arg-type]


class HeadwiseLinear(nn.Module):
    """Linear layer with a block-diagonal matrix, kept as its blocks `[blocks, size, size]`, outputs first.

    Names of parameters as in NX-AI/xlstm's `LinearHeadwiseExpand`.

    Args:
        features: of the input and of the output.
        blocks: their number; each has `features / blocks` rows and columns.
        bias: add a bias.

    Raises:
        ValueError: if `features` is no multiple of the blocks.
    """

    def __init__(self, features: int, blocks: int, bias: bool, **dd: Any) -> None:
        super().__init__()
        size = per_head(features, blocks, "the width of a block-diagonal layer")
        self.size = size
        self.weight = nn.Parameter(torch.empty(blocks, size, size, **dd))
        self.bias = nn.Parameter(torch.empty(features, **dd)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("...hd,hod->...ho", x.unflatten(-1, [-1, self.size]), self.weight).flatten(-2)
        return y if self.bias is None else y + self.bias
