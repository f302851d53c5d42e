"""Samples a second of models of sound, by the engine in C, by torch and without a state; and training them."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinuous.audio.lowering import NotLowered, lower
from sinuous.core.bench import measure
from sinuous.core.bench.options import add_machine, add_outputs, positive_integers
from sinuous.core.checks import check_choice
from sinuous.core.modes import stepping
from sinuous.core.registry import create_model, list_models
from sinuous.core.sampling import Sampling
from sinuous.core.tables import Row, command, show, write_csv, write_markdown

METHOD = """Models have random weights, since speed does not depend on them, and draw at temperature 1. Engine `c` makes
{samples} samples a clip in one call, engine `torch` {steps} steps of a model whose systems are discretised once, and
`recomputation` calls `forward` on the last {context} codes for each sample. Samples of all clips are counted together,
and figures are medians of {repeats} runs by the {clock} clock. Real time is 16,000 samples a second and clip; ratios
are over the torch engine at as many clips, and over one clip by the same engine."""
TRAINING = """Training is forward and backward of the loss of the next code of one clip, {repeats} times; the peak is
what this needs beyond weights and codes, in a fresh process."""

RATE = 16000
COLUMNS = ("model", "parameters", "clips", "engine", "samples_per_s", "real_time", "over_torch", "over_one_clip")
TRAINING_COLUMNS = ("length", "layers", "mixer", "seconds", "samples_per_s", "peak_mb", "bytes_per_sample")
MODELS = "sashimi_2l,sashimi_4l,sashimi_8l,sashimi_nano,wavenet_4m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", default=MODELS, help="causal models of codes of sinuous.audio")
    parser.add_argument("--clips", default="1,8", help="comma-separated numbers of clips that are drawn together")
    parser.add_argument("--samples", type=int, default=RATE, help="samples of each clip by the engine in C")
    parser.add_argument("--steps", type=int, default=200, help="samples of each clip by torch")
    parser.add_argument("--context", type=int, default=4096, help="codes that recomputation reads for each sample")
    parser.add_argument("--training", action="store_true", help="measure training instead")
    parser.add_argument("--lengths", default="16000,131072", help="with --training: samples of a clip")
    parser.add_argument("--layers", default="2,4,8", help="with --training: pairs of blocks at each rate")
    parser.add_argument("--mixers", default="s4,s4d", help="with --training: names of mixers")
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which the median is shown")
    add_machine(parser)
    parser.add_argument("--clock", default="wall", choices=sorted(measure.CLOCKS), help="cpu suits a busy machine")
    add_outputs(parser)


def build(name: str) -> Any:
    """The model `name` with random weights.

    Raises:
        ValueError: if it is no causal model of codes.
    """
    torch.manual_seed(0)
    if name not in list_models(domain="audio"):
        raise ValueError(f"--models: there is no model {name!r} of sound; `sinuous models` lists them")
    model = create_model(name).eval()
    if not (getattr(model, "causal", False) and hasattr(model, "vocab_size")):
        raise ValueError(f"--models: {name} draws no codes; name a causal model, as sashimi_nano")
    return model


def by_c(model: Any, clips: int, samples: int) -> Callable[[], object]:
    """A call that draws `samples` of each clip by the engine in C.

    Raises:
        NotLowered: if that cannot run the model.
    """
    program = lower(model)
    uniforms = torch.rand(clips, samples, dtype=torch.float64)
    start = torch.full((clips,), model.vocab_size // 2)
    return lambda: program.run(start, uniforms)


def by_torch(model: Any, clips: int, steps: int, device: torch.device) -> Callable[[], object]:
    """A call that draws `steps` samples of each clip by the model's own steps."""
    twin: Any = stepping(model)
    uniforms = torch.rand(steps, clips, dtype=torch.float64, device=device)
    sampling = Sampling(temperature=1.0)

    @torch.inference_mode()
    def call() -> None:
        code = torch.full((clips,), model.vocab_size // 2, device=device)
        state = twin.initial_state(clips)
        for uniform in uniforms:
            logits, state = twin.step(code, state)
            code = sampling.choose(logits, uniform)

    return call


def by_recomputation(model: Any, clips: int, context: int, device: torch.device) -> Callable[[], object]:
    """A call that draws one sample of each clip from `context` codes, without a state."""
    codes = torch.randint(model.vocab_size, (clips, context), device=device)
    uniform = torch.rand(clips, dtype=torch.float64, device=device)

    @torch.inference_mode()
    def call() -> Tensor:
        return Sampling(temperature=1.0).choose(model(codes)[:, -1], uniform)

    return call


def run(options: argparse.Namespace) -> list[Row]:
    """All rows that the options ask for; the table is printed at the end.

    Raises:
        ValueError: for numbers that are no positive integers, or a model or mixer that cannot be measured.
    """
    check_choice("--clock", options.clock, measure.CLOCKS)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    rows = _training(options) if options.training else _drawing(options, device)
    columns, group = (TRAINING_COLUMNS, "length") if options.training else (COLUMNS, "model")
    about = "Training models of sound" if options.training else "Models of sound"
    title = f"{about}: {measure.machine(device)}, {options.threads} thread(s), torch {torch.__version__}"
    show(rows, columns, title=title, group=(group,))
    if options.csv:
        write_csv([{**row, "threads": options.threads, "torch": torch.__version__} for row in rows], options.csv)
        print(options.csv)
    if options.markdown:
        method = (TRAINING if options.training else METHOD).format(**vars(options))
        write_markdown(
            rows, columns, options.markdown, title=title, method=f"{method}\n\n    {command('audio', options)}"
        )
        print(options.markdown)
    return rows


def _drawing(options: argparse.Namespace, device: torch.device) -> list[Row]:
    clips = positive_integers("--clips", options.clips)
    models = {name: build(name) for name in _listed(options.models)}
    rows = []
    for name, model in models.items():
        measure.say(name)
        model.to(device)
        of_model = [row for count in clips for row in _of_clips(options, name, model, count, device)]
        _compare(of_model)
        rows += of_model
    return rows


def _of_clips(options: argparse.Namespace, name: str, model: Any, clips: int, device: torch.device) -> list[Row]:
    calls = {
        "torch": (by_torch(model, clips, options.steps, device), options.steps),
        "recomputation": (by_recomputation(model, clips, options.context, device), 1),
    }
    try:
        calls = {"c": (by_c(model, clips, options.samples), options.samples), **calls}
    except NotLowered as reason:
        measure.say(f"{name}: {reason}")
    rows = []
    for engine, (call, samples) in calls.items():
        call()
        times = [measure.seconds(call, device, clock=options.clock) for _ in range(options.repeats)]
        rate = clips * samples / statistics.median(times)
        row = dict.fromkeys(COLUMNS) | {"model": name, "clips": clips, "engine": engine, "ours": engine == "c"}
        row["parameters"] = sum(p.numel() for p in model.parameters())
        rows.append(row | {"samples_per_s": rate, "real_time": rate / clips / RATE})
    return rows


def _compare(rows: list[Row]) -> None:
    """Add the ratios of each row of a model."""
    rates = {(row["engine"], row["clips"]): row["samples_per_s"] for row in rows}
    fewest = min(row["clips"] for row in rows)
    for row in rows:
        row["over_torch"] = row["samples_per_s"] / rates["torch", row["clips"]]
        if fewest == 1:
            row["over_one_clip"] = row["samples_per_s"] / rates[row["engine"], 1]


def _training(options: argparse.Namespace) -> list[Row]:
    lengths = positive_integers("--lengths", options.lengths)
    layers = positive_integers("--layers", options.layers)
    rows = []
    for length in lengths:
        for depth in layers:
            for mixer in _listed(options.mixers):
                measure.say(f"{depth} layers of {mixer}, {length} samples")
                arguments = (mixer, depth, length, options.repeats, options.device, options.threads, options.clock)
                seconds = measure.in_fresh_process(measure_training, *arguments, timeout=7200)
                peak = measure.in_fresh_process(measure_peak, *arguments, timeout=7200)
                rows.append(
                    {
                        "length": length,
                        "layers": depth,
                        "mixer": mixer,
                        "seconds": seconds,
                        "samples_per_s": None if seconds is None else length / seconds,
                        "peak_mb": None if peak is None else peak / 1e6,
                        "bytes_per_sample": None if peak is None else peak / length,
                    }
                )
    return rows


def training(mixer: str, depth: int, length: int, device: str, threads: int) -> Callable[[], object]:
    """Forward and backward of the loss of the next code, of a SaShiMi of `depth` layers of `mixer`."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model: nn.Module = create_model("sashimi_2l", depth=depth, mixer=mixer).to(device)
    codes = torch.randint(256, (1, length + 1), device=device)

    def call() -> object:
        model.zero_grad()
        loss = F.cross_entropy(model(codes[:, :-1]).flatten(0, 1), codes[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return call


def measure_training(mixer: str, depth: int, length: int, repeats: int, device: str, threads: int, clock: str) -> float:
    """Median seconds of a pass; run it in a fresh process."""
    call = training(mixer, depth, length, device, threads)
    training(mixer, depth, 64, device, threads)()
    place = torch.device(device)
    return statistics.median(measure.seconds(call, place, clock=clock) for _ in range(repeats))


def measure_peak(
    mixer: str, depth: int, length: int, repeats: int, device: str, threads: int, clock: str
) -> float | None:
    """Bytes that a pass needs beyond weights and codes; run it in a fresh process."""
    training(mixer, depth, 64, device, threads)()
    peak = measure.peak_growth({"training": training(mixer, depth, length, device, threads)}, torch.device(device))
    return None if peak is None else peak["training"]


def _listed(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
