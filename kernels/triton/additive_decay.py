"""Launches of additive_decay: causal as gla with the decay that new keys leave, else plain torch.

Causal, the kernels of additive_decay_kernels make of the keys their shares in the softmax and what is left of the
earlier ones, and those of gla_kernels do the rest; gla's gradients of q and of the shares and one linear scan against
time, again of Triton kernels, give that of the keys. Not causal, there is no recurrence: one pass over the keys and two
products of matrices, which a GPU runs best in plain torch, as kernels/torch/additive_decay.py does.

bfloat16 shares are rounded like bfloat16 inputs. float16 has no numbers for the shares in a long softmax: with float16
inputs they are float32, and all products are taken in that.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sinuous.kernels.arguments import AdditiveDecay, LinearScan
from sinuous.kernels.precision import working_dtype
from sinuous.kernels.torch import additive_decay as plain
from sinuous.kernels.triton import INTERPRETED, linear_scan
from sinuous.kernels.triton.additive_decay_kernels import carry_sums, share_out
from sinuous.kernels.triton.gla import GLACall
from sinuous.kernels.triton.matrix_states import MatrixStatesCall
from sinuous.kernels.triton.packing import on_device, packed_steps


class KeySoftmax(NamedTuple):
    """The softmax of the keys over time; tensors are shaped like them.

    Attributes:
        weights: their shares times the factor; the keys of gla.
        shares: without the factor, in the precision of the state, if asked for.
        log_decay: z_{t-1} - z_t, 0 where z_{t-1} is -inf and there is no state yet.
        last: z after each sequence, `[sequences, H, K]`.
        chunk_z: z before each chunk, `[B, chunks, H, K]`.
    """

    call: MatrixStatesCall
    weights: Tensor
    shares: Tensor | None
    log_decay: Tensor
    last: Tensor
    chunk_z: Tensor


def _softmax(args: AdditiveDecay, z: Tensor, chunk_size: int, shares: bool) -> KeySoftmax:
    k, dtype = args.k, working_dtype(args.k.dtype)
    half = k.dtype == torch.bfloat16 and not INTERPRETED  # the interpreter truncates what it stores in it
    weights = torch.empty_like(k, dtype=k.dtype if half else dtype)
    call = MatrixStatesCall.of(weights, args.v, args.cu_seqlens, args.scale, args.reverse, chunk_size)
    width = call.heads * call.keys
    starts = torch.empty(call.segments, width, dtype=torch.float64, device=k.device)
    softmax = KeySoftmax(
        call,
        weights,
        torch.empty_like(k, dtype=dtype) if shares else None,
        torch.empty_like(k, dtype=dtype),
        torch.empty_like(z),
        call.empty_states(z),
    )

    def over(channels: int, warps: int) -> tuple[int, dict[str, Any]]:
        block = min(channels, triton.next_power_of_2(width))
        form = {name: call.form[name] for name in ("CHUNK", "PACKED", "REVERSE")}
        return triton.cdiv(width, block), {
            **form, "D": width, "BD": block, "num_warps": warps, "num_stages": 1, "enable_fp_fusion": True,
        }  # fmt: skip

    with on_device(k):
        blocks, sizes = over(32, 4)
        carry_sums[(blocks * call.sequences,)](
            k, z, call.bounds, starts, softmax.chunk_z, softmax.last, call.length, call.sequences, **sizes
        )
        blocks, sizes = over(64, 2)
        share_out[(blocks * call.segments,)](
            k, args.factor, starts, call.table, weights, softmax.shares, softmax.log_decay, call.length, call.sequences,
            ACC=call.sizes["ACC"], **sizes,
        )  # fmt: skip
    return softmax


def _contiguous(args: AdditiveDecay) -> tuple[AdditiveDecay, Tensor, Tensor]:
    """The arguments in the kernels' layout, and the initial states."""
    factor = None if args.factor is None else args.factor.contiguous()
    args = args._replace(q=args.q.contiguous(), k=args.k.contiguous(), v=args.v.contiguous(), factor=factor)
    S, z = plain.initial_states(args)
    return args, S.contiguous(), z.contiguous()


