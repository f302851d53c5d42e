"""Memory and time of a training step against length, by what is recomputed"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sinuous.core.bench import measure
from sinuous.core.bench.options import add_outputs, positive_integers
from sinuous.core.blocks import carry
from sinuous.core.checkpointing import STRATEGIES, peak_memory, plan_memory
from sinuous.core.checks import check_choice
from sinuous.core.sequence_model import SequenceModel
from sinuous.core.tables import Row, command, show, write_csv, write_markdown

NESTED, MAMBAPY = "nested", "mambapy"
TIMEOUT = 3600.0
METHOD = """A step of training: the loss of random tokens with random targets, and its gradients, of `{mixer}` of width
{dim} with {depth} blocks and {vocab} tokens, batch 1, in fp32. Each figure comes from a process of its own.

- planned: what `plan_memory` says; live: the most that tensors have alive at once (`peak_memory`); resident: growth of
  the process's resident set at its peak. None of them counts the weights.
- `nested`: the cells of `multi_axis`, as `torch.utils.checkpoint` around each of them. `mambapy`: that library's model
  of the same size, with its own weights, all activations kept.
- slope: by what power of the length live memory grows, fitted to lengths of 4,096 and more.
- Strategies that need more than {limit:,} MB are left out."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mixer", default="mamba")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=64)
    lengths = ",".join(str(2**n) for n in range(10, 18))
    parser.add_argument("--lengths", default=lengths, help="comma-separated steps of the sequence")
    parser.add_argument(
        "--strategies", default=",".join([*STRATEGIES, NESTED, MAMBAPY]), help="comma-separated; the last two are peers"
    )
    parser.add_argument("--limit", type=int, default=3000, help="MB above which a strategy is left out")
    parser.add_argument("--budget", type=int, default=64, help="MiB for which the longest sequences are sought")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--figure", type=Path, help="also draw memory against length into this file")
    add_outputs(parser)


def run(options: argparse.Namespace) -> list[Row]:
    """All rows that the options ask for.

    Raises:
        ValueError: for an unknown strategy, or lengths that are no positive integers.
    """
    lengths = positive_integers("--lengths", options.lengths)
    names = [name.strip() for name in options.strategies.split(",")]
    for name in names:
        check_choice("--strategies", name, (*STRATEGIES, NESTED, MAMBAPY))
    if MAMBAPY in names and (importlib.util.find_spec("mambapy") is None or options.mixer != "mamba"):
        measure.say("mambapy is not installed, or the mixer is not mamba: it is left out")
        names.remove(MAMBAPY)
    model = _model(options)
    rows: list[Row] = []
    for name in names:
        for length in lengths:
            row = _row(options, model, name, length)
            if row is not None:
                rows.append(row)
    notes = [*_slopes(rows), *_longest(options, model)]
    heading = f"{measure.machine(torch.device('cpu'))}, {options.threads} thread(s), torch {torch.__version__}"
    show(rows, tuple(rows[0]), title=heading, group=("strategy",))
    for note in notes:
        print(note)
    if options.csv:
        write_csv(rows, options.csv)
        print(options.csv)
    if options.figure:
        draw(rows, heading, options.figure)
        print(options.figure)
    if options.markdown:
        method = METHOD.format(**vars(options)) + f"\n\n    {command('memory', options)}"
        if options.figure:
            picture = os.path.relpath(options.figure, options.markdown.parent)
            method += f"\n\n![Memory against length]({picture})"
        title = f"Memory of training: {heading}"
        write_markdown(rows, tuple(rows[0]), options.markdown, title=title, method=method, notes=notes)
        print(options.markdown)
    return rows


def _model(options: argparse.Namespace) -> SequenceModel:
    torch.manual_seed(0)
    return SequenceModel(options.vocab, options.dim, options.depth, options.mixer)


def _row(options: argparse.Namespace, model: SequenceModel, name: str, length: int) -> Row | None:
    own = "multi_axis" if name == NESTED else "none" if name == MAMBAPY else name
    plan = plan_memory(model, 1, length, strategy=own)
    if plan.total / 1e6 > options.limit:
        return None
    measure.say(f"{name}, {length:,} steps: {plan.total / 1e6:,.0f} MB planned")
    sizes = (own != "none", plan.layers, plan.steps)
    found = measure.in_fresh_process(measured, vars(options), name, length, sizes, timeout=TIMEOUT)
    live, resident, seconds, loss = found or (None,) * 4
    return {
        "strategy": name,
        "steps": length,
        "layers": None if own == "none" else plan.layers,
        "cell_steps": None if own == "none" else plan.steps or length,
        "planned_mb": None if name in (NESTED, MAMBAPY) else plan.total / 1e6,
        "live_mb": live,
        "resident_mb": resident,
        "cpu_s": seconds,
        "loss": loss,
    }


