"""Depthwise causal convolution as a sum of shifted products, one per tap; time is contiguous across channels."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.kernels.precision import working_dtype
from sinuous.kernels.torch.packing import flip_sequences, flip_time, mirror, rows


def _sequences(
    x: Tensor, weight: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:
    """The place in time of each sequence, and its inputs with the W-1 that precede them."""
    tail = weight.shape[1] - 1
    edges = [0, x.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    for n, (begin, end) in enumerate(itertools.pairwise(edges)):
        inputs = x[:, begin:end].to(weight.dtype)
        past = (
            inputs.new_zeros(x.shape[0], tail, x.shape[2])
            if initial_state is None
            else rows(initial_state, n, cu_seqlens)
        )
        yield slice(begin, end), torch.cat([past.to(weight.dtype), inputs], 1)


def _filter(extended: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    length = extended.shape[1] - weight.shape[1] + 1
    y = extended[:, :length] * weight[:, 0]
    for j in range(1, weight.shape[1]):
        y.addcmul_(extended[:, j : j + length], weight[:, j])
    return y if bias is None else y.add_(bias)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """`(y, final_state)`; see sinuous.core.ops.causal_conv1d."""
    if reverse:
        initial, bounds = flip_sequences(initial_state, cu_seqlens), mirror(cu_seqlens, x.shape[1])
        y, final = forward(flip_time(x), weight, bias, initial, bounds, silu, False)
        return y.flip(1), flip_sequences(final, cu_seqlens)
    dtype = working_dtype(x.dtype)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    ys, finals = [], []
    for _, extended in _sequences(x, weight, initial_state, cu_seqlens):
        y = _filter(extended, weight, bias)
        ys.append((F.silu(y, inplace=True) if silu else y).to(x.dtype))
        finals.append(extended[:, y.shape[1] :].to(x.dtype))
    return torch.cat(ys, 1), torch.cat(finals)


def backward(
    grads: tuple[Tensor | None, Tensor | None],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    reverse: bool,
) -> list[Tensor | None]:
    """Gradients of x, weight, bias and initial_state; the values before the activation are recomputed."""
    dy, dfinal = grads
    if reverse:
        initial, bounds = flip_sequences(initial_state, cu_seqlens), mirror(cu_seqlens, x.shape[1])
        mirrored = (flip_time(dy), flip_sequences(dfinal, cu_seqlens))
        dx, dweight, dbias, dinitial = backward(mirrored, x.flip(1), weight, bias, initial, bounds, silu, False)
        return [flip_time(dx), dweight, dbias, flip_sequences(dinitial, cu_seqlens)]
    dtype = working_dtype(x.dtype)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    taps = weight.shape[1]
    dweight, dbias = torch.zeros_like(weight), torch.zeros_like(weight[:, 0])
    dxs, dinitials = [], []
    for n, (inside, extended) in enumerate(_sequences(x, weight, initial_state, cu_seqlens)):
        length = extended.shape[1] - taps + 1
        dpre = torch.zeros_like(extended[:, :length]) if dy is None else dy[:, inside].to(dtype)
        if silu:
            pre = _filter(extended, weight, bias)
            sigmoid = torch.sigmoid(pre)
            dpre = dpre * sigmoid * (1 + pre * (1 - sigmoid))
        dextended = torch.zeros_like(extended)
        for j in range(taps):
            dextended[:, j : j + length].addcmul_(dpre, weight[:, j])
            dweight[:, j] += (dpre * extended[:, j : j + length]).sum((0, 1))
        dbias += dpre.sum((0, 1))
        if dfinal is not None:
            dextended[:, length:] += rows(dfinal, n, cu_seqlens).to(dtype)
        dinitials.append(dextended[:, : taps - 1])
        dxs.append(dextended[:, taps - 1 :])
    return [
        torch.cat(dxs, 1),
        dweight,
        None if bias is None else dbias,
        None if initial_state is None else torch.cat(dinitials),
    ]
