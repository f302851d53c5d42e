"""Cross entropy of a vocabulary without the logits of all steps at once.

    loss_t = -log softmax(head(x_t))[target_t]            0 where the target is ignored

The head runs at the targets that count, in pieces, and again in the backward pass: never T × V numbers are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sinuous.core import norms
from sinuous.core.checks import described
from sinuous.kernels.precision import real_dtype

PIECE = 2**20
"""Logits of one piece; more where the head's own matrix is larger, whose size is then that of a piece."""


class TokenLoss:
    """Losses of the tokens of a stream.

    Args:
        logits: makes logits `[N, V]` of rows of the stream, `[N, …]`.
        weights: its parameters.
        ignore_index: target of steps that do not count.
        vocab_size: V.
    """

    def __init__(
        self, logits: Callable[[Tensor], Tensor], weights: Sequence[nn.Parameter], ignore_index: int, vocab_size: int
    ) -> None:
        self.logits, self.weights = logits, list(weights)
        self.ignore_index, self.vocab_size = ignore_index, vocab_size

    def __call__(self, stream: Tensor, targets: Tensor) -> Tensor:
        """Losses `[B, T]`, in at least fp32, of a stream `[B, T, …]`."""
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in (stream, *self.weights))):
            return self.values(stream, targets)
        if len(pieces := list(self._pieces(stream, targets))) <= 1:
            losses = stream.new_zeros(targets.numel(), dtype=real_dtype(stream.dtype))
            for index in pieces:
                losses = losses.index_put((index,), self._losses(_rows(stream, index), targets.flatten()[index]))
            return losses.view(targets.shape)
        losses_in_pieces: Tensor = _InPieces.apply(self, stream, targets, *self.weights)  # type: ignore[no-untyped-call]
        return losses_in_pieces

    def rows(self, width: int) -> int:
        """Steps of one piece, of a stream of `width` channels."""
        return max(PIECE // self.vocab_size, width, 1)

    def counts(self, targets: Tensor) -> bool:
        """Whether any of the targets counts."""
        return bool((targets != self.ignore_index).any())

    def values(self, stream: Tensor, targets: Tensor) -> Tensor:
        """Losses `[B, T]`, without a gradient."""
        losses = stream.new_zeros(targets.numel(), dtype=real_dtype(stream.dtype))
        with torch.no_grad():
            for index in self._pieces(stream, targets):
                losses[index] = self._losses(_rows(stream, index), targets.flatten()[index])
        return losses.view(targets.shape)

    def gradients(
        self, stream: Tensor, targets: Tensor, grad: Tensor, add: Callable[[nn.Parameter, Tensor], None]
    ) -> Tensor:
        """Gradient of the stream, given that of the losses; those of the weights go to `add`, piece by piece."""
        of_stream = torch.zeros_like(stream, memory_format=torch.contiguous_format)
        rows_of_grad = of_stream.view(-1, *stream.shape[2:])
        weights = [weight for weight in self.weights if weight.requires_grad]
        for index in self._pieces(stream, targets):
            rows = _rows(stream, index).detach().requires_grad_()
            with torch.enable_grad():
                losses = self._losses(rows, targets.flatten()[index])
            of_losses = grad.flatten()[index].to(losses.dtype)
            of_rows, *of_weights = torch.autograd.grad(losses, [rows, *weights], of_losses, allow_unused=True)
            rows_of_grad[index] = of_rows
            for weight, found in zip(weights, of_weights, strict=True):
                if found is not None:
                    add(weight, found)
        return of_stream

    def _pieces(self, stream: Tensor, targets: Tensor) -> Iterator[Tensor]:
        """Places of the targets that count, a piece at a time."""
        index = (targets.flatten() != self.ignore_index).nonzero().squeeze(1)
        yield from index.split(self.rows(stream.shape[-1])) if len(index) else ()

    def _losses(self, rows: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(norms.at_least_fp32(self.logits(rows)), targets.long(), reduction="none")


class _InPieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: TokenLoss, stream: Tensor, targets: Tensor, *weights: Tensor) -> Tensor:
        ctx.loss = loss
        kind = stream.device.type
        ctx.autocast = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}
        ctx.save_for_backward(stream, targets, *weights)
        with torch.autocast(kind, cache_enabled=False, **ctx.autocast):
            return loss.values(stream, targets)

    @staticmethod
    @once_differentiable  # type: ignore[misc,untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        stream, targets, *_ = ctx.saved_tensors  # raises where weights have been changed in place
        sums = GradientSums(ctx.loss.weights)
        with torch.autocast(stream.device.type, cache_enabled=False, **ctx.autocast):
            of_stream = ctx.loss.gradients(stream, targets, grad, sums.add)
        return None, of_stream, None, *sums.results()


class GradientSums:
    """Gradients of weights, added up part by part; in fp32 where they are of half precision."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weights = weights
        self.places = {id(weight): k for k, weight in enumerate(weights)}
        self.sums: list[Tensor | None] = [None] * len(weights)

    def add(self, weight: Tensor, grad: Tensor) -> None:
        place = self.places[id(weight)]
        total = self.sums[place]
        if total is None:  # a copy: autograd may have given the same tensor to several weights
            half = weight.dtype in (torch.float16, torch.bfloat16)
            wide = torch.float32 if half else weight.dtype
            self.sums[place] = torch.empty_like(weight, dtype=wide, memory_format=torch.contiguous_format).copy_(grad)
        else:
            total.add_(grad)

    def results(self) -> list[Tensor | None]:
        """The sums, `None` for weights without a gradient, in the dtypes of the weights."""
        pairs = zip(self.sums, self.weights, strict=True)
        return [None if total is None else total.to(weight.dtype) for total, weight in pairs]


def _rows(stream: Tensor, index: Tensor) -> Tensor:
    rows = stream.flatten(0, 1)
    return rows if len(index) == len(rows) else rows.index_select(0, index)


def check_targets(targets: Any, x: Any) -> None:
    """Refuse targets that are not whole numbers, one for each step of x.

    Raises:
        ValueError: naming them.
    """
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.is_complex():
        raise ValueError(f"targets must be int64 [B, T] (got {described(targets)}); convert them with .long()")
    if isinstance(x, Tensor) and targets.shape != x.shape[:2]:
        raise ValueError(
            f"targets must be one for each step, {list(x.shape[:2])} (got {list(targets.shape)}); "
            "give those that do not count ignore_index"
        )


def explain_targets(targets: Tensor, ignore_index: int, vocab_size: int) -> None:
    """Say which target is none of the vocabulary's, if one is.

    Raises:
        ValueError: naming it.
    """
    counting = targets[targets != ignore_index]
    if len(strange := counting[(counting < 0) | (counting >= vocab_size)]):
        raise ValueError(
            f"targets must lie between 0 and {vocab_size - 1}, or be ignore_index {ignore_index} "
            f"(got {int(strange[0])}); use the tokenizer that the model was trained with"
        )
