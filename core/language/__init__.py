"""Language: models of tokens and bytes, and text to train them on. Importing this registers the models."""

from __future__ import annotations

from sinuous.core.language import models

__all__ = ["models"]
