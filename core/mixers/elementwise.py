"""Base of mixers with one number of state per channel: the state, and the calls around the recurrence."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from sinuous.core.mixers.contract import Mixer, register_state
from sinuous.core.mixers.states import zero_states


@register_state
class ElementwiseState(NamedTuple):
    """conv: the last W-1 inputs of the convolution, `[B, W-1, C]`, W = 1 and C = 0 without one; hidden: the
    recurrence's state, `[B, E]`, fp32 or fp64, or complex of that precision."""

    conv: Tensor
    hidden: Tensor


class ElementwiseMixer(Mixer):
    """A mixer over `linear_scan`. A subclass has `_mix` and `init_weights`.

    Args:
        hidden_width: E.
        conv_shape: W - 1 and C.
        complex_hidden: the state is complex.
    """

    causal: ClassVar[bool] = True
    constant_state: ClassVar[bool] = True

    def __init__(self, hidden_width: int, conv_shape: tuple[int, int] = (0, 0), complex_hidden: bool = False) -> None:
        super().__init__()
        self.hidden_width = hidden_width
        self.conv_shape = conv_shape
        self.complex_hidden = complex_hidden

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, grid: list[int] | None = None) -> Tensor:
        return self._mix(x, None, None, cu_seqlens)[0]

    def _mix(
        self, x: Tensor, conv: Tensor | None, hidden: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the output, and the states of the convolution and the recurrence after the last step."""
        raise NotImplementedError

    def prefill(self, x: Tensor, state: ElementwiseState | None = None) -> tuple[Tensor, ElementwiseState]:
        conv, hidden = (None, None) if state is None else state
        y, conv, hidden = self._mix(x, conv, hidden, None)
        return y, ElementwiseState(conv, hidden)

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> ElementwiseState:
        shapes = ((batch_size, *self.conv_shape), (batch_size, self.hidden_width))
        conv, hidden = zero_states(next(self.parameters()), device, dtype, *shapes)
        return ElementwiseState(conv, hidden.to(hidden.dtype.to_complex()) if self.complex_hidden else hidden)
