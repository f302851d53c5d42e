r"""Depthwise causal convolution over time, the short filter in front of most recurrences.

    y_t = act( bias + Σ_{j=0}^{W-1} weight[:, j] ⊙ x_{t-W+1+j} )          x_s = state for s < 0

The last tap multiplies the newest input, as in torch's `Conv1d` with left padding W-1. The state is the last W-1
inputs, before the activation.

Source: Mamba (arXiv 2312.00752), section 3.4; the function of the same name in Dao-AILab/causal-conv1d.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.core.ops.checks import (
    check_packing,
    check_shape,
    sequence_count,
)
from sinuous.core.ops.family import Family, define
from sinuous.core.ops.public import public
from sinuous.kernels.arguments import CausalConv1d
from sinuous.kernels.precision import working_dtype
from sinuous.kernels.torch.packing import flip_sequences, flip_time, mirror, rows

MAX_WIDTH = 8


def recurrent(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Run the definition step by step; autograd differentiates it to any order."""
    length, width = x.shape[1], weight.shape[1]
    if reverse:
        initial_state, bounds = flip_sequences(initial_state, cu_seqlens), mirror(cu_seqlens, length)
        y, final = recurrent(flip_time(x), weight, bias, initial_state, bounds, silu, False)
        return y.flip(1), flip_sequences(final, cu_seqlens)
    dtype = working_dtype(x.dtype)
    weight, inputs = weight.to(dtype), x.to(dtype).unbind(1)
    count = sequence_count(x, cu_seqlens)
    initial = x.new_zeros(count, width - 1, x.shape[2]) if initial_state is None else initial_state
    initial = initial.to(dtype)
    ys, finals = [], []
    edges = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    for n, (begin, end) in enumerate(itertools.pairwise(edges)):
        window = list(rows(initial, n, cu_seqlens).unbind(1))
        for x_t in inputs[begin:end]:
            window.append(x_t)
            ys.append((torch.stack(window, 1) * weight.T).sum(1))
            window.pop(0)
        finals.append(torch.stack(window, 1) if window else rows(initial, n, cu_seqlens))
    y = torch.stack(ys, 1) if ys else x.to(dtype) * 0
    y = y if bias is None else y + bias.to(dtype)
    y = F.silu(y) if silu else y
    return y.to(x.dtype), torch.cat(finals).to(x.dtype)


def _as_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """The definition of sequences that are not packed, by torch's own convolution."""
    taps = weight.shape[1]
    past = x.new_zeros(x.shape[0], taps - 1, x.shape[2]) if initial_state is None else initial_state
    padded = torch.cat([past, flip_time(x) if reverse else x], 1)
    y = F.conv1d(padded.transpose(1, 2), weight.unsqueeze(1), bias, groups=x.shape[2]).transpose(1, 2)
    y = F.silu(y) if silu else y
    return (flip_time(y) if reverse else y), padded[:, padded.shape[1] - taps + 1 :]


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    reverse: bool,
) -> None:
    if x.ndim != 3:
        raise ValueError(f"x must have shape [B, T, D] (got {list(x.shape)}); time is axis 1 and channels are last")
    batch, length, channels = x.shape
    if weight.ndim != 2 or weight.shape[0] != channels or not 1 <= weight.shape[1] <= MAX_WIDTH:
        raise ValueError(
            f"weight must have shape [D, W] with D = {channels} and 1 ≤ W ≤ {MAX_WIDTH} (got {list(weight.shape)}); "
            "squeeze the middle axis of a Conv1d weight"
        )
    check_shape("bias", bias, (channels,), "one bias per channel")
    check_packing(cu_seqlens, batch, length)
    tail = (sequence_count(x, cu_seqlens), weight.shape[1] - 1, channels)
    check_shape("initial_state", initial_state, tail, "[sequences, W - 1, D], the inputs before the first step")


def _fake(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None, **_: object) -> tuple[Tensor, Tensor]:
    tail = (sequence_count(x, cu_seqlens), weight.shape[1] - 1, x.shape[2])
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(tail, dtype=x.dtype, device=x.device)


def _multiply_adds(x: Sequence[int], weight: Sequence[int], **_: object) -> int:
    return x[0] * x[1] * x[2] * weight[1]


FAMILY = Family(
    name="causal_conv1d",
    arguments=CausalConv1d,
    by_name=True,
    outputs=("y", "final_state"),
    saved={},
    integers=("cu_seqlens",),
    forms=("triton", "cpu", "torch", "recurrent"),
    fake=_fake,
    check=_check,
    recurrent=recurrent,
    options={},
    multiply_adds=_multiply_adds,
    traced=_as_convolution,
)
define(FAMILY)


@public
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Depthwise causal convolution: `y_t = act(bias + Σ_j weight[:, j] ⊙ x_{t-W+1+j})`.

    Args:
        x: input `[B, T, D]`; packed sequences are `[1, ΣT, D]` with `cu_seqlens`.
        weight: filters `[D, W]`, W ≤ 8, the newest input last.
        bias: `[D]`.
        activation: `"silu"` or None.
        initial_state: the W-1 inputs before the first step, `[B, W-1, D]`, oldest first; zeros if absent.
        return_state: return `(y, state)`, the last W-1 inputs.
        reverse: run from the last step to the first (an anti-causal filter); the state is then the one after step 0.
        cu_seqlens: int32 or int64 `[sequences + 1]`, the boundaries of packed sequences.
        backend: `recurrent`, `torch`, `cpu` or `triton`; the fastest that can run if absent.

    Returns:
        y `[B, T, D]` in the dtype of x, or `(y, state)`. Both are differentiable in every tensor argument.

    Raises:
        ValueError: for a wrong shape, dtype, device or activation, naming the argument.

    Source: Mamba (arXiv 2312.00752), section 3.4.
    """
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be 'silu' or None (got {activation!r}); apply another one to the output")
    y, state = torch.ops.sinuous.causal_conv1d(
        x, weight, bias, initial_state, cu_seqlens, activation == "silu", reverse, backend or ""
    )
    return (y, state) if return_state else y
