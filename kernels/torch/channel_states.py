"""Recurrences that keep N numbers for every channel, in chunks of plain torch, written once for them all.

    h_t = a_t ⊙ h_{t-1} + (Δ_t u_t) B_t          h ∈ R^{D×N}
    y_t = C_t · h_t + D ⊙ u_t,   and y_t ⊙ silu(z_t) where a gate z is given

A family says in a `Rule` how the step sizes Δ and the decays a come from its inputs. Only the states at chunk starts
are kept, and the backward pass computes those within a segment again. Its time and memory are linear in T: steps are
views (`unbind`) of buffers as long as a segment, so that no step allocates a tensor of the whole length.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.kernels.arguments import ChannelStates, Longhorn, SelectiveScan
from sinuous.kernels.precision import working_dtype
from sinuous.kernels.torch import chunked
from sinuous.kernels.torch.chunked import Recurrence, State, Tensors
from sinuous.kernels.torch.packing import sequence_count

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


def grouped(B: Tensor, width: int) -> tuple[int, int]:
    """G and P: how many groups of how many channels share a row of `B`, `[B,T,N]` or `[B,T,G,N]`."""
    groups = B.shape[2] if B.ndim == 4 else 1
    return groups, width // max(groups, 1)


def _time_first(t: Tensor) -> Tensor:
    """`[B,G,c,·]` as `[c,B,G,·]`, and as it lies in memory: the tensors with N numbers per channel follow it."""
    return t.permute(2, 0, 1, 3).contiguous()


def _time_third(t: Tensor) -> Tensor:
    return t.permute(1, 2, 0, 3)


def _pass(rule: Rule, h: Tensor, inputs: Tensors, dt_bias: Tensor | None) -> ChannelStatesSegment:
    """A segment and its states, begun in state `h` `[B,G,N,P]`."""
    u, dt, B, C = (_time_first(t) for t in inputs[:4] if t is not None)
    raw = dt if dt_bias is None else dt + dt_bias
    delta = rule.step_sizes(raw, B)
    decay = rule.decays(delta, B)
    states = (delta * u)[..., None, :] * B[..., None]
    for decay_t, state_t in zip(decay.unbind(0), states.unbind(0), strict=True):
        h = state_t.addcmul_(decay_t, h)
    return ChannelStatesSegment(u, raw, delta, B, C, decay, states)


def _output(here: ChannelStatesSegment, D: Tensor | None) -> Tensor:
    """y before the gate, `[c,B,G,P]`."""
    y = (here.C[..., None, :] @ here.states).squeeze(-2)
    return y if D is None else y.addcmul_(D, here.u)


def _forward(rule: Rule, state: State, inputs: Tensors, parameters: Tensors) -> tuple[Tensor, State]:
    D, dt_bias = parameters
    (h,), u, ys = state, inputs[0], []
    assert u is not None
    for start in range(0, u.shape[2], _STEPS):
        part = [None if t is None else t[:, :, start : start + _STEPS] for t in inputs]
        here = _pass(rule, h, part, dt_bias)
        h = here.states[-1].clone()
        y, z = _output(here, D), part[4]
        ys.append(y if z is None else y.mul_(F.silu(_time_first(z))))
    return _time_third(torch.cat(ys)), (h,)


def _backward(
    rule: Rule, state: State, inputs: Tensors, parameters: Tensors, dy: Tensor, dstate: State
) -> tuple[State, Tensors, Tensors]:
    """With λ_t = C_t dy_t + a_{t+1} λ_{t+1}: da_t = λ_t h_{t-1}, dC_t = Σ_d dy_t h_t, dx_t = Σ_n λ_t B_t for x = Δu,
    and dB_t = Σ_d λ_t Δ_t u_t, to which the rule adds."""
    D, dt_bias = parameters
    here, dy = _pass(rule, state[0], inputs, dt_bias), _time_first(dy)
    z = dz = inputs[4]
    if z is not None:
        z = _time_first(z)
        sigmoid = torch.sigmoid(z)
        dz = _time_third(dy * _output(here, D) * sigmoid * (1 + z * (1 - sigmoid)))
        dy = dy * z * sigmoid
    dC = (here.states @ dy[..., None]).squeeze(-1)
    adjoint = dy[..., None, :] * here.C[..., None]
    adjoint[-1] += dstate[0]
    pairs = zip(adjoint.unbind(0)[:-1], adjoint.unbind(0)[1:], here.decay.unbind(0)[1:], strict=True)
    for before, after, decay in reversed(list(pairs)):
        before.addcmul_(decay, after)
    dB = (adjoint @ (here.delta * here.u)[..., None]).squeeze(-1)
    dx = (here.B[..., None, :] @ adjoint).squeeze(-2)
    dstart = adjoint[0] * here.decay[0]
    ddecay = adjoint
    ddecay[1:] *= here.states[:-1]
    ddecay[0] *= state[0]
    ddt, through_rule = rule.backward(here, ddecay, dx * here.u)
    dB = dB if through_rule is None else dB + through_rule
    du = dx * here.delta if D is None else (dx * here.delta).addcmul_(D, dy)
    dD = None if D is None else (dy * here.u).sum((0, 1))
    return (dstart,), [*(_time_third(t) for t in (du, ddt, dB, dC)), dz], [dD, ddt.sum((0, 1))]


class ChannelStatesCall:
    """The arguments as `chunked` takes them: groups of channels are its heads, and states are `[sequences,G,N,P]`."""

    def __init__(self, rule: Rule, args: ChannelStates) -> None:
        self.dtype, (batch, length, width) = working_dtype(args.u.dtype), args.u.shape
        self.shape = groups, channels, states = *grouped(args.B, width), args.B.shape[-1]
        self.passes = Recurrence(functools.partial(_forward, rule), functools.partial(_backward, rule))
        wide = [None if t is None else t.reshape(batch, length, groups, channels) for t in (args.u, args.dt, args.z)]
        narrow = [t.reshape(batch, length, groups, states) for t in (args.B, args.C)]
        self.inputs = [*wide[:2], *narrow, wide[2]]
        in_groups = (None if t is None else t.to(self.dtype).reshape(groups, channels) for t in (args.D, args.dt_bias))
        self.parameters = list(in_groups)
        zeros = args.u.new_zeros(sequence_count(args.u, args.cu_seqlens), width, states, dtype=self.dtype)
        self.initial = (self.state(zeros if args.initial_state is None else args.initial_state),)

    def state(self, h: Tensor) -> Tensor:
        return h.to(self.dtype).reshape(h.shape[0], *self.shape).mT


def forward(rule: Rule, arguments: SelectiveScan | Longhorn, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, final_state, chunk_states)`: `[B,T,D]`, `[sequences,D,N]`, and states at chunk starts `[B,chunks,D,N]`."""
    args = ChannelStates.of(arguments)
    call = ChannelStatesCall(rule, args)
    y = torch.empty(args.u.shape, dtype=args.u.dtype, device=args.u.device).unflatten(2, call.shape[:2])
    y, (final,), (chunk_states,) = chunked.forward(
        call.passes, call.inputs, call.parameters, call.initial, y, args.cu_seqlens, args.reverse, chunk_size
    )
    return y.flatten(2), final.mT.flatten(1, 2), chunk_states.mT.flatten(2, 3)


