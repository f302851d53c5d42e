"""xLSTM's scalar memory: an LSTM with exponential gates, whose heads read their last output.

    x' = silu(causal_conv1d(x))
    i, f = fgate(x'), igate(x');   z, o = zgate(x), ogate(x)           block-diagonal, one block for each head
    y = slstm(i + R_i y_{t-1}, f + R_f y_{t-1}, z + R_z y_{t-1}, o + R_o y_{t-1})
    out = group_norm(y)

The layer named `fgate` gives the input gate and the one named `igate` the forget gate, as in the published code; the
names are kept for its weights.

Source: Beck et al., "xLSTM" (arXiv 2405.04517), section 2.3 and figure 10; names of parameters as in NX-AI/xlstm's
`sLSTMLayer`, those of the cell as in its backend without CUDA.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from sinuous.core.checks import check_place
from sinuous.core.mixers.contract import Mixer, register_mixer, register_state
from sinuous.core.mixers.convolutions import PaddedConvolution
from sinuous.core.mixers.heads import per_head
from sinuous.core.mixers.projections import HeadwiseLinear
from sinuous.core.mixers.states import zero_states
from sinuous.core.norms import MultiHeadLayerNorm
from sinuous.core.ops.operators import operators

GATES = 4
"""i, f, z, o: the order in the op and in the parameters of the cell."""


@register_state
class SLSTMState(NamedTuple):
    """conv: the last W-1 inputs of the convolution, `[B, W-1, dim]` (`[B, 0, 0]` without one); y, c, n, m: the
    last output of the cells, their memory, its normaliser and the scale of both, `[B, H, dim / H]`, fp32 or fp64."""

    conv: Tensor
    y: Tensor
    c: Tensor
    n: Tensor
    m: Tensor


class SLSTMCell(nn.Module):
    """Recurrent weights and biases, flat as NX-AI/xlstm keeps them; the recurrence is the mixer's."""

    def __init__(self, num_heads: int, head_dim: int, **dd: Any) -> None:
        super().__init__()
        self._recurrent_kernel_ = nn.Parameter(torch.empty(num_heads, GATES * head_dim, head_dim, **dd))
        self._bias_ = nn.Parameter(torch.empty(GATES * num_heads * head_dim, **dd))

    def weights(self) -> tuple[Tensor, Tensor]:
        """Weights as the op takes them: R `[4, H, D_out, D_in]` and the bias `[4, H, D]`."""
        heads, _, size = self._recurrent_kernel_.shape
        R = self._recurrent_kernel_.unflatten(1, [-1, size]).transpose(0, 1)
        return R, self._bias_.unflatten(0, [-1, heads, size])


@register_mixer("slstm")
class SLSTM(Mixer):
    """The layer of xLSTM's sLSTM block, between its norm and its residual.

    Args:
        dim: width of the model.
        num_heads: H; a head's cells read one another's outputs, those of different heads do not.
        conv_size: taps of the convolution in front of the input and forget gates; 0 leaves it out.
        num_blocks, block_index: how many blocks the model has and which this is, from 0; biases of the forget gate
            start at +5 to -7 within a head, in early blocks with more of them low than in late ones.

    Raises:
        ValueError: if `dim` is no multiple of `num_heads`, `conv_size` is negative, or there is no such block.
    """

    causal: ClassVar[bool] = True
    constant_state: ClassVar[bool] = True
    may_be_zero: ClassVar[frozenset[str]] = frozenset({"conv_size"})

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        conv_size: int = 4,
        num_blocks: int = 1,
        block_index: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        size = per_head(dim, num_heads, "dim")
        if conv_size < 0:
            raise ValueError(f"conv_size must be at least 1, or 0 for no convolution (got {conv_size})")
        check_place(block_index, num_blocks)
        self.dim, self.num_heads, self.head_dim = dim, num_heads, size
        self.num_blocks, self.block_index = num_blocks, block_index
        self.conv_shape = (conv_size - 1, dim) if conv_size > 0 else (0, 0)
        self.conv1d = PaddedConvolution(dim, conv_size, **dd) if conv_size > 0 else None
        self.fgate, self.igate, self.zgate, self.ogate = (
            HeadwiseLinear(dim, num_heads, False, **dd) for _ in range(GATES)
        )
        self.slstm_cell = SLSTMCell(num_heads, size, **dd)
        self.group_norm = MultiHeadLayerNorm(num_heads, size, weight_from_one=True, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        if self.conv1d is not None:
            self.conv1d.conv.reset_parameters()
        for gate in (self.fgate, self.igate, self.zgate, self.ogate):
            nn.init.normal_(gate.weight, std=math.sqrt(2 / (5 * self.dim)))
        nn.init.zeros_(self.slstm_cell._recurrent_kernel_)
        self.group_norm.reset_parameters()
        depth = self.block_index / max(self.num_blocks - 1, 1)
        place = torch.arange(self.head_dim) / max(self.head_dim - 1, 1)
        with torch.no_grad():
            bias = self.slstm_cell._bias_.zero_().unflatten(0, (GATES, -1, self.head_dim))
            bias[1] = 5 - 12 * place ** (0.3 + 1.3 * depth)

    def output_weights(self) -> set[str]:
        return {"group_norm.weight"}

    def no_weight_decay(self) -> set[str]:
        return {"slstm_cell._recurrent_kernel_", "slstm_cell._bias_"}

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, grid: list[int] | None = None) -> Tensor:
        return self._mix(x, None, None, None, None, None, cu_seqlens)[0]

    def _mix(
        self,
        x: Tensor,
        conv: Tensor | None,
        y: Tensor | None,
        c: Tensor | None,
        n: Tensor | None,
        m: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        if self.conv1d is None:
            convolved, conv = x, x.new_zeros([x.shape[0], 0, 0])
        else:
            weights = self.conv1d.conv
            convolved, conv = operators.causal_conv1d(
                x, weights.weight.squeeze(1), weights.bias, initial_state=conv, cu_seqlens=cu_seqlens, silu=True
            )
        gates = [self.fgate(convolved), self.igate(convolved), self.zgate(x), self.ogate(x)]
        R, bias = self.slstm_cell.weights()
        hidden, y, c, n, m, _, _, _, _, _ = operators.slstm(
            torch.stack(gates, 2).unflatten(-1, [self.num_heads, self.head_dim]), R, bias,
            initial_y=y, initial_c=c, initial_n=n, initial_m=m, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        return self.group_norm(hidden), conv, y, c, n, m

    def prefill(self, x: Tensor, state: SLSTMState | None = None) -> tuple[Tensor, SLSTMState]:
        conv, y, c, n, m = (None, None, None, None, None) if state is None else state
        out, conv, y, c, n, m = self._mix(x, conv, y, c, n, m, None)
        return out, SLSTMState(conv, y, c, n, m)

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> SLSTMState:
        memory = (batch_size, self.num_heads, self.head_dim)
        conv = (batch_size, *self.conv_shape)
        return SLSTMState(*zero_states(self.fgate.weight, device, dtype, conv, memory, memory, memory, memory))
