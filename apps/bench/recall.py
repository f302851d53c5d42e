"""Train each layer to recall and to keep count, on tasks of a few minutes."""

from __future__ import annotations

import argparse
import csv
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress

from sinuous.apps.bench.state_tracking import TASKS, Task
from sinuous.core.bench import measure
from sinuous.core.bench.options import add_machine, add_outputs
from sinuous.core.mixers import list_mixers, mixer_class, mixer_options
from sinuous.core.sequence_model import SequenceModel
from sinuous.core.tables import Row, command, show, write_csv, write_markdown

NEGATIVE = "allow_neg_eigval"
"""Option of mixers whose transition may have eigenvalues down to -1 (arXiv 2411.12537)."""

SHORTENED = {"sliding_window_attention": {"window_size": 16}}
"""Options without which a mixer would not differ from another one on sequences this short."""

METHOD = """Each model has two blocks of one mixer and an MLP, {dim} channels wide, embeddings from N(0, 1) and a head
of its own, and answers at every step. It is trained from one seed for {steps} steps of {batch} fresh sequences (AdamW,
learning rate {lr} with warm-up and cosine decay, weight decay 0.01, gradients clipped at 1), the same for all mixers,
without a search for better settings. The score is the share of right answers on {tests} fresh sequences, over all steps
that ask at the training length and over the last quarter of the steps at the longer one, which no model saw in
training. Sliding-window attention sees 16 steps per block. Failing here means failing with this budget; a longer
training may do better: softmax attention recalls everything after `--steps 4000 --lr 1e-3`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mixer", action="append", help="one mixer (default: every causal one; may be repeated)")
    parser.add_argument("--task", action="append", choices=list(TASKS), help="one task (default: all; may be repeated)")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=32, help="sequences per step")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--tests", type=int, default=256, help="test sequences per length")
    parser.add_argument("--seed", type=int, default=0)
    add_machine(parser)
    add_outputs(parser, csv="also write the rows to this file, each as soon as it is known")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --csv has already, train the others")
    parser.add_argument("--figure", type=Path, help="also draw the scores into this file")


def contenders(names: list[str] | None) -> dict[str, tuple[str, dict[str, Any]]]:
    """Label to mixer and options: every causal mixer, and again with negative eigenvalues where it has the option.

    Raises:
        ValueError: if a name is unknown or belongs to a mixer that sees the future.
    """
    models: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in names or [name for name in list_mixers() if mixer_class(name).causal]:
        if not mixer_class(name).causal:
            raise ValueError(f"mixer {name!r} sees the future, where the answers are; choose a causal one")
        if NEGATIVE in mixer_options(name):
            models[name] = (name, {NEGATIVE: False})
            models[f"{name}, negative"] = (name, {NEGATIVE: True})
        else:
            models[name] = (name, SHORTENED.get(name, {}))
    return models


def _learning_rate(step: int, steps: int) -> float:
    warm_up = max(steps // 20, 1)
    return min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / steps)))


def train(task: Task, mixer: str, chosen: dict[str, Any], options: argparse.Namespace) -> Row:
    """Train one model on one task and score it; the row's scores are keyed by test length."""
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    model = SequenceModel(
        task.tokens,
        options.dim,
        2,
        (mixer,),
        mixer_options={mixer: chosen},
        mlp="swiglu",
        tie_head=False,
    )
    # A tiny model's blocks write at size one from the first step, and would drown embeddings of the usual 0.02.
    torch.nn.init.normal_(model.embedding.weight)
    model.to(device)
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate(step, options.steps))
    began = time.perf_counter()
    for _ in range(options.steps):
        inputs, targets = (t.to(device) for t in task.draw(options.batch, task.train, generator))
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - began
    scores = {length: _accuracy(model, task, length, options.tests, options.seed, device) for length in task.test}
    return {
        "task": task.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": seconds,
        "loss": loss.item(),
        "accuracy": scores[task.train],
        "longer": scores[task.test[-1]] if len(task.test) > 1 else None,
    }


