"""Bytes that blocks, embedding and head take while a model is trained, measured on small cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sinuous.core.blocks import carry
from sinuous.core.live_memory import LiveStorages, peak_memory
from sinuous.core.sequence_model import SequenceModel
from sinuous.core.token_loss import TokenLoss

STEPS = (128, 384)
"""Sizes of the small cells: what lies between them is taken to be linear."""


@dataclass(frozen=True)
class Line:
    """Bytes that rise linearly with steps, and with the steps before them."""

    constant: float
    per_step: float
    per_past: float = 0.0
    per_both: float = 0.0

    def at(self, steps: int, past: int) -> float:
        return self.constant + self.per_step * steps + self.per_past * past + self.per_both * steps * past


@dataclass(frozen=True)
class BlockCost:
    """Bytes of one block, for one sequence.

    Attributes:
        kept: what its graph keeps, after a past.
        extra: what going back through it needs beyond, without gradients of weights.
        alone: both, for all steps at once, without a past.
        weights: of the gradients of its weights.
        state: of its state, as far as that does not grow.
        growth: by which its state grows in each step.
    """

    kept: Line
    extra: Line
    alone: tuple[Line, Line]
    weights: int
    state: int
    growth: int


@dataclass(frozen=True)
class Costs:
    """Bytes of a model's parts, for one sequence.

    Attributes:
        blocks: of each block.
        stream: of the stream, per step.
        shared: of tensors that blocks share, per step.
        weights: of the gradients of all weights.
        ends: what lies in front of the blocks and behind them, per step.
        head: what the loss of a cell needs; its first number is for any number of sequences.
        rows: the most steps that the head takes at once.
    """

    blocks: Sequence[BlockCost]
    stream: int
    shared: int
    weights: int
    ends: int
    head: Line
    rows: int

    def cell(self, group: range, batch: int, steps: int, length: int) -> int:
        """The most that recomputing a group of blocks and going back through it has alive."""
        blocks = [self.blocks[n] for n in group]
        kept, peak = batch * 2.0 * self.stream * steps, 0.0
        for block in blocks:
            keeps, more = block.alone if steps == length else (block.kept, block.extra)
            kept += batch * keeps.at(steps, length)
            peak = max(peak, kept + batch * more.at(steps, length))
        if group.stop == len(self.blocks):
            peak = max(peak, kept + self.head.constant + self.head.per_step * min(batch * steps, self.rows))
        return round(peak + sum(block.weights for block in blocks))


def measured_costs(model: nn.Module, stack: Any) -> Costs:
    """Measure the blocks of a stack, one of each kind, and the ends of a model that has a loss, or of one inside it
    that is given embeddings."""
    weight = next(stack.parameters())
    known: dict[Any, BlockCost] = {}
    blocks: list[BlockCost] = []
    devices = [weight.device] if weight.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        language = model
        if callable(getattr(model, "loss", None)):
            language = next((part for part in model.modules() if isinstance(part, SequenceModel)), model)
        embedded = _embedded(language, stack, weight)
        shared: dict[type, list[Tensor]] = {}
        for block in stack:
            before = {kind: list(tensors) for kind, tensors in shared.items()}
            kind = _kind(block)
            if kind not in known:
                known[kind] = _block_cost(block, embedded, before, stack.causal)
            blocks.append(known[kind])
            if stack.causal and getattr(block, "shares", False):
                with torch.no_grad():
                    carry("prefill", [block], embedded, [None], shared)
        head, rows, ends = _ends(language, embedded)
    per_step = _bytes([embedded]) // embedded.shape[1]
    of_shared = sum(_bytes(tensors) for tensors in shared.values()) // embedded.shape[1]
    trained = [p for p in model.parameters() if p.requires_grad]
    beside = ends if ends and language is model else 3 * per_step
    return Costs(blocks, per_step, of_shared, _bytes(trained), beside, head, rows)


def _kind(block: nn.Module) -> Any:
    """What tells blocks apart that cost different amounts."""
    shapes = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters())
    return type(block), tuple(type(module) for module in block.modules()), shapes


def _embedded(model: nn.Module, stack: Any, weight: Tensor) -> Tensor:
    """A stream as the stack gets it, of one sequence."""
    x = torch.randn(1, STEPS[-1], stack.dim, device=weight.device, dtype=weight.dtype)
    return model._embed(x, 2).detach() if isinstance(model, SequenceModel) else x


def _bytes(tree: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(tree) if isinstance(t, Tensor))


def _block_cost(block: Any, x: Tensor, shared: dict[type, list[Tensor]], causal: bool) -> BlockCost:
    pasts = [STEPS[0] if causal else 0]
    sizes = []
    for past in STEPS if causal else ():
        with torch.no_grad():
            sizes.append(_bytes(_run(block, x[:, :past], None, _first(shared, past), causal)[1]))
    growth = (sizes[1] - sizes[0]) // (STEPS[1] - STEPS[0]) if causal else 0
    if growth:
        pasts = list(STEPS)
    weights = _bytes([p for p in block.parameters() if p.requires_grad])

    def lines(pasts: list[int]) -> tuple[Line, Line]:
        found = {(steps, past): _measured(block, x, steps, past, shared, causal) for steps in STEPS for past in pasts}
        kept, extra = (_line({place: pair[k] for place, pair in found.items()}, pasts) for k in (0, 1))
        return kept, Line(extra.constant - weights, extra.per_step, extra.per_past, extra.per_both)

    kept, extra = lines(pasts)
    alone = lines([0]) if growth else (kept, extra)
    return BlockCost(kept, extra, alone, weights, sizes[0] - growth * STEPS[0] if causal else 0, growth)


def _line(found: dict[tuple[int, int], int], pasts: Sequence[int]) -> Line:
    (low, high), width = STEPS, STEPS[1] - STEPS[0]
    slopes = [(found[high, past] - found[low, past]) / width for past in pasts]
    starts = [found[low, past] - slope * low for past, slope in zip(pasts, slopes, strict=True)]
    if len(pasts) == 1:
        return Line(starts[0], slopes[0])
    per_past, per_both = (starts[1] - starts[0]) / width, (slopes[1] - slopes[0]) / width
    return Line(starts[0] - per_past * low, slopes[0] - per_both * low, per_past, per_both)


def _first(shared: dict[type, list[Tensor]], steps: int) -> dict[type, list[Tensor]]:
    return {kind: [t[:, :steps] for t in tensors] for kind, tensors in shared.items()}


def _run(block: Any, x: Tensor, state: Any, shared: dict[type, list[Tensor]], causal: bool) -> tuple[Tensor, Any]:
    if causal:
        y, (after,) = carry("prefill", [block], x, [state], shared)
        return y, after
    more = [t for tensors in shared.values() for t in tensors] if block.shares else []
    y = block(x, None, None, *more)
    return (y[0] if block.shares else y), None


def _measured(
    block: Any, x: Tensor, steps: int, past: int, shared: dict[type, list[Tensor]], causal: bool
) -> tuple[int, int]:
    """Bytes that the graph of a block keeps, and what going back through it needs beyond."""
    state = None
    if past:
        with torch.no_grad():
            _, state = _run(block, x[:, :past], None, _first(shared, past), causal)
    leaf = x[:, :steps].clone().requires_grad_()
    state = torch.utils._pytree.tree_map_only(Tensor, _leaf, state)
    parts = _first(shared, steps)
    with LiveStorages() as live:
        y, after = _run(block, leaf, state, parts, causal)
        kept = live.now
        outputs = [t for t in tree_leaves((y, after)) if isinstance(t, Tensor) and t.requires_grad]
        of_outputs = [torch.ones_like(t) for t in outputs]
        ones = _bytes(of_outputs)
        leaves = [t for t in tree_leaves((leaf, state)) if isinstance(t, Tensor) and t.requires_grad]
        weights = [p for p in block.parameters() if p.requires_grad]
        found = torch.autograd.grad(outputs, [*leaves, *weights], of_outputs, allow_unused=True)
        del found
    return kept, live.peak - kept - ones


def _leaf(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_(t.is_floating_point() or t.is_complex())


def _ends(model: nn.Module, x: Tensor) -> tuple[Line, int, int]:
    """What the loss of a model needs, the rows of one piece, and bytes per step beside the blocks."""
    if not isinstance(model, SequenceModel):
        return Line(0, 0), 1, 0
    weights = [p for name, p in model.named_parameters() if not name.startswith("layers.")]
    loss = TokenLoss(model._logits_of, weights, -100, model.padded_vocab_size)
    peaks = []
    for rows in STEPS:
        part, targets = x[:, :rows], torch.zeros(1, rows, dtype=torch.long, device=x.device)
        grad = torch.ones(1, rows, device=x.device)
        peaks.append(peak_memory(lambda a=part, b=targets, c=grad: loss.gradients(a, b, c, lambda *_: None)))  # type: ignore[misc]
    slope = (peaks[1] - peaks[0]) / (STEPS[1] - STEPS[0])
    return Line(peaks[0] - slope * STEPS[0], slope), loss.rows(x.shape[-1]), 16
