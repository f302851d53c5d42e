"""Linear scan in chunks of plain torch.

Only the states at chunk starts are kept; those of a chunk are computed again for the gradients. With λ_t the gradient
of h_t, by torch's convention for complex tensors:

    λ_t = dy_t + conj(a_{t+1}) λ_{t+1}      dx_t = λ_t      da_t = λ_t conj(h_{t-1})      dh_0 = conj(a_1) λ_1

At a reset nothing passes in either direction: da_t is 0, and λ_t does not reach h_{t-1}.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sinuous.kernels.arguments import LinearScan
from sinuous.kernels.precision import working_dtype
from sinuous.kernels.torch import chunked
from sinuous.kernels.torch.chunked import Recurrence, State, Tensors
from sinuous.kernels.torch.packing import sequence_count


def _plus_carried(x: Tensor, a: Tensor, h: Tensor, reset: Tensor | None, out: Tensor) -> Tensor:
    """x + a h, and x where a reset is set: the product is masked, since 0 times NaN is NaN."""
    if reset is None:
        return torch.addcmul(x, a, h, out=out)
    return torch.add(x, (a * h).masked_fill_(reset, 0), out=out)


def _unpacked(inputs: Tensors, parameters: Tensors) -> tuple[Tensor, Tensor, Tensor | None]:
    """x and a `[B, 1, c, D]`, and where the resets are, `[B, 1, c, 1]`."""
    x, a, reset = inputs
    a = parameters[0] if a is None else a
    assert x is not None
    assert a is not None
    return x, a.expand_as(x), None if reset is None else reset != 0


def _each_step(reset: Tensor | None, length: int) -> tuple[Tensor | None, ...]:
    return (None,) * length if reset is None else reset.unbind(2)


def _states(h: Tensor, x: Tensor, a: Tensor, reset: Tensor | None) -> Tensor:
    """The states after each step, `[B, 1, c, D]`."""
    states = torch.empty_like(x)
    steps = zip(x.unbind(2), a.unbind(2), _each_step(reset, x.shape[2]), states.unbind(2), strict=True)
    for x_t, a_t, reset_t, h_t in steps:
        h = _plus_carried(x_t, a_t, h, reset_t, out=h_t)
    return states


def _forward(state: State, inputs: Tensors, parameters: Tensors) -> tuple[Tensor, State]:
    states = _states(state[0], *_unpacked(inputs, parameters))
    return states, (states[:, :, -1].clone(),)


def _backward(
    state: State, inputs: Tensors, parameters: Tensors, dy: Tensor, dstate: State
) -> tuple[State, Tensors, Tensors]:
    x, a, reset = _unpacked(inputs, parameters)
    before = torch.cat([state[0].unsqueeze(2), _states(state[0], x, a, reset)[:, :, :-1]], 2)
    adjoint = torch.cat([dy[:, :, :-1], dy[:, :, -1:] + dstate[0].unsqueeze(2)], 2)
    passed = torch.zeros_like(dstate[0])
    into = [passed, *adjoint.unbind(2)]
    factors = a.conj().resolve_conj().unbind(2)
    steps = zip(into[:-1], factors, into[1:], _each_step(reset, x.shape[2]), strict=True)
    for earlier, a_t, later, reset_t in reversed(list(steps)):
        _plus_carried(earlier, a_t, later, reset_t, out=earlier)
    da = adjoint * before.conj()
    da = da if reset is None else da.masked_fill_(reset, 0)
    return (passed,), (adjoint, da, None), (None if parameters[0] is None else da.sum((0, 1, 2)),)


_RECURRENCE = Recurrence(_forward, _backward)


def _arguments(args: LinearScan) -> tuple[list[Tensor | None], list[Tensor | None], State]:
    """Inputs `[B, T, 1, …]`, parameters and initial states `[sequences, 1, D]` as the loop over chunks takes them."""
    x, a = args.x, args.a
    dtype = working_dtype(x.dtype)
    sequences = sequence_count(x, args.cu_seqlens)
    initial = x.new_zeros(sequences, x.shape[2]) if args.initial_state is None else args.initial_state
    resets = None if args.reset is None else args.reset[..., None, None]
    constant = a.ndim == 1
    inputs = [x.unsqueeze(2), None if constant else a.unsqueeze(2), resets]
    return inputs, [a.to(dtype) if constant else None], (initial.to(dtype).unsqueeze(1),)


def forward(args: LinearScan, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, final_state, chunk_states)`; see sinuous.core.ops.linear_scan."""
    x = args.x
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device).unsqueeze(2)
    y, (final,), (chunk_states,) = chunked.forward(
        _RECURRENCE, *_arguments(args), y, args.cu_seqlens, args.reverse, chunk_size
    )
    return y.squeeze(2), final.squeeze(1), chunk_states.squeeze(2)


def backward(
    args: LinearScan, grads: tuple[Tensor | None, Tensor | None], chunk_states: Tensor, chunk_size: int
) -> list[Tensor | None]:
    """Gradients of x, a and initial_state."""
    dy, dfinal = (None if t is None else t.unsqueeze(axis) for t, axis in zip(grads, (2, 1), strict=True))
    starts = (chunk_states.unsqueeze(2),)
    (dx, da, _), (da_constant,), (dinitial,) = chunked.backward(
        _RECURRENCE, *_arguments(args), starts, dy, (dfinal,), args.cu_seqlens, args.reverse, chunk_size, value=0
    )
    assert dx is not None
    da = da_constant if da is None else da.squeeze(2)
    return [dx.squeeze(2), da, None if args.initial_state is None else dinitial.squeeze(1)]