def backward(
    rule: Rule,
    arguments: SelectiveScan | Longhorn,
    grads: tuple[Tensor | None, Tensor | None],
    chunk_states: Tensor,
    chunk_size: int,
) -> list[Tensor | None]:
    """Gradients of all arguments in the order of Longhorn's; those that the rule holds it sums itself."""
    args, (dy, dfinal) = ChannelStates.of(arguments), grads
    call = ChannelStatesCall(rule, args)
    starts = call.state(chunk_states.flatten(0, 1)).unflatten(0, chunk_states.shape[:2])
    inputs, (dD, dbias), (dinitial,) = chunked.backward(
        call.passes,
        call.inputs,
        call.parameters,
        call.initial,
        (starts,),
        None if dy is None else dy.unflatten(2, call.shape[:2]),
        (None if dfinal is None else call.state(dfinal),),
        args.cu_seqlens,
        args.reverse,
        chunk_size,
        value=0,
    )
    du, ddt, dB, dC, dz = inputs
    pairs = zip(
        (du, ddt, dB, dC, dD, dz, dbias), (args.u, args.dt, args.B, args.C, args.D, args.z, args.dt_bias), strict=True
    )
    gradients = [None if g is None or t is None else g.reshape(t.shape) for g, t in pairs]
    return [*gradients, None if args.initial_state is None else dinitial.mT.flatten(1, 2)]
