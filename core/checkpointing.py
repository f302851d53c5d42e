"""Which cells to recompute: plans of memory for `multi_axis` and for the losses of models.

With L blocks, T steps, and cells of l blocks by s steps, a training step has alive

    (⌈L/l⌉ - 1) T a        checkpoints of the stream, a bytes per step
    (⌈T/s⌉ - 1) Σ b        checkpoints of the states, b bytes per block
    l s g                  activations of one cell, g bytes per block and step

and the gradients of weights and states. Left alone, the least of the sum lies near l s ~ (L T)^(1/3) each way and grows
as (L T)^(2/3). Here a, b and g are measured on small cells of the model itself, block by block.

    plan = plan_memory(model, 1, 2**17, budget=64 * 2**20)
    plan.apply(model)
    model.loss(ids, targets).backward()

Source: Lee et al., "Video-Ma2mba" (arXiv 2411.19460), section 3.3; layers alone: Chen et al. (arXiv 1604.06174).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sinuous.core.block_costs import Costs, measured_costs
from sinuous.core.cells import multi_axis
from sinuous.core.checks import check_choice, check_sizes, described, is_number
from sinuous.core.live_memory import peak_memory
from sinuous.core.modes import evaluating
from sinuous.core.stack import Stack

__all__ = ["STRATEGIES", "MemoryPlan", "multi_axis", "peak_memory", "plan_memory", "set_checkpointing"]

STRATEGIES: dict[str, str] = {
    "none": "keep all activations",
    "layer": "recompute one block at a time, over all steps",
    "sqrt": "recompute √L blocks at a time, over all steps",
    "time": "recompute all blocks at once, over some steps at a time",
    "stream": "recompute one block over 1,024 steps at a time",
    "multi_axis": "recompute some blocks over some steps at a time",
}
"""Names of strategies, and how they go back."""

STREAM_STEPS = 1024
MULTIPLE = 64
"""Cells begin at multiples of this, as chunks inside kernels do: so their sums are those of the whole to the bit."""


@dataclass(frozen=True)
class MemoryPlan:
    """How a model goes back through its blocks, and the bytes that this takes.

    Attributes:
        strategy: one of `STRATEGIES`.
        layers: blocks that are recomputed together.
        steps: steps that are recomputed together; `None` for all.
        terms: bytes at the peak of a training step, by what they are for; weights and the batch itself are not counted.
    """

    strategy: str
    layers: int
    steps: int | None
    terms: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of all terms."""
        return sum(self.terms.values())

    def apply(self, model: nn.Module) -> None:
        """Let a model go back as planned.

        Raises:
            ValueError: if it has no stack of blocks, or looks ahead where the plan cuts steps.
        """
        set_checkpointing(model, self.strategy != "none", layers=self.layers, steps=self.steps)

    def __str__(self) -> str:
        steps = "all" if self.steps is None else f"{self.steps:,}"
        lines = [f"{self.strategy}: {self.layers} blocks by {steps} steps", ""]
        rows = [*self.terms.items(), ("total", self.total)]
        width = max(len(name) for name, _ in rows)
        return "\n".join([*lines, *(f"{name:<{width}}  {value / 1e6:>10,.2f} MB" for name, value in rows)])


def plan_memory(
    model: nn.Module,
    batch_size: int,
    length: int,
    *,
    strategy: str = "multi_axis",
    budget: float | None = None,
) -> MemoryPlan:
    """Plan how a training step of a model goes back through its blocks.

    Constants are measured on small cells of the model, on its device and in its mode. A model with a `loss`, as
    `SequenceModel` has, is planned for that; any other for its stack, with the stream on either side of it.

    Args:
        model: with one `Stack`, or one itself.
        batch_size: sequences in a batch.
        length: steps of each.
        strategy: one of `STRATEGIES`.
        budget: bytes; the plan has the largest cells that fit, and so the fewest. Without it, the least memory.

    Raises:
        ValueError: if a size is less than 1, there is no such strategy, the model has no stack or several, a strategy
            that cuts steps is for a model that looks ahead, or nothing fits into the budget: the least one is named.
    """
    check_sizes(batch_size=batch_size, length=length)
    check_choice("strategy", strategy, STRATEGIES)
    if budget is not None and not (is_number(budget) and budget > 0):
        raise ValueError(f"budget must be a number of bytes above 0 (got {described(budget)}); give 64 * 2**20")
    stack = _stack_of(model)
    if strategy in ("time", "stream", "multi_axis") and not stack.causal:
        raise ValueError(
            f"strategy {strategy!r} cuts steps and the model looks ahead (got causal=False); choose layer or sqrt"
        )
    costs = measured_costs(model, stack)
    sizes = _sizes(strategy, len(stack), length)
    plans = [
        MemoryPlan(strategy, layers, steps, _terms(costs, batch_size, length, layers, steps, strategy == "none"))
        for layers, steps in sizes
    ]
    least = min(plans, key=lambda plan: plan.total)
    if budget is None:
        return least
    fitting = [plan for plan in plans if plan.total <= budget]
    if not fitting:
        raise ValueError(
            f"budget must be at least {least.total:,} bytes for {batch_size} x {length:,} steps with strategy "
            f"{strategy!r} (got {budget:,}); give as much, or choose shorter sequences"
        )
    return max(fitting, key=lambda plan: (plan.layers * (plan.steps or length), -plan.total))


