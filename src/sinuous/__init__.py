"""sinuous: recurrent backbones for sequences that are too long for attention.

Importing the package imports no torch; `create_model`, `list_models`, `load`, `save`, `model_info`, `backend`, `nn`
and `ops` load what they need on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "create_model": "sinuous.core.registry",
    "list_models": "sinuous.core.registry",
    "load": "sinuous.core.hub",
    "save": "sinuous.core.hub",
    "model_info": "sinuous.core.registry",
    "backend": "sinuous.core.ops.dispatch",
    "nn": "sinuous.nn",
    "ops": "sinuous.ops",
}

__all__ = ["__version__", *_LAZY]

if TYPE_CHECKING:
    from sinuous import nn as nn
    from sinuous import ops as ops
    from sinuous.core.hub import load as load
    from sinuous.core.hub import save as save
    from sinuous.core.ops.dispatch import backend as backend
    from sinuous.core.registry import create_model as create_model
    from sinuous.core.registry import list_models as list_models
    from sinuous.core.registry import model_info as model_info


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'sinuous' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    value = module if name in ("nn", "ops") else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
