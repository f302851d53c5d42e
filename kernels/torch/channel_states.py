"""Recurrences that keep N numbers for every channel, in chunks of plain torch, written once for them all.

    h_t = a_t ⊙ h_{t-1} + (Δ_t u_t) B_t          h ∈ R^{D×N}
    y_t = C_t · h_t + D ⊙ u_t,   and y_t ⊙ silu(z_t) where a gate z is given

A family says in a `Rule` how the step sizes Δ and the decays a come from its inputs. Only the states at chunk starts
are kept, and the backward pass computes those within a segment again. Its time and memory are linear in T: steps are
views (`unbind`) of buffers as long as a segment, so that no step allocates a tensor of the whole length.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.kernels.precision import working_dtype
from sinuous.kernels.torch.packing import Segment, flip_sequences, flip_time, mirror, rows, segments

_STEPS = 32
"""Most steps of a segment in the forward pass: their states fit a core's cache better than those of a whole here."""


class ChannelStatesSegment(NamedTuple):
    """A segment, time first; c steps, G groups of P channels, N states. Channels are last, the longest axis."""

    u: Tensor  # [c,B,G,P]
    raw: Tensor  # [c,B,G,P], dt with its bias
    delta: Tensor  # [c,B,G,P]
    B: Tensor  # [c,B,G,N]
    C: Tensor  # [c,B,G,N]
    decay: Tensor  # [c,B,G,N,P]
    states: Tensor  # [c,B,G,N,P], after each step


