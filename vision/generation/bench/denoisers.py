"""Time, memory and operations of one call of a denoiser against the size of its latents, ours beside diffusers' DiT."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sinuous.core.bench import measure
from sinuous.core.bench.options import add_machine, add_outputs, positive_integers
from sinuous.core.extras import package
from sinuous.core.registry import create_model, list_models
from sinuous.core.tables import Row, command, show, write_csv, write_markdown
from sinuous.vision.bench.backbones import crossings, draw

METHOD = """Models have random weights and are built for the size, the side of the latents, an eighth of that of the
picture. They take turns in one process, so that a disturbance of the machine meets all of them alike; times are medians
of one call with a step and a class, by the {clock} clock; freed memory stays with the process, so that calls do not
wait for the system's pages. Peak memory is what one call needs beyond weights and
latents, read in a fresh process per row. GFLOPs are multiply-adds, counted once, of the definitions, for one picture.
Ratios above 1 speak for the row. DiT is diffusers', with patches of 2; its blocks have an embedding of step and class
each, which is why it has more parameters than the paper's."""

COLUMNS = ("size", "model", "parameters", "gflops", "median_ms", "ratio", "peak_mb", "memory_ratio")
CROSSINGS = (
    "model",
    "versus",
    "faster_from_latents",
    "leaner_from_latents",
    "ratio_at_largest",
    "memory_ratio_at_largest",
)
CHANNELS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", default="lamamba_diff_s,dit_s", help="denoisers of ours, and sizes of DiT")
    parser.add_argument("--sizes", default="32,64,128", help="comma-separated sides of the latents")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="samples per model, of which the median is shown")
    add_machine(parser)
    parser.add_argument("--clock", default="wall", choices=sorted(measure.CLOCKS), help="cpu suits a busy machine")
    parser.add_argument("--no-memory", action="store_true", help="skip the peaks, each of which starts a process")
    add_outputs(parser)
    parser.add_argument("--figure", type=Path, help="also draw time and memory against size into this file")


def build(name: str, size: int, device: torch.device) -> nn.Module:
    """A denoiser of `size` x `size` latents, randomly initialised, in evaluation mode.

    Raises:
        ValueError: if there is no such model.
        ModuleNotFoundError: if diffusers is missing.
    """
    package("diffusers", "diffusion")
    from sinuous.vision.generation.peers import DITS, dit

    ours = ours_among(list_models(domain="generation"))
    if name not in ours and name not in DITS:
        known = ", ".join((*sorted(ours), *DITS))
        raise ValueError(f"--models: there is no denoiser {name!r} of latents; there are {known}")
    torch.manual_seed(0)
    with device:
        model = (
            dit(name, sample_size=size) if name in DITS else create_model(name, sample_size=size, in_channels=CHANNELS)
        )
    return model.eval()


def ours_among(names: list[str]) -> set[str]:
    """The denoisers among names of models that make pictures."""
    return {name for name in names if "lamamba_diff" in name}


def denoising(model: nn.Module, size: int, batch: int, device: torch.device) -> Callable[[], object]:
    """A call of `model` with a step and a class."""
    latents = torch.randn(batch, CHANNELS, size, size, device=device)
    steps, labels = torch.full((batch,), 500, device=device), torch.zeros(batch, dtype=torch.long, device=device)

    def call() -> object:
        with torch.inference_mode():
            return model(latents, timestep=steps, class_labels=labels)

    return call


def giga_operations(name: str, size: int) -> float:
    """10⁹ multiply-adds of one call for one picture, without memory for it."""
    meta = torch.device("meta")
    call = denoising(build(name, size, meta), size, 1, meta)
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops()) / 2e9


def measure_peak(name: str, size: int, batch: int, device: str, threads: int) -> dict[str, float] | None:
    """Peak memory of one call in this process, beyond weights and latents; run it in a fresh one."""
    torch.set_num_threads(threads)
    place = torch.device(device)
    call = denoising(build(name, size, place), size, batch, place)
    small = min(size, 16)
    denoising(build(name, small, place), small, 1, place)()
    return measure.peak_growth({"call": call}, place)


def run(options: argparse.Namespace) -> list[Row]:
    """All rows that the options ask for; the table is printed at the end.

    Raises:
        ValueError: for sizes that are no positive integers, or an unknown model.
        ModuleNotFoundError: if diffusers is missing.
    """
    torch.set_num_threads(options.threads)
    measure.keep_memory()
    device = torch.device(options.device)
    sizes = positive_integers("--sizes", options.sizes)
    names = [name.strip() for name in options.models.split(",")]
    for name in names:
        build(name, sizes[0], torch.device("meta"))
    ours = ours_among(names)
    versus = next((name for name in reversed(names) if name not in ours), names[-1])
    rows = [row for size in sizes for row in _of_size(options, names, versus, size, device)]
    title = (
        f"Denoisers: batch {options.batch}, fp32, {measure.machine(device)}, {options.threads} thread(s), "
        f"torch {torch.__version__}; ratios are {versus} / this row"
    )
    show(rows, COLUMNS, title=title, group=("size",))
    starts = crossings(rows, "latents")
    if starts:
        show(starts, CROSSINGS, title="Side of the latents from which a model stays ahead", group=("versus",))
    method = f"{METHOD.format(clock=options.clock)}\n\n    {command('denoisers', options)}"
    for path, write in (
        (options.csv, write_csv),
        (options.figure, functools.partial(draw, axis="side of the latents", unit="latents")),
        (options.markdown, functools.partial(_write_page, title=title, method=method)),
    ):
        if path:
            write(rows, path)
            print(path)
    return rows


def _of_size(options: argparse.Namespace, names: list[str], versus: str, size: int, device: torch.device) -> list[Row]:
    measure.say(f"{size} x {size} latents")
    models = {name: build(name, size, device) for name in names}
    calls = {name: denoising(model, size, options.batch, device) for name, model in models.items()}
    samples = measure.round_robin(calls, device, repeats=options.repeats, clock=options.clock)
    times = {name: measure.median(values) for name, values in samples.items()}
    peaks: dict[str, float | None] = dict.fromkeys(names)
    for name in [] if options.no_memory else names:
        arguments = (name, size, options.batch, options.device, options.threads)
        peak = measure.in_fresh_process(measure_peak, *arguments, timeout=1800)
        peaks[name] = None if peak is None else peak["call"]
    rows = []
    for name in names:
        peak, other = peaks[name], peaks[versus]
        rows.append(
            {
                "size": size,
                "model": name,
                "ours": name in ours_among(names),
                "parameters": sum(p.numel() for p in models[name].parameters()),
                "gflops": giga_operations(name, size),
                "median_ms": times[name] * 1e3,
                "fastest_ms": min(samples[name]) * 1e3,
                "versus": versus,
                "ratio": times[versus] / times[name],
                "peak_mb": None if peak is None else peak / 1e6,
                "memory_ratio": None if not peak or other is None else other / peak,
                "batch": options.batch,
                "repeats": options.repeats,
                "clock": options.clock,
                "machine": measure.machine(device),
                "threads": options.threads,
                "torch": torch.__version__,
            }
        )
    return rows


def _write_page(rows: list[Row], path: Path, title: str, method: str) -> None:
    write_markdown(rows, COLUMNS, path, title=title, method=method)
