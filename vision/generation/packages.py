"""diffusers, which `sinuous[diffusion]` brings."""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("diffusers") is None:
    raise ModuleNotFoundError(
        "this needs diffusers, which is not installed: pip install 'sinuous[diffusion]'", name="diffusers"
    )
