"""Clips: backbones, films read exactly, and data with a time axis. Importing this registers the models.

    from sinuous.video import read_frames

Names of `__all__` are loaded on first use.
"""

from __future__ import annotations

from sinuous.core.lazy import lazily
from sinuous.video import frame_reader, ma2mba, videomamba

_LAZY = {
    "MovingClips": "datasets",
    "NeedleFrames": "datasets",
    "NeedleInVideo": "datasets",
    "clip_info": "io",
    "read_frames": "io",
    "scene_cuts": "scenes",
    "stream_frames": "io",
    "stream_scene_cuts": "scenes",
}
"""Public names, and the modules that they are in."""

__all__ = ["frame_reader", "ma2mba", "videomamba", *_LAZY]
__getattr__, __dir__ = lazily(__name__, _LAZY)
