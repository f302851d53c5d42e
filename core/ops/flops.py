"""Costs of the ops, as torch's `FlopCounterMode` counts them: a multiply-add is two operations.

    with torch.utils.flop_counter.FlopCounterMode() as counter:
        model(x)
    counter.get_total_flops()

What is counted is the definition, step by step, whatever backend computes it; the backward pass counts as twice the
forward one, as torch's own formulas of matrix products and convolutions have it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula


def register(name: str, multiply_adds: Callable[..., int]) -> None:
    """Let `FlopCounterMode` count the operator `name`.

    Args:
        name: the operator, `sinuous::<name>`.
        multiply_adds: the operator's arguments, tensors as their shapes -> number of multiply-adds.
    """

    def count(*shapes: Any, out_shape: Any = None, **named: Any) -> int:
        return 2 * multiply_adds(*shapes, **named)

    op = getattr(torch.ops.sinuous, name.partition("::")[2])
    register_flop_formula(op)(count)  # type: ignore[no-untyped-call]


def matrix_state(factor: int) -> Callable[[Any], int]:
    """Cost of a matrix state `[K, V]` for each head: `factor` multiply-adds of all its entries a step."""

    def multiply_adds(args: Any) -> int:
        batch, steps, heads, values = args.v
        count: int = factor * batch * steps * heads * args.q[-1] * values
        return count

    return multiply_adds
