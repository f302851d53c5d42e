r"""minGRU and minLSTM: the gates of GRU and LSTM without the state in them, so that the recurrence is linear.

    minGRU     z, h̃ from x:        h_t = (1 - z_t) ⊙ h_{t-1} + z_t ⊙ g(h̃_t),                 z = σ(·)
    minLSTM    f, i, h̃ from x:     h_t = f_t / (f_t + i_t) ⊙ h_{t-1} + i_t / (f_t + i_t) ⊙ g(h̃_t),    f, i = σ(·)
    g(x) = x + 1/2 for x ≥ 0 and σ(x) below, positive;  out = to_out(h)

The authors scan in logarithms, which needs h > 0 and therefore g; the scan here does not, so g can be left out.

Source: Feng et al., "Were RNNs All We Needed?" (arXiv 2410.01201), sections 3.1 and 3.2 and appendix B; names of
parameters as in lucidrains/minGRU-pytorch.
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


def positive(x: Tensor) -> Tensor:
    """Apply g: x + 1/2 where x ≥ 0 and σ(x) elsewhere, which meet at 0."""
    return torch.where(x >= 0, x + 0.5, torch.sigmoid(x))


class MinimalRNN(ElementwiseMixer):
    """Base of minGRU and minLSTM. A subclass has the projection, and `_gates`, which splits its output."""

    def __init__(
        self,
        dim: int,
        expand: float,
        proj_out: bool | None,
        positive_hidden: bool,
        use_short_conv: bool,
        conv_size: int,
        allow_neg_eigval: bool,
        dd: dict[str, Any],
    ) -> None:
        inner = int(expand * dim)
        check_sizes(dim=dim, d_inner=inner, conv_size=conv_size)
        proj_out = inner != dim if proj_out is None else proj_out
        if inner != dim and not proj_out:
            raise ValueError(f"expand={expand} makes {inner} channels of {dim}; leave out proj_out=False")
        super().__init__(inner, (conv_size - 1, dim) if use_short_conv else (0, 0))
        self.positive_hidden = positive_hidden
        self.allow_neg_eigval = allow_neg_eigval
        self.conv1d = ShortConvolution(dim, conv_size, True, **dd) if use_short_conv else None
        self.to_out = nn.Linear(inner, dim, bias=False, **dd) if proj_out else nn.Identity()

    def init_weights(self) -> None:
        for layer in self.children():
            if isinstance(layer, nn.Linear | nn.Conv1d):
                layer.reset_parameters()

    def output_weights(self) -> set[str]:
        return {"to_out.weight"} if isinstance(self.to_out, nn.Linear) else set()

    def _mix(
        self, x: Tensor, conv: Tensor | None, hidden: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.conv1d is not None:
            weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
            x, after = operators.causal_conv1d(x, weight, bias, initial_state=conv, cu_seqlens=cu_seqlens)
        else:
            after = x.new_zeros([x.shape[0], 0, 0])
        candidate, forget_gate, input_gate = self._gates(x)
        candidate = positive(candidate) if self.positive_hidden else candidate
        factor = 2 * forget_gate - 1 if self.allow_neg_eigval else forget_gate
        candidate = (input_gate * candidate).to(candidate.dtype)
        h, hidden, _ = operators.linear_scan(candidate, factor, initial_state=hidden, cu_seqlens=cu_seqlens)
        return self.to_out(h), after, hidden

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute h̃ `[B, T, E]`, and in at least fp32 the factors of h_{t-1} and of g(h̃) in the state."""
        raise NotImplementedError


@register_mixer("min_gru")
class MinGRU(MinimalRNN):
    """minGRU.

    Args:
        dim: width of the model.
        expand: E / dim.
        proj_out: a projection behind the recurrence; `None` is where `expand` is not 1.
        positive_hidden: apply g, as in the paper's experiments; without, h̃ is left as it is.
        use_short_conv: a convolution ahead of the projection, as in the paper's language models.
        conv_size: its taps.
        allow_neg_eigval: 1 - 2z, in (-1, 1), instead of 1 - z, so that the state can count modulo 2 (Grazzi et
            al., arXiv 2411.12537).

    Raises:
        ValueError: if a size is less than 1, or `proj_out=False` leaves the wrong width.
    """

    def __init__(
        self,
        dim: int,
        expand: float = 1,
        proj_out: bool | None = None,
        positive_hidden: bool = True,
        use_short_conv: bool = False,
        conv_size: int = 4,
        allow_neg_eigval: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, expand, proj_out, positive_hidden, use_short_conv, conv_size, allow_neg_eigval, dd)
        self.to_hidden_and_gate = nn.Linear(dim, 2 * self.hidden_width, bias=False, **dd)
        self.init_weights()

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        candidate, gate = self.to_hidden_and_gate(x).chunk(2, dim=-1)
        gate = norms.at_least_fp32(gate)
        return candidate, torch.sigmoid(-gate), torch.sigmoid(gate)


@register_mixer("min_lstm")
class MinLSTM(MinimalRNN):
    """minLSTM, with the gates divided by their sum.

    Args:
        dim: width of the model.
        expand: E / dim.
        proj_out: a projection behind the recurrence; `None` is where `expand` is not 1.
        positive_hidden: apply g, as in the paper's experiments; without, h̃ is left as it is.
        use_short_conv: a convolution ahead of the projection, as in the paper's language models.
        conv_size: its taps.
        allow_neg_eigval: twice the forget gate less 1, in (-1, 1), instead of it, so that the state can count modulo 2
            (Grazzi et al., arXiv 2411.12537).

    Raises:
        ValueError: if a size is less than 1, or `proj_out=False` leaves the wrong width.
    """

    def __init__(
        self,
        dim: int,
        expand: float = 1,
        proj_out: bool | None = None,
        positive_hidden: bool = True,
        use_short_conv: bool = False,
        conv_size: int = 4,
        allow_neg_eigval: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, expand, proj_out, positive_hidden, use_short_conv, conv_size, allow_neg_eigval, dd)
        self.to_hidden_and_f_i_gate = nn.Linear(dim, 3 * self.hidden_width, bias=False, **dd)
        self.init_weights()

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        candidate, f, i = self.to_hidden_and_f_i_gate(x).chunk(3, dim=-1)
        # f / (f + i) = σ(log f - log i), which neither overflows nor divides 0 by 0.
        ratio = F.logsigmoid(norms.at_least_fp32(f)) - F.logsigmoid(norms.at_least_fp32(i))
        return candidate, torch.sigmoid(ratio), torch.sigmoid(-ratio)
