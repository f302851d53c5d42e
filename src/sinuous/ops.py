"""Recurrences as functions of tensors; see `sinuous.core.ops`."""

from __future__ import annotations

from sinuous.core.ops import *  # noqa: F403
from sinuous.core.ops import __all__ as __all__
