"""Make pictures of a class, and show one of them as it comes out of noise.

sinuous demo generation --class sneaker --n 16 --out grid.png --strip strip.png
sinuous demo generation --model aim_nano --class bag --guidance 1.5
sinuous demo generation --model FOLDER --class 3 --steps 20 --size 32x48

FOLDER is what a pipeline's `save_pretrained` wrote, ours or diffusers', such as the pipeline/ that a training leaves.
"""

from __future__ import annotations

import argparse
import inspect
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sinuous.core.checks import check_range, check_sizes
from sinuous.core.demo_parts import check_output, progress_bar
from sinuous.core.extras import package
from sinuous.core.files import written_whole

MODEL = "lamamba_diff_nano.fashion_mnist"
OUT = Path("sinuous_generated.png")
STEPS = 20
FRAMES = 10
"""Moments that a strip shows."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--class", dest="label", metavar="NAME", help="a class by name or number (default: all in turn)"
    )
    parser.add_argument("--n", type=int, default=16, metavar="N", help="pictures to make")
    parser.add_argument("--out", type=Path, default=OUT, metavar="PNG", help="all of them in rows")
    parser.add_argument("--strip", type=Path, metavar="PNG", help="also the first one, from noise to its end")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; the others count up")
    parser.add_argument("--steps", type=int, help=f"calls of the denoiser (default: as scored, or {STEPS})")
    parser.add_argument(
        "--guidance", type=float, help="scale of the guidance by the class, 1 for none (default: as scored, or 1.5)"
    )
    parser.add_argument("--size", type=size, metavar="HxW", help="of the pictures, in pixels (default: as trained)")
    parser.add_argument(
        "--model", default=MODEL, metavar="NAME", help="a pipeline: weights by name, or a folder (default: %(default)s)"
    )


def size(text: str) -> tuple[int, int]:
    """Read HxW."""
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"must be like 32x48, height first (got {text!r})")
    return int(height), int(width)


def run(options: argparse.Namespace) -> list[Path]:
    """Make the pictures, write them, and print how long they took and the names of the files.

    Returns:
        The files that were written.

    Raises:
        ValueError: for what cannot be made or written, or if there are no weights.
        ModuleNotFoundError: if diffusers is missing.
    """
    check_sizes(**{"--n": options.n, "--steps": STEPS if options.steps is None else options.steps})
    check_range(-(2**62), 2**62, **{"--seed": options.seed})
    check_output("--out", options.out, (".png",), [options.strip])
    check_output("--strip", options.strip, (".png",))
    package("diffusers", "diffusion").utils.logging.disable_progress_bar()
    from sinuous.vision.generation.drawing import save_rows
    from sinuous.vision.generation.pipelines import load_pipeline

    pipeline: Any = load_pipeline(options.model)
    pipeline.set_progress_bar_config(disable=True)
    moments: list[Tensor] = []
    began = time.perf_counter()
    with progress_bar() as tell:
        arguments = arguments_of(pipeline, options, moments, tell)
        pictures = torch.as_tensor(pipeline(labels_of(pipeline, options), **arguments).images)
    seconds = time.perf_counter() - began
    with written_whole(options.out) as out:
        save_rows(pictures, out, math.ceil(math.sqrt(options.n)))
    written = [options.out]
    if options.strip is not None:
        kept = [moments[i] for i in torch.linspace(0, len(moments) - 1, min(FRAMES, len(moments))).round().int()]
        with written_whole(options.strip) as strip:
            save_rows(torch.cat(kept), strip, len(kept))
        written.append(options.strip)
    print(f"{options.n} pictures of {' x '.join(map(str, pictures.shape[-2:]))} pixels in {seconds:.1f} s")
    for path in written:
        print(path)
    return written


def labels_of(pipeline: Any, options: argparse.Namespace) -> list[int | str]:
    """The class of each picture."""
    if options.label is None:
        count = pipeline.num_classes if hasattr(pipeline, "num_classes") else pipeline.transformer.config.num_classes
        return [i % count for i in range(options.n)]
    return [int(options.label) if options.label.isdecimal() else options.label] * options.n


def arguments_of(pipeline: Any, options: argparse.Namespace, moments: list[Tensor], tell: Any) -> dict[str, Any]:
    """Keyword arguments of a call, of those that the pipeline knows.

    Raises:
        ValueError: if a strip or a size is wanted, and it makes none.
    """
    known = inspect.signature(type(pipeline).__call__).parameters
    for flag, wanted, name in (
        ("--strip", options.strip, "callback_on_step_end"),
        ("--size", options.size, "height"),
        ("--steps", options.steps, "num_inference_steps"),
    ):
        if wanted is not None and name not in known:
            raise ValueError(f"{flag} is for denoisers, and this is a {type(pipeline).__name__}; leave it out")

    own = pipeline.config.get("defaults") or {}
    steps = options.steps or own.get("num_inference_steps", STEPS)

    def watch(_: Any, step: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
        tell("steps", step + 1, steps)
        if options.strip is not None:
            moments.append(pipeline._decoded(values["latents"][:1], "pt"))
        return values

    height, width = options.size or (None, None)
    given = {
        "guidance_scale": options.guidance,
        "num_inference_steps": steps,
        "generator": [torch.Generator().manual_seed(options.seed + i) for i in range(options.n)],
        "height": height,
        "width": width,
        "output_type": "pt",
        "callback_on_step_end": watch,
    }
    return {name: value for name, value in given.items() if name in known and value is not None}
