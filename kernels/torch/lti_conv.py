"""Convolution with the response of a linear system in plain torch, in blocks or by Fourier transforms."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from sinuous.kernels.arguments import LTIConv
from sinuous.kernels.precision import working_dtype
from sinuous.kernels.torch import lti_blocks, lti_fourier
from sinuous.kernels.torch.lti_operators import PARAMETERS
from sinuous.kernels.torch.packing import flip_sequences, flip_time, mirror, rows, segments, sequence_count

MANY_BLOCKS = 16
"""Greatest number of blocks that go one after the other without much loss where each waits for launches."""


def by_transforms(u: Tensor, longest: int) -> bool:
    """Whether to convolve by transforms of the whole length, and not in blocks.

    On a CPU blocks are as fast or faster from 64 to 8192 steps, but for large batches of a low rank, where they lose a
    fifth. On other devices each block waits for a launch, where transforms need a number that grows as log T.
    """
    return not u.is_cpu and longest > MANY_BLOCKS * 2 ** lti_blocks.DOUBLINGS[-1]


class LTISequences(NamedTuple):
    """Time in processing order, channels first: `start:stop` of each sequence that is not empty, with its number; an
    ordinary batch is one of them."""

    bounds: list[tuple[int, int, int]]
    cu_seqlens: Tensor | None
    reverse: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, args: LTIConv) -> LTISequences:
        length = args.u.shape[1]
        ordered = mirror(args.cu_seqlens, length) if args.reverse else args.cu_seqlens
        bounds = [(s.start, s.stop, s.first or 0) for s in segments(length, max(length, 1), ordered)]
        return cls(bounds, ordered, args.reverse, working_dtype(args.u.dtype))

    def cut(self, t: Tensor) -> list[Tensor]:
        """`[D, B, T]` of each from `[B, ΣT, D]`."""
        moved = (flip_time(t) if self.reverse else t).to(self.dtype).permute(2, 0, 1).contiguous()
        return [moved[:, :, start:stop] for start, stop, _ in self.bounds]

    def join(self, parts: list[Tensor], like: Tensor) -> Tensor:
        """The inverse of `cut`, in the dtype of `like`."""
        joined = torch.empty_like(like, memory_format=torch.contiguous_format)
        for (start, stop, _), part in zip(self.bounds, parts, strict=True):
            joined[:, start:stop] = part.permute(1, 2, 0)
        return flip_time(joined) if self.reverse else joined

    def states(self, t: Tensor | None) -> list[Tensor | None]:
        """`[D, B, N]` of each from `[sequences, D, M, 2]`."""
        if t is None:
            return [None for _ in self.bounds]
        ordered = flip_sequences(t, self.cu_seqlens) if self.reverse else t
        moved = ordered.to(self.dtype).flatten(2)
        return [rows(moved, n, self.cu_seqlens).transpose(0, 1).contiguous() for _, _, n in self.bounds]

    def join_states(self, parts: list[Tensor], empty: Tensor) -> Tensor:
        """The inverse of `states`, with the rows of `empty` for sequences without steps."""
        joined = flip_sequences(empty, self.cu_seqlens) if self.reverse else empty
        joined = joined.to(self.dtype, copy=True, memory_format=torch.contiguous_format)
        for (_, _, n), part in zip(self.bounds, parts, strict=True):
            rows(joined, n, self.cu_seqlens).copy_(part.transpose(0, 1).unflatten(-1, (-1, 2)))
        return flip_sequences(joined, self.cu_seqlens) if self.reverse else joined


def _form(args: LTIConv, sequences: LTISequences) -> ModuleType:
    longest = max((stop - start for start, stop, _ in sequences.bounds), default=0)
    return lti_fourier if by_transforms(args.u, longest) else lti_blocks


def _or_zeros(states: Tensor | None, args: LTIConv, dtype: torch.dtype) -> Tensor:
    """States `[sequences, D, M, 2]`."""
    if states is not None:
        return states
    count = sequence_count(args.u, args.cu_seqlens)
    return torch.zeros(count, args.u.shape[2], args.A.shape[-2], 2, dtype=dtype, device=args.u.device)


def forward(args: LTIConv) -> tuple[Tensor, Tensor]:
    """`(y, final_state)`; see sinuous.core.ops.lti_conv."""
    u, sequences = args.u, LTISequences.of(args)
    before = _or_zeros(args.initial_state, args, sequences.dtype)
    if not u.numel():
        return torch.empty_like(u), before.to(sequences.dtype, copy=True)
    ys, ends = _form(args, sequences).forward(args, sequences.cut(u), sequences.states(args.initial_state))
    return sequences.join(ys, u), sequences.join_states(ends, before)


def backward(args: LTIConv, grads: tuple[Tensor | None, Tensor | None]) -> list[Tensor | None]:
    """Gradients of u, dt, A, B, C, P, D and initial_state."""
    (dy, dfinal), u, sequences = grads, args.u, LTISequences.of(args)
    after = _or_zeros(dfinal, args, sequences.dtype)
    if not u.numel():
        zeros = [None if (t := getattr(args, name)) is None else torch.zeros_like(t) for name in PARAMETERS]
        return [torch.zeros_like(u), *zeros, None if args.initial_state is None else after]
    dys = sequences.cut(torch.zeros_like(u) if dy is None else dy)
    states, dends = sequences.states(args.initial_state), sequences.states(dfinal)
    dus, dstates, of_parameters = _form(args, sequences).backward(args, sequences.cut(u), states, dys, dends)
    dinitial = None if args.initial_state is None else sequences.join_states(dstates, after)
    return [sequences.join(dus, u), *(of_parameters.get(name) for name in PARAMETERS), dinitial]
