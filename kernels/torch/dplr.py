"""Diagonal plus low rank (DPLR) in chunks of plain torch.

With G the sums of the logarithms of the decays, inclusive, Gx those up to the step before, and r in the middle of a
segment, so that e^r S_0 is the state in the units in which both sides are moderate,

    left  = [q ⊙ e^{G - r};  a ⊙ e^{Gx - r}]          the readers
    right = [k ⊙ e^{r - G};  b ⊙ e^{r - G}]           the writers
    [y / scale; U] = tril(left rightᵀ) [V; U] + left (e^r S_0)
    S_1 = e^r (e^r S_0 + rightᵀ [V; U])

where a reads what is strictly earlier and q its own step too. U, what the rank-one parts write, solves a unit
triangular system. A segment in which a channel decays by more than exp(-60) is halved, and halved again; a single step
needs no exponential but that of its decay.

Source: the WY form of Yang et al. (arXiv 2406.06484), section 3, with decays taken apart as in (arXiv 2312.06635),
section 4.3.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from sinuous.kernels.arguments import DPLR
from sinuous.kernels.torch import chunked
from sinuous.kernels.torch.chunked import Recurrence, State, Tensors


class DPLRSegment(NamedTuple):
    """The matrices of a segment, in the letters of the equations above."""

    after: Tensor  # [B,H,2c,K], e^{G - r} and e^{Gx - r}
    before: Tensor  # [B,H,c,K], e^{r - G}
    half: Tensor  # [B,H,K,1], e^r
    left: Tensor  # [B,H,2c,K]
    right: Tensor  # [B,H,2c,K]
    weights: Tensor  # [B,H,2c,2c]
    start: Tensor  # [B,H,K,V], e^r S_0
    values: Tensor  # [B,H,2c,V], V and U
    output: Tensor  # [B,H,c,V], y / scale


def _causal(weights: Tensor) -> Tensor:
    """Zero the weights of a step on those that are written later."""
    c = weights.shape[-1] // 2
    for columns in (weights[..., :c], weights[..., c:]):
        columns[..., :c, :].tril_()
        columns[..., c:, :].tril_(-1)
    return weights


def _present(inputs: Tensors) -> list[Tensor]:
    """q, k, v, log_decay, a and b: none is optional."""
    return [t for t in inputs if t is not None]


def _segment(state: State, inputs: Tensors) -> DPLRSegment:
    q, k, v, log_decay, a, b = _present(inputs)
    c = q.shape[2]
    # In float64, since only differences of long sums are used of them.
    sums = log_decay.double().cumsum(2)
    middle = sums[:, :, -1:] / 2
    inclusive = (sums - middle).to(q.dtype).exp()
    half = middle.to(q.dtype).exp()
    after = torch.cat([inclusive, half.reciprocal(), inclusive[:, :, :-1]], 2)
    before = inclusive.reciprocal()
    left = torch.cat([q, a], 2).mul_(after)
    right = torch.cat([k * before, b * before], 2)
    weights = _causal(left @ right.mT)
    half = half.mT
    start = half * state[0]
    read = left @ start
    rest = torch.baddbmm(read[:, :, c:].flatten(0, 1), weights[:, :, c:, :c].flatten(0, 1), v.flatten(0, 1))
    written = torch.linalg.solve_triangular(-weights[:, :, c:, c:], rest.view_as(v), upper=False, unitriangular=True)
    values = torch.cat([v, written], 2)
    output = weights[:, :, :c] @ values + read[:, :, :c]
    return DPLRSegment(after, before, half, left, right, weights, start, values, output)


def _forward(state: State, inputs: Tensors, parameters: Tensors, scale: float) -> tuple[Tensor, State]:
    if _present(inputs)[0].shape[2] == 1:
        return _forward_step(state, inputs, scale)
    p = _segment(state, inputs)
    return p.output * scale, (p.half * (p.start + p.right.mT @ p.values),)


def _backward(
    state: State, inputs: Tensors, parameters: Tensors, dy: Tensor, dstate: State, scale: float
) -> tuple[State, Tensors, Tensors]:
    if dy.shape[2] == 1:
        return _backward_step(state, inputs, dy, dstate, scale)
    p, c = _segment(state, inputs), dy.shape[2]
    dend = p.half * dstate[0]
    dy = dy * scale
    dwritten = p.weights[:, :, :c, c:].mT @ dy + p.right[:, :, c:] @ dend
    through = torch.linalg.solve_triangular(-p.weights[:, :, c:, c:].mT, dwritten, upper=True, unitriangular=True)
    dread = torch.cat([dy, through], 2)
    dweights = _causal(dread @ p.values.mT)
    dleft = dweights @ p.right + dread @ p.start.mT
    dright = dweights.mT @ p.left + p.values @ dend.mT
    dv = p.weights[:, :, :, :c].mT @ dread + p.right[:, :, :c] @ dend

    # The gradient of G: at the readouts, at the steps that are written, and at the end, through the state there.
    at_left, at_right = dleft * p.left, dright * p.right
    at_a = at_left[:, :, c:].double()
    ends = at_left[:, :, :c] + at_a - at_right[:, :, :c] - at_right[:, :, c:]
    ends[:, :, -1] += ((p.start + p.right.mT @ p.values) * dend).sum(-1)
    dlog_decay = ends.flip(2).cumsum(2).flip(2) - at_a  # a does not see the decay of its own step
    dq, da = dleft.mul_(p.after).tensor_split(2, 2)
    dk, db = (part * p.before for part in dright.tensor_split(2, 2))
    dS = p.half * (dend + p.left.mT @ dread)
    return (dS,), (dq, dk, dv, dlog_decay, da, db), ()


def _forward_step(state: State, inputs: Tensors, scale: float) -> tuple[Tensor, State]:
    """One step, of any decay: c is 1."""
    q, k, v, log_decay, a, b = _present(inputs)
    S = log_decay.exp().mT * state[0] + b.mT @ (a @ state[0]) + k.mT @ v
    return (q @ S) * scale, (S,)


def _backward_step(
    state: State, inputs: Tensors, dy: Tensor, dstate: State, scale: float
) -> tuple[State, Tensors, Tensors]:
    q, k, v, log_decay, a, b = _present(inputs)
    (S,), (after,) = state, _forward_step(state, inputs, scale)[1]
    dy, decay = dy * scale, log_decay.exp()
    dafter = dstate[0] + q.mT @ dy
    dread = b @ dafter
    dlog_decay = decay * (S * dafter).sum(-1).unsqueeze(2)
    gradients = (dy @ after.mT, v @ dafter.mT, k @ dafter, dlog_decay, dread @ S.mT, (a @ S) @ dafter.mT)
    return (decay.mT * dafter + a.mT @ dread,), gradients, ()


def _of_call(args: DPLR) -> tuple[Recurrence, Tensors, Tensors, State]:
    """Passes, inputs, no parameters, and initial state."""
    scale = args.q.shape[-1] ** -0.5 if args.scale is None else args.scale
    passes = Recurrence(functools.partial(_forward, scale=scale), functools.partial(_backward, scale=scale))
    inputs = (args.q, args.k, args.v, args.log_decay, args.a, args.b)
    initial = chunked.initial_matrix(args.q, args.v, args.initial_state, args.cu_seqlens)
    return chunked.in_short_segments(passes, gate=3), inputs, (), initial


def forward(args: DPLR, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, final_state, chunk_states)`; see sinuous.core.ops.dplr."""
    y, (final,), (chunk_states,) = chunked.forward(
        *_of_call(args), torch.empty_like(args.v), args.cu_seqlens, args.reverse, chunk_size
    )
    return y, final, chunk_states


def backward(
    args: DPLR, grads: tuple[Tensor | None, Tensor | None], chunk_states: Tensor, chunk_size: int
) -> list[Tensor | None]:
    """Gradients of q, k, v, log_decay, a, b and initial_state."""
    dy, dfinal = grads
    inputs, _, (dinitial,) = chunked.backward(
        *_of_call(args), (chunk_states,), dy, (dfinal,), args.cu_seqlens, args.reverse, chunk_size, value=2
    )
    return [*inputs, None if args.initial_state is None else dinitial]
