"""Recurrent cells step by step in plain torch, with a backward pass through time.

The output of a step stands inside the gates of the next, so the only products that are not made step by step are those
of the backward pass that know all outputs: the pre-activations of a segment, computed again, and the gradient of R. In
the loops a step is `[H, B, D]`, a batch of matrix products over heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.kernels.arguments import SLSTM
from sinuous.kernels.precision import working_dtype
from sinuous.kernels.torch import chunked
from sinuous.kernels.torch.chunked import LOWEST, Recurrence, State, Tensors
from sinuous.kernels.torch.packing import sequence_count


class _Cell(NamedTuple):
    """One kind of cell, elementwise.

    Attributes:
        step: `(p_i, p_f, p_z, p_o, state) -> state` with the state (y, c, n, m).
        factors: `(p_i, p_f, p_z, p_o, before, after) -> factors`, all values of a segment that its gradients
            need, with time on axis 0.
        back: `(dstate, *factors_t) -> (dp_i, dp_f, dp_z, dp_o), dstate`, from the gradient of the state after a step to
            that before it, without what passes through the pre-activations.
    """

    step: Callable[..., State]
    factors: Callable[..., State]
    back: Callable[..., tuple[State, State]]


# sLSTM. With i' and f' the gates in units of e^m, and a = log f + m_{t-1}: of the three terms that meet in the gradient
# of m, the one of the gate that attains the maximum cancels, since that gate is 1. It is left out and not subtracted.


def _slstm_step(p_i: Tensor, p_f: Tensor, p_z: Tensor, p_o: Tensor, state: State) -> State:
    _, c, n, m = state
    carried = F.logsigmoid(p_f).add_(m)
    m = torch.where((n == 0).logical_or_(p_i >= carried), p_i, carried).clamp_min_(LOWEST)
    i, f = (p_i - m).exp_(), carried.sub_(m).clamp_max_(0).exp_()
    c, n = torch.addcmul(f * c, i, p_z.tanh()), torch.addcmul(i, f, n)
    return p_o.sigmoid().mul_(c / n.masked_fill(n == 0, torch.inf)), c, n, m


def _slstm_factors(p_i: Tensor, p_f: Tensor, p_z: Tensor, p_o: Tensor, before: State, after: State) -> State:
    (_, c_before, n_before, m_before), (_, c, n, m) = before, after
    carried = F.logsigmoid(p_f) + m_before
    input_wins = (n_before == 0) | (p_i >= carried)
    bounded = torch.where(input_wins, p_i, carried) < LOWEST
    i, f = (p_i - m).exp(), (carried - m).clamp_max(0).exp()
    o, z, inverse = p_o.sigmoid(), p_z.tanh(), (1 / n).masked_fill(n == 0, 0)
    ratio = c * inverse
    return (
        o * inverse,
        o * ratio * inverse,
        ratio * o * (1 - o),
        i * (1 - z * z),
        i * z,
        i,
        f.masked_fill(carried > m, 0) * c_before,
        f.masked_fill(carried > m, 0) * n_before,
        f,
        (-p_f).sigmoid(),
        input_wins & ~bounded,
        ~input_wins & ~bounded,
    )


def _slstm_back(dstate: State, *factors: Tensor) -> tuple[State, State]:
    y_of_c, y_of_n, y_of_o, c_of_z, log_i_c, log_i_n, log_f_c, log_f_n, f, slope, input_wins, carried_wins = factors
    dy, dc, dn, dm = dstate
    dc, dn = torch.addcmul(dc, dy, y_of_c), torch.addcmul(dn, dy, y_of_n, value=-1)
    dlog_i = torch.addcmul(dn * log_i_n, dc, log_i_c)
    dlog_f = torch.addcmul(dn * log_f_n, dc, log_f_c)
    dp_i = torch.where(input_wins, dm - dlog_f, dlog_i)
    dcarried = torch.where(carried_wins, dm - dlog_i, dlog_f)
    return (dp_i, dcarried * slope, dc * c_of_z, dy * y_of_o), (torch.zeros_like(dy), dc * f, dn * f, dcarried)


def _lstm_step(p_i: Tensor, p_f: Tensor, p_z: Tensor, p_o: Tensor, state: State) -> State:
    _, c, n, m = state
    c = torch.addcmul(p_f.sigmoid() * c, p_i.sigmoid(), p_z.tanh())
    return p_o.sigmoid().mul_(c.tanh()), c, n, m


def _lstm_factors(p_i: Tensor, p_f: Tensor, p_z: Tensor, p_o: Tensor, before: State, after: State) -> State:
    i, f, z, o, out = p_i.sigmoid(), p_f.sigmoid(), p_z.tanh(), p_o.sigmoid(), after[1].tanh()
    return (
        o * (1 - out * out),
        out * o * (1 - o),
        z * i * (1 - i),
        before[1] * f * (1 - f),
        i * (1 - z * z),
        f,
    )


def _lstm_back(dstate: State, *factors: Tensor) -> tuple[State, State]:
    y_of_c, y_of_o, c_of_i, c_of_f, c_of_z, f = factors
    dy, dc, dn, dm = dstate
    dc = torch.addcmul(dc, dy, y_of_c)
    return (dc * c_of_i, dc * c_of_f, dc * c_of_z, dy * y_of_o), (torch.zeros_like(dy), dc * f, dn, dm)


def _gru_step(p_i: Tensor, p_f: Tensor, p_z: Tensor, p_o: Tensor, state: State) -> State:
    y, c, n, m = state
    return torch.lerp(torch.addcmul(p_z, p_i.sigmoid(), p_o).tanh_(), y, p_f.sigmoid()), c, n, m


def _gru_factors(p_i: Tensor, p_f: Tensor, p_z: Tensor, p_o: Tensor, before: State, after: State) -> State:
    i, f = p_i.sigmoid(), p_f.sigmoid()
    candidate = torch.addcmul(p_z, i, p_o).tanh()
    of_sum = (1 - f) * (1 - candidate * candidate)
    return of_sum * p_o * i * (1 - i), (before[0] - candidate) * f * (1 - f), of_sum, of_sum * i, f


def _gru_back(dstate: State, *factors: Tensor) -> tuple[State, State]:
    *of_gates, f = factors
    dy, dc, dn, dm = dstate
    return tuple(dy * factor for factor in of_gates), (dy * f, dc, dn, dm)


_CELLS = {
    "slstm": _Cell(_slstm_step, _slstm_factors, _slstm_back),
    "lstm": _Cell(_lstm_step, _lstm_factors, _lstm_back),
    "gru": _Cell(_gru_step, _gru_factors, _gru_back),
}


def _steps_first(gates: Tensor, bias: Tensor) -> Tensor:
    """Gates `[B, H, c, 4, D]` and bias `[H, 4, D]` -> their sum `[c, H, B, 4 D]`."""
    return (gates + bias[:, None]).permute(2, 1, 0, 3, 4).flatten(3)


def _heads_first(state: Tensor) -> Tensor:
    return state.transpose(0, 1).contiguous()


def _forward(cell: _Cell, state: State, inputs: Tensors, parameters: Tensors) -> tuple[Tensor, State]:
    gates, _ = inputs
    R, bias = parameters
    assert gates is not None
    assert R is not None
    assert bias is not None
    into_gates = R.flatten(1, 2).transpose(1, 2).contiguous()
    state = tuple(_heads_first(t) for t in state)
    ys = []
    for x_t in _steps_first(gates, bias).unbind(0):
        state = cell.step(*torch.baddbmm(x_t, state[0], into_gates).chunk(4, -1), state)
        ys.append(state[0])
    return torch.stack(ys).permute(2, 1, 0, 3), tuple(_heads_first(t) for t in state)


def _stacked(states: list[State]) -> tuple[State, State]:
    """The states before and after each step, from those before the first step and after every one."""
    whole = tuple(torch.stack(parts) for parts in zip(*states, strict=True))
    return tuple(t[:-1] for t in whole), tuple(t[1:] for t in whole)


def _backward(
    cell: _Cell, state: State, inputs: Tensors, parameters: Tensors, dy: Tensor, dstate: State
) -> tuple[State, Tensors, Tensors]:
    gates, hidden = inputs
    R, bias = parameters
    assert gates is not None
    assert hidden is not None
    assert R is not None
    assert bias is not None
    batch, heads, length, _, width = gates.shape
    R = R.flatten(1, 2)
    y_before = torch.cat([state[0].unsqueeze(2), hidden[:, :, :-1]], 2).permute(1, 2, 0, 3).flatten(1, 2)
    products = (y_before @ R.transpose(1, 2)).unflatten(1, (length, batch)).transpose(0, 1)
    p = (_steps_first(gates, bias) + products).chunk(4, -1)
    state = tuple(_heads_first(t) for t in state)
    states = [state]
    for p_t in zip(*(t.unbind(0) for t in p), strict=True):
        states.append(cell.step(*p_t, states[-1]))
    factors = [t.unbind(0) for t in cell.factors(*p, *_stacked(states))]
    dp = gates.new_empty(length, heads, batch, 4 * width)
    adjoint = tuple(_heads_first(t) for t in dstate)
    steps = zip(dy.permute(2, 1, 0, 3).unbind(0), dp.unbind(0), *factors, strict=True)
    for dy_t, dp_t, *factors_t in reversed(list(steps)):
        dgates, (dy_direct, *rest) = cell.back((adjoint[0] + dy_t, *adjoint[1:]), *factors_t)
        torch.cat(dgates, -1, out=dp_t)
        adjoint = (torch.baddbmm(dy_direct, dp_t, R), *rest)
    dR = dp.transpose(0, 1).flatten(1, 2).transpose(1, 2) @ y_before
    dgates_by_head = dp.unflatten(3, (4, width)).permute(2, 1, 0, 3, 4)
    return (
        tuple(_heads_first(t) for t in adjoint),
        (dgates_by_head, None),
        (dR.unflatten(1, (4, width)), dgates_by_head.sum((0, 2))),
    )


def _recurrence(cell: str) -> Recurrence:
    kind = _CELLS[cell]
    return Recurrence(partial(_forward, kind), partial(_backward, kind))


def _arguments(args: SLSTM) -> tuple[Tensor, list[Tensor | None], State]:
    """Gates with heads before gates, as are the parameters, and the initial states."""
    dtype = working_dtype(args.gates.dtype)
    sequences = sequence_count(args.gates, args.cu_seqlens)
    zeros = args.gates.new_zeros(sequences, *args.gates.shape[3:], dtype=dtype)
    initial = tuple(zeros if t is None else t.to(dtype) for t in args.initial_state)
    by_head = [t.to(dtype).transpose(0, 1) for t in (args.R, args.bias)]
    return args.gates.transpose(2, 3), [*by_head], initial


def forward(args: SLSTM, chunk_size: int) -> tuple[Tensor, ...]:
    """`(y, final states, hidden, chunk states)`; see sinuous.core.ops.slstm."""
    x, parameters, initial = _arguments(args)
    batch, length, heads, _, width = x.shape
    hidden = x.new_empty(batch, length, heads, width, dtype=initial[0].dtype)
    hidden, final, chunk_states = chunked.forward(
        _recurrence(args.cell), [x, None], parameters, initial, hidden, args.cu_seqlens, args.reverse, chunk_size
    )
    return hidden.to(x.dtype, copy=True), *final, hidden, *chunk_states


def backward(
    args: SLSTM,
    grads: Tensors,
    hidden: Tensor,
    chunk_y: Tensor,
    chunk_c: Tensor,
    chunk_n: Tensor,
    chunk_m: Tensor,
    chunk_size: int,
) -> list[Tensor | None]:
    """Gradients of gates, R, bias and the four initial states."""
    x, parameters, initial = _arguments(args)
    dy, *dfinal = grads
    (dx, _), (dR, dbias), dinitial = chunked.backward(
        _recurrence(args.cell), [x, hidden], parameters, initial, (chunk_y, chunk_c, chunk_n, chunk_m), dy, dfinal,
        args.cu_seqlens, args.reverse, chunk_size, value=1,
    )  # fmt: skip
    assert dx is not None
    assert dR is not None
    assert dbias is not None
    dstates = [None if t is None else d for t, d in zip(args.initial_state, dinitial, strict=True)]
    return [dx.transpose(2, 3), dR.transpose(0, 1), dbias.transpose(0, 1), *dstates]


def outputs_before(args: SLSTM, hidden: Tensor) -> Tensor:
    """The output that each step reads, `[B, T, H, D]` like `hidden`: that of the step processed before it."""
    before, initial, cu_seqlens, reverse = torch.empty_like(hidden), args.initial_y, args.cu_seqlens, args.reverse
    if hidden.shape[1] == 0:
        return before
    if reverse:
        before[:, :-1] = hidden[:, 1:]
    else:
        before[:, 1:] = hidden[:, :-1]
    if cu_seqlens is None:
        before[:, -1 if reverse else 0] = 0 if initial is None else initial
        return before
    time = torch.arange(hidden.shape[1], device=hidden.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), time, right=True)
    begins = time == (cu_seqlens[sequence + 1] - 1 if reverse else cu_seqlens[sequence])
    first = hidden.new_zeros(()) if initial is None else initial.to(hidden.dtype)[sequence]
    return torch.where(begins[:, None, None], first, before)