@torch.no_grad()
def _accuracy(model: SequenceModel, task: Task, length: int, tests: int, seed: int, device: torch.device) -> float:
    model.eval()
    inputs, targets = task.draw(tests, length, torch.Generator().manual_seed(seed + 1_000_003))
    right = (model(inputs.to(device)).argmax(-1).cpu() == targets)[targets >= 0].view(tests, -1)
    if length > task.train:
        right = right[:, -(right.shape[1] // 4) :]
    return float(right.float().mean())


def run(options: argparse.Namespace) -> list[Row]:
    """All rows that the options ask for, printed as they are ready.

    Raises:
        ValueError: for an unknown mixer.
    """
    torch.set_num_threads(options.threads)
    models, tasks = contenders(options.mixer), [TASKS[name] for name in options.task or TASKS]
    rows = read_rows(options.csv) if options.resume else []
    known = {(row["mixer"], row["task"]) for row in rows}
    missing = [(label, task) for label in models for task in tasks if (label, task.name) not in known]
    stamp = {"steps": options.steps, "seed": options.seed, "torch": torch.__version__}
    with Progress(transient=True) as progress:
        bar = progress.add_task("training", total=len(missing))
        for label, task in missing:
            progress.update(bar, description=f"{label}, {task.name}")
            rows.append({"mixer": label} | train(task, *models[label], options) | stamp)
            if options.csv:
                write_csv(rows, options.csv)
            progress.advance(bar)
    order = {(label, task.name): i for i, (label, task) in enumerate((m, t) for m in models for t in tasks)}
    rows = sorted(
        (row for row in rows if (row["mixer"], row["task"]) in order), key=lambda r: order[r["mixer"], r["task"]]
    )
    device = torch.device(options.device)
    heading = f"{options.steps} steps, width {options.dim}, {measure.machine(device)}, {options.threads} thread(s)"
    show(
        rows, ("mixer", "task", "accuracy", "longer", "loss", "seconds", "parameters"), title=heading, group=("mixer",)
    )
    if options.csv:
        print(options.csv)
    table = [_summary(label, rows, tasks) for label in models]
    if options.markdown:
        meanings = "\n".join(f"- {task.name}: {task.meaning}; chance {task.chance:.3g}" for task in tasks)
        method = METHOD.format(**vars(options)) + f"\n\n{meanings}\n\n    {command('recall', options)}"
        write_markdown(table, tuple(table[0]), options.markdown, title=f"Recall: {heading}", method=method, notes=[])
        print(options.markdown)
    if options.figure:
        draw(table, tasks, options.figure)
        print(options.figure)
    return rows


def read_rows(path: Path | None) -> list[Row]:
    """The rows that an earlier run wrote; none where it wrote none.

    Raises:
        ValueError: if no file is named, or it has other columns.
    """
    if path is None:
        raise ValueError("--resume needs --csv FILE, where the rows of the earlier run are")
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows: list[Row] = [dict(row) for row in csv.DictReader(file)]
    try:
        for row in rows:
            row |= {key: int(row[key]) for key in ("parameters", "steps", "seed")}
            row |= {key: float(row[key]) if row[key] else None for key in ("seconds", "loss", "accuracy", "longer")}
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} was not written by sinuous bench recall ({error}); name another --csv") from None
    return rows


def _columns(task: Task) -> list[tuple[str, str]]:
    """Heading and key of a task's scores."""
    first = (f"{task.name}, {task.train}", "accuracy")
    return [first] if len(task.test) == 1 else [first, (f"{task.name}, {task.test[-1]}", "longer")]


def _summary(label: str, rows: list[Row], tasks: list[Task]) -> Row:
    """One line per mixer, one column per task and length."""
    mine = {row["task"]: row for row in rows if row["mixer"] == label}
    scores = {heading: mine[task.name][key] for task in tasks for heading, key in _columns(task)}
    return {"mixer": label, **scores, "seconds": sum(row["seconds"] for row in mine.values())}


def draw(table: list[Row], tasks: list[Task], path: Path) -> None:
    """A field for each mixer and task, from white at chance to full colour at every answer right.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    columns = [(heading, task.chance) for task in tasks for heading, _ in _columns(task)]
    above = [[max(0.0, (row[heading] - chance) / (1 - chance)) for heading, chance in columns] for row in table]
    figure = Figure(figsize=(2.2 + 0.95 * len(columns), 1.3 + 0.27 * len(table)), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(above, cmap="Blues", vmin=0, vmax=1.15, aspect="auto")
    for y, row in enumerate(table):
        for x, (heading, _) in enumerate(columns):
            colour = "white" if above[y][x] > 0.7 else "black"
            axes.text(x, y, f"{row[heading]:.0%}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(columns)), [heading.replace(", ", "\n") for heading, _ in columns], fontsize=8)
    axes.set_yticks(range(len(table)), [row["mixer"] for row in table], fontsize=8)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_title("Right answers by task and length of the sequence\n(trained at the shorter length)", fontsize=9)
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.savefig(path)
