r"""Convolution with the response of a linear system, in blocks with the state carried between them.

Over N real numbers of state a block of c steps is four matrix products per channel. With the rows `E_j = C Ā^{j+1}`,
the columns `W_j = Ā^j b` and the response `K_j = C Ā^j b`,

    Y = U Toeplitz(K) + X E^T       S = U flip(W)       X' = Ā^c X + S

where U has the blocks as its rows: all of them are multiplied at once and only `X' = Ā^c X + S` goes from block to
block. Time and memory are linear in T, and nothing of T × N is made: there is one state per block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sinuous.kernels.arguments import LTIConv
from sinuous.kernels.torch.differentiation import autograd_inside_an_op
from sinuous.kernels.torch.discretization import as_complex, conj
from sinuous.kernels.torch.lti_operators import (
    Operators,
    is_matrix,
    operators,
    power_gradient,
    sums_of_diagonals,
    toeplitz,
    with_leaves,
    with_skip,
)

DOUBLINGS = range(3, 7)
"""Blocks have 2^3 to 2^6 steps."""


class BlockRun(NamedTuple):
    """Steps `start:stop` of a sequence, which are blocks of `size` steps each."""

    start: int
    stop: int
    size: int

    def rows(self, t: Tensor) -> Tensor:
        """`[D, B·I, c]`, each block a row, of `[D, B, T]`."""
        blocks: Tensor = t[:, :, self.start : self.stop].unflatten(-1, (-1, self.size))
        return blocks.flatten(1, 2)


def _doublings(sequences: Sequence[Tensor]) -> int:
    """k of blocks of 2^k steps, on a CPU about half the square root of the steps of all rows: operators cost as much
    however few steps there are. On other devices launches cost more than operators, and few blocks are best."""
    if not sequences[0].is_cpu:
        return DOUBLINGS[-1]
    steps = sum(u.shape[1] * u.shape[2] for u in sequences)
    return min(max(steps.bit_length() // 2 - 1, DOUBLINGS[0]), DOUBLINGS[-1])


def _runs(length: int, doublings: int, alone: bool) -> list[BlockRun]:
    """Full blocks, and for the rest one shorter block, or where sequences of any length share operators, blocks of
    2^k, …, 1 steps."""
    size = 2**doublings
    full = length // size * size
    runs = [BlockRun(0, full, size)] if full else []
    while full < length:
        rest = length - full if alone else 1 << (length - full).bit_length() - 1
        runs.append(BlockRun(full, full + rest, rest))
        full += rest
    return runs


class BlockOperators(NamedTuple):
    """The operators of blocks of one size: toeplitz `[D, c, c]`, rows and columns, last step first, `[D, c, N]`."""

    toeplitz: Tensor
    rows: Tensor
    columns: Tensor
    power: Tensor

    @classmethod
    def of(cls, operators: Operators, size: int, power: Tensor) -> BlockOperators:
        rows, columns = operators.rows[:, :size], operators.columns[:, :size].flip(1)
        return cls(toeplitz(operators.response[:, :size]), rows, columns, power)


class BlockPlan(NamedTuple):
    """The runs of blocks of each sequence, and all the sizes that blocks have."""

    runs: list[list[BlockRun]]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, sequences: Sequence[Tensor]) -> BlockPlan:
        doublings = _doublings(sequences)
        runs = [_runs(u.shape[2], doublings, len(sequences) == 1) for u in sequences]
        return cls(runs, tuple({run.size for each in runs for run in each}))

    def operators(self, dtype: torch.dtype, args: LTIConv) -> Operators:
        long = operators(self.sizes, dtype, args)
        powers = tuple(power.to(dtype) for power in long.powers)
        return long._replace(response=with_skip(long.response, args.D), powers=powers)

    def blocks(self, operators: Operators) -> dict[int, BlockOperators]:
        return {
            size: BlockOperators.of(operators, size, power)
            for size, power in zip(self.sizes, operators.powers, strict=True)
        }


def _carried(power: Tensor, start: Tensor, added: Tensor, adjoint: bool = False) -> tuple[Tensor, Tensor]:
    """States before each block, `[D, B·I, N]`, and after the last one, from that before the first and the sum that each
    block adds; with `adjoint` time runs backwards and the last block is the first."""
    batch = start.shape[1]
    added = added.unflatten(1, (batch, added.shape[1] // max(batch, 1)))
    entering, leaving = torch.empty_like(added), torch.empty_like(start)
    factor = None if is_matrix(power, start) else as_complex(conj(power) if adjoint else power).unsqueeze(1)

    def each(t: Tensor) -> list[Tensor]:
        t = t if factor is None else torch.view_as_complex(t.unflatten(-1, (-1, 2)))
        return list(t.unbind(2))[:: -1 if adjoint else 1]

    befores, inputs = [*each(entering), *each(leaving.unsqueeze(2))], each(added)
    befores[0].copy_(each(start.unsqueeze(2))[0])
    for plus, before, after in zip(inputs, befores, befores[1:], strict=False):
        if factor is None:
            torch.baddbmm(plus, before, power if adjoint else power.mT, out=after)
        else:
            torch.addcmul(plus, factor, before, out=after)
    return entering.flatten(1, 2), leaving


def _forward_run(block: BlockOperators, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    states, state = _carried(block.power, state, u @ block.columns)
    return torch.baddbmm(u @ block.toeplitz, states, block.rows.mT), state


def _backward_run(
    block: BlockOperators, u: Tensor, dy: Tensor, state: Tensor, dstate: Tensor
) -> tuple[Tensor, Tensor, BlockOperators]:
    """Gradients of u, of the state before the run, and of the operators."""
    states, _ = _carried(block.power, state, u @ block.columns)
    dadded, dstate = _carried(block.power, dstate, dy @ block.rows, adjoint=True)
    du = torch.baddbmm(dy @ block.toeplitz.mT, dadded, block.columns.mT)
    dpower = power_gradient(block.power, states, dadded)
    return du, dstate, BlockOperators(u.mT @ dy, dy.mT @ states, u.mT @ dadded, dpower)


def _or_zeros(state: Tensor | None, u: Tensor, args: LTIConv) -> Tensor:
    return u.new_zeros(*u.shape[:2], 2 * args.A.shape[-2]) if state is None else state


def forward(
    args: LTIConv, sequences: Sequence[Tensor], states: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs `[D, B, T]` of each sequence `[D, B, T]` and the states after it; states `[D, B, N]`, or None for 0."""
    plan = BlockPlan.of(sequences)
    blocks = plan.blocks(plan.operators(sequences[0].dtype, args))
    ys, ends = [], []
    for u, start, runs in zip(sequences, states, plan.runs, strict=True):
        state, parts = _or_zeros(start, u, args), []
        for run in runs:
            y, state = _forward_run(blocks[run.size], run.rows(u), state)
            parts.append(y.reshape(*u.shape[:2], -1))
        ys.append(parts[0] if len(parts) == 1 else torch.cat(parts, -1))
        ends.append(state)
    return ys, ends


