"""Checks of options that are numbers, names or flags; those of tensors are in `sinuous.core.ops.checks`.

Each error names the option, what it must be, and what it is.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import operator
import reprlib
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
Result = TypeVar("Result")


def described(value: object) -> str:
    """Describe a value that was given where another kind was asked for, in a few words whatever its size."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {list(value.shape)}"
    if value is None or isinstance(value, Real):
        return str(value)
    shape = getattr(value, "shape", None)
    text = f"shape {list(shape)}" if isinstance(shape, tuple) else reprlib.repr(value)
    return f"{text} of type {type(value).__name__}"


def check_sizes(**sizes: int) -> None:
    """Refuse sizes, counts and widths that are no whole numbers or less than 1.

    Raises:
        ValueError: naming the first of them.
    """
    for name, size in sizes.items():
        if not is_whole(size):
            raise ValueError(f"{name} must be a whole number (got {described(size)}); give 1 or more")
        if size < 1:
            raise ValueError(f"{name} must be at least 1 (got {size})")


def check_range(low: float, high: float, **numbers: float | None) -> None:
    """Refuse numbers that do not lie between `low` and `high`, both allowed, or that are NaN; `None` passes.

    Raises:
        ValueError: naming the first of them.
    """
    for name, number in numbers.items():
        if number is None:
            continue
        if not is_number(number):
            raise ValueError(f"{name} must be a number (got {described(number)})")
        if not low <= float(number) <= high:
            bounds = f"be {low:g} or more" if high == math.inf else f"lie between {low:g} and {high:g}"
            raise ValueError(f"{name} must {bounds} (got {number})")


def check_positive(**numbers: float | None) -> None:
    """Refuse numbers that are not above 0 and finite; `None` passes.

    Raises:
        ValueError: naming the first of them.
    """
    for name, number in numbers.items():
        if number is not None and not (is_number(number) and 0 < number < math.inf):
            raise ValueError(f"{name} must be more than 0 and finite (got {described(number)})")


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Refuse a value of the option `name` that is not among `choices`.

    Raises:
        ValueError: listing the choices.
    """
    if not isinstance(value, str) or value not in choices:
        quoted = [repr(choice) for choice in choices]
        listed = " or ".join(quoted) if len(quoted) < 3 else f"one of {', '.join(quoted)}"
        raise ValueError(f"{name} must be {listed} (got {reprlib.repr(value)})")


def check_near(name: str, value: str, choices: Collection[str]) -> None:
    """Refuse a value of the option `name` that is not among `choices`, where they are many or easily misspelt.

    Raises:
        ValueError: naming the nearest, or listing the choices where none is near.
    """
    if isinstance(value, str) and value not in choices:
        near = difflib.get_close_matches(value, choices, n=3, cutoff=0.5)
        if near:
            raise ValueError(f"there is no {name} {reprlib.repr(value)}; did you mean {' or '.join(map(repr, near))}?")
    check_choice(name, value, choices)


def check_place(block_index: int, num_blocks: int) -> None:
    """Refuse a place in depth that a model of `num_blocks` blocks does not have.

    Raises:
        ValueError: if `block_index` does not lie in [0, num_blocks).
    """
    if not 0 <= block_index < num_blocks:
        raise ValueError(f"block_index must be one of the {num_blocks} blocks, from 0 (got {block_index})")


@torch.fx.wrap
def check_grid(grid: list[int], length: int, cu_seqlens: Tensor | None, axes: int = 0) -> None:
    """Refuse a grid that the tokens do not fill.

    A leaf for FX, whose traced sizes cannot be compared; so callers write `checks.check_grid(...)`.

    Args:
        grid: sides, whose product must be `length`.
        length: number of tokens.
        cu_seqlens: boundaries of packed sequences, which have no grid.
        axes: how many sides there must be; 0 for any number.

    Raises:
        ValueError: if one of these does not hold.
    """
    if cu_seqlens is not None:
        raise ValueError("packed sequences (cu_seqlens) are rows and have no grid; leave one of the two out")
    if axes > 0 and len(grid) != axes:
        sides = " x ".join([str(side) for side in grid])
        raise ValueError(f"grid must have {axes} sides for this mixer (got {sides}); choose one that reads more axes")
    cells = 1
    for side in grid:
        cells = cells * side
    if cells != length:
        sides = " x ".join([str(side) for side in grid])
        raise ValueError(f"grid must have as many cells as there are tokens, {length} (got {sides})")


def check_types(hints: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Refuse values of another kind than they are annotated with.

    Numbers of NumPy pass for Python's, whole ones for floats, any sequence for a tuple or a list; NaN is no number.
    Annotations that are neither numbers, flags, words, dtypes nor collections of them are not looked at.

    Raises:
        ValueError: naming the first of them, with what it must be.
    """
    for name, value in values.items():
        if name in hints and not _fits(value, hints[name]):
            raise ValueError(f"{name} must be {_kind(hints[name])} (got {described(value)})")


