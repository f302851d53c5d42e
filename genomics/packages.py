"""Packages of the extra `genomics`, imported where they are used."""

from __future__ import annotations

from typing import Any

from sinuous.core import extras


def package(module: str) -> Any:
    """Import a module that `sinuous[genomics]` brings; raises as `sinuous.core.extras.package` does."""
    return extras.package(module, "genomics")
