"""`sinuous export`: a model with its weights as an ONNX file, checked against the model by onnxruntime."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import sinuous
from sinuous.core.onnx import export, export_step

KEPT = ("architecture", "tag", "input_size", "mean", "std", "interpolation", "crop_pct", "label_names", "license")
"""What the file says of its model, as JSON under the name "sinuous"."""


def main(argv: list[str]) -> int:
    """`sinuous export MODEL OUT [--checkpoint FILE] [--overwrite]`."""
    parser = argparse.ArgumentParser(
        prog="sinuous export",
        description="Write a model as ONNX: one step of a causal model of sequences, the forward pass of any other. "
        "The size of the batch is free.",
    )
    parser.add_argument("model", metavar="MODEL", help="NAME.TAG, a folder of sinuous.save, or one on the hub")
    parser.add_argument("target", type=Path, metavar="OUT", help="the .onnx file to write")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights for NAME: of a run, or the authors'")
    parser.add_argument("--overwrite", action="store_true", help="write OUT even if it exists")
    options = parser.parse_args(argv)
    if options.target.suffix != ".onnx":
        raise ValueError(f"OUT must end in .onnx (got {options.target})")
    if options.target.exists() and not options.overwrite:
        raise ValueError(f"{options.target} exists; give --overwrite or another name")
    model: Any = (
        sinuous.load(options.model)
        if options.checkpoint is None
        else sinuous.create_model(options.model, checkpoint_path=options.checkpoint)
    )
    metadata = {"sinuous": json.dumps({key: model.pretrained_cfg[key] for key in KEPT if key in model.pretrained_cfg})}
    size, vocabulary = model.pretrained_cfg.get("input_size"), getattr(model, "vocab_size", None)
    if vocabulary and getattr(model, "causal", False):
        difference = export_step(model, torch.arange(2) % vocabulary, options.target, metadata=metadata)
        reads = "one step of ids [batch] and a state"
    elif size:
        example = torch.randint(vocabulary, (2, *size)) if vocabulary else torch.randn(2, *size)
        difference = export(model, example, options.target, metadata=metadata)
        reads = f"{'ids' if vocabulary else 'values'} [batch, {', '.join(map(str, size))}]"
    else:
        raise ValueError(
            f"nothing says how large an input {options.model} reads; call sinuous.core.onnx.export with an example"
        )
    print(
        f"{options.target}: {reads}, {options.target.stat().st_size / 1e6:.1f} MB; "
        f"onnxruntime's outputs differ from the model's by {difference:.0e} of the largest"
    )
    return 0
