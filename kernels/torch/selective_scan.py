"""Selective scan in chunks of plain torch.

Only the states at chunk starts are kept. The backward pass recomputes a chunk's states, and its time and memory stay
linear in T: time is cut with `narrow` and `unbind` of chunk-sized buffers, whose gradients nobody takes, so no step
allocates a tensor of the whole length.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.kernels.torch.packing import Segment, flip_sequences, flip_time, mirror, rows, segments

_STEPS = 32
"""Steps that the forward pass holds at once: their states fit a core's cache better than those of a whole chunk."""


class _Chunk(NamedTuple):
    """One segment, time first; c steps, G groups of P channels, N states. Channels are last, the longest axis."""

    u: Tensor  # [c,B,G,P]
    delta: Tensor  # [c,B,G,P]
    raw: Tensor  # [c,B,G,P], delta before softplus
    B: Tensor  # [c,B,G,N]
    C: Tensor  # [c,B,G,N]
    decay: Tensor  # [c,B,G,N,P]
    states: Tensor  # [c,B,G,N,P], after each step


def _time_first(t: Tensor, segment: Segment, dtype: torch.dtype, *tail: int) -> Tensor:
    piece = t[:, segment.start : segment.stop].transpose(0, 1).to(dtype)
    return piece.reshape(*piece.shape[:2], *tail)


