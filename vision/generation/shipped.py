"""Pipelines in one file: what `load_pipeline` makes of weights that come with the package, and how they are written.

    python -m sinuous.vision.generation.shipped RUN NAME.TAG.safetensors

writes the pipeline of the folder RUN of a training in half precision. The file holds the denoiser or AiM by the names
of its authors, AiM's tokenizer under `vqvae.`, and in its metadata, under `pipeline`, what a pipeline has besides:

    _class_name    ClassConditionalPipeline or AiMPipeline
    id2label       names of the classes
    defaults       arguments of a call, those that the weights were scored with
    scheduler      configuration, with its class, of a denoiser's
    vqvae          configuration, of AiM's

Beside it goes a card, see `sinuous.core.weights`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import diffusers
import torch

from sinuous.core.checkpoints import data_facts, read_metadata, save_safetensors
from sinuous.core.registry import create_model
from sinuous.core.weights import Weights
from sinuous.vision.generation.aim_pipeline import AiMPipeline
from sinuous.vision.generation.pipelines import ClassConditionalPipeline, load_pipeline
from sinuous.vision.generation.tokenizers import PREFIX, load_vq_tokenizer

BACKBONE = "mamba.backbone."
"""Before the names of AiM's parameters in its authors' files."""


def shipped_pipeline(weights: Weights, dtype: torch.dtype | None = None) -> Any:
    """The pipeline of weights that come with the package, in fp32 unless `dtype` is given.

    Raises:
        ValueError: if the file says nothing of a pipeline.
    """
    about = json.loads(read_metadata(weights.file).get("pipeline", "null"))
    if about is None:
        raise ValueError(f"{weights.file} says nothing of a pipeline; write it with {__name__}")
    model = create_model(weights.name, pretrained=True).eval()
    options = {"id2label": about["id2label"], "defaults": about["defaults"]}
    if about["_class_name"] == "AiMPipeline":
        pipeline: Any = AiMPipeline(model, load_vq_tokenizer(weights.file), **options)
    else:
        scheduler = getattr(diffusers, about["scheduler"]["_class_name"]).from_config(about["scheduler"])
        pipeline = ClassConditionalPipeline(model, scheduler, **options)
    return pipeline if dtype is None else pipeline.to(dtype)


def write_pipeline(
    pipeline: Any, path: str | os.PathLike[str], facts: Mapping[str, Any] | None = None, dtype: torch.dtype = torch.half
) -> None:
    """Write a pipeline's parts into one file.

    Args:
        pipeline: a `ClassConditionalPipeline` without a VAE, or an `AiMPipeline`.
        path: of the file.
        facts: of the data, as `sinuous.core.checkpoints.data_facts` reads them.
        dtype: of the numbers in it.

    Raises:
        ValueError: if the pipeline has a VAE.
    """
    about = {"_class_name": type(pipeline).__name__, "id2label": dict(pipeline.config.id2label)}
    about["defaults"] = dict(pipeline.config.defaults)
    state = pipeline.transformer.state_dict()
    if isinstance(pipeline, AiMPipeline):
        about["vqvae"] = _plain(pipeline.vqvae.config)
        state = {f"{BACKBONE}{name}": tensor for name, tensor in state.items()}
        state |= {f"{PREFIX}{name}": tensor for name, tensor in pipeline.vqvae.state_dict().items()}
    elif pipeline.vae is not None:
        raise ValueError("a pipeline with a VAE is more than one file holds; save it to a folder by save_pretrained")
    else:
        about["scheduler"] = {**_plain(pipeline.scheduler.config), "_class_name": type(pipeline.scheduler).__name__}
    rounded = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
    save_safetensors(rounded, path, {"pipeline": json.dumps(about), "data": json.dumps(dict(facts or {}))})


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of diffusers without what it keeps for itself."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the pipeline of a run into one file."""
    parser = argparse.ArgumentParser(description=cast("str", main.__doc__))
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a training")
    parser.add_argument("path", type=Path, metavar="NAME.TAG.safetensors", help="the file to write")
    options = parser.parse_args(argv)
    try:
        pipeline = load_pipeline(options.run / "pipeline")
        write_pipeline(pipeline, options.path, data_facts(options.run / "checkpoints" / "best.safetensors"))
    except (OSError, ValueError) as error:
        print(f"shipped: {error}", file=sys.stderr)
        return 2
    print(f"{options.path}: {options.path.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