def forward(args: AdditiveDecay, chunk_size: int) -> tuple[Tensor, ...]:
    """`(y, S, z, kept_S, kept_z)` as `sinuous.core.ops.additive_decay` defines them."""
    if not args.causal or args.v.numel() == 0:
        return plain.forward(args, chunk_size)
    args, S, z = _contiguous(args)
    made = _softmax(args, z, chunk_size, shares=False)
    y, final, chunk_S = GLACall(made.call, made.log_decay, None, False).forward(args.q, made.weights, args.v, S)
    return y, final, made.last, chunk_S, made.chunk_z


def _next(t: Tensor, ends: Tensor, cu_seqlens: Tensor | None, reverse: bool) -> Tensor:
    """`t` `[B, T, H, K]` one step later in processing order; after the last step of a sequence, its row of `ends`."""
    if cu_seqlens is None:
        ends = ends.unsqueeze(1)
        return torch.cat([ends, t[:, :-1]] if reverse else [t[:, 1:], ends], 1)
    sequence, before, after = packed_steps(cu_seqlens, t.shape[1], reverse=False)
    last = (before if reverse else after) == 0
    return torch.where(last[:, None, None], ends[sequence], t.roll(1 if reverse else -1, 1))


def backward(
    args: AdditiveDecay, grads: tuple[Tensor | None, ...], kept_S: Tensor, kept_z: Tensor, chunk_size: int
) -> list[Tensor | None]:
    """Gradients of q, k, v, factor, initial_S and initial_z."""
    if not args.causal or args.v.numel() == 0:
        return plain.backward(args, grads, kept_S, kept_z, chunk_size)
    args, S, z = _contiguous(args)
    q, v, factor = args.q, args.v, args.factor
    softmax = _softmax(args, z, chunk_size, shares=True)
    weights, shares = softmax.weights, softmax.shares
    assert shares is not None
    made = GLACall(softmax.call, softmax.log_decay, None, False)
    prepared = made.prepare(q, weights)
    dy = torch.zeros_like(v) if grads[0] is None else grads[0].contiguous()
    dfinal = torch.zeros_like(S) if grads[1] is None else grads[1].to(S.dtype).contiguous()
    dinitial, after, dv = made.adjoint(prepared, dy, dfinal)
    dq, dweights = (torch.empty_like(q, dtype=S.dtype) for _ in range(2))
    made.sides(q, weights, dy, v, (kept_S, S), (after, dfinal), dq, dweights, gates=False)

    # z enters y_t as exp(-z_t) only, and S at the end as exp(-z) of the end: the gradient of each is minus that of what
    # it scales. That of a key is its share of those of all z that follow, each as much less as z has grown until then.
    dz = torch.zeros_like(z) if grads[2] is None else grads[2].to(z.dtype)
    if grads[1] is not None:
        final, _ = made.carry(prepared.keys, v, prepared.totals, S, adjoint=False)
        dz = dz - (final * dfinal).sum(-1)
    dzs, left = -q * dq, softmax.log_decay.exp()
    against_time = LinearScan(
        (left * dzs).flatten(2),
        left.flatten(2),
        initial_state=dz.flatten(1),
        cu_seqlens=args.cu_seqlens,
        reverse=not args.reverse,
    )
    through, dbefore, _ = linear_scan.forward(against_time, chunk_size)
    later = dzs + _next(through.view(dzs.shape), dz, args.cu_seqlens, args.reverse)
    dk = shares * (later + (dweights if factor is None else dweights * factor))
    none = torch.isneginf(z)
    return [
        dq,
        dk,
        dv,
        None if factor is None else shares * dweights,
        None if args.initial_S is None else dinitial.masked_fill(none[..., None], 0),
        None if args.initial_z is None else (dbefore.view(z.shape) + (S * dinitial).sum(-1)).masked_fill(none, 0),
    ]