class _Scan:
    """The arguments in processing order, and what forward and backward share."""

    def __init__(
        self,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        dt_bias: Tensor | None,
        dt_softplus: bool,
    ) -> None:
        self.dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
        self.batch, self.length, self.width = u.shape
        self.groups, self.size = (B.shape[2] if B.ndim == 4 else 1), A.shape[1]
        self.shape = (self.groups, self.width // max(self.groups, 1))
        self.u, self.dt, self.B, self.C = u, dt, B, C
        self.A = A.to(self.dtype).reshape(*self.shape, self.size).mT.contiguous()
        self.dt_bias = None if dt_bias is None else dt_bias.to(self.dtype).reshape(self.shape)
        self.dt_softplus = dt_softplus

    def state(self, h: Tensor) -> Tensor:
        return h.to(self.dtype).reshape(h.shape[0], *self.shape, self.size).mT

    def chunk(self, segment: Segment, h: Tensor) -> _Chunk:
        """All states of one segment that starts in state `h`."""
        u, dt = (_time_first(t, segment, self.dtype, *self.shape) for t in (self.u, self.dt))
        B, C = (_time_first(t, segment, self.dtype, self.groups, self.size) for t in (self.B, self.C))
        raw = dt if self.dt_bias is None else dt + self.dt_bias
        delta = F.softplus(raw) if self.dt_softplus else raw
        decay = (delta[..., None, :] * self.A).exp_()
        states = (delta * u)[..., None, :] * B[..., None]
        for decay_t, state_t in zip(decay.unbind(0), states.unbind(0), strict=True):
            h = state_t.addcmul_(decay_t, h)
        return _Chunk(u, delta, raw, B, C, decay, states)


def forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, final_state, chunk_states)`; see sinuous.core.ops.selective_scan."""
    if reverse:
        u, dt, B, C, z = u.flip(1), dt.flip(1), B.flip(1), C.flip(1), flip_time(z)
        initial_state, bounds = flip_sequences(initial_state, cu_seqlens), mirror(cu_seqlens, u.shape[1])
        y, final, states = forward(u, dt, A, B, C, D, z, dt_bias, initial_state, bounds, dt_softplus, False, chunk_size)
        return y.flip(1), flip_sequences(final, cu_seqlens), states
    scan = _Scan(u, dt, A, B, C, dt_bias, dt_softplus)
    sequences = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    zeros = torch.zeros(sequences, scan.width, scan.size, dtype=scan.dtype, device=u.device)
    initial = scan.state(zeros if initial_state is None else initial_state)
    final = initial.clone()
    kept = [initial.new_empty(scan.batch, 0, *initial.shape[1:])]
    ys = [u.new_zeros(u.shape[0], 0, scan.width)]
    h = initial
    for segment in segments(scan.length, math.gcd(chunk_size, _STEPS), cu_seqlens):
        h = h if segment.first is None else rows(initial, segment.first, cu_seqlens)
        if segment.start % chunk_size == 0:
            kept.append(h.unsqueeze(1))
        chunk = scan.chunk(segment, h)
        h = chunk.states[-1].clone()
        y = (chunk.C[..., None, :] @ chunk.states).squeeze(-2).flatten(2)
        y = y if D is None else y.addcmul_(D.to(scan.dtype), chunk.u.flatten(2))
        y = y if z is None else y.mul_(F.silu(_time_first(z, segment, scan.dtype, scan.width)))
        ys.append(y.to(u.dtype).transpose(0, 1))
        if segment.last is not None:
            rows(final, segment.last, cu_seqlens).copy_(h)
    return torch.cat(ys, 1), final.mT.flatten(1, 2), torch.cat(kept, 1).mT.flatten(2, 3)


def backward(
    grads: tuple[Tensor | None, Tensor | None],
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_states: Tensor,
    dt_softplus: bool,
    reverse: bool,
    chunk_size: int,
) -> list[Tensor | None]:
    """Gradients of u, dt, A, B, C, D, z, dt_bias and initial_state.

    With λ_t = C_t dy_t + exp(Δ_{t+1} A) λ_{t+1}: dB_t = Σ_d λ_t Δ_t u_t, dC_t = Σ_d dy_t h_t,
    dx_t = Σ_n λ_t B_t for x = Δu, and w_t = λ_t exp(Δ_t A) h_{t-1} gives dΔ_t = Σ_n w_t A + dx_t u_t, dA = Σ w_t Δ_t.
    """
    dy, dfinal = grads
    if reverse:
        grads = (flip_time(dy), flip_sequences(dfinal, cu_seqlens))
        u, dt, B, C, z = u.flip(1), dt.flip(1), B.flip(1), C.flip(1), flip_time(z)
        initial_state, bounds = flip_sequences(initial_state, cu_seqlens), mirror(cu_seqlens, u.shape[1])
        du, ddt, dA, dB, dC, dD, dz, dbias, dinitial = backward(
            grads, u, dt, A, B, C, D, z, dt_bias, initial_state, bounds, chunk_states, dt_softplus, False, chunk_size
        )
        du, ddt, dB, dC, dz = (flip_time(t) for t in (du, ddt, dB, dC, dz))
        return [du, ddt, dA, dB, dC, dD, dz, dbias, flip_sequences(dinitial, cu_seqlens)]
    scan = _Scan(u, dt, A, B, C, dt_bias, dt_softplus)
    sequences = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    zeros = torch.zeros(sequences, scan.groups, scan.size, scan.shape[1], dtype=scan.dtype, device=u.device)
    initial = zeros if initial_state is None else scan.state(initial_state)
    dinitial = (zeros if dfinal is None else scan.state(dfinal)).clone()
    starts = scan.state(chunk_states.flatten(0, 1)).unflatten(0, chunk_states.shape[:2])
    du, ddt = (torch.empty(t.shape, dtype=scan.dtype, device=u.device) for t in (u, dt))
    dB, dC = (torch.empty(t.shape, dtype=scan.dtype, device=u.device) for t in (B, C))
    dz = None if z is None else torch.empty(z.shape, dtype=scan.dtype, device=u.device)
    dA, dD = torch.zeros_like(scan.A), torch.zeros(scan.width, dtype=scan.dtype, device=u.device)
    skip = None if D is None else D.to(scan.dtype)
    carry = dinitial
    for segment in reversed(segments(scan.length, chunk_size, cu_seqlens)):
        if segment.last is not None:
            carry = rows(dinitial, segment.last, cu_seqlens)
        inside = slice(segment.start, segment.stop)
        h = (
            rows(initial, segment.first, cu_seqlens)
            if segment.first is not None
            else starts[:, segment.start // chunk_size]
        )
        chunk = scan.chunk(segment, h)
        steps = chunk.u.shape[0]
        dy_t = (
            chunk.u.new_zeros(steps, scan.batch, scan.width)
            if dy is None
            else _time_first(dy, segment, scan.dtype, scan.width)
        )
        if z is not None and dz is not None:
            gate = _time_first(z, segment, scan.dtype, scan.width)
            sigmoid = torch.sigmoid(gate)
            y = (chunk.C[..., None, :] @ chunk.states).squeeze(-2).flatten(2)
            y = y if skip is None else y.addcmul_(skip, chunk.u.flatten(2))
            dz[:, inside] = (dy_t * y * sigmoid * (1 + gate * (1 - sigmoid))).transpose(0, 1)
            dy_t = dy_t * gate * sigmoid
        dy_g = dy_t.unflatten(2, scan.shape)
        dC[:, inside] = (chunk.states @ dy_g[..., None]).reshape(steps, scan.batch, *C.shape[2:]).transpose(0, 1)
        adjoint = dy_g[..., None, :] * chunk.C[..., None]
        adjoint[-1] += carry
        pairs = zip(adjoint.unbind(0)[:-1], adjoint.unbind(0)[1:], chunk.decay.unbind(0)[1:], strict=True)
        for before, after, decay in reversed(list(pairs)):
            before.addcmul_(decay, after)
        x = chunk.delta * chunk.u
        dB[:, inside] = (adjoint @ x[..., None]).reshape(steps, scan.batch, *B.shape[2:]).transpose(0, 1)
        dx = (chunk.B[..., None, :] @ adjoint).squeeze(-2)
        through_decay = adjoint.mul_(chunk.decay)
        carry = through_decay[0].clone()
        if segment.first is not None:
            rows(dinitial, segment.first, cu_seqlens).copy_(carry)
        through_decay[1:] *= chunk.states[:-1]
        through_decay[0] *= h
        dA += torch.mul(through_decay, chunk.delta[..., None, :], out=chunk.states).sum((0, 1))
        ddelta = through_decay.mul_(scan.A).sum(-2) + dx * chunk.u
        ddelta = ddelta * torch.sigmoid(chunk.raw) if dt_softplus else ddelta
        du_t = (dx * chunk.delta).flatten(2)
        if skip is not None:
            du_t = du_t.addcmul_(skip, dy_t)
            dD += (dy_t * chunk.u.flatten(2)).sum((0, 1))
        du[:, inside], ddt[:, inside] = du_t.transpose(0, 1), ddelta.flatten(2).transpose(0, 1)
    return [
        du,
        ddt,
        dA.mT.flatten(0, 1),
        dB,
        dC,
        None if D is None else dD,
        dz,
        None if dt_bias is None else ddt.sum((0, 1)),
        None if initial_state is None else dinitial.mT.flatten(1, 2),
    ]
