r"""Additive decay: a softmax of the keys over time, channel by channel, as the memory of linear attention.

    z_t = log Σ_{s≤t} exp k_s                                 per key channel
    S_t = Σ_{s≤t} (exp(k_s - z_t) ⊙ f_s) v_sᵀ                 S ∈ R^{K×V}, f = 1 if absent
    y_t = scale · S_tᵀ q_t

or, where it is not causal, y_t = scale · S_Tᵀ q_t: one pass over the keys in any order. Step by step, the decay is the
share that the new key leaves to the old ones:

    z_t = logaddexp(z_{t-1}, k_t)      S_t = exp(z_{t-1} - z_t) S_{t-1} + (exp(k_t - z_t) ⊙ f_t) v_tᵀ

The state is S and z. Before the first step z is -inf, no weight at all: S counts for nothing where z is -inf, on input
too, and is 0 there on output. k = -inf is a step that adds nothing, so that padding has a key of -inf. A constant added
to a channel of k, and to that of z in the initial state, changes no y. `merge` joins the states of two parts of a
sequence, in any order.

Sources: LightNet, Qin et al. (arXiv 2405.21022), the additive recurrence, with z from the data alone as in
fla-org/flash-linear-attention; Aaren, Feng et al. (arXiv 2405.13956), section 3, is K = 1 with k = query · key and
q = 1. The factors f are for positions that rotate the keys after their softmax. Beyond the public kernels: the form
that is not causal, an initial state with gradients through both its parts, reversal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sinuous.core.ops.checks import (
    check_attention,
    check_packing,
    check_shape,
)
from sinuous.core.ops.family import Family, define
from sinuous.core.ops.flops import matrix_state
from sinuous.core.ops.operators import operators
from sinuous.core.ops.public import public
from sinuous.core.ops.stepwise import State, run_steps
from sinuous.kernels.arguments import AdditiveDecay
from sinuous.kernels.precision import working_dtype
from sinuous.kernels.torch.packing import rows, sequence_count, sequences

CHUNK_SIZE = 64
"""Time steps between two states that the forward pass keeps for the backward pass."""

WeightedMemory = tuple[Tensor, Tensor]
"""S `[B, H, K, V]` and z `[B, H, K]`."""


def _shares(new: Tensor, old: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shares of two weights in their sum, and the logarithm of the sum; 0, 0 and -inf where both are -inf.

    The weights are logarithms.
    """
    none = torch.isneginf(new)
    # What is masked out below stays finite, since a gradient of 0 through it would else be 0 · inf.
    some = new.masked_fill(none, 0)
    share = torch.sigmoid(some - old).masked_fill(none, 0)
    rest = torch.sigmoid(old - some).masked_fill(none, 1).masked_fill(torch.isneginf(old), 0)
    return share, rest, torch.where(none, old, torch.logaddexp(some, old))


def recurrent(args: AdditiveDecay, chunk_size: int = CHUNK_SIZE) -> tuple[Tensor, ...]:
    """Run the definition step by step; autograd differentiates it to any order."""
    dtype = working_dtype(args.q.dtype)
    scale = args.q.shape[-1] ** -0.5 if args.scale is None else args.scale
    q, k, v, f = (None if t is None else t.to(dtype) for t in (args.q, args.k, args.v, args.factor))
    assert q is not None
    assert v is not None
    S_shape, z_shape = _state(args)
    z = q.new_full(z_shape, -torch.inf) if args.initial_z is None else args.initial_z.to(dtype)
    S = q.new_zeros(S_shape) if args.initial_S is None else args.initial_S.to(dtype)
    S = S.masked_fill(torch.isneginf(z)[..., None], 0)

    def step(state: State, q_t: Tensor, k_t: Tensor, v_t: Tensor, f_t: Tensor | None) -> tuple[Tensor, State]:
        S, z = state
        share, rest, z = _shares(k_t, z)
        share = share if f_t is None else share * f_t
        S = rest[..., None] * S + share[..., None] * v_t[..., None, :]
        return (q_t[..., None, :] @ S).squeeze(-2) * scale, (S, z)

    y, final, chunk_states = run_steps(step, (q, k, v, f), (S, z), v[:, :0], args.cu_seqlens, args.reverse, chunk_size)
    if not args.causal:
        places = enumerate(sequences(q.shape[1], args.cu_seqlens))
        read = [q[:, steps].transpose(1, 2) @ rows(final[0], n, args.cu_seqlens) * scale for n, steps in places]
        y, chunk_states = torch.cat(read, 2).transpose(1, 2), tuple(t.detach().clone() for t in final)
    return y.to(args.v.dtype), *final, *chunk_states


