"""Image generation: denoisers and a model of codes, with diffusers' pipelines. Importing this registers the models.

    from sinuous.vision.generation import ClassConditionalPipeline, LaMambaDiff

Names of `__all__` are loaded on first use, and diffusers with them.
"""

from __future__ import annotations

import importlib
from typing import Any

from sinuous.vision.generation import models

_LAZY = {
    "AiM": "aim",
    "AiMPipeline": "aim_pipeline",
    "ClassConditionalPipeline": "pipelines",
    "LaMambaDiff": "lamamba_diff",
    "load_pipeline": "pipelines",
    "load_vq_tokenizer": "tokenizers",
}
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
