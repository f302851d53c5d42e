"""Packages of the extra `genomics`, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any


def package(module: str) -> Any:
    """Import a module that `sinuous[genomics]` brings.

    Raises:
        ModuleNotFoundError: if it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        message = f"this needs {error.name}, which is not installed: pip install 'sinuous[genomics]'"
        raise ModuleNotFoundError(message, name=error.name) from error
