"""Packages whose names are loaded on first use, so that importing them stays quick.

_LAZY = {"read_audio": "io"}
__all__ = list(_LAZY)
__getattr__, __dir__ = lazily(__name__, _LAZY)
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from sinuous.core import extras


def lazily(
    package: str, modules: Mapping[str, str], needs: Mapping[str, tuple[str, str]] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    Args:
        package: its name.
        modules: public names, and the modules below the package that they are in.
        needs: of modules that cannot be imported without it, a package and the extra that brings it.
    """

    def load(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if needs is not None and modules[name] in needs:
            extras.package(*needs[modules[name]])
        value = getattr(importlib.import_module(f"{package}.{modules[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return load, names