def backward(
    args: LTIConv,
    sequences: Sequence[Tensor],
    states: Sequence[Tensor | None],
    dys: Sequence[Tensor],
    dends: Sequence[Tensor | None],
) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
    """Gradients of the sequences, of the states before them and of the parameters that there are."""
    plan = BlockPlan.of(sequences)
    with autograd_inside_an_op():
        args, leaves = with_leaves(args)
        operators = plan.operators(sequences[0].dtype, args)
    outputs = (operators.response, operators.rows, operators.columns, *operators.powers)
    plain = [t.detach() for t in outputs]
    blocks = plan.blocks(Operators(operators.readout, plain[0], plain[1], plain[2], tuple(plain[3:])))
    response, rows, columns, *powers = sums = [torch.zeros_like(t) for t in outputs]
    power_of = dict(zip(plan.sizes, powers, strict=True))
    dus, dstates = [], []
    for u, dy, start, dend, runs in zip(sequences, dys, states, dends, plan.runs, strict=True):
        state, dstate = (_or_zeros(t, u, args) for t in (start, dend))
        starts, parts = [state], []
        for run in runs[:-1]:
            block = blocks[run.size]
            starts.append(_carried(block.power, starts[-1], run.rows(u) @ block.columns)[1])
        for run, before in zip(reversed(runs), reversed(starts), strict=True):
            size = run.size
            du, dstate, dblock = _backward_run(blocks[size], run.rows(u), run.rows(dy), before, dstate)
            parts.append(du.reshape(*u.shape[:2], -1))
            response[:, :size] += sums_of_diagonals(dblock.toeplitz)
            rows[:, :size] += dblock.rows
            columns[:, :size] += dblock.columns.flip(1)
            power_of[size].add_(dblock.power)
        dus.append(torch.cat(parts[::-1], -1))
        dstates.append(dstate)
    with autograd_inside_an_op():
        gradients = torch.autograd.grad(outputs, list(leaves.values()), sums)
    return dus, dstates, dict(zip(leaves, gradients, strict=True))
