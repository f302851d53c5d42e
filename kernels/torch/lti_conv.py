r"""Convolution with the response of a linear system, in blocks of plain torch, with the state carried between them.

Over N = 2M real numbers of state a block of c steps is four matrix products per channel. With the rows
`E_j = c Ā^{j+1}`, the columns `W_j = Ā^j b` and the response `K_j = c Ā^j b`,

    Y = U Toeplitz(K) + X E^T       S = U flip(W)       X' = Ā^c X + S

where U has the blocks as its rows: all of them are multiplied at once and only `X' = Ā^c X + S` goes from block to
block. Time and memory are linear in T, and nothing of T × N is made: there is one state per block. What is left of T
after the full blocks goes in blocks of 32, 16, … 1.

A Fourier transform over all of T, the other way to convolve, has no state to begin with or to end with, and is not
faster as a rule (docs/benchmarks/cells_systems_grids_cpu.md has it as a peer; the responses it needs are in
sinuous.core.ops.hippo).

K, E, W and the powers of Ā come from a few products by doubling, in double precision, so that a slow mode stays exact
over many steps; autograd passes their gradients on to the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.kernels.torch.chunked import working_dtype
from sinuous.kernels.torch.differentiation import autograd_inside_an_op
from sinuous.kernels.torch.discretization import conj, discretize, matrix, times
from sinuous.kernels.torch.packing import flip_sequences, flip_time, mirror, rows, segments

DOUBLINGS = range(3, 7)
"""Blocks have 2^3 to 2^6 steps."""


class _Operators(NamedTuple):
    """response K `[D, c]` with the skip in it; rows E and columns W `[D, c, N]`; powers Ā^(2^k) of k = 0, 1, …, pairs
    `[D, M, 2]` of a diagonal system and matrices `[D, N, N]` of another one."""

    response: Tensor
    rows: Tensor
    columns: Tensor
    powers: tuple[Tensor, ...]

    @property
    def flat(self) -> tuple[Tensor, ...]:
        return self.response, self.rows, self.columns, *self.powers

    def map(self, function: Callable[[Tensor], Tensor]) -> _Operators:
        response, rows, columns, *powers = (function(t) for t in self.flat)
        return _Operators(response, rows, columns, tuple(powers))


def _operators(
    doublings: int,
    dtype: torch.dtype,
    discretization: str,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    P: Tensor | None,
    D: Tensor | None,
) -> _Operators:
    """The operators of blocks of 2^doublings steps and of all shorter ones."""
    dt, A, B, C = dt.double(), A.double(), B.double(), C.double()
    factor, b, p, q = discretize(dt, A, B, None if P is None else P.double(), discretization)
    readout = (2 * conj(C)).expand_as(factor)
    first = factor if p is None or q is None else matrix(factor, p, q)
    diagonal = p is None

    def forwards(vectors: Tensor, power: Tensor) -> Tensor:
        if diagonal:
            return times(vectors.unflatten(-1, (-1, 2)), power.unsqueeze(1)).flatten(-2)
        return vectors @ power.transpose(1, 2)

    def backwards(vectors: Tensor, power: Tensor) -> Tensor:
        if diagonal:
            return times(vectors.unflatten(-1, (-1, 2)), conj(power).unsqueeze(1)).flatten(-2)
        return vectors @ power

    powers = [first]
    readouts, columns = readout.flatten(1).unsqueeze(1), b.flatten(1).unsqueeze(1)
    for _ in range(doublings):
        readouts = torch.cat([readouts, backwards(readouts, powers[-1])], 1)
        columns = torch.cat([columns, forwards(columns, powers[-1])], 1)
        powers.append(times(powers[-1], powers[-1]) if diagonal else powers[-1] @ powers[-1])
    response = (readouts * columns[:, :1]).sum(-1)
    if D is not None:
        response = torch.cat([response[:, :1] + D.double()[:, None], response[:, 1:]], 1)
    return _Operators(
        response.to(dtype),
        backwards(readouts, first).to(dtype),
        columns.to(dtype),
        tuple(power.to(dtype) for power in powers),
    )


def _toeplitz(response: Tensor) -> Tensor:
    """What step i of a block gives to step o, `[D, c, c]` from `[D, c]`: K_{o-i}, and 0 for o < i."""
    length = response.shape[1]
    return F.pad(response, (length - 1, 0)).unfold(1, length, 1).flip(1)


def _sums_of_diagonals(t: Tensor) -> Tensor:
    """The transpose of `_toeplitz`."""
    length = t.shape[1]
    skewed = F.pad(t.flip(1), (0, length)).flatten(1)[:, : length * (2 * length - 1)]
    sums: Tensor = skewed.unflatten(1, (length, 2 * length - 1)).sum(1)
    return sums[:, length - 1 :]


class _Piece(NamedTuple):
    """Steps `start:stop` of a sequence: blocks of 2^power steps each."""

    start: int
    stop: int
    power: int

    @property
    def blocks(self) -> int:
        return (self.stop - self.start) >> self.power


def _doublings(u: Tensor) -> int:
    """Of a block: its operators cost as much however few steps there are, so that it has about half the square root of
    the steps of all rows. On other devices launches cost more than operators, and few blocks are best."""
    wanted = (u.shape[0] * u.shape[1]).bit_length() // 2 - 1 if u.is_cpu else DOUBLINGS[-1]
    return min(max(wanted, DOUBLINGS[0]), DOUBLINGS[-1])


def _pieces(start: int, stop: int, doublings: int) -> list[_Piece]:
    full = (stop - start) >> doublings << doublings
    found = [_Piece(start, start + full, doublings)] if full else []
    start += full
    for power in range(doublings - 1, -1, -1):
        if (stop - start) >> power:
            found.append(_Piece(start, start + 2**power, power))
            start += 2**power
    return found


class _Block(NamedTuple):
    """The operators of blocks of one size: toeplitz `[D, c, c]`, rows and columns, last step first, `[D, c, N]`."""

    toeplitz: Tensor
    rows: Tensor
    columns: Tensor
    power: Tensor

    @classmethod
    def of(cls, operators: _Operators, power: int) -> _Block:
        size = 2**power
        toeplitz = _toeplitz(operators.response[:, :size])
        return cls(toeplitz, operators.rows[:, :size], operators.columns[:, :size].flip(1), operators.powers[power])


def _is_matrix(power: Tensor, states: Tensor) -> bool:
    return power.shape[1] == states.shape[-1]


def _advance(state: Tensor, power: Tensor, plus: Tensor, adjoint: bool) -> Tensor:
    """Ā^c x + s, or its adjoint, of states `[D, B, N]`."""
    if _is_matrix(power, state):
        return torch.baddbmm(plus, state, power if adjoint else power.transpose(1, 2))
    factor = torch.view_as_complex(conj(power) if adjoint else power).unsqueeze(1)
    plus, state = (torch.view_as_complex(t.unflatten(-1, (-1, 2))) for t in (plus, state))
    return torch.view_as_real(torch.addcmul(plus, factor, state)).flatten(-2)


def _states(block: _Block, state: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """The states before each block `[D, I, B, N]`, and the one after the last."""
    states = torch.empty_like(added)
    for before, plus in zip(states.unbind(1), added.unbind(1), strict=True):
        before.copy_(state)
        state = _advance(state, block.power, plus, adjoint=False)
    return states, state


def _blocks_of(t: Tensor, piece: _Piece, dtype: torch.dtype) -> Tensor:
    """`[D, I·B, c]` from `[B, T, D]`: channels first, and each block a row."""
    length, count = 2**piece.power, piece.blocks
    blocks = t[:, piece.start : piece.stop].unflatten(1, (count, length))
    found: Tensor = blocks.permute(3, 1, 0, 2).to(dtype).reshape(t.shape[2], count * t.shape[0], length)
    return found


def _write(t: Tensor, piece: _Piece, blocks: Tensor) -> None:
    """The inverse of `_blocks_of`."""
    sizes = (piece.blocks, t.shape[0])
    t[:, piece.start : piece.stop].unflatten(1, (piece.blocks, -1)).copy_(
        blocks.unflatten(1, sizes).permute(2, 1, 3, 0)
    )


def _by_block(t: Tensor, batch: int) -> Tensor:
    """`[D, I, B, N]` from `[D, I·B, N]`."""
    found: Tensor = t.unflatten(1, (t.shape[1] // max(batch, 1), batch))
    return found


def _forward_piece(block: _Block, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    added = _by_block(u @ block.columns, state.shape[1])
    states, state = _states(block, state, added)
    return torch.baddbmm(u @ block.toeplitz, states.flatten(1, 2), block.rows.transpose(1, 2)), state


def _backward_piece(
    block: _Block, u: Tensor, dy: Tensor, state: Tensor, dstate: Tensor
) -> tuple[Tensor, Tensor, _Block]:
    """Gradients of u, of the state before the piece, and of the operators."""
    batch = state.shape[1]
    states = _states(block, state, _by_block(u @ block.columns, batch))[0].flatten(1, 2)
    through_y = _by_block(dy @ block.rows, batch)
    dadded = torch.empty_like(through_y)
    for after, plus in reversed(list(zip(dadded.unbind(1), through_y.unbind(1), strict=True))):
        after.copy_(dstate)
        dstate = _advance(dstate, block.power, plus, adjoint=True)
    dadded = dadded.flatten(1, 2)
    du = torch.baddbmm(dy @ block.toeplitz.transpose(1, 2), dadded, block.columns.transpose(1, 2))
    if _is_matrix(block.power, states):
        dpower = dadded.transpose(1, 2) @ states
    else:
        dpower = times(conj(states.unflatten(-1, (-1, 2))), dadded.unflatten(-1, (-1, 2))).sum(1)
    into = u.transpose(1, 2)
    return du, dstate, _Block(into @ dy, dy.transpose(1, 2) @ states, into @ dadded, dpower)


class _Run(NamedTuple):
    """One sequence, or all rows of an ordinary batch: its steps in processing order and its rows of the states."""

    pieces: list[_Piece]
    sequence: int


def _runs(u: Tensor, cu_seqlens: Tensor | None) -> list[_Run]:
    found = segments(u.shape[1], max(u.shape[1], 1), cu_seqlens)
    return [_Run(_pieces(s.start, s.stop, _doublings(u)), s.first or 0) for s in found]


def _longest(runs: list[_Run]) -> int:
    return max((piece.power for run in runs for piece in run.pieces), default=0)


def _channels_first(states: Tensor) -> Tensor:
    """`[D, B, N]` from `[B, D, M, 2]`."""
    return states.flatten(2).transpose(0, 1)


def _initial(u: Tensor, A: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, reverse: bool) -> Tensor:
    """States before the first step, `[D, sequences, N]`, in the order in which the sequences are processed."""
    dtype = working_dtype(u)
    if initial_state is None:
        count = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        return torch.zeros(u.shape[2], count, 2 * A.shape[-2], dtype=dtype, device=u.device)
    initial = flip_sequences(initial_state, cu_seqlens) if reverse else initial_state
    return _channels_first(initial.to(dtype)).contiguous()


def _batch_first(states: Tensor, cu_seqlens: Tensor | None, reverse: bool) -> Tensor:
    """`[sequences, D, M, 2]` from what `_initial` gives."""
    states = states.transpose(0, 1).unflatten(-1, (-1, 2))
    return flip_sequences(states, cu_seqlens) if reverse else states


def _rows(states: Tensor, run: _Run, cu_seqlens: Tensor | None) -> Tensor:
    return rows(states.transpose(0, 1), run.sequence, cu_seqlens).transpose(0, 1)


def forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    P: Tensor | None,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    discretization: str,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """`(y, final_state)`; see sinuous.core.ops.lti_conv."""
    bounds = mirror(cu_seqlens, u.shape[1]) if reverse else cu_seqlens
    state = _initial(u, A, initial_state, cu_seqlens, reverse)
    given = flip_time(u) if reverse else u
    runs, y = _runs(u, bounds), torch.empty_like(u, memory_format=torch.contiguous_format)
    operators = _operators(_longest(runs), state.dtype, discretization, dt, A, B, C, P, D)
    blocks = {power: _Block.of(operators, power) for power in {p.power for run in runs for p in run.pieces}}
    final = state.clone()
    for run in runs:
        carried = _rows(state, run, bounds)
        for piece in run.pieces:
            output, carried = _forward_piece(blocks[piece.power], _blocks_of(given, piece, state.dtype), carried)
            _write(y, piece, output)
        _rows(final, run, bounds).copy_(carried)
    return flip_time(y) if reverse else y, _batch_first(final, cu_seqlens, reverse)


def backward(
    grads: tuple[Tensor | None, Tensor | None],
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    P: Tensor | None,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    discretization: str,
    reverse: bool,
) -> list[Tensor | None]:
    """Gradients of u, dt, A, B, C, P, D and initial_state."""
    dy, dfinal = grads
    bounds = mirror(cu_seqlens, u.shape[1]) if reverse else cu_seqlens
    state = _initial(u, A, initial_state, cu_seqlens, reverse)
    dstate = _initial(u, A, dfinal, cu_seqlens, reverse).clone()
    dy = torch.zeros_like(u) if dy is None else dy
    given, dy = (flip_time(u), flip_time(dy)) if reverse else (u, dy)
    runs, du = _runs(u, bounds), torch.empty_like(u, memory_format=torch.contiguous_format)

    parameters = {"dt": dt, "A": A, "B": B, "C": C, "P": P, "D": D}
    with autograd_inside_an_op():
        leaves: dict[str, Any] = {n: None if t is None else t.detach().requires_grad_() for n, t in parameters.items()}
        operators = _operators(_longest(runs), state.dtype, discretization, **leaves)
    plain, sums = operators.map(Tensor.detach), operators.map(torch.zeros_like)
    blocks = {power: _Block.of(plain, power) for power in {p.power for run in runs for p in run.pieces}}
    for run in runs:
        carried, starts = _rows(state, run, bounds), []
        for piece in run.pieces:
            starts.append(carried)
            if piece is not run.pieces[-1]:
                block = blocks[piece.power]
                added = _blocks_of(given, piece, state.dtype) @ block.columns
                carried = _states(block, carried, _by_block(added, carried.shape[1]))[1]
        dcarried = _rows(dstate, run, bounds)
        for piece, start in zip(reversed(run.pieces), reversed(starts), strict=True):
            into, out_of = (_blocks_of(t, piece, state.dtype) for t in (given, dy))
            dpiece, dcarried, dblock = _backward_piece(blocks[piece.power], into, out_of, start, dcarried)
            _write(du, piece, dpiece)
            size = 2**piece.power
            sums.response[:, :size] += _sums_of_diagonals(dblock.toeplitz)
            sums.rows[:, :size] += dblock.rows
            sums.columns[:, :size] += dblock.columns.flip(1)
            sums.powers[piece.power].add_(dblock.power)
        _rows(dstate, run, bounds).copy_(dcarried)
    with autograd_inside_an_op():
        present = {n: t for n, t in leaves.items() if t is not None}
        found = torch.autograd.grad(operators.flat, list(present.values()), sums.flat)
    of_parameters = dict(zip(present, found, strict=True))
    du = flip_time(du) if reverse else du
    dinitial = None if initial_state is None else _batch_first(dstate, cu_seqlens, reverse)
    return [du, *(of_parameters.get(n) for n in parameters), dinitial]
