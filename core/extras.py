"""Packages of the extras, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any


def package(module: str, extra: str) -> Any:
    """Import a module that `sinuous[extra]` brings.

    Raises:
        ModuleNotFoundError: if it is not installed, with the command that installs it.
        ImportError: if it is installed and cannot be loaded, as when it was built for another torch.
    """
    name = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != name:
            raise
        message = f"this needs {error.name}, which is not installed: pip install 'sinuous[{extra}]'"
        raise ModuleNotFoundError(message, name=error.name) from error
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        message = f"{name} is installed and does not load ({reason}): pip install --upgrade 'sinuous[{extra}]'"
        raise ImportError(message, name=name) from error
