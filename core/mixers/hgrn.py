r"""HGRN: one gate per channel, which forgets as much as it takes in.

    i, f = i_proj(x), f_proj(x)                                each behind a short convolution, if there is one
    f = β + (1 - β) σ(f)                                       never below the bound β
    h_t = f_t ⊙ h_{t-1} + (1 - f_t) ⊙ silu(i_t)
    out = o_proj(RMSNorm(h) ⊙ silu(g_proj(x)))

Source: Qin et al., "Hierarchically Gated Recurrent Neural Network for Sequence Modeling" (arXiv 2311.04823), section
3.2, in the real form of fla-org/flash-linear-attention's `HGRNAttention`, whose names the parameters have; the paper's
hidden state is complex, with a phase that the input does not change.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinuous.core import norms
from sinuous.core.checks import check_sizes
from sinuous.core.mixers.contract import register_mixer
from sinuous.core.mixers.convolutions import ShortConvolution
from sinuous.core.mixers.elementwise import ElementwiseMixer
from sinuous.core.ops.operators import operators


@register_mixer("hgrn")
class HGRN(ElementwiseMixer):
    """HGRN's mixer.

    Args:
        dim: width of the model.
        expand: E / dim.
        lower_bound: β in [0, 1), which the paper lets rise from 0 in the first layer towards 1 in the last.
        channel_bounds: keep β with the weights as a buffer `bounds`, a number for every channel, `lower_bound` at the
            start. Published models have learnt them.
        use_short_conv: convolutions behind i_proj and f_proj.
        conv_size: their taps; conv_bias: their biases.
        norm_eps: added under the root of the norm.
        allow_neg_eigval: let f_t in h_t = f_t h_{t-1} + … be 2f - 1, in (-1, 1), so that the state can count modulo 2
            (Grazzi et al., arXiv 2411.12537).

    Raises:
        ValueError: if a size is less than 1, or `lower_bound` is outside [0, 1).
    """

    def __init__(
        self,
        dim: int,
        expand: float = 1,
        lower_bound: float = 0.0,
        channel_bounds: bool = False,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        norm_eps: float = 1e-5,
        allow_neg_eigval: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = int(expand * dim)
        check_sizes(dim=dim, d_inner=inner, conv_size=conv_size)
        if not 0 <= lower_bound < 1:
            raise ValueError(f"lower_bound must lie in [0, 1) (got {lower_bound}); at 1 the state would never change")
        super().__init__(inner, (conv_size - 1, 2 * inner) if use_short_conv else (0, 0))
        self.lower_bound = float(lower_bound)
        self.bounds: Tensor | None
        self.register_buffer("bounds", torch.empty(inner, **dd) if channel_bounds else None)
        self.allow_neg_eigval = allow_neg_eigval
        self.i_proj = nn.Linear(dim, inner, bias=False, **dd)
        self.f_proj = nn.Linear(dim, inner, bias=False, **dd)
        self.g_proj = nn.Linear(dim, inner, bias=False, **dd)
        self.i_conv1d = ShortConvolution(inner, conv_size, conv_bias, **dd) if use_short_conv else None
        self.f_conv1d = ShortConvolution(inner, conv_size, conv_bias, **dd) if use_short_conv else None
        self.g_norm = norms.GatedRMSNorm(inner, norm_eps, **dd)
        self.o_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        for layer in self.children():
            if isinstance(layer, nn.Linear | nn.Conv1d | norms.GatedRMSNorm):
                layer.reset_parameters()
        if self.bounds is not None:
            nn.init.constant_(self.bounds, self.lower_bound)

    def output_weights(self) -> set[str]:
        return {"o_proj.weight"}

    def _mix(
        self, x: Tensor, conv: Tensor | None, hidden: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        i, f = self.i_proj(x), self.f_proj(x)
        if self.i_conv1d is not None and self.f_conv1d is not None:
            weight = torch.cat([self.i_conv1d.weight, self.f_conv1d.weight]).squeeze(1)
            i_bias, f_bias = self.i_conv1d.bias, self.f_conv1d.bias
            bias = torch.cat([i_bias, f_bias]) if i_bias is not None and f_bias is not None else None
            convolved, after = operators.causal_conv1d(
                torch.cat([i, f], -1), weight, bias, initial_state=conv, cu_seqlens=cu_seqlens
            )
            i, f = convolved.chunk(2, dim=-1)
        else:
            after = i.new_zeros([i.shape[0], 0, 0])
        # 1 - f, and not f, is what must not be rounded away where a channel remembers for long.
        renewed = torch.sigmoid(-norms.at_least_fp32(f))
        renewed = renewed * ((1 - self.lower_bound) if self.bounds is None else (1 - norms.at_least_fp32(self.bounds)))
        decay = 1 - 2 * renewed if self.allow_neg_eigval else 1 - renewed
        i = (renewed * F.silu(i)).to(i.dtype)
        h, hidden, _ = operators.linear_scan(i, decay, initial_state=hidden, cu_seqlens=cu_seqlens)
        return self.o_proj(self.g_norm(h, self.g_proj(x))), after, hidden
