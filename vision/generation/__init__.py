"""Image generation: denoisers and a model of codes, with diffusers' pipelines. Importing this registers the models.

    from sinuous.vision.generation import ClassConditionalPipeline, LaMambaDiff

Names of `__all__` are loaded on first use, and diffusers with them.
"""

from __future__ import annotations

from sinuous.core.lazy import lazily
from sinuous.vision.generation import models

_LAZY = {
    "AiM": "aim",
    "AiMPipeline": "aim_pipeline",
    "ClassConditionalPipeline": "pipelines",
    "LaMambaDiff": "lamamba_diff",
    "denoising_loss": "objectives",
    "load_pipeline": "pipelines",
    "load_vq_tokenizer": "tokenizers",
    "score": "scores",
}
"""Public names, and the modules that they are in."""

_NEEDS = {
    **dict.fromkeys(_LAZY.values(), ("diffusers", "diffusion")),
    **dict.fromkeys(("objectives", "scores"), ("torchmetrics", "train")),
}

__all__ = ["models", *_LAZY]
__getattr__, __dir__ = lazily(__name__, _LAZY, _NEEDS)
