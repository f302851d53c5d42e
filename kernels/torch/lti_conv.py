"""Convolution with the response of a linear system in plain torch, in blocks or by Fourier transforms."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sinuous.kernels.precision import working_dtype
from sinuous.kernels.torch import lti_blocks, lti_fourier
from sinuous.kernels.torch.packing import flip_sequences, flip_time, mirror, rows, segments

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
    def of(cls, u: Tensor, cu_seqlens: Tensor | None, reverse: bool) -> LTISequences:
        ordered = mirror(cu_seqlens, u.shape[1]) if reverse else cu_seqlens
        whole = segments(u.shape[1], max(u.shape[1], 1), ordered)
        return cls([(s.start, s.stop, s.first or 0) for s in whole], ordered, reverse, working_dtype(u.dtype))

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


def _longest(sequences: LTISequences) -> int:
    return max((stop - start for start, stop, _ in sequences.bounds), default=0)


def _no_states(u: Tensor, A: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype) -> Tensor:
    count = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return torch.zeros(count, u.shape[2], A.shape[-2], 2, dtype=dtype, device=u.device)


def forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    P: Tensor | None,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    discretization: str,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """`(y, final_state)`; see sinuous.core.ops.lti_conv."""
    sequences = LTISequences.of(u, cu_seqlens, reverse)
    before = _no_states(u, A, cu_seqlens, sequences.dtype) if initial_state is None else initial_state
    if not u.numel():
        return torch.empty_like(u), before.to(sequences.dtype, copy=True)
    form = lti_fourier if by_transforms(u, _longest(sequences)) else lti_blocks
    parameters = {"dt": dt, "A": A, "B": B, "C": C, "P": P, "D": D}
    ys, ends = form.forward(sequences.cut(u), sequences.states(initial_state), discretization, parameters)
    return sequences.join(ys, u), sequences.join_states(ends, before)


def backward(
    grads: tuple[Tensor | None, Tensor | None],
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    P: Tensor | None,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    discretization: str,
    reverse: bool,
) -> list[Tensor | None]:
    """Gradients of u, dt, A, B, C, P, D and initial_state."""
    dy, dfinal = grads
    parameters = {"dt": dt, "A": A, "B": B, "C": C, "P": P, "D": D}
    sequences = LTISequences.of(u, cu_seqlens, reverse)
    before = _no_states(u, A, cu_seqlens, sequences.dtype) if dfinal is None else dfinal
    if not u.numel():
        zeros = [None if t is None else torch.zeros_like(t) for t in parameters.values()]
        return [torch.zeros_like(u), *zeros, None if initial_state is None else before]
    form = lti_fourier if by_transforms(u, _longest(sequences)) else lti_blocks
    dys = sequences.cut(torch.zeros_like(u) if dy is None else dy)
    dus, dstates, of_parameters = form.backward(
        sequences.cut(u), sequences.states(initial_state), dys, sequences.states(dfinal), discretization, parameters
    )
    dinitial = None if initial_state is None else sequences.join_states(dstates, before)
    return [sequences.join(dus, u), *(of_parameters.get(n) for n in parameters), dinitial]
