"""States of mixers before the first step."""

from __future__ import annotations

import torch
from torch import Tensor

from sinuous.kernels.precision import real_dtype


def zero_states(
    like: Tensor,
    device: torch.device | None,
    dtype: torch.dtype | None,
    conv: tuple[int, ...],
    *memories: tuple[int, ...],
) -> tuple[Tensor, ...]:
    """Make zeros for the state of a convolution and for those of recurrences.

    Args:
        like: a parameter of the mixer, for device and dtype where they are None.
        device: of all states.
        dtype: of the inputs, and so of the state of the convolution; recurrences keep theirs in fp32, or fp64 for fp64.
        conv: shape of the state of the convolution.
        memories: shapes of the states of recurrences.
    """
    device = like.device if device is None else device
    dtype = like.dtype if dtype is None else dtype
    wide = real_dtype(dtype)
    return (
        torch.zeros(conv, device=device, dtype=dtype),
        *(torch.zeros(shape, device=device, dtype=wide) for shape in memories),
    )
