"""Norms whose arithmetic keeps its precision in half-precision models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinuous.core.checks import check_choice
from sinuous.kernels import precision


# FX cannot branch on the dtype of a traced value: the function stays one node. `wrap` patches this module's own
# namespace, so callers write `norms.at_least_fp32(x)`.
@torch.fx.wrap
def at_least_fp32(x: Tensor) -> Tensor:
    """Convert `x` to fp32 unless it is fp64: `sinuous.kernels.precision.at_least_fp32` as one node of FX."""
    return precision.at_least_fp32(x)


def unit_length(x: Tensor) -> Tensor:
    """Divide `x` by its length over the last axis, `sqrt(Σ x² + 1e-6)`, computed in at least fp32.

    The output has the dtype of x.
    """
    wide = at_least_fp32(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


class RMSNorm(nn.Module):
    """RMS norm, `y = x / sqrt(mean(x²) + eps) ⊙ weight`, over the last axis.

    The arithmetic has the input's dtype, in our backbones the fp32 of the residual stream. The output has the dtype of
    the weight, and so of the layers that follow.

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
    """Layer norm with the dtypes of `RMSNorm`: arithmetic in the input's, output in the weight's."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), bias, self.eps).to(self.weight.dtype)


class GatedRMSNorm(nn.Module):
    """RMS norm with a gate: `norm(x) ⊙ f(z)`, or `norm(x ⊙ f(z))`, where f is silu or the sigmoid.

    The arithmetic is at least fp32; the output has the dtype of x.

    Args:
        dim: width of the last axis.
        eps: added to the mean square.
        group_size: width of the parts that are normed by themselves; the whole axis if absent.
        norm_before_gate: the first of the two forms; else the second.
        activation: `"silu"` or `"sigmoid"`.

    Raises:
        ValueError: if `dim` is no multiple of `group_size`, or `activation` is neither.

    Source: the second form is Mamba-2's (arXiv 2405.21060, section 7.1), the first RetNet's and GLA's with an RMS norm
    (arXiv 2307.08621, section 2.3; arXiv 2312.06635, section 4.4), with a sigmoid that of Kimi Linear (arXiv
    2510.26692, section 4).
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        activation: str = "silu",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        group_size = dim if group_size is None else group_size
        if dim % group_size:
            raise ValueError(f"group_size must divide the width {dim} (got {group_size})")
        check_choice("activation", activation, ("silu", "sigmoid"))
        self.dim = dim
        self.eps = eps
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate
        self.sigmoid = activation == "sigmoid"
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        gate, wide = at_least_fp32(z), at_least_fp32(x)
        gate = torch.sigmoid(gate) if self.sigmoid else F.silu(gate)
        if not self.norm_before_gate:
            wide = wide * gate
        groups = wide.unflatten(-1, [self.dim // self.group_size, self.group_size])
        y = F.rms_norm(groups, [self.group_size], None, self.eps).flatten(-2) * self.weight
        if self.norm_before_gate:
            y = y * gate
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        activation = "sigmoid" if self.sigmoid else "silu"
        order = f"norm_before_gate={self.norm_before_gate}, activation={activation}"
        return f"{self.dim}, eps={self.eps}, group_size={self.group_size}, {order}"


class HeadRMSNorm(RMSNorm):
    """RMS norm of each head by itself, with arithmetic in at least fp32 and the output in the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_fp32(x)
        return F.rms_norm(wide, (self.dim,), self.weight.to(wide.dtype), self.eps).to(x.dtype)


class MultiHeadRMSNorm(nn.Module):
    """RMS norm of each head by itself, with a scale for every channel, `[…, H, V]`.

    The arithmetic is at least fp32; the output has the dtype of x.

    Args:
        num_heads: H.
        head_dim: V.
        eps: added to the mean square.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        eps: float = 1e-5,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(num_heads, head_dim, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(at_least_fp32(x), [self.scale.shape[1]], None, self.eps)
        return (y * self.scale).to(x.dtype)


class MultiHeadLayerNorm(nn.Module):
    """Layer norm of each head by itself, with a weight for every channel: `[…, H, V]` to `[…, H · V]`.

    The arithmetic is at least fp32; the output has the dtype of x.

    Args:
        num_heads: H.
        head_dim: V.
        eps: added to the variance.
        bias: a bias for every channel.
        weight_from_one: the parameter is the weight less one, so that weight decay pulls the weight to one.

    Source: the group norm of RetNet (arXiv 2307.08621, section 2.3) and xLSTM (arXiv 2405.04517, figure 11).
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        eps: float = 1e-5,
        bias: bool = False,
        weight_from_one: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        width = num_heads * head_dim
        self.head_dim = head_dim
        self.eps = eps
        self.offset = 1.0 if weight_from_one else 0.0
        self.weight = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(width, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 1.0 - self.offset)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(at_least_fp32(x), [self.head_dim], None, None, self.eps).flatten(-2)
        y = y * (self.weight + self.offset)
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, eps={self.eps}, weight_from_one={self.offset == 1}"
