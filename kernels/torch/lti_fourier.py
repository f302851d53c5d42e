r"""Convolution with the response of a linear system, by Fourier transforms of the whole length.

    y = K * u + Σ_i E Ā^{ci} x_0        x_T = Σ_i Ā^{c(I-1-i)} S_i + Ā^T x_0        K_{ci+j} = (C Ā^{ci}) (Ā^j b)

with the rows E, the columns W and the sums S_i = U_i flip(W) of blocks of about √T steps. Distant blocks are reached by
doubling: the readouts `C Ā^{ci}`, the states `Ā^{ci} x_0` and the sum of the S_i need the powers `Ā^{c 2^k}` only, so
that no loop goes from block to block and nothing of T × N is made. The convolution's gradients are two more transforms;
those of the rest, whose tensors are √T or T / c long, are autograd's.

A transform rounds relative to the largest value of its sequence, and a NaN anywhere in a sequence reaches all of it;
blocks keep what came before as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.kernels.arguments import LTIConv
from sinuous.kernels.torch.differentiation import autograd_inside_an_op
from sinuous.kernels.torch.lti_operators import advance, operators, squared, with_leaves, with_skip


class FourierSystem(NamedTuple):
    """response K `[D, T]` with the skip in it; rows and columns `[D, c, N]`; powers Ā^(2^k) by k, those that are
    needed; c is 2^doublings."""

    response: Tensor
    rows: Tensor
    columns: Tensor
    powers: dict[int, Tensor]
    doublings: int


def _system(args: LTIConv, length: int, free: bool, dtype: torch.dtype) -> FourierSystem:
    """The system for up to `length` steps; with the powers below c only if `free`, which initial states need."""
    doublings = max(length, 1).bit_length() // 2
    block = 2**doublings
    exponents = range(0 if free else doublings, doublings + 1)
    short = operators(tuple(2**k for k in exponents), dtype, args)
    powers = dict(zip(exponents, short.powers, strict=True))
    far, last = short.readout.unsqueeze(1), doublings
    while far.shape[1] * block < length:
        far = torch.cat([far, advance(powers[last], far, adjoint=True)], 1)
        powers[last + 1] = squared(powers[last], far)
        last += 1
    response = (far.to(dtype) @ short.columns.mT).flatten(1)[:, :length]
    narrow = {k: power.to(dtype) for k, power in powers.items()}
    return FourierSystem(with_skip(response, args.D), short.rows, short.columns, narrow, doublings)


def _end(system: FourierSystem, u: Tensor) -> Tensor:
    """The state `[D, B, N]` after the input `[D, B, T]`, from 0: neighbouring blocks are joined until one is left."""
    block = 2**system.doublings
    batch, length = u.shape[1:]
    count = 1 << max(-(-length // block) - 1, 0).bit_length()
    blocks = F.pad(u, (-length % block, 0)).unflatten(-1, (-1, block))
    sums: Tensor = (blocks.flatten(1, 2) @ system.columns.flip(1)).unflatten(1, (batch, -1))
    sums = F.pad(sums, (0, 0, count - sums.shape[2], 0))
    exponent = system.doublings
    while sums.shape[2] > 1:
        early, late = (t.flatten(1, 2) for t in (sums[:, :, ::2], sums[:, :, 1::2]))
        sums = (advance(system.powers[exponent], early) + late).unflatten(1, (batch, -1))
        exponent += 1
    return sums.squeeze(2)


def _free(system: FourierSystem, state: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The response to a state `[D, B, N]` without input: outputs `[D, B, length]` and the state after them."""
    full, rest = divmod(length, 2**system.doublings)
    batch, states, exponent = state.shape[1], state.unsqueeze(1), system.doublings
    while states.shape[1] <= full:
        more = advance(system.powers[exponent], states.flatten(1, 2)).unflatten(1, (-1, batch))
        states, exponent = torch.cat([states, more], 1), exponent + 1
    states = states[:, : full + 1]
    y = (states.transpose(1, 2).flatten(1, 2) @ system.rows.mT).unflatten(1, (batch, -1)).flatten(2)
    state = states[:, full]
    for k in range(system.doublings):
        if rest >> k & 1:
            state = advance(system.powers[k], state)
    return y[..., :length], state


def _size(length: int) -> int:
    """A length of quick transforms, 2^k, 3·2^k, 5·2^k, 9·2^k or 15·2^k, that holds a convolution without wrapping."""
    least = max(2 * length - 1, 1)
    return min(odd << max(-(-least // odd) - 1, 0).bit_length() for odd in (1, 3, 5, 9, 15))


def forward(
    args: LTIConv, sequences: Sequence[Tensor], states: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs `[D, B, T]` of each sequence `[D, B, T]` and the states after it; states `[D, B, N]`, or None for 0."""
    longest = max(u.shape[2] for u in sequences)
    system = _system(args, longest, any(s is not None for s in states), sequences[0].dtype)
    ys, ends = [], []
    for u, state in zip(sequences, states, strict=True):
        length, size = u.shape[2], _size(u.shape[2])
        spectrum = torch.fft.rfft(u, size) * torch.fft.rfft(system.response[:, None, :length], size)
        y, end = torch.fft.irfft(spectrum, size)[..., :length], _end(system, u)
        if state is not None:
            free, carried = _free(system, state, length)
            y, end = y + free, end + carried
        ys.append(y)
        ends.append(end)
    return ys, ends


def backward(
    args: LTIConv,
    sequences: Sequence[Tensor],
    states: Sequence[Tensor | None],
    dys: Sequence[Tensor],
    dends: Sequence[Tensor | None],
) -> tuple[list[Tensor], list[Tensor | None], dict[str, Tensor]]:
    """Gradients of the sequences, of the states before them and of the parameters that there are."""
    longest = max(u.shape[2] for u in sequences)
    free = any(s is not None for s in states)
    with autograd_inside_an_op():
        args, leaves = with_leaves(args)
        system = _system(args, longest, free, sequences[0].dtype)
    dresponse, dus = torch.zeros_like(system.response), []
    outputs: list[Tensor] = [system.response]
    grads: list[Tensor] = [dresponse]
    inner: dict[tuple[str, int], Tensor] = {}
    for n, (u, state, dy, dend) in enumerate(zip(sequences, states, dys, dends, strict=True)):
        length, size = u.shape[2], _size(u.shape[2])
        spectrum, response = torch.fft.rfft(u, size), torch.fft.rfft(system.response.detach()[:, None, :length], size)
        above = torch.fft.rfft(dy, size)
        dresponse[:, :length] += torch.fft.irfft((above * spectrum.conj_physical()).sum(1), size)[:, :length]
        dus.append(torch.fft.irfft(above * response.conj_physical(), size)[..., :length])
        with autograd_inside_an_op():
            if dend is not None:
                inner["u", n] = u.detach().requires_grad_()
                outputs.append(_end(system, inner["u", n]))
                grads.append(dend)
            if state is not None:
                inner["state", n] = state.detach().requires_grad_()
                y, end = _free(system, inner["state", n], length)
                outputs += [y] if dend is None else [y, end]
                grads += [dy] if dend is None else [dy, dend]
    with autograd_inside_an_op():
        gradients = torch.autograd.grad(outputs, [*leaves.values(), *inner.values()], grads)
    of_inner = dict(zip(inner, gradients[len(leaves) :], strict=True))
    for (kind, n), gradient in of_inner.items():
        if kind == "u":
            dus[n] = dus[n] + gradient
    dstates = [of_inner.get(("state", n)) for n in range(len(sequences))]
    return dus, dstates, dict(zip(leaves, gradients, strict=False))
