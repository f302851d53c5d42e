"""Where a pass without activations keeps what the backward pass starts its cells from, in few tensors.

A tensor for each chunk would leave the allocator with many small holes: what belongs together lies in one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


def compact(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it is a part of a larger one that would live on with it."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


class StreamShelf:
    """A stream `[B, T, …]` that comes chunk by chunk, each chunk contiguous.

    Args:
        length: T.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.shape = torch.Size()
        self.tensors: list[Tensor] = []

    def put(self, start: int, chunk: Tensor) -> None:
        """Keep steps from `start` on.

        Raises:
            ValueError: if there are more of them than are left, or chunks differ in more than steps.
        """
        if not self.tensors:
            self.shape = chunk.shape
            self.tensors = [chunk.new_empty(self.length * chunk[:, :1].numel())]
        stop = start + chunk.shape[1]
        if chunk.ndim < 2 or stop > self.length or chunk.shape[2:] != self.shape[2:]:
            raise ValueError(
                f"blocks must return as many steps as they are given (got {list(chunk.shape)} at step {start} of "
                f"{self.length}); run those that do not by themselves"
            )
        self.get(start, stop).copy_(chunk)

    def get(self, start: int, stop: int) -> Tensor:
        per_step = self.tensors[0].numel() // max(self.length, 1)
        part = self.tensors[0].narrow(0, start * per_step, (stop - start) * per_step)
        return part.view(self.shape[0], stop - start, *self.shape[2:])


class LeafShelf:
    """One tensor of a state, as it is at the starts of chunks.

    Tensors of one shape are rows of one buffer. Of one that only grows at the end of an axis the newest holds all the
    others. What changes in another way is kept as it comes.

    Args:
        slots: number of starts.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.tensors: list[Tensor] = []
        self.places: dict[int, tuple[int, ...]] = {}
        """For each start: a tensor; or a tensor and a row; or a tensor, an axis and a length on it."""

    def put(self, slot: int, value: Tensor) -> Tensor:
        """Keep a value; returns it as it is kept, without the larger tensor that it may be a part of."""
        if len(self.tensors) == 1:
            first, kept = next(iter(self.places)), self.tensors[0]
            form = kept.shape[1:] if len(self.places[first]) == 2 else kept.shape
            if form == value.shape and kept.dtype == value.dtype:
                if len(self.places[first]) != 2:
                    self.tensors = [kept.new_empty(self.slots, *value.shape)]
                    self.tensors[0][first].copy_(kept)
                    self.places = {first: (0, first)}
                self.tensors[0][slot].copy_(value)
                self.places[slot] = (0, slot)
                return self.tensors[0][slot]
            axis = None if len(self.places[first]) == 2 else _grown(kept, value)
            if axis is not None and all(len(place) == 1 or place[1] == axis for place in self.places.values()):
                self.places[max(self.places)] = (0, axis, kept.shape[axis])
                self.tensors, self.places[slot] = [value], (0,)
                return value
        self.places[slot] = (len(self.tensors),)
        self.tensors.append(compact(value))
        return self.tensors[-1]

    def get(self, slot: int) -> Tensor:
        index, *rest = self.places[slot]
        tensor = self.tensors[index]
        if not rest:
            return tensor
        return tensor[rest[0]] if len(rest) == 1 else tensor.narrow(rest[0], 0, rest[1])


def _grown(old: Tensor, new: Tensor) -> int | None:
    """The axis at whose end `new` has more than `old`, all else being equal; None if there is none."""
    if old.ndim != new.ndim or old.dtype != new.dtype:
        return None
    longer = [axis for axis in range(old.ndim) if old.shape[axis] != new.shape[axis]]
    if len(longer) != 1 or new.shape[longer[0]] < old.shape[longer[0]]:
        return None
    return longer[0] if torch.equal(new.narrow(longer[0], 0, old.shape[longer[0]]), old) else None


class StateShelf:
    """The state of one block, any pytree, at the starts of chunks.

    Args:
        slots: number of starts.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.forms: dict[int, TreeSpec] = {}
        self.others: dict[int, dict[int, Any]] = {}
        """What is no tensor, by start and place."""
        self.leaves: list[LeafShelf] = []

    def put(self, slot: int, state: Any) -> Any:
        """Keep a state; returns it as it is kept."""
        values, self.forms[slot] = tree_flatten(state)
        self.leaves += [LeafShelf(self.slots) for _ in range(len(values) - len(self.leaves))]
        self.others[slot] = {k: value for k, value in enumerate(values) if not isinstance(value, Tensor)}
        kept = [
            shelf.put(slot, value) if isinstance(value, Tensor) else value
            for shelf, value in zip(self.leaves, values, strict=False)
        ]
        return tree_unflatten(kept, self.forms[slot])

    def get(self, slot: int) -> tuple[list[Any], TreeSpec]:
        """The leaves of a state, and its form."""
        form, others = self.forms[slot], self.others[slot]
        return [others[k] if k in others else self.leaves[k].get(slot) for k in range(form.num_leaves)], form
