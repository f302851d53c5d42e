"""Depthwise causal convolution as a sum of shifted products, one per tap; time is contiguous across channels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.kernels.arguments import CausalConv1d
from sinuous.kernels.precision import working_dtype
from sinuous.kernels.torch.packing import flip_time, rows, sequences


def _sequences(args: CausalConv1d) -> Iterator[tuple[slice, Tensor]]:
    """The place in time of each sequence; and its inputs in processing order, after the W-1 that precede them."""
    x, dtype = args.x, working_dtype(args.x.dtype)
    for n, steps in enumerate(sequences(x.shape[1], args.cu_seqlens)):
        inputs = _in_order(x[:, steps].to(dtype), args.reverse)
        if args.initial_state is None:
            past = inputs.new_zeros(x.shape[0], args.weight.shape[1] - 1, x.shape[2])
        else:
            past = rows(args.initial_state, n, args.cu_seqlens).to(dtype)
        yield steps, torch.cat([past, inputs], 1)


def _in_order(t: Tensor, reverse: bool) -> Tensor:
    return flip_time(t) if reverse else t


def _filter(extended: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    length = extended.shape[1] - weight.shape[1] + 1
    y = extended[:, :length] * weight[:, 0]
    for j in range(1, weight.shape[1]):
        y.addcmul_(extended[:, j : j + length], weight[:, j])
    return y if bias is None else y.add_(bias)


def forward(args: CausalConv1d) -> tuple[Tensor, Tensor]:
    """`(y, final_state)`; see sinuous.core.ops.causal_conv1d."""
    dtype = working_dtype(args.x.dtype)
    weight, bias = args.weight.to(dtype), None if args.bias is None else args.bias.to(dtype)
    ys, finals = [], []
    for _, extended in _sequences(args):
        y = _filter(extended, weight, bias)
        ys.append(_in_order(F.silu(y, inplace=True) if args.silu else y, args.reverse).to(args.x.dtype))
        finals.append(extended[:, y.shape[1] :].to(args.x.dtype))
    return torch.cat(ys, 1), torch.cat(finals)


def backward(args: CausalConv1d, grads: tuple[Tensor | None, Tensor | None]) -> list[Tensor | None]:
    """Gradients of x, weight, bias and initial_state; the values before the activation are recomputed."""
    dy, dfinal = grads
    dtype = working_dtype(args.x.dtype)
    weight, bias = args.weight.to(dtype), None if args.bias is None else args.bias.to(dtype)
    taps = weight.shape[1]
    dweight, dbias = torch.zeros_like(weight), torch.zeros_like(weight[:, 0])
    dxs, dinitials = [], []
    for n, (inside, extended) in enumerate(_sequences(args)):
        length = extended.shape[1] - taps + 1
        if dy is None:
            dpre = torch.zeros_like(extended[:, :length])
        else:
            dpre = _in_order(dy[:, inside].to(dtype), args.reverse)
        if args.silu:
            pre = _filter(extended, weight, bias)
            sigmoid = torch.sigmoid(pre)
            dpre = dpre * sigmoid * (1 + pre * (1 - sigmoid))
        dextended = torch.zeros_like(extended)
        for j in range(taps):
            dextended[:, j : j + length].addcmul_(dpre, weight[:, j])
            dweight[:, j] += (dpre * extended[:, j : j + length]).sum((0, 1))
        dbias += dpre.sum((0, 1))
        if dfinal is not None:
            dextended[:, length:] += rows(dfinal, n, args.cu_seqlens).to(dtype)
        dinitials.append(dextended[:, : taps - 1])
        dxs.append(_in_order(dextended[:, taps - 1 :], args.reverse))
    return [
        torch.cat(dxs, 1),
        dweight,
        None if bias is None else dbias,
        None if args.initial_state is None else torch.cat(dinitials),
    ]
