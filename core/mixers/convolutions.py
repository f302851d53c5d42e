"""Depthwise convolutions over time: causal ones, whose weights the `causal_conv1d` op applies, and centred ones."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinuous.core.ops.causal_conv1d import MAX_WIDTH
from sinuous.core.ops.operators import operators

MAX_CENTRED_TAPS = 2 * MAX_WIDTH - 1


class ShortConvolution(nn.Conv1d):
    """Weights of a depthwise causal convolution, `[channels, 1, taps]`; `causal_conv1d` applies them."""

    def __init__(self, channels: int, taps: int, bias: bool = False, **dd: Any) -> None:
        super().__init__(channels, channels, taps, padding=taps - 1, groups=channels, bias=bias, **dd)


class PaddedConvolution(nn.Module):
    """`ShortConvolution` with a bias, one level down, where NX-AI/xlstm's `CausalConv1d` has it."""

    def __init__(self, channels: int, taps: int, **dd: Any) -> None:
        super().__init__()
        self.conv = ShortConvolution(channels, taps, True, **dd)


def short_convolutions(
    widths: tuple[int, int, int], taps: int | None, bias: bool, dd: dict[str, Any]
) -> tuple[ShortConvolution | None, ShortConvolution | None, ShortConvolution | None]:
    """Make one convolution for each width, or None for each where `taps` is None."""
    if taps is None:
        return None, None, None
    q, k, v = (ShortConvolution(width, taps, bias, **dd) for width in widths)
    return q, k, v


def convolve_together(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Apply three short convolutions in one call.

    Args:
        q, k, v: `[B, T, ·]`.
        weights: one `[channels, 1, taps]` for each of them.
        biases: one `[channels]` for each, or None for all.
        state: the last `taps - 1` inputs of all three, side by side, `[B, taps - 1, channels]`; zeros if absent.
        cu_seqlens: boundaries of packed sequences.
        silu: apply silu to what comes out.

    Returns:
        q, k, v convolved, and the state after the last step.
    """
    present: list[Tensor] = []
    for bias in biases:
        if bias is not None:
            present.append(bias)
    y, state = operators.causal_conv1d(
        torch.cat([q, k, v], -1),
        torch.cat(weights).squeeze(1),
        torch.cat(present) if len(present) > 0 else None,
        initial_state=state,
        cu_seqlens=cu_seqlens,
        silu=silu,
    )
    q, k, v = y.split([q.shape[-1], k.shape[-1], v.shape[-1]], -1)
    return q, k, v, state


def check_centred(d_conv: int) -> None:
    """Refuse a number of taps that has no middle or does not fit.

    Raises:
        ValueError: if it is even, less than 1, or more than `MAX_CENTRED_TAPS`.
    """
    if d_conv % 2 == 0 or not 1 <= d_conv <= MAX_CENTRED_TAPS:
        raise ValueError(f"d_conv must be odd, at least 1 and at most {MAX_CENTRED_TAPS} (got {d_conv})")


def centred_conv1d(x: Tensor, taps: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Apply a filter that sees as far ahead as behind, with zeros beyond either end of a sequence.

        y_t = bias + Σ_j taps[:, j] ⊙ x_{t-c+j},   c the middle of the taps

    One causal filter sees the past and the present, another, from the end, the rest: so packed sequences do not meet.

    Args:
        x: `[B, T, D]`; packed sequences are `[1, ΣT, D]` with `cu_seqlens`.
        taps: `[D, W]`, W odd.
        bias: `[D]`.
        cu_seqlens: boundaries of packed sequences.
    """
    centre = taps.shape[1] // 2
    past, _ = operators.causal_conv1d(x, taps[:, : centre + 1], bias, cu_seqlens=cu_seqlens)
    ahead = F.pad(taps[:, centre + 1 :].flip(1), [0, 1])
    rest, _ = operators.causal_conv1d(x, ahead, cu_seqlens=cu_seqlens, reverse=True)
    return past + rest
