r"""Depthwise causal convolution over time, the short filter in front of most recurrences.

    y_t = act( bias + Σ_{j=0}^{W-1} weight[:, j] ⊙ x_{t-W+1+j} )          x_s = state for s < 0

The last tap multiplies the newest input, as in torch's `Conv1d` with left padding W-1. The state is the last W-1
inputs, before the activation.

Source: Mamba (arXiv 2312.00752), section 3.4; the function of the same name in Dao-AILab/causal-conv1d.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.core.ops.checks import check_packing, check_shape
from sinuous.core.ops.family import Family, define
from sinuous.core.ops.operators import operators
from sinuous.core.ops.public import public
from sinuous.core.ops.stepwise import State, run_steps
from sinuous.kernels.arguments import CausalConv1d
from sinuous.kernels.precision import working_dtype
from sinuous.kernels.torch.packing import flip_time, sequence_count

MAX_WIDTH = 8


def recurrent(args: CausalConv1d) -> tuple[Tensor, Tensor]:
    """Run the definition step by step; autograd differentiates it to any order."""
    dtype = working_dtype(args.x.dtype)
    x, weight = args.x.to(dtype), args.weight.to(dtype)
    initial = x.new_zeros(_state(args)) if args.initial_state is None else args.initial_state.to(dtype)

    def step(state: State, x_t: Tensor) -> tuple[Tensor, State]:
        window = (*state, x_t)
        return (torch.stack(window, 1) * weight.T).sum(1), window[1:]

    whole = max(x.shape[1], 1)
    y, inputs, _ = run_steps(step, (x,), initial.unbind(1), x[:, :0], args.cu_seqlens, args.reverse, whole)
    final = torch.stack(inputs, 1) if inputs else initial
    y = y if args.bias is None else y + args.bias.to(dtype)
    y = F.silu(y) if args.silu else y
    return y.to(args.x.dtype), final.to(args.x.dtype)


def _as_convolution(args: CausalConv1d) -> tuple[Tensor, Tensor]:
    """The definition of sequences that are not packed, by torch's own convolution."""
    x, taps = args.x, args.weight.shape[1]
    past = x.new_zeros(_state(args)) if args.initial_state is None else args.initial_state
    padded = torch.cat([past, flip_time(x) if args.reverse else x], 1)
    y = F.conv1d(padded.transpose(1, 2), args.weight.unsqueeze(1), args.bias, groups=x.shape[2]).transpose(1, 2)
    y = F.silu(y) if args.silu else y
    return (flip_time(y) if args.reverse else y), padded[:, padded.shape[1] - taps + 1 :]


def _state(args: CausalConv1d) -> tuple[int, ...]:
    return sequence_count(args.x, args.cu_seqlens), args.weight.shape[1] - 1, args.x.shape[2]


def _check(args: CausalConv1d) -> None:
    x, weight = args.x, args.weight
    if x.ndim != 3:
        raise ValueError(f"x must have shape [B, T, D] (got {list(x.shape)}); time is axis 1 and channels are last")
    batch, length, channels = x.shape
    if weight.ndim != 2 or weight.shape[0] != channels or not 1 <= weight.shape[1] <= MAX_WIDTH:
        raise ValueError(
            f"weight must have shape [D, W] with D = {channels} and 1 ≤ W ≤ {MAX_WIDTH} (got {list(weight.shape)}); "
            "squeeze the middle axis of a Conv1d weight"
        )
    check_shape("bias", args.bias, (channels,), "one bias per channel")
    check_packing(args.cu_seqlens, batch, length)
    meaning = "[sequences, W - 1, D], the inputs before the first step"
    check_shape("initial_state", args.initial_state, _state(args), meaning)


def _fake(args: CausalConv1d) -> tuple[Tensor, Tensor]:
    y = torch.empty(args.x.shape, dtype=args.x.dtype, device=args.x.device)
    return y, y.new_empty(_state(args))


def _multiply_adds(args: Any) -> int:
    count: int = math.prod(args.x) * args.weight[1]
    return count


FAMILY = Family(
    name="causal_conv1d",
    arguments=CausalConv1d,
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
    y, state = operators.causal_conv1d(
        x, weight, bias, initial_state, cu_seqlens, activation == "silu", reverse, backend or ""
    )
    return (y, state) if return_state else y
