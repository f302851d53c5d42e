"""Cells of a grid in several orders at once, and the sum of several orders back over the cells: one copy each.

    take_orders(cells, order, step)[b, t, k] = cells[b, order[t, k]]             [B, T, D] -> [B, T, K, D]
    sum_orders(sequences, order, step)[b, c] = Σ_k sequences[b, step[c, k], k]   [B, T, K, D] -> [B, T, D]

`order` holds K permutations of the T cells, int64 `[T, K]`, and `step` their inverses. Each of the two is the other's
gradient. Composed of torch's operators, either would copy K times and more, and its gradient would add row by row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.core.ops import differentiation


def take_orders(cells: Tensor, order: Tensor, step: Tensor) -> Tensor:
    """K sequences side by side, in torch's operators."""
    sequences: Tensor = cells.index_select(1, order.flatten()).unflatten(1, order.shape)
    return sequences


def sum_orders(sequences: Tensor, order: Tensor, step: Tensor) -> Tensor:
    """Sum of K sequences over the cells, in torch's operators."""
    rows = step * step.shape[1] + torch.arange(step.shape[1], device=step.device)
    cells: Tensor = sequences.flatten(1, 2).index_select(1, rows.flatten()).unflatten(1, step.shape).sum(2)
    return cells


DEFINITIONS: dict[str, Callable[..., Tensor]] = {"take_orders": take_orders, "sum_orders": sum_orders}
"""The two by their names."""


def _take(cells: Tensor, order: Tensor, step: Tensor) -> Tensor:
    return take_orders(cells, order, step).contiguous()


def _sum(sequences: Tensor, order: Tensor, step: Tensor) -> Tensor:
    batch, steps, count, width = sequences.shape
    if sequences.numel() == 0:
        return sequences.new_zeros(batch, steps, width)
    rows = step * count + torch.arange(count, device=step.device)
    whole = rows + torch.arange(batch, device=step.device)[:, None, None] * (steps * count)
    summed: Tensor = F.embedding_bag(whole.flatten(0, 1), sequences.reshape(-1, width), mode="sum")
    return summed.view(batch, steps, width)


def _fake_take(cells: Tensor, order: Tensor, step: Tensor) -> Tensor:
    return cells.new_empty(cells.shape[0], *order.shape, cells.shape[2])


def _fake_sum(sequences: Tensor, order: Tensor, step: Tensor) -> Tensor:
    batch, steps, _, width = sequences.shape
    return sequences.new_empty(batch, steps, width)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[1:])


def _define(name: str, body: Callable[..., Tensor], fake: Callable[..., Tensor], adjoint: str) -> None:
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return getattr(torch.ops.sinuous, adjoint)(gradient, *ctx.saved_tensors), None, None

    torch.library.define(f"sinuous::{name}", "(Tensor x, Tensor order, Tensor step) -> Tensor")
    torch.library.impl(f"sinuous::{name}", "CompositeExplicitAutograd", body)
    torch.library.register_fake(f"sinuous::{name}", fake)
    differentiation.register(f"sinuous::{name}", _keep, backward, DEFINITIONS[name])


_define("take_orders", _take, _fake_take, "sum_orders")
_define("sum_orders", _sum, _fake_sum, "take_orders")
