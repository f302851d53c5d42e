"""Delta rule in chunks of plain torch.

The values U that a segment writes, ΔS = Kᵀ U, solve a triangular system (the WY or UT form): with E the products of
decays, factors counted as steps of their own,

    (I + A) U = diag(β) (V - e^G K S_0),        A = stril(diag(β) (K Kᵀ ⊙ E))
    Y = scale · (e^G Q S_0 + (Q Kᵀ ⊙ E) U),     S_1 = e^{G_c} S_0 + (e^{G_c - G} K)ᵀ U

Source: Yang et al. (arXiv 2406.06484), section 3, and (arXiv 2412.06464), section 3.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from sinuous.kernels.arguments import DeltaRule
from sinuous.kernels.torch import chunked
from sinuous.kernels.torch.chunked import Decays, Recurrence, State, Tensors, decay_gradient, decays


class DeltaRuleSegment(NamedTuple):
    """A segment of c steps with n factors each, m = c n rows in the order of time."""

    q: Tensor  # [B,H,c,K]
    k: Tensor  # [B,H,m,K]
    v: Tensor  # [B,H,m,V]
    beta: Tensor  # [B,H,m,1]
    factors: int
    decays: Decays  # of steps
    since_start: Tensor  # [B,H,m,1]
    until_end: Tensor  # [B,H,m,1]
    between: Tensor  # [B,H,m,m], E
    similarity: Tensor  # [B,H,m,m], K Kᵀ ⊙ E below the diagonal
    system: Tensor  # [B,H,m,m], A
    error: Tensor  # [B,H,m,V], V - e^G K S_0
    written: Tensor  # [B,H,m,V], U
    weights: Tensor  # [B,H,c,m], scale · Q Kᵀ ⊙ E


def _segment(state: State, inputs: Tensors, scale: float) -> DeltaRuleSegment:
    q, k, v, beta, log_decay = inputs
    assert q is not None
    assert k is not None
    assert v is not None
    assert beta is not None
    n = k.shape[3]
    k, v, beta = k.flatten(2, 3), v.flatten(2, 3), beta.flatten(2, 3).unsqueeze(-1)
    products = decays(q.new_zeros(1, 1, q.shape[2]) if log_decay is None else log_decay)
    since_start, until_end = (_per_factor(t, n).unsqueeze(-1) for t in (products.since_start, products.until_end))
    between = _per_factor(_per_factor(products.between, n).mT, n).mT
    # Factors of one step have no decay between them; the triangle below takes the earlier ones only.
    between = between if n == 1 else torch.maximum(between, _same_step(q.shape[2], n, q))
    similarity = (k @ k.mT).mul_(between).tril_(-1)
    system = similarity * beta
    error = torch.addcmul(v, k @ state[0], since_start, value=-1)
    written = torch.linalg.solve_triangular(system, error * beta, upper=False, unitriangular=True)
    weights = (q @ k.mT).mul_(_per_factor(products.between, n)).mul_(scale)
    return DeltaRuleSegment(
        q, k, v, beta, n, products, since_start, until_end, between, similarity, system, error, written, weights
    )


def _per_factor(t: Tensor, n: int) -> Tensor:
    return t if n == 1 else t.repeat_interleave(n, -1)


def _same_step(length: int, n: int, like: Tensor) -> Tensor:
    step = torch.arange(length, device=like.device).repeat_interleave(n)
    return (step[:, None] == step).to(like.dtype)


def _forward(state: State, inputs: Tensors, parameters: Tensors, scale: float) -> tuple[Tensor, State]:
    segment, (S,) = _segment(state, inputs, scale), state
    E = segment.decays
    y = segment.weights @ segment.written
    y.addcmul_(segment.q @ S, E.since_start[..., None], value=scale)
    S = E.since_start[..., -1:, None] * S + segment.k.mT @ (segment.until_end * segment.written)
    return y, (S,)


def _backward(
    state: State, inputs: Tensors, parameters: Tensors, dy: Tensor, dstate: State, scale: float
) -> tuple[State, Tensors, Tensors]:
    segment, (S,), (dS,) = _segment(state, inputs, scale), state, dstate
    q, k, n, E = segment.q, segment.k, segment.factors, segment.decays
    per_step, total = (q.shape[2], n), E.since_start[..., -1:]
    dwritten = torch.addcmul(segment.weights.mT @ dy, k @ dS, segment.until_end)
    dright = torch.linalg.solve_triangular(segment.system.mT, dwritten, upper=True, unitriangular=True)
    derror = segment.beta * dright

    # Through the system: its matrix, then the similarities of keys.
    dsystem = -(dright @ segment.written.mT).tril_(-1)
    dbeta = (dright * segment.error).sum(-1) + (dsystem * segment.similarity).sum(-1)
    dkeys = dsystem * segment.between * segment.beta
    dk = dkeys @ k + dkeys.mT @ k

    # Through the readouts of the state at the start, by queries and by keys.
    through_start = (dy @ S.mT).mul_(E.since_start[..., None]).mul_(scale)
    errors_start = (derror @ S.mT).mul_(segment.since_start).neg_()
    dk += errors_start

    # Through the readout and the state at the end.
    dweights = dy @ segment.written.mT
    through_end = (segment.written @ dS.mT).mul_(segment.until_end)
    dk += through_end
    dlog_decay = None
    if inputs[4] is not None:
        inside = (dsystem * segment.system).unflatten(-1, per_step).sum(-1).unflatten(-2, per_step).sum(-2)
        dlog_decay = decay_gradient(
            inputs[4],
            inside + (dweights * segment.weights).unflatten(-1, per_step).sum(-1),
            (through_start * q).sum(-1) + (errors_start * k).sum(-1).unflatten(-1, per_step).sum(-1),
            (through_end * k).sum(-1).unflatten(-1, per_step).sum(-1),
            total.squeeze(-1) * (S * dS).sum((-2, -1)),
        )
    dscores = dweights.mul_(_per_factor(E.between, n)).mul_(scale)
    dq = (dscores @ k).add_(through_start)
    dk += dscores.mT @ q
    dS = total[..., None] * dS + q.mT @ (E.since_start[..., None] * dy).mul_(scale)
    dS -= k.mT @ (segment.since_start * derror)
    dinputs = (dq, *(t.unflatten(2, per_step) for t in (dk, derror, dbeta)), dlog_decay)
    return (dS,), dinputs, ()


def _of_call(args: DeltaRule) -> tuple[Recurrence, Tensors, Tensors, State]:
    """Passes, inputs with an axis of factors after the heads, `[B, T, H, n, …]`, no parameters, and initial state."""
    scale = args.q.shape[-1] ** -0.5 if args.scale is None else args.scale
    passes = Recurrence(functools.partial(_forward, scale=scale), functools.partial(_backward, scale=scale))
    factors = (t.transpose(2, 3) if args.k.ndim == 5 else t.unsqueeze(3) for t in (args.k, args.v, args.beta))
    initial = chunked.initial_matrix(args.q, args.v, args.initial_state, args.cu_seqlens)
    return passes, (args.q, *factors, args.log_decay), (), initial


def _empty_output(args: DeltaRule) -> Tensor:
    return args.v.new_empty(*args.q.shape[:3], args.v.shape[-1])


def forward(args: DeltaRule, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, final_state, chunk_states)`; see sinuous.core.ops.delta_rule."""
    y, (final,), (chunk_states,) = chunked.forward(
        *_of_call(args), _empty_output(args), args.cu_seqlens, args.reverse, chunk_size
    )
    return y, final, chunk_states


def backward(
    args: DeltaRule, grads: tuple[Tensor | None, Tensor | None], chunk_states: Tensor, chunk_size: int
) -> list[Tensor | None]:
    """Gradients of q, k, v, beta, log_decay and initial_state."""
    dy, dfinal = grads
    dy = _empty_output(args).zero_() if dy is None else dy
    (dq, *dfactors, dlog_decay), _, (dinitial,) = chunked.backward(
        *_of_call(args), (chunk_states,), dy, (dfinal,), args.cu_seqlens, args.reverse, chunk_size, value=0
    )
    dk, dv, dbeta = (t if t is None else t.transpose(2, 3) if args.k.ndim == 5 else t.squeeze(3) for t in dfactors)
    return [dq, dk, dv, dbeta, dlog_decay, None if args.initial_state is None else dinitial]
