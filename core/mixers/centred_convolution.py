"""A depthwise filter over time that sees as far ahead as behind."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.core.ops.causal_conv1d import MAX_WIDTH

MAX_TAPS = 2 * MAX_WIDTH - 1


def check_centred(d_conv: int) -> None:
    """Refuse a number of taps that has no middle or does not fit.

    Raises:
        ValueError: if it is even, less than 1, or more than `MAX_TAPS`.
    """
    if d_conv % 2 == 0 or not 1 <= d_conv <= MAX_TAPS:
        raise ValueError(f"d_conv must be odd, at least 1 and at most {MAX_TAPS} (got {d_conv})")


def centred_conv1d(x: Tensor, taps: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """`y_t = bias + Σ_j taps[:, j] ⊙ x_{t-c+j}`, c the middle of the taps, zeros beyond either end of a sequence.

    One causal filter sees the past and the present, another, from the end, the rest: so packed sequences do not meet.

    Args:
        x: `[B, T, D]`; packed sequences are `[1, ΣT, D]` with `cu_seqlens`.
        taps: `[D, W]`, W odd; bias: `[D]`.
    """
    centre = taps.shape[1] // 2
    past, _ = torch.ops.sinuous.causal_conv1d(x, taps[:, : centre + 1], bias, None, cu_seqlens, False, False, "")
    ahead = F.pad(taps[:, centre + 1 :].flip(1), [0, 1])
    rest, _ = torch.ops.sinuous.causal_conv1d(x, ahead, None, None, cu_seqlens, False, True, "")
    y: Tensor = past + rest
    return y
