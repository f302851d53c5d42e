"""Normalisation whose arithmetic does not lose precision in half-precision models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# FX cannot branch on the dtype of a traced value: the function stays one node. `wrap` patches this module's own
# namespace, so callers write `norms.at_least_fp32(x)`.
@torch.fx.wrap
def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in fp32, or unchanged where it is fp64."""
    return x if x.dtype == torch.float64 else x.float()


class RMSNorm(nn.Module):
    """`y = x / sqrt(mean(x²) + eps) ⊙ weight` over the last axis.

    The arithmetic has the input's dtype, which in our backbones is the fp32 of the residual stream; the output has the
    dtype of the weight, which is that of the layers that follow.

    Source: Zhang and Sennrich (arXiv 1910.07467).
    """

    def __init__(
        self, dim: int, eps: float = 1e-5, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.dim,), self.weight.to(x.dtype), self.eps).to(self.weight.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` with the dtypes of `RMSNorm`: arithmetic in the input's, output in the weight's."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), bias, self.eps).to(self.weight.dtype)
