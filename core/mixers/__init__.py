"""Token mixers by name: `build_mixer(name, dim)`, `list_mixers()`."""

from __future__ import annotations

from sinuous.core.mixers.bidirectional import Bidirectional
from sinuous.core.mixers.contract import (
    Mixer,
    build_mixer,
    list_mixers,
    mixer_class,
    mixer_options,
    register_mixer,
    register_state,
)
from sinuous.core.mixers.mamba import Mamba, MambaState
from sinuous.core.mixers.vim_pair import VimPair

__all__ = [
    "Bidirectional",
    "Mamba",
    "MambaState",
    "Mixer",
    "VimPair",
    "build_mixer",
    "list_mixers",
    "mixer_class",
    "mixer_options",
    "register_mixer",
    "register_state",
]
