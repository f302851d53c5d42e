"""Bytes of tensors that a call has alive at its peak, counted storage by storage."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_memory(call: Callable[[], Any]) -> int:
    """Bytes of the storages that are alive at the peak of `call()`, beyond those that were before.

    Each storage that an operation returns is counted from then until it is freed; views cost nothing. What an operation
    allocates and frees inside itself is not seen, nor is what the allocator keeps: this is the memory that the graph of
    a computation asks for, the same on every machine.

    Returns:
        Bytes.
    """
    live = LiveStorages()
    with live:
        result = call()
        del result
    return live.peak


class LiveStorages(TorchDispatchMode):
    """Counts the storages made inside the `with` block: `now`, and `peak`, their most at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.now: int = 0
        self.peak: int = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)
