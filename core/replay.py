"""Running a part of a model once more as it ran before: random numbers, stochastic depth, precision, backends."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.layers import DropPath
from timm.layers.drop import drop_path
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from sinuous.core.ops.dispatch import wishes, wishing


class Surroundings:
    """What a cell must find again when it is recomputed: random numbers, precision, and the choice of backends.

    Stochastic depth leaves out a block for the whole of a sequence: the first chunk draws, those after it follow.
    """

    def __init__(self, x: Tensor, groups: Sequence[Sequence[Any]]) -> None:
        self.at = torch.empty(0, device=x.device)
        self.random: dict[tuple[int, int], tuple[Tensor, list[int], list[Tensor]]] = {}
        self.masks: dict[tuple[int, nn.Module], list[Tensor]] = {}
        self.droppers = [_droppers(group) for group in groups]
        kinds = [kind for kind in dict.fromkeys((x.device.type, "cpu")) if torch.amp.is_autocast_available(kind)]
        self.dtypes = {k: torch.get_autocast_dtype(k) if torch.is_autocast_enabled(k) else None for k in kinds}
        self.wishes = wishes()

    @contextlib.contextmanager
    def first_time(self, j: int, i: int) -> Iterator[None]:
        """Where cell (j, i) runs without activations; where it draws random numbers, they can be drawn again."""
        before = self._generators()
        with self.again(None), self._dropping(j, i, recording=True):
            yield
        after = self._generators()
        if not all(map(torch.equal, [before[0], *before[2]], [after[0], *after[2]])):
            self.random[j, i] = before

    @contextlib.contextmanager
    def again(self, place: tuple[int, int] | None) -> Iterator[None]:
        """Where a cell is recomputed, or a loss computed. The cache of weights in half precision is off: it would hand
        copies that were made without gradients to the pass that needs them."""
        with contextlib.ExitStack() as stack:
            for kind, dtype in self.dtypes.items():
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=dtype is not None, cache_enabled=False))
            stack.enter_context(wishing(self.wishes))
            if place is not None:
                if place in self.random:
                    cpu, devices, states = self.random[place]
                    stack.enter_context(torch.random.fork_rng(devices, device_type=self.at.device.type))
                    torch.set_rng_state(cpu)
                    set_device_states(devices, states, device_type=self.at.device.type)
                stack.enter_context(self._dropping(*place, recording=False))
            yield

    def _generators(self) -> tuple[Tensor, list[int], list[Tensor]]:
        return torch.get_rng_state(), *get_device_states(self.at)

    @contextlib.contextmanager
    def _dropping(self, j: int, i: int, recording: bool) -> Iterator[None]:
        for module in self.droppers[j]:
            masks = self.masks.setdefault((j, module), [])
            if i > 0:
                module.forward = functools.partial(_follow, iter(masks))  # type: ignore[method-assign]
            else:
                module.forward = functools.partial(_draw, module, masks if recording else [])  # type: ignore[method-assign]
        try:
            yield
        finally:
            for module in self.droppers[j]:
                del module.forward


def _droppers(blocks: Sequence[Any]) -> list[DropPath]:
    modules = [module for block in blocks if isinstance(block, nn.Module) for module in block.modules()]
    active = [m for m in modules if isinstance(m, DropPath) and m.training and m.drop_prob > 0]
    return list(dict.fromkeys(active))


def _draw(module: DropPath, masks: list[Tensor], x: Tensor) -> Tensor:
    ones = x.new_ones(x.shape[0], *[1] * (x.ndim - 1))
    masks.append(drop_path(ones, module.drop_prob, True, module.scale_by_keep))
    return x * masks[-1]


def _follow(masks: Iterator[Tensor], x: Tensor) -> Tensor:
    return x * next(masks).to(x.dtype)
