"""Clips: backbones, films read exactly, and data with a time axis. Importing this registers the models.

    from sinuous.video import read_frames

Names of `__all__` are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

from sinuous.video import videomamba

_LAZY = {
    "MovingClips": "datasets",
    "NeedleInVideo": "datasets",
    "clip_info": "io",
    "read_frames": "io",
    "scene_cuts": "scenes",
    "stream_frames": "io",
    "stream_scene_cuts": "scenes",
}
"""Public names, and the modules that they are in."""

__all__ = ["videomamba", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