class Rule(Protocol):
    """A family's step sizes and decays, made of its inputs, in the layout of `ChannelStatesSegment`."""

    def step_sizes(self, raw: Tensor, B: Tensor) -> Tensor:
        """Δ `[c,B,G,P]`."""

    def decays(self, delta: Tensor, B: Tensor) -> Tensor:
        """a `[c,B,G,N,P]`."""

    def backward(self, segment: ChannelStatesSegment, ddecay: Tensor, ddelta: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of `raw`, and of B as far as it enters Δ and a.

        Args:
            segment: as in the forward pass; its states and `ddecay` may be overwritten, nobody reads them later.
            ddecay: gradient of the decays.
            ddelta: gradient of the step sizes through the inputs Δ u.
        """


class ChannelStatesGradients(NamedTuple):
    """Gradients in the precision of the state; None for an argument that is None."""

    u: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor | None


def grouped(B: Tensor, width: int) -> tuple[int, int]:
    """G and P: how many groups of how many channels share a row of `B`, `[B,T,N]` or `[B,T,G,N]`."""
    groups = B.shape[2] if B.ndim == 4 else 1
    return groups, width // max(groups, 1)


def _time_first(t: Tensor, segment: Segment, dtype: torch.dtype, *tail: int) -> Tensor:
    steps = t[:, segment.start : segment.stop].transpose(0, 1).to(dtype)
    return steps.reshape(*steps.shape[:2], *tail)


class ChannelStatesScan:
    """The arguments in processing order, and what forward and backward share."""

    def __init__(self, rule: Rule, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, dt_bias: Tensor | None) -> None:
        self.rule, self.dtype = rule, working_dtype(u.dtype)
        self.batch, self.length, self.width = u.shape
        self.shape, self.size = grouped(B, self.width), B.shape[-1]
        self.u, self.dt, self.B, self.C = u, dt, B, C
        self.dt_bias = None if dt_bias is None else dt_bias.to(self.dtype).reshape(self.shape)

    def state(self, h: Tensor) -> Tensor:
        return h.to(self.dtype).reshape(h.shape[0], *self.shape, self.size).mT

    def passed(self, segment: Segment, h: Tensor) -> ChannelStatesSegment:
        """A segment and its states, begun in state `h`."""
        u, dt = (_time_first(t, segment, self.dtype, *self.shape) for t in (self.u, self.dt))
        B, C = (_time_first(t, segment, self.dtype, self.shape[0], self.size) for t in (self.B, self.C))
        raw = dt if self.dt_bias is None else dt + self.dt_bias
        delta = self.rule.step_sizes(raw, B)
        decay = self.rule.decays(delta, B)
        states = (delta * u)[..., None, :] * B[..., None]
        for decay_t, state_t in zip(decay.unbind(0), states.unbind(0), strict=True):
            h = state_t.addcmul_(decay_t, h)
        return ChannelStatesSegment(u, raw, delta, B, C, decay, states)


def forward(
    rule: Rule,
    u: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, final_state, chunk_states)`: `[B,T,D]`, `[sequences,D,N]`, and the states at chunk starts `[B,chunks,D,N]`.

    Args:
        u, dt, z: `[B,T,D]`; B, C: `[B,T,N]` or `[B,T,G,N]`; D, dt_bias: `[D]`.
        initial_state: `[sequences,D,N]`.
    """
    if reverse:
        u, dt, B, C, z = u.flip(1), dt.flip(1), B.flip(1), C.flip(1), flip_time(z)
        initial_state, bounds = flip_sequences(initial_state, cu_seqlens), mirror(cu_seqlens, u.shape[1])
        y, final, states = forward(rule, u, dt, B, C, D, z, dt_bias, initial_state, bounds, False, chunk_size)
        return y.flip(1), flip_sequences(final, cu_seqlens), states
    scan = ChannelStatesScan(rule, u, dt, B, C, dt_bias)
    sequences = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    zeros = torch.zeros(sequences, scan.width, scan.size, dtype=scan.dtype, device=u.device)
    initial = scan.state(zeros if initial_state is None else initial_state)
    final = initial.clone()
    chunk_states = [initial.new_empty(scan.batch, 0, *initial.shape[1:])]
    ys = [u.new_zeros(u.shape[0], 0, scan.width)]
    h = initial
    for segment in segments(scan.length, math.gcd(chunk_size, _STEPS), cu_seqlens):
        h = h if segment.first is None else rows(initial, segment.first, cu_seqlens)
        if segment.start % chunk_size == 0:
            chunk_states.append(h.unsqueeze(1))
        here = scan.passed(segment, h)
        h = here.states[-1].clone()
        y = (here.C[..., None, :] @ here.states).squeeze(-2).flatten(2)
        y = y if D is None else y.addcmul_(D.to(scan.dtype), here.u.flatten(2))
        y = y if z is None else y.mul_(F.silu(_time_first(z, segment, scan.dtype, scan.width)))
        ys.append(y.to(u.dtype).transpose(0, 1))
        if segment.last is not None:
            rows(final, segment.last, cu_seqlens).copy_(h)
    return torch.cat(ys, 1), final.mT.flatten(1, 2), torch.cat(chunk_states, 1).mT.flatten(2, 3)


def backward(
    rule: Rule,
    grads: tuple[Tensor | None, Tensor | None],
    u: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_states: Tensor,
    reverse: bool,
    chunk_size: int,
) -> ChannelStatesGradients:
    """Gradients of all arguments but those that the rule holds, which sums theirs itself.

    With λ_t = C_t dy_t + a_{t+1} λ_{t+1}: da_t = λ_t h_{t-1}, dC_t = Σ_d dy_t h_t, dx_t = Σ_n λ_t B_t for x = Δu, and
    dB_t = Σ_d λ_t Δ_t u_t, to which the rule adds.
    """
    dy, dfinal = grads
    if reverse:
        grads = (flip_time(dy), flip_sequences(dfinal, cu_seqlens))
        u, dt, B, C, z = u.flip(1), dt.flip(1), B.flip(1), C.flip(1), flip_time(z)
        initial_state, bounds = flip_sequences(initial_state, cu_seqlens), mirror(cu_seqlens, u.shape[1])
        gradients = backward(
            rule, grads, u, dt, B, C, D, z, dt_bias, initial_state, bounds, chunk_states, False, chunk_size
        )
        timed = {name: flip_time(getattr(gradients, name)) for name in ("u", "dt", "B", "C", "z")}
        return gradients._replace(**timed, initial_state=flip_sequences(gradients.initial_state, cu_seqlens))
    scan = ChannelStatesScan(rule, u, dt, B, C, dt_bias)
    sequences = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    zeros = torch.zeros(sequences, scan.shape[0], scan.size, scan.shape[1], dtype=scan.dtype, device=u.device)
    initial = zeros if initial_state is None else scan.state(initial_state)
    dinitial = (zeros if dfinal is None else scan.state(dfinal)).clone()
    starts = scan.state(chunk_states.flatten(0, 1)).unflatten(0, chunk_states.shape[:2])
    du, ddt, dB, dC = (torch.empty(t.shape, dtype=scan.dtype, device=u.device) for t in (u, dt, B, C))
    dz = None if z is None else torch.empty(z.shape, dtype=scan.dtype, device=u.device)
    dD = torch.zeros(scan.width, dtype=scan.dtype, device=u.device)
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
        here = scan.passed(segment, h)
        steps = here.u.shape[0]
        dy_t = (
            here.u.new_zeros(steps, scan.batch, scan.width)
            if dy is None
            else _time_first(dy, segment, scan.dtype, scan.width)
        )
        if z is not None and dz is not None:
            gate = _time_first(z, segment, scan.dtype, scan.width)
            sigmoid = torch.sigmoid(gate)
            y = (here.C[..., None, :] @ here.states).squeeze(-2).flatten(2)
            y = y if skip is None else y.addcmul_(skip, here.u.flatten(2))
            dz[:, inside] = (dy_t * y * sigmoid * (1 + gate * (1 - sigmoid))).transpose(0, 1)
            dy_t = dy_t * gate * sigmoid
        dy_g = dy_t.unflatten(2, scan.shape)
        dC[:, inside] = (here.states @ dy_g[..., None]).reshape(steps, scan.batch, *C.shape[2:]).transpose(0, 1)
        adjoint = dy_g[..., None, :] * here.C[..., None]
        adjoint[-1] += carry
        pairs = zip(adjoint.unbind(0)[:-1], adjoint.unbind(0)[1:], here.decay.unbind(0)[1:], strict=True)
        for before, after, decay in reversed(list(pairs)):
            before.addcmul_(decay, after)
        dB_t = (adjoint @ (here.delta * here.u)[..., None]).squeeze(-1)
        dx = (here.B[..., None, :] @ adjoint).squeeze(-2)
        carry = adjoint[0] * here.decay[0]
        if segment.first is not None:
            rows(dinitial, segment.first, cu_seqlens).copy_(carry)
        ddecay = adjoint
        ddecay[1:] *= here.states[:-1]
        ddecay[0] *= h
        draw, through_rule = rule.backward(here, ddecay, dx * here.u)
        dB_t = dB_t if through_rule is None else dB_t + through_rule
        du_t = (dx * here.delta).flatten(2)
        if skip is not None:
            du_t = du_t.addcmul_(skip, dy_t)
            dD += (dy_t * here.u.flatten(2)).sum((0, 1))
        dB[:, inside] = dB_t.reshape(steps, scan.batch, *B.shape[2:]).transpose(0, 1)
        du[:, inside], ddt[:, inside] = du_t.transpose(0, 1), draw.flatten(2).transpose(0, 1)
    return ChannelStatesGradients(
        du,
        ddt,
        dB,
        dC,
        None if D is None else dD,
        dz,
        None if dt_bias is None else ddt.sum((0, 1)),
        None if initial_state is None else dinitial.mT.flatten(1, 2),
    )
