"""Choice of the backend that computes an op: `triton` on a GPU, `cpu` (C) or `torch` elsewhere, or `recurrent`.

The choice is made inside the op's body, so that it also holds for compiled and exported graphs. In order of strength:
the `backend=` argument, the `sinuous.backend(...)` context manager, the `SINUOUS_BACKEND` environment variable, and
the fastest backend that can run. An argument that cannot be met is an error; a context or variable is a wish, and an
op that cannot follow it says so once and takes the fastest.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch

from sinuous.core.checks import check_choice

PREFERENCE = ("triton", "cpu", "torch", "recurrent")

_warned: set[str] = set()


@dataclass(frozen=True, eq=False)
class _Wish:
    name: str


# torch hands its thread-local state to the threads that it starts for a backward pass. They see no ContextVar.
_KEY = "sinuous.backend"


def wishes() -> tuple[_Wish, ...]:
    """What this thread wishes for, the newest last."""
    held: tuple[_Wish, ...] = torch._C._get_obj_in_tls(_KEY) if torch._C._is_key_in_tls(_KEY) else ()
    return held


@contextmanager
def wishing(for_these: tuple[_Wish, ...]) -> Iterator[None]:
    """Let this thread have other wishes inside the `with` block."""
    before = wishes()
    torch._C._stash_obj_in_tls(_KEY, for_these)
    try:
        yield
    finally:
        torch._C._stash_obj_in_tls(_KEY, before)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Prefer backend `name` (`recurrent`, `torch`, `cpu` or `triton`) for all ops inside the `with` block.

    The preference is this thread's; a thread that is started inside the block has none. The backward pass of an op
    follows the preference that held in its forward pass, on whatever thread it runs; that of a compiled function
    follows the one that holds where it is called. Put the block around the call of a compiled function, not inside it.

    Raises:
        ValueError: if there is no such backend.
    """
    check_choice("backend", name, PREFERENCE)
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break(msg="sinuous.backend holds for calls of a compiled function: put it around the call")
    wish = _Wish(name)
    torch._C._stash_obj_in_tls(_KEY, (*wishes(), wish))
    try:
        yield
    finally:  # blocks need not end in the order in which they began
        torch._C._stash_obj_in_tls(_KEY, tuple(other for other in wishes() if other is not wish))


def warn_once(message: str) -> None:
    """Issue `message` as a RuntimeWarning the first time it is seen in this process."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def unavailable(family: str, forms: tuple[str, ...], name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why backend `name` cannot compute `family` on `device` with `dtype`; None if it can."""
    if name not in forms:
        return f"{family} has no {name} form (it has {', '.join(forms)})"
    if name == "recurrent":
        return None
    try:
        package = importlib.import_module(f"sinuous.kernels.{name}")
    except ImportError as error:
        return str(error)
    reason: str | None = package.unavailable(device, dtype)
    return reason


def choose(family: str, forms: tuple[str, ...], requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """Name the backend that computes `family`; `requested` is empty where the caller has no wish.

    Raises:
        ValueError: if `requested` is no backend or cannot run here.
    """
    if requested:
        check_choice("backend", requested, PREFERENCE)
        reason = unavailable(family, forms, requested, device, dtype)
        if reason is not None:
            raise ValueError(f"backend {requested!r} cannot compute {family} here: {reason}")
        return requested
    held = wishes()
    wish = held[-1].name if held else os.environ.get("SINUOUS_BACKEND", "")
    if wish:
        check_choice("SINUOUS_BACKEND", wish, PREFERENCE)
        reason = unavailable(family, forms, wish, device, dtype)
        if reason is None:
            return wish
        warn_once(f"{family} does not follow the wish for backend {wish!r}: {reason}")
    for name in PREFERENCE:
        if name in forms and unavailable(family, forms, name, device, dtype) is None:
            return name
    raise RuntimeError(f"no backend can compute {family} on {device} with {dtype}")


def kernel(family: str, name: str) -> ModuleType:
    """Import the module with the `forward` and `backward` functions of `family` for backend `name`."""
    return importlib.import_module(f"sinuous.kernels.{name}.{family}")
