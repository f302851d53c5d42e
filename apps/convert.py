"""`sinuous convert`: an author's checkpoint, read without running anything in it, to safetensors in our names."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from torch import Tensor

import sinuous
from sinuous.core.checkpoints import data_facts, load_state_dict, save_safetensors

SHOWN = 6
"""How many names of a list are printed."""


def main(argv: list[str]) -> int:
    """`sinuous convert IN OUT --model NAME [--prefer KEY] [--half] [--overwrite]`."""
    parser = argparse.ArgumentParser(
        prog="sinuous convert", description="Turn an author's checkpoint into safetensors."
    )
    parser.add_argument("source", type=Path, metavar="IN", help="the author's file (torch or safetensors)")
    parser.add_argument("target", type=Path, metavar="OUT", help="the safetensors file to write")
    parser.add_argument("--model", required=True, metavar="NAME", help="the model it is for; sinuous models lists them")
    parser.add_argument("--half", action="store_true", help="round to half precision (fp16), which halves the file")
    parser.add_argument("--prefer", metavar="KEY", help="the weights to take of several, such as model_ema")
    parser.add_argument("--overwrite", action="store_true", help="write OUT even if it exists")
    options = parser.parse_args(argv)
    if options.target.suffix != ".safetensors":
        raise ValueError(f"OUT must end in .safetensors (got {options.target})")
    if options.target.exists() and not options.overwrite:
        raise ValueError(f"{options.target} exists; give --overwrite or another name")
    theirs = load_state_dict(options.source, options.prefer)
    ours = sinuous.create_model(options.model, checkpoint_path=options.source, prefer=options.prefer).state_dict()
    if options.half:
        ours = {name: _halved(name, tensor) for name, tensor in ours.items()}
    facts = {"data": json.dumps(data_facts(options.source))}
    save_safetensors(ours, options.target, {"model": options.model, "source": options.source.name, **facts})
    numbers = sum(tensor.numel() for tensor in ours.values())
    print(f"{options.target}: {len(ours)} tensors, {numbers:,} numbers, for {options.model}")
    print(f"  under the same name in {options.source.name}: {len(ours.keys() & theirs.keys())}")
    print(f"  renamed or derived: {_listed([name for name in ours if name not in theirs])}")
    print(f"  not needed from {options.source.name}: {_listed([name for name in theirs if name not in ours])}")
    return 0


def _halved(name: str, tensor: Tensor) -> Tensor:
    """`tensor` rounded to fp16, if it holds real numbers."""
    if not tensor.is_floating_point():
        return tensor
    half = tensor.half()
    if (half.isinf() & tensor.isfinite()).any():
        raise ValueError(
            f"{name} has numbers up to {float(tensor.abs().max()):.3g} and half precision ends at 65504; "
            "leave out --half"
        )
    return half


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
    return f"{len(names)} ({shown})" if names else "0"
