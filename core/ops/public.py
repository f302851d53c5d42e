"""Public functions of ops, guarded: an argument of another kind than its annotation is refused in a sentence.

torch would refuse it too, in the words of an operator's schema and with the whole value printed, and takes some of it
in silence: None for a bool, a tensor with a gradient for a number.
"""

from __future__ import annotations

import functools
import math
import numbers
import typing
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from sinuous.core.ops.family import FAMILIES

P = ParamSpec("P")
R = TypeVar("R")


def described(value: Any) -> str:
    """A few words for a value of any kind and size."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}"
    if value is None or isinstance(value, (bool, int, float, complex, str)):
        text = repr(value)
        return text if len(text) <= 40 else f"{text[:37]}…"
    if isinstance(value, (list, tuple, dict)):
        return f"a {type(value).__name__} of length {len(value)}"
    return f"a {type(value).__module__}.{type(value).__qualname__}".replace("builtins.", "")


def _stands_for_a_tensor(value: Any) -> bool:
    return hasattr(type(value), "__torch_function__")  # as the proxies of torch.fx do


def check_tensor(name: str, value: Any) -> None:
    """Refuse what is not a dense tensor."""
    if not isinstance(value, Tensor):
        if _stands_for_a_tensor(value):
            return
        arrays = isinstance(value, list) or hasattr(value, "__array__")
        remedy = f"pass torch.as_tensor({name})" if arrays and not isinstance(value, type) else "pass a torch.Tensor"
        raise ValueError(f"{name} must be a tensor (got {described(value)}); {remedy}")
    if value.layout is not torch.strided or value.is_nested:
        layout = "a nested tensor" if value.is_nested else str(value.layout)
        remedy = "concatenate its parts and pass cu_seqlens" if value.is_nested else f"pass {name}.to_dense()"
        raise ValueError(f"{name} must be a dense tensor (got {layout}); {remedy}")


def check_switch(name: str, value: Any) -> None:
    """Refuse what is not a bool."""
    if not (isinstance(value, (bool, torch.SymBool)) or type(value).__name__ == "bool"):  # NumPy's has that name, too
        raise ValueError(f"{name} must be True or False (got {described(value)})")


def check_number(name: str, value: Any) -> None:
    """Refuse what is not a finite real number."""
    if isinstance(value, (torch.SymFloat, torch.SymInt)):
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        remedy = f"; pass {name}.item(), which has no gradient" if isinstance(value, Tensor) else ""
        raise ValueError(f"{name} must be a finite number (got {described(value)}){remedy}")


def check_word(name: str, value: Any) -> None:
    """Refuse what is not a word; which one it may be is for the op to say."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be the name of a choice (got {described(value)})")


def check_integers(name: str, value: Any) -> None:
    """Refuse what is not a list of integers."""
    integers = isinstance(value, Sequence) and all(isinstance(n, (int, torch.SymInt)) for n in value)
    if not integers or isinstance(value, str):
        raise ValueError(f"{name} must be a list of integers (got {described(value)})")


def _check_state(parts: Sequence[str]) -> Callable[[str, Any], None]:
    wanted = f"({', '.join(parts)})"

    def check(name: str, value: Any) -> None:
        parted = isinstance(value, (tuple, list))
        if not parted or len(value) != len(parts):
            found = f"{len(value)} parts" if parted else described(value)
            raise ValueError(f"{name} must be {wanted} (got {found}); all parts travel together")
        for n, part in enumerate(value):
            check_tensor(f"{name}[{n}]", part)

    return check


_CHECKS: dict[Any, Callable[[str, Any], None]] = {
    Tensor: check_tensor,
    bool: check_switch,
    float: check_number,
    str: check_word,
    Sequence[int]: check_integers,
}

_UNKNOWN = (lambda name, value: None, True)  # Python itself refuses an argument that there is not


def _check_of(annotation: Any, state: Sequence[str]) -> tuple[Callable[[str, Any], None], bool]:
    """The check of an annotated argument, and whether it may be None."""
    members = typing.get_args(annotation)
    optional = NoneType in members
    if optional:
        (annotation,) = (member for member in members if member is not NoneType)
    return _check_state(state) if typing.get_origin(annotation) is tuple else _CHECKS[annotation], optional


def public(function: Callable[P, R]) -> Callable[P, R]:
    """Let the public function of a family refuse arguments of another kind than its annotations say.

    Raises (by the returned function):
        ValueError: naming the argument, what it must be, and what it is.
    """
    hints = typing.get_type_hints(function)
    state = [name.removeprefix("final_") for name in FAMILIES[function.__name__].outputs[1:]]
    checks = {name: _check_of(hint, state) for name, hint in hints.items() if name != "return"}
    in_order = list(checks.items())

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        for (name, (check, optional)), value in zip(in_order, args, strict=False):
            if value is not None or not optional:
                check(name, value)
        for name, value in kwargs.items():
            check, optional = checks.get(name, _UNKNOWN)
            if value is not None or not optional:
                check(name, value)
        return function(*args, **kwargs)

    return guarded