def measured(
    given: dict[str, Any], name: str, length: int, sizes: tuple[bool, int, int | None]
) -> tuple[float, float | None, float, float]:
    """Live and resident MB, CPU seconds and the loss of one step; to be run in a process of its own."""
    options = argparse.Namespace(**given)
    torch.set_num_threads(options.threads)
    model: nn.Module = _model(options)
    enable, layers, steps = sizes
    loss_of: Callable[[Tensor, Tensor], Tensor]
    if name == MAMBAPY:
        model = _of_mambapy(options)
        loss_of = model
    elif name == NESTED:
        loss_of = _Nested(model, layers, steps or length)  # type: ignore[arg-type]
    else:
        model.set_grad_checkpointing(enable, layers=layers, steps=steps)  # type: ignore[operator]
        loss_of = model.loss  # type: ignore[assignment]
    ids, targets = torch.randint(options.vocab, (2, 1, length)).unbind()
    last = {}

    def step(ids: Tensor = ids, targets: Tensor = targets) -> None:
        model.zero_grad()
        loss = loss_of(ids, targets)
        loss.backward()
        last["loss"] = float(loss.detach())

    step(ids[:, :64], targets[:, :64])  # builds kernels
    seconds = []

    def timed() -> None:
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)

    model.zero_grad()
    peaks = measure.peak_growth({"step": timed}, torch.device("cpu"))
    model.zero_grad()
    live = peak_memory(step)
    return live / 1e6, None if peaks is None else peaks["step"] / 1e6, seconds[0], last["loss"]


class _Nested:
    """The cells of `multi_axis` by `torch.utils.checkpoint`: block by block of depth, chunk by chunk of steps."""

    def __init__(self, model: SequenceModel, layers: int, steps: int) -> None:
        self.model, self.layers, self.steps = model, layers, steps

    def __call__(self, ids: Tensor, targets: Tensor) -> Tensor:
        chunks = [self.model._embed(part, 2) for part in ids.split(self.steps, 1)]
        blocks = list(self.model.layers)
        for first in range(0, len(blocks), self.layers):
            group, states, outputs = blocks[first : first + self.layers], None, []
            for chunk in chunks:
                chunk, states = checkpoint(self._run, group, chunk, states, use_reentrant=False)
                outputs.append(chunk)
            chunks = outputs
        parts = zip(chunks, targets.split(self.steps, 1), strict=True)
        total: Tensor = sum(checkpoint(self._loss, part, aims, use_reentrant=False) for part, aims in parts)  # type: ignore[assignment]
        return total / targets.numel()

    def _run(self, group: list[Any], x: Tensor, states: Any) -> Any:
        return carry("prefill", group, x, states or [None] * len(group), {})

    def _loss(self, x: Tensor, targets: Tensor) -> Tensor:
        logits = self.model.forward_head(self.model._finish(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def _of_mambapy(options: argparse.Namespace) -> nn.Module:
    library = importlib.import_module("mambapy.mamba")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(options.vocab, options.dim)
            self.layers = library.Mamba(library.MambaConfig(d_model=options.dim, n_layers=options.depth))
            self.norm = nn.RMSNorm(options.dim)

        def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
            logits = F.linear(self.norm(self.layers(self.embedding(ids))), self.embedding.weight)
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    torch.manual_seed(0)
    return Model()


def _slopes(rows: list[Row]) -> list[str]:
    notes = []
    for name in dict.fromkeys(row["strategy"] for row in rows):
        points = [
            (math.log2(r["steps"]), math.log2(r["live_mb"])) for r in rows if r["strategy"] == name and r["live_mb"]
        ]
        points = [point for point in points if point[0] >= 12]
        if len(points) >= 2:
            notes.append(f"{name}: live memory grows as length to the {_slope(points):.2f}")
    return notes


def _slope(points: list[tuple[float, float]]) -> float:
    """Of the line through points that has the least squares."""
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def _longest(options: argparse.Namespace, model: SequenceModel) -> list[str]:
    """The longest sequences that are planned to fit into the budget, and what they have alive."""
    notes, budget = [], options.budget * 2**20
    for name in ("layer", "multi_axis"):
        low, high = 1, 2**14  # in units of 256 steps
        while high - low > 1:
            middle = (low + high) // 2
            fits = plan_memory(model, 1, 256 * middle, strategy=name).total <= budget
            low, high = (middle, high) if fits else (low, middle)
        plan = plan_memory(model, 1, 256 * low, strategy=name)
        if plan.total > budget:
            continue
        sizes = (True, plan.layers, plan.steps)
        found = measure.in_fresh_process(measured, vars(options), name, 256 * low, sizes, timeout=TIMEOUT)
        live = "" if found is None else f", {found[0] / 1.048576:.1f} MiB of them alive"
        notes.append(f"{name}: {256 * low:,} steps are the longest planned for {options.budget} MiB{live}")
    return notes


def draw(rows: list[Row], title: str, path: Path) -> None:
    """Live and resident memory against length.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    names = list(dict.fromkeys(row["strategy"] for row in rows))
    figure = Figure(figsize=(10.8, 4.4), layout="constrained")
    panels = (("live_mb", "live tensors at the peak, MB"), ("resident_mb", "resident growth at the peak, MB"))
    for index, (key, label) in enumerate(panels):
        axes = figure.add_subplot(1, 2, index + 1)
        for k, name in enumerate(names):
            points = [(row["steps"], row[key]) for row in rows if row["strategy"] == name and row[key]]
            style = "--" if name in (NESTED, MAMBAPY) else "-"
            width = 2.6 if name == "multi_axis" else 1.4
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, style, marker="o", ms=3.5, lw=width, color=f"C{k}", label=name)
        steps = sorted({row["steps"] for row in rows})
        axes.set(xscale="log", yscale="log", xlabel="steps", title=label)
        axes.set_xticks(steps, [f"{n // 1024}k" if n >= 1024 else str(n) for n in steps], minor=False)
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(11)
        if index == 0:
            lines = axes.get_legend_handles_labels()
            figure.legend(*lines, frameon=False, fontsize=8, loc="outside lower center", ncols=len(names))
    figure.suptitle(title, x=0.01, ha="left", fontsize=8, color="0.4")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