def check_arguments(function: Callable[P, Result]) -> Callable[P, Result]:
    """Decorate a constructor: its arguments are checked against its annotations ahead of the call.

    Arguments that it does not have stay a TypeError.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> Result:
        try:
            arguments = signature.bind(*args, **kwargs).arguments
        except TypeError:  # told better by the call itself
            return function(*args, **kwargs)
        check_types(_hints(function), arguments)
        return function(*args, **kwargs)

    return checked


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    try:
        hints = typing.get_type_hints(function)
    except NameError:  # names that a stranger's module imports for the type checker alone
        return {}
    return {p.name: hints[p.name] for p in parameters if p.name in hints and p.kind not in several}


def is_whole(value: object) -> bool:
    """Whether it is a whole number and no flag."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a real number, infinite ones included, and neither NaN nor a flag."""
    return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)


_SIMPLE: dict[Any, tuple[Callable[[object], bool], str]] = {
    int: (is_whole, "a whole number"),
    float: (is_number, "a number"),
    bool: (lambda value: isinstance(value, bool), "True or False"),
    str: (lambda value: isinstance(value, str), "a word"),
    type(None): (lambda value: value is None, "None"),
    torch.dtype: (lambda value: isinstance(value, torch.dtype), "a torch.dtype such as torch.float32"),
}


def _fits(value: Any, hint: Any) -> bool:
    if hint in _SIMPLE:
        return _SIMPLE[hint][0](value)
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if hint in _MAPPINGS or origin in _MAPPINGS:
        pairs = value.items() if isinstance(value, Mapping) else ()
        return isinstance(value, Mapping) and all(_fits(k, parts[0]) and _fits(v, parts[1]) for k, v in pairs if parts)
    if hint in _SEQUENCES or origin in _SEQUENCES:
        if not isinstance(value, Sequence) or isinstance(value, str):
            return False
        if origin is tuple and parts[-1:] != (...,):
            return len(value) == len(parts) and all(map(_fits, value, parts))
        return all(_fits(item, parts[0]) for item in value if parts)
    return True


_MAPPINGS = (dict, Mapping)
_SEQUENCES = (tuple, list, Sequence)


def _kind(hint: Any) -> str:
    """Say in words what a value must be."""
    if hint in _SIMPLE:
        return _SIMPLE[hint][1]
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_kind, parts)))
    if hint in _MAPPINGS or origin in _MAPPINGS:
        return "a dictionary" + (f", {_kind(parts[0])} to {_kind(parts[1])}" if parts and parts[1] is not Any else "")
    if origin is tuple and parts[-1:] != (...,):
        return f"{len(parts)} values in a row, each {_kind(parts[0])}"
    if hint in _SEQUENCES or origin in _SEQUENCES:
        return "a list" + (f", each of it {_kind(parts[0])}" if parts else "")
    return getattr(hint, "__name__", str(hint))


def check_indices(blocks: int, indices: int | list[int] | None, name: str = "blocks") -> tuple[list[int], int]:
    """Blocks that `indices` stands for among so many, as timm reads it, and the last of them.

    Raises:
        ValueError: if there are no such blocks, calling them `name`.
    """
    from timm.models._features import feature_take_indices

    try:
        taken, last = feature_take_indices(blocks, indices)
        taken = [operator.index(block) for block in taken]
    except (AssertionError, TypeError) as error:
        raise ValueError(
            f"indices must be {name} from {-blocks} to {blocks - 1}, or how many of the last of {blocks} "
            f"(got {described(indices)})"
        ) from error
    return taken, last
