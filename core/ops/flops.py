"""Costs of the ops, as torch's `FlopCounterMode` counts them: a multiply-add is two operations.

    with torch.utils.flop_counter.FlopCounterMode() as counter:
        model(x)
    counter.get_total_flops()

What is counted is the definition, step by step, whatever backend computes it; the backward pass counts as twice the
forward one, as torch's own formulas of matrix products and convolutions have it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula


def register(name: str, arguments: Sequence[str], multiply_adds: Callable[..., int], passes: int = 1) -> None:
    """Let `FlopCounterMode` count the operator `name`.

    Args:
        name: the operator, `sinuous::<name>`.
        arguments: names of its arguments in order.
        multiply_adds: keyword arguments, tensors as their shapes -> number of multiply-adds.
        passes: over the data.
    """

    def count(*values: Any, out_shape: Any = None, **named: Any) -> int:
        shapes = {**dict(zip(arguments, values, strict=False)), **named}
        return 2 * passes * multiply_adds(**shapes)

    op = getattr(torch.ops.sinuous, name.partition("::")[2])
    register_flop_formula(op)(count)  # type: ignore[no-untyped-call]


def matrix_state(factor: int) -> Callable[..., int]:
    """Cost of a matrix state `[K, V]` for each head: `factor` multiply-adds of all its entries a step."""

    def multiply_adds(q: Sequence[int], v: Sequence[int], **_: Any) -> int:
        steps_and_heads = v[0] * v[1] * v[2]
        return factor * steps_and_heads * q[-1] * v[-1]

    return multiply_adds
