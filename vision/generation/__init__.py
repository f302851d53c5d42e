"""Image generation: denoisers that diffusers runs. Importing this registers the models.

    from sinuous.vision.generation import LaMambaDiff

Names of `__all__` are loaded on first use, and diffusers with them.
"""

from __future__ import annotations

import importlib
from typing import Any

from sinuous.vision.generation import models

_LAZY = {"LaMambaDiff": "lamamba_diff"}
"""Public names, and the modules that they are in."""

__all__ = ["models", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
