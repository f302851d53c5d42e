"""Gradients of a column of blocks in little memory: a grid of blocks by steps, recomputed cell by cell.

    forward    for each chunk of steps, for each group of blocks:  keep x at the group's lower edge and the states at
               the chunk's start;  (x, states) ← group(x, states)                       without activations
    backward   for each chunk from the last, for each group from the top:  recompute the cell with its activations, and
               go back through it:  (∂x, ∂states, ∂weights) from those at its upper edge and at its end

For L blocks of l per group and T steps of s per chunk, that keeps (⌈L/l⌉ - 1) T values of x, L (⌈T/s⌉ - 1) states, and
the activations of l blocks over s steps: with the best l and s, memory grows as (L T)^(2/3). Gradients are those of the
whole, since states carry theirs from chunk to chunk; each cell runs forward twice.

Source: Lee et al., "Video-Ma2mba" (arXiv 2411.19460), section 3.3, and Chen et al. (arXiv 1604.06174), section 4. The
order in time, chunk by chunk, keeps gradients of x for one chunk only.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from sinuous.core.blocks import carry
from sinuous.core.checks import check_sizes, described
from sinuous.core.replay import Surroundings
from sinuous.core.shelves import StateShelf, StreamShelf, compact
from sinuous.core.token_loss import GradientSums, TokenLoss

State = tuple[list[Any], TreeSpec]
"""Leaves and form of the state of a block."""

Gradients = tuple[list[Tensor | None], list[list[Tensor | None]]]
"""Of what lies at an edge, and of the states of blocks."""

_TENSOR = object()
"""Stands for a tensor."""


def multi_axis(
    blocks: Sequence[nn.Module], x: Tensor, state: Any = None, *, layers: int = 1, steps: int | None = None
) -> tuple[Tensor, Any]:
    """Run blocks one after another over a sequence, and keep for the backward pass what a grid of cells needs.

    A block is a module with `prefill(x, state) -> (y, state)`, where `prefill` of two parts of a sequence in turn gives
    what it gives of the whole: x `[B, T, …]`, and as state any pytree, `None` before the first step. It must leave the
    state that it is given as it is. A tensor of the state that only grows by what is appended on one axis, as the cache
    of softmax attention does, is kept once.

    Dropout is the same when a cell is recomputed; stochastic depth (timm's `DropPath`) is drawn once for each sequence
    and block. Derivatives of derivatives are refused.

    Args:
        blocks: the first one first; a `Stack` is such a sequence.
        x: `[B, T, …]`.
        state: what an earlier call returned, a part for each block; `None` at the start of a sequence.
        layers: blocks of a cell.
        steps: steps of a cell; all of them, if absent.

    Returns:
        Output of the last block, and a tuple with the state of each block after the last step. Gradients come through
        both, and reach x, the weights and the given state.

    Raises:
        ValueError: if a size is less than 1, there is no block or a block has no `prefill`, or `state` has another
            number of parts than there are blocks.

    Source: Lee et al. (arXiv 2411.19460), section 3.3.
    """
    return Cells(list(blocks), layers, steps)(x, state)


@dataclass(frozen=True)
class Ends:
    """What stands before and behind the blocks, inside the cells.

    Attributes:
        enter: makes the stream `[B, s, dim]` of a chunk of the input, ids `[B, s]` or embeddings.
        weights: its parameters.
        loss: makes losses of the stream behind the last block.
    """

    enter: Callable[[Tensor], Tensor]
    weights: Sequence[nn.Parameter]
    loss: TokenLoss


class Cells:
    """The grid of `multi_axis`, or of a loss: see there, and `Ends`."""

    def __init__(self, blocks: Sequence[Any], layers: int, steps: int | None, ends: Ends | None = None) -> None:
        check_sizes(layers=layers, **({} if steps is None else {"steps": steps}))
        if not blocks:
            raise ValueError("blocks must be one or more modules (got none); give those of a model")
        for block in blocks:
            if not callable(getattr(block, "prefill", None)):
                raise ValueError(
                    f"blocks must have prefill(x, state) -> (y, state), which {type(block).__name__} lacks; add it"
                )
            if hasattr(block, "unshard"):
                raise ValueError(
                    "steps goes with whole weights (got blocks that fully_shard has split); leave steps out, or train "
                    "with trainer=ddp"
                )
        self.blocks, self.ends, self.layers, self.steps = blocks, ends, layers, steps
        self.places = [slice(first, first + layers) for first in range(0, len(blocks), layers)]
        self.groups = self.of_groups(blocks)
        self.trained = [_unique(p for block in group for p in _weights(block)) for group in self.groups]
        if ends is not None:
            self.trained[0] = _unique([*ends.weights, *self.trained[0]])
        self.weights = self.find_weights()

    def of_groups(self, of_blocks: Sequence[Any]) -> list[Sequence[Any]]:
        """What belongs to each block, by group."""
        return [of_blocks[place] for place in self.places]

    def find_weights(self) -> list[nn.Parameter]:
        """The trained weights of the ends and the blocks."""
        of_ends = [] if self.ends is None else [*self.ends.weights, *self.ends.loss.weights]
        return _unique([*of_ends, *(p for block in self.blocks for p in _weights(block))])

    def __call__(
        self, x: Tensor, state: Any = None, *, targets: Tensor | None = None, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """The stream `[B, T, …]` behind the last block, or with ends the losses of `targets` `[B, T]`; and the states
        after the last step, of which a loss has none."""
        if not isinstance(x, Tensor) or x.ndim < 2:
            raise ValueError(f"x must be a tensor [B, T, …] (got {described(x)}); add the axes that are missing")
        parts = [None] * len(self.blocks) if state is None else state
        if not isinstance(parts, tuple | list) or len(parts) != len(self.blocks):
            raise ValueError(
                f"state must be a tuple with a part for each of the {len(self.blocks)} blocks "
                f"(got {described(state)}); give what an earlier call returned"
            )
        run = _Run(self, parts, x, targets, position_ids)
        outputs = _Recomputed.apply(run, *run.tensors, *self.weights)  # type: ignore[no-untyped-call]
        return outputs[0], run.last_states(outputs[1:])


class _Recomputed(torch.autograd.Function):
    """The grid as one node of autograd's graph, whose inputs include the weights: what waits for their gradients, as
    distributed training does, `torch.autograd.grad` and frozen parts work as with any other operation."""

    @staticmethod
    def forward(ctx: Any, run: _Run, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.run = run
        ctx.set_materialize_grads(False)
        outputs = run.forward()
        ctx.save_for_backward(*tensors, *run.put_away())
        ctx.mark_non_differentiable(*(t for t in outputs if not _differentiable(t)))
        return outputs

    @staticmethod
    @once_differentiable  # type: ignore[misc,untyped-decorator]
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *ctx.run.backward(ctx.saved_tensors, grads)


class _Run:
    """One call: its chunks, the two passes, and what lies between them.

    Between the passes tensors belong to the node of autograd's graph, so that they are freed with it.
    """

    def __init__(
        self, cells: Cells, states: Sequence[Any], x: Tensor, targets: Tensor | None, position_ids: Tensor | None
    ) -> None:
        length = x.shape[1]
        size = max(length, 1) if cells.steps is None else cells.steps
        self.cells = cells
        self.chunks = [(start, min(start + size, length)) for start in range(0, max(length, 1), size)]
        self.given: list[State] = [tree_flatten(state) for state in states]
        """Without tensors, which are in `tensors`."""
        leaves = [leaf for values, _ in self.given for leaf in values]
        self.tensors = [x, targets, position_ids, *(leaf if isinstance(leaf, Tensor) else None for leaf in leaves)]
        """What autograd's node is given besides the weights."""
        self.given = [([None if isinstance(v, Tensor) else v for v in values], form) for values, form in self.given]

        reached = [bool(weights) for weights in cells.trained]
        for j, group in enumerate(cells.of_groups(list(states))):
            reached[j] |= any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(group))
        reached[0] |= x.requires_grad
        self.lowest = reached.index(True) if any(reached) else len(reached)
        """The lowest group that gradients reach; those below are not recomputed."""
        of_loss = cells.ends is not None and any(weight.requires_grad for weight in cells.ends.loss.weights)
        self.records = torch.is_grad_enabled() and (any(reached) or of_loss)

        self.edges: dict[int, list[StreamShelf]] = {}
        """What comes to the lower edge of a group: the stream, and what blocks below share with blocks above."""
        self.written: dict[int, list[int]] = {}
        """Those of them that no lower edge has."""
        self.shelves = [StateShelf(len(self.chunks) - 1) for _ in cells.blocks]
        self.forms = {0: tree_flatten({})[1]}
        """Which mixers the shared tensors at the lower edge of a group are for."""
        self.last: list[State] = []
        """The states after the last step, without tensors."""
        self.surroundings = Surroundings(x, cells.groups)

    def last_states(self, tensors: Iterable[Tensor]) -> tuple[Any, ...]:
        """The states after the last step, whose tensors are outputs of autograd's node."""
        outputs = iter(tensors)
        return tuple(
            tree_unflatten([next(outputs) if value is _TENSOR else value for value in values], form)
            for values, form in self.last
        )

    def put_away(self) -> list[Tensor]:
        """Hand over all tensors that are kept."""
        self.counts = [len(shelf.tensors) for shelf in self._shelves()]
        kept = [tensor for shelf in self._shelves() for tensor in shelf.tensors]
        self._fill([])
        return kept

    def _shelves(self) -> list[Any]:
        streams = {id(shelf): shelf for edge in self.edges.values() for shelf in edge}
        return [*streams.values(), *(leaf for shelf in self.shelves for leaf in shelf.leaves)]

    def _fill(self, tensors: Iterable[Tensor]) -> None:
        rest = iter(tensors)
        for shelf, count in zip(self._shelves(), self.counts, strict=True):
            shelf.tensors = list(itertools.islice(rest, count))

    def _given(self, leaves: Sequence[Tensor | None]) -> list[State]:
        rest = iter(leaves)
        pairs = [([(v, t) for v, t in zip(values, rest, strict=False)], form) for values, form in self.given]
        return [([v if t is None else t for v, t in both], form) for both, form in pairs]

    def forward(self) -> tuple[Tensor, ...]:
        """Run every cell without activations."""
        cells, (x, targets, position_ids, *leaves) = self.cells, self.tensors
        assert x is not None
        states, top = [tree_unflatten(values, form) for values, form in self._given(leaves)], len(cells.groups)
        out: Tensor | None = None
        for i, (start, stop) in enumerate(self.chunks):
            is_last = i + 1 == len(self.chunks)
            places = None if position_ids is None else position_ids[:, start:stop]
            edge = [x[:, start:stop]]
            for j, blocks in enumerate(cells.places):
                with self.surroundings.first_time(j, i):
                    above, after = self._cell(j, edge, states[blocks], places)
                if is_last and cells.ends is not None:
                    after = [None] * len(after)
                elif self.records and not is_last and j >= self.lowest:
                    after = [shelf.put(i, state) for shelf, state in zip(self.shelves[blocks], after, strict=True)]
                states[blocks] = after
                if self.records and self.lowest <= j + 1 and (j + 1 < top or self.lowest == top):
                    self._keep_edge(j + 1, start, edge, above)
                edge = above
            part = edge[0]
            if cells.ends is not None:
                with self.surroundings.again(None):
                    part = cells.ends.loss.values(part, targets[:, start:stop])  # type: ignore[index]
            if len(self.chunks) == 1:
                out = part
            else:
                out = part.new_empty(part.shape[0], x.shape[1], *part.shape[2:]) if out is None else out
                out[:, start:stop] = part
        assert out is not None
        if cells.ends is not None:
            return (out,)
        ends = [tree_flatten(state) for state in states]
        self.last = [([_TENSOR if isinstance(v, Tensor) else v for v in values], form) for values, form in ends]
        return out, *(compact(v) for values, _ in ends for v in values if isinstance(v, Tensor))

    def _cell(
        self, j: int, edge: list[Tensor], states: list[Any], places: Tensor | None
    ) -> tuple[list[Tensor], list[Any]]:
        """What comes to the upper edge of group j, and the states after the chunk."""
        cells, (x, *passed_on) = self.cells, edge
        if j == 0 and cells.ends is not None:
            x = cells.ends.enter(x)
        shared = tree_unflatten(passed_on, self.forms[j])
        x, after = carry("prefill", cells.groups[j], x, states, shared, places)
        passed_on, self.forms[j + 1] = tree_flatten(shared)
        return [x, *passed_on], after

    def _keep_edge(self, j: int, start: int, below: list[Tensor], edge: list[Tensor]) -> None:
        if start == 0:
            lower = self.edges.get(j - 1, [])
            same = [next((m for m, old in enumerate(below[: len(lower)]) if old is new), None) for new in edge]
            length = self.chunks[-1][1]
            self.edges[j] = [StreamShelf(length) if m is None else lower[m] for m in same]
            self.written[j] = [k for k, m in enumerate(same) if m is None]
        for k in self.written[j]:
            self.edges[j][k].put(start, edge[k])

    def backward(self, saved: Sequence[Any], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Recompute the cells, the last chunk first and the top group first: gradients of what the node was given."""
        cells, count = self.cells, len(self.tensors)
        if any(now is not then for now, then in zip(cells.find_weights(), cells.weights, strict=False)):
            raise RuntimeError("weights were exchanged for others between the two passes; go back before that")
        x, targets, position_ids, *leaves = saved[:count]
        self._fill(saved[count + len(cells.weights) :])
        sums = GradientSums(cells.weights)
        try:
            of_x, of_given = self._chunks_back(x, targets, position_ids, self._given(leaves), grads, sums)
        finally:
            self._fill([])
        return [of_x, None, None, *of_given, *sums.results()]

    def _chunks_back(
        self,
        x: Tensor,
        targets: Tensor,
        position_ids: Tensor | None,
        given: list[State],
        grads: Sequence[Tensor | None],
        sums: GradientSums,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        cells, top, (of_out, *rest) = self.cells, len(self.cells.groups), grads
        of_x = torch.zeros_like(x) if x.requires_grad else None
        of_last = iter(rest)
        of_states = [[next(of_last) if v is _TENSOR else None for v in values] for values, _ in self.last]
        of_states = of_states or [[] for _ in cells.blocks]
        for i, (start, stop) in reversed(list(enumerate(self.chunks))):
            places = None if position_ids is None else position_ids[:, start:stop]
            of_part = None if of_out is None else of_out[:, start:stop]
            of_edge: list[Tensor | None] = [of_part] if cells.ends is None else []
            through_loss = None
            if cells.ends is not None and of_part is not None and cells.ends.loss.counts(targets[:, start:stop]):
                loss, aims = cells.ends.loss, targets[:, start:stop]
                through_loss = functools.partial(loss.gradients, targets=aims, grad=of_part, add=sums.add)
            if through_loss is not None and self.lowest == top:
                with self.surroundings.again(None):
                    through_loss(self.edges[top][0].get(start, stop))
            for j in reversed(range(self.lowest, top)):
                blocks = cells.places[j]
                edge = [x[:, start:stop]] if j == 0 else [shelf.get(start, stop) for shelf in self.edges[j]]
                states = [shelf.get(i - 1) for shelf in self.shelves[blocks]] if i > 0 else given[blocks]
                of_edge, of_states[blocks] = self._cell_back(
                    (j, i), edge, states, places, of_edge, of_states[blocks], through_loss, sums
                )
                through_loss = None
            if of_x is not None and of_edge and of_edge[0] is not None:
                of_x[:, start:stop] = of_edge[0]
        for n, (values, _) in enumerate(self.given[: self.lowest * cells.layers]):
            of_states[n] = [None] * len(values)
        return of_x, [grad for of_state in of_states for grad in of_state]

    def _cell_back(
        self,
        place: tuple[int, int],
        edge: list[Tensor],
        states: list[State],
        places: Tensor | None,
        of_edge: list[Tensor | None],
        of_states: list[list[Tensor | None]],
        through_loss: Callable[[Tensor], Tensor] | None,
        sums: GradientSums,
    ) -> Gradients:
        """Gradients at the lower edge of a cell and before it, from those at its upper edge, or of the losses of what
        is there, and after it."""
        (j, i), weights = place, self.cells.trained[place[0]]
        below = [_leaf(t, t.requires_grad if j == 0 else j > self.lowest) for t in edge]
        before = [[_leaf(v, i > 0 or v.requires_grad) if isinstance(v, Tensor) else v for v in s] for s, _ in states]
        nothing: Gradients = [None for _ in edge], [[None for _ in values] for values in before]
        of_all = [*of_edge, *(grad for values in of_states for grad in values)]
        if through_loss is None and all(grad is None for grad in of_all):
            return nothing
        with self.surroundings.again(place), torch.enable_grad():
            trees = [tree_unflatten(values, form) for values, (_, form) in zip(before, states, strict=True)]
            above, after = self._cell(j, below, trees, places)
            if through_loss is not None:
                of_edge = [through_loss(above[0].detach())]
        pairs = list(zip(above, of_edge, strict=False))
        for state, of_state in zip(after, of_states, strict=True):
            pairs += zip(tree_flatten(state)[0], of_state, strict=False)
        pairs = [(t, grad) for t, grad in pairs if grad is not None and t.requires_grad]
        leaves = [v for values in ([below], before) for part in values for v in part if isinstance(v, Tensor)]
        inputs = [v for v in leaves if v.requires_grad]
        if not pairs or not (inputs or weights):
            return nothing
        outputs, of_outputs = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, [*inputs, *weights], of_outputs, allow_unused=True))
        by_leaf = {id(leaf): next(found) for leaf in inputs}
        for weight, grad in zip(weights, found, strict=True):
            if grad is not None:
                sums.add(weight, grad)
        return [by_leaf.get(id(t)) for t in below], [[by_leaf.get(id(v)) for v in values] for values in before]


def _differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _leaf(tensor: Tensor, needs_grad: bool) -> Tensor:
    return tensor.detach().requires_grad_(needs_grad and _differentiable(tensor))


def _weights(block: Any) -> list[nn.Parameter]:
    return list(block.parameters()) if isinstance(block, nn.Module) else []


def _unique(weights: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those that are trained, each once."""
    return list({id(weight): weight for weight in weights if weight.requires_grad}.values())
