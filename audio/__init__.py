"""Sound: models of waveforms and what hears them. Importing this registers the models.

    from sinuous.audio import codec

Names of `__all__` are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

from sinuous.audio import diffusion_models, sashimi, wave_classifier, wavenet

_LAZY = {
    "audio_info": "io",
    "AudioWriter": "io",
    "codec": "codecs",
    "DiffWavePipeline": "diffusion_pipeline",
    "DiffWaveSashimi": "diffwave",
    "DiffWaveWaveNet": "diffwave",
    "generate": "generation",
    "read_audio": "io",
    "resample": "resampling",
    "score": "generation",
    "stream": "generation",
    "write_audio": "io",
}
"""Public names, and the modules that they are in."""

__all__ = ["diffusion_models", "sashimi", "wave_classifier", "wavenet", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