def merge(first: WeightedMemory, second: WeightedMemory) -> WeightedMemory:
    """Join the states of two parts of a sequence: S weighted by exp z, and logaddexp of z.

    The operation is associative, does not depend on the order, and its neutral element is a state with z = -inf.

    Args:
        first: `(S, z)` with S `[…, K, V]` and z `[…, K]`, each begun without an initial state; second: likewise.
    """
    share, rest, z = _shares(second[1], first[1])
    return rest[..., None] * first[0] + share[..., None] * second[0], z


def _state(args: AdditiveDecay) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of S and z."""
    z = (sequence_count(args.q, args.cu_seqlens), args.v.shape[2], args.q.shape[3])
    return (*z, args.v.shape[3]), z


def _check(args: AdditiveDecay) -> None:
    check_attention(args.q, args.k, args.v)
    check_shape("factor", args.factor, tuple(args.k.shape), "one per key channel, shaped like the keys")
    check_packing(args.cu_seqlens, args.q.shape[0], args.q.shape[1])
    S, z = _state(args)
    check_shape("initial_S", args.initial_S, S, "[sequences, H, K, V]")
    check_shape("initial_z", args.initial_z, z, "[sequences, H, K]")


def _fake(args: AdditiveDecay) -> tuple[Tensor, ...]:
    dtype = working_dtype(args.q.dtype)
    return torch.empty_like(args.v), *(args.v.new_empty(shape, dtype=dtype) for shape in _state(args))


def _kept_S(args: AdditiveDecay, chunk_size: int) -> tuple[int, ...]:
    S, _ = _state(args)
    batch, length = args.q.shape[:2]
    return (batch, -(-length // chunk_size), *S[1:]) if args.causal else S


def _kept_z(args: AdditiveDecay, chunk_size: int) -> tuple[int, ...]:
    return _kept_S(args, chunk_size)[:-1]


FAMILY = Family(
    name="additive_decay",
    arguments=AdditiveDecay,
    outputs=("y", "S", "z"),
    saved={"kept_S": _kept_S, "kept_z": _kept_z},
    integers=("cu_seqlens",),
    forms=("triton", "torch", "recurrent"),
    fake=_fake,
    check=_check,
    recurrent=recurrent,
    options={"chunk_size": CHUNK_SIZE},
    multiply_adds=matrix_state(3),
)
define(FAMILY)


@public
def additive_decay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    factor: Tensor | None = None,
    scale: float | None = None,
    initial_state: WeightedMemory | None = None,
    return_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, WeightedMemory]:
    r"""Linear attention to a softmax of the keys over time: `y_t = scale · Σ_{s≤t} (softmax(k)_s ⊙ f_s · q_t) v_s`,
    where the softmax of each key channel is over the steps up to t, or over all of them.

    Args:
        q: queries `[B, T, H, K]`; packed sequences are `[1, ΣT, H, K]` with `cu_seqlens`.
        k: logarithms of weights, shaped like q; -inf is a step without weight.
        v: values `[B, T, H, V]`.
        causal: each step sees those up to itself; else all steps see all.
        factor: f, multiplies the weights after the softmax, shaped like k; of either sign. 1 if absent.
        scale: factor of the queries; K^-1/2 if absent.
        initial_state: S `[B, H, K, V]` and z `[B, H, K]` before the first step (one row per sequence when packed), with
            z = -inf where there is nothing; that if absent.
        return_state: return `(y, (S, z))`, the state after the last step in fp32 (fp64 for fp64 input).
        reverse: run from the last step to the first; the state is then the one after step 0.
        cu_seqlens: int32 or int64 `[sequences + 1]`, the boundaries of packed sequences, starting at 0, ending at ΣT.
        backend: `recurrent`, `torch` or `triton`; the fastest that can run if absent.

    Returns:
        y `[B, T, H, V]` in the dtype of v, or `(y, state)`. Both are differentiable in every tensor argument.

    Raises:
        ValueError: for a wrong shape, dtype or device, naming the argument, and for a backend that cannot run.

    Source: LightNet (arXiv 2405.21022), the additive recurrence.
    """
    y, S, z, _, _ = operators.additive_decay(
        q, k, v, factor, *(initial_state or (None, None)), cu_seqlens, scale, causal, reverse, backend or ""
    )
    return (y, (S, z)) if return_state else y
