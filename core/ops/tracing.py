"""Ops as an exporter to another format has to see them: by their definitions, in operators that torch itself has.

Inside `definitions()`, a call of `torch.ops.sinuous.<family>` from Python runs the definition of the family, whose loop
over time is one `scan`. torch.export then yields a graph of the size of a single step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from sinuous.core.ops.family import FAMILIES, Family
from sinuous.core.ops.permutations import DEFINITIONS
from sinuous.core.ops.stepwise import as_one_scan


class _Definitions(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        namespace, _, name = str(func).removesuffix(".default").partition(".")
        if namespace == "sinuous" and name in DEFINITIONS:
            return DEFINITIONS[name](*args, **(kwargs or {}))
        if namespace != "sinuous" or name not in FAMILIES:
            return func(*args, **(kwargs or {}))
        return _by_definition(FAMILIES[name], args, kwargs or {})


def _by_definition(family: Family, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    arguments, _ = family.bind(*args, **kwargs)
    if getattr(arguments, "cu_seqlens", None) is not None:
        raise ValueError(f"{family.name}: packed sequences (cu_seqlens) cannot be exported; export a padded batch")
    if family.time_axes > 1:
        raise ValueError(f"{family.name} runs along {family.time_axes} axes and has no single loop to export")
    outputs = (family.traced or family.recurrent)(arguments, **family.options)
    nothing = outputs[0].new_empty(0)
    return tuple(nothing if t is None else t for t in outputs)


@contextmanager
def definitions() -> Iterator[None]:
    """Inside, every op is computed by its definition, visible to tracers, with its loop over time as one scan.

    Raises:
        ValueError: in the call of an op on packed sequences, or of one that runs along two axes of time.
    """
    with as_one_scan(), _Definitions():
        yield
