"""Images: backbones, datasets and what to do with them. Importing this registers the backbones, in timm too."""

from __future__ import annotations

from sinuous.vision import vim

__all__ = ["vim"]