def set_checkpointing(model: nn.Module, enable: bool = True, *, layers: int = 1, steps: int | None = None) -> None:
    """Let every stack of a model recompute its blocks, see `Stack.set_grad_checkpointing`.

    A model of timm's, without a stack, recomputes as its own `set_grad_checkpointing` says.

    Raises:
        ValueError: if the model has no such method, or takes no sizes and some are given.
    """
    own = getattr(model, "set_grad_checkpointing", None)
    if own is not None and "steps" in inspect.signature(own).parameters:
        own(enable, layers=layers, steps=steps)
        return
    stacks = [module for module in model.modules() if isinstance(module, Stack)]
    if (layers, steps) != (1, None) and not stacks:
        raise ValueError(
            f"layers={layers}, steps={steps} are for models with a stack of blocks, which {type(model).__name__} "
            "lacks; leave them out"
        )
    if own is not None:
        try:
            own(enable)
        except (AssertionError, NotImplementedError) as error:  # timm's models without it assert
            raise _without_checkpointing(model) from error
    elif not stacks:
        raise _without_checkpointing(model)
    for stack in stacks:
        stack.set_grad_checkpointing(enable, layers=layers, steps=steps)


def _without_checkpointing(model: nn.Module) -> ValueError:
    return ValueError(
        f"checkpointing asks for set_grad_checkpointing, which {type(model).__name__} lacks; leave it out"
    )


def _stack_of(model: nn.Module) -> Stack:
    stacks = [module for module in model.modules() if isinstance(module, Stack)]
    if len(stacks) != 1:
        raise ValueError(
            f"plan_memory is for a model with one stack of blocks (got {type(model).__name__} with {len(stacks)}); "
            "plan its stacks one by one"
        )
    return stacks[0]


def _sizes(strategy: str, depth: int, length: int) -> list[tuple[int, int | None]]:
    """The cells among which a strategy chooses: blocks, and steps."""
    if strategy in ("none", "layer"):
        return [(1, None)]
    if strategy == "sqrt":
        return [(round(math.sqrt(depth)) or 1, None)]
    if strategy == "stream":
        return [(1, STREAM_STEPS if length > STREAM_STEPS else None)]
    parts = range(1, max(math.ceil(length / MULTIPLE), 1) + 1)
    cuts = {math.ceil(length / (k * MULTIPLE)) * MULTIPLE for k in parts}
    steps = [None, *sorted(cut for cut in cuts if cut < length)]
    layers = {depth} if strategy == "time" else {math.ceil(depth / k) for k in range(1, depth + 1)}
    return [(number, cut) for number in sorted(layers) for cut in steps]


def _terms(costs: Costs, batch: int, length: int, layers: int, steps: int | None, keeps_all: bool) -> dict[str, int]:
    """Bytes of a training step by what they are for."""
    depth, size = len(costs.blocks), min(steps or length, length)
    if keeps_all:
        layers = depth
    chunks = math.ceil(length / size)
    groups = [range(first, min(first + layers, depth)) for first in range(0, depth, layers)]
    states = sum(block.state for block in costs.blocks)
    growing = sum(block.growth for block in costs.blocks)
    edges = (len(groups) - 1) * costs.stream + (costs.shared if len(groups) > 1 else 0)
    cell = max(costs.cell(group, batch, size, length) for group in groups)
    return {
        "checkpoints of the stream": batch * length * edges,
        "checkpoints of the states": batch * ((chunks - 1) * states + (length * growing if chunks > 1 else 0)),
        "one cell": cell,
        "gradients of the states": batch * (states + length * growing) if chunks > 1 else 0,
        "gradients of the weights": costs.weights,
        "both ends": batch * length * costs.ends,
    }


def length_in(model: nn.Module, example: Tensor) -> int:
    """Steps of the stream in which a model reads an example, with its axis of the batch.

    Raises:
        ValueError: if it has no stack or several.
    """
    lengths: list[int] = []
    hook = _stack_of(model).register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    try:
        with torch.no_grad(), evaluating(model):
            model(example.to(next(model.parameters()).device))
    finally:
        hook.remove()
    return lengths[0]


def checkpointing_of(options: Any) -> Mapping[str, Any] | None:
    """Check the option of a run: `False` or nothing, `True`, `{layers, steps}` or `{strategy, budget}`.

    Returns:
        The sizes or the strategy; `None` for no checkpointing.

    Raises:
        ValueError: for any other.
    """
    if options is None or options is False:
        return None
    if options is True:
        return {}
    if isinstance(options, Mapping):
        names = set(options)
        if names and (names <= {"layers", "steps"} or names <= {"strategy", "budget"}):
            return options
    raise ValueError(
        f"checkpointing must be true, false, {{layers, steps}} or {{strategy, budget}} (got {options}); "
        "give checkpointing={strategy: multi_axis}"
    )
