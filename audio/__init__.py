"""Sound: models of waveforms and what hears them. Importing this registers the models.

    from sinuous.audio import codec

Names of `__all__` are loaded on first use.
"""

from __future__ import annotations

from sinuous.audio import diffusion_models, sashimi, wave_classifier, wavenet
from sinuous.core.lazy import lazily

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
__getattr__, __dir__ = lazily(
    __name__, _LAZY, dict.fromkeys(("diffusion_pipeline", "diffwave"), ("diffusers", "diffusion"))
)
