"""Time and memory of inference against image size, recurrent backbones beside attention."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from sinuous.core.bench import measure
from sinuous.core.bench.options import add_machine, add_outputs, positive_integers
from sinuous.core.checks import check_choice
from sinuous.core.registry import list_models
from sinuous.core.tables import Row, cell, command, markdown_table, show, write_csv, write_markdown

ATTENTION = ("fused attention", "plain attention")

METHOD = """Models have random weights and are built for the size. They take turns in one process, so that a
disturbance of the machine meets all of them alike; times are medians of one forward pass. Peak memory is what one pass
needs beyond weights and image, read in a fresh process per row. Ratios above 1 speak for the row."""

MODELS = (
    "vim_tiny_patch16_224",
    "lightnet_tiny_patch16_224",
    "plstm_vis_tiny_patch16_224",
    "vir_small_patch16_224",
    "vmamba_tiny_s1l8",
    "mambavision_t",
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "swin_tiny_patch4_window7_224",
)
COLOURS = ("#c1272d", "#0f4c81", "#5b8c5a", "#8a6d9e", "#d98218", "#2a9d8f", "#333333", "#7d8ca3", "#b0a08a", "#d07ba1")
COLUMNS = ("size", "tokens", "model", "median_ms", "ratio", "peak_mb", "memory_ratio")
CROSSINGS = ("model", "versus", "faster_from_px", "leaner_from_px", "ratio_at_largest", "memory_ratio_at_largest")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", default=",".join(MODELS), help="names in timm's registry (default: every family)")
    parser.add_argument("--sizes", default="224,512,1024,1248", help="comma-separated image sizes in pixels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="samples per candidate, of which the median is shown")
    add_machine(parser)
    parser.add_argument("--clock", default="wall", choices=sorted(measure.CLOCKS), help="cpu suits a busy machine")
    parser.add_argument("--plain", action="store_true", help="also time attention that is not fused")
    parser.add_argument("--versus", help="the row that ratios refer to (default: the last model)")
    parser.add_argument("--no-memory", action="store_true", help="skip the peaks, each of which starts a process")
    add_outputs(parser)
    parser.add_argument("--figure", type=Path, help="also draw time and memory against size into this file")


def build(name: str, size: int, attention: str | None, device: torch.device) -> nn.Module:
    """Model `name` for `size` pixels, randomly initialised, in evaluation mode; `attention` is one of `ATTENTION`.

    Raises:
        ValueError: if timm's registry has no such model.
    """
    import timm

    import sinuous.vision  # registers our models in timm

    assert sinuous.vision
    if not timm.is_model(name):
        raise ValueError(f"--models: there is no model {name!r}; `sinuous models` lists ours, timm.list_models() all")
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, img_size=size).eval().to(device)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            cast("Any", module).fused_attn = attention != ATTENTION[1]
    return model


def variants(name: str, size: int, plain: bool) -> dict[str, tuple[str, str | None]]:
    """Rows that a model gives: one, or two where it has attention that can be fused and `plain` is asked for, too."""
    model = build(name, size, None, torch.device("meta"))
    if plain and any(hasattr(module, "fused_attn") for module in model.modules()):
        return {f"{name}, {kind}": (name, kind) for kind in ATTENTION}
    return {name: (name, None)}


def patches(model: nn.Module, size: int) -> int:
    """Patches that a model cuts a picture into, at its finest resolution."""
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is None:
        side: int = math.ceil(size / cast("Any", model).feature_info[0]["reduction"])
        return side * side
    return math.prod(grid)


def _inference(model: nn.Module, size: int, batch: int, device: torch.device) -> Callable[[], object]:
    image = torch.randn(batch, getattr(model, "in_chans", 3), size, size, device=device)

    def call() -> object:
        with torch.inference_mode():
            return model(image)

    return call


def measure_peak(
    name: str, attention: str | None, size: int, batch: int, device: str, threads: int
) -> dict[str, float] | None:
    """Peak memory of one inference in this process, beyond the weights and the image; run it in a fresh one."""
    torch.set_num_threads(threads)
    place = torch.device(device)
    model = build(name, size, attention, place)
    call = _inference(model, size, batch, place)
    small = min(size, 64)
    _inference(build(name, small, attention, place), small, 1, place)()
    return measure.peak_growth({"inference": call}, place)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows that the options ask for; the table is printed at the end.

    Raises:
        ValueError: for sizes that are no positive integers, or an unknown model.
    """
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    sizes = positive_integers("--sizes", options.sizes)
    candidates: dict[str, tuple[str, str | None]] = {}
    for name in options.models.split(","):
        candidates |= variants(name.strip(), sizes[0], options.plain)
    versus = options.versus or [c for c in candidates if ATTENTION[1] not in c][-1]
    check_choice("--versus", versus, candidates)
    ours = set(list_models(domain="vision"))
    rows: list[Row] = []
    for size in sizes:
        measure.say(f"{size} pixels")
        calls: dict[str, Callable[[], object]] = {}
        tokens = {}
        for label, (name, attention) in candidates.items():
            model = build(name, size, attention, device)
            tokens[label] = patches(model, size)
            calls[label] = _inference(model, size, options.batch, device)
        samples = measure.round_robin(calls, device, repeats=options.repeats, clock=options.clock)
        medians = {label: measure.median(values) for label, values in samples.items()}
        peaks: dict[str, float | None] = dict.fromkeys(candidates)
        for label, (name, attention) in {} if options.no_memory else candidates.items():
            peak_bytes = measure.in_fresh_process(
                measure_peak, name, attention, size, options.batch, options.device, options.threads, timeout=600
            )
            peaks[label] = None if peak_bytes is None else peak_bytes["inference"]
        for label in candidates:
            peak, other = peaks[label], peaks[versus]
            rows.append(
                {
                    "size": size,
                    "tokens": tokens[label],
                    "model": label,
                    "ours": candidates[label][0] in ours,
                    "median_ms": medians[label] * 1e3,
                    "fastest_ms": min(samples[label]) * 1e3,
                    "versus": versus,
                    "ratio": medians[versus] / medians[label],
                    "peak_mb": None if peak is None else peak / 1e6,
                    "memory_ratio": None if peak is None or other is None else other / peak,
                    "batch": options.batch,
                    "repeats": options.repeats,
                    "clock": options.clock,
                    "machine": measure.machine(device),
                    "threads": options.threads,
                    "torch": torch.__version__,
                }
            )
    title = (
        f"Backbones: inference, batch {options.batch}, fp32, {measure.machine(device)}, {options.threads} thread(s), "
        f"torch {torch.__version__}; ratios are {versus} / this row"
    )
    show(rows, COLUMNS, title=title, group=("size",))
    starts = crossings(rows)
    if starts:
        show(starts, CROSSINGS, title="Size from which a model stays ahead of attention", group=("versus",))
    method = f"{METHOD}\n\n    {command('backbones', options)}"
    for path, write in (
        (options.csv, write_csv),
        (options.figure, draw),
        (options.markdown, lambda rows, path: _write_page(rows, starts, path, title, method)),
    ):
        if path:
            write(rows, path)
            print(path)
    return rows


def _write_page(rows: list[Row], starts: list[Row], path: Path, title: str, method: str) -> None:
    write_markdown(rows, COLUMNS, path, title=title, method=method)
    if starts:
        cells = [{c: cell(row[c]) for c in CROSSINGS} for row in starts]
        table = markdown_table(cells, CROSSINGS)
        with path.open("a") as page:
            page.write(
                f"\nSize from which a model of ours stays ahead of a peer, up to the largest measured:\n\n{table}"
            )


def crossings(rows: list[Row], unit: str = "px") -> list[Row]:
    """For each model of ours and each other row: from what size on it is faster and needs less memory, `None` where it
    is not at the largest, and the ratios there; sizes are in `unit`."""
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    lines: dict[str, dict[str, list[Any]]] = {}
    for row in rows:
        line = lines.setdefault(row["model"], {"median_ms": [], "peak_mb": []})
        for key, values in line.items():
            values.append(row[key])
    mine = {row["model"] for row in rows if row["ours"]}
    found = []
    for peer in [label for label in lines if label not in mine]:
        for label in [label for label in lines if label in mine]:
            starts: dict[str, Any] = {}
            for key, (start, ratio) in {
                "median_ms": (f"faster_from_{unit}", "ratio_at_largest"),
                "peak_mb": (f"leaner_from_{unit}", "memory_ratio_at_largest"),
            }.items():
                a, b = lines[label][key], lines[peer][key]
                known = all(a) and all(b)
                starts[start] = crossing(sizes, a, b) if known else None
                starts[ratio] = b[-1] / a[-1] if known else None
            found.append({"model": label, "versus": peer, **starts})
    return found


def crossing(sizes: list[int], ours: list[float], theirs: list[float]) -> float | None:
    """The size from which on `ours` stays below `theirs`, interpolated between the measured sizes on logarithmic axes;
    None if it is not below at the largest size."""
    gaps = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]
    if gaps[-1] >= 0:
        return None
    ahead = len(gaps) - 1
    while ahead > 0 and gaps[ahead - 1] < 0:
        ahead -= 1
    if ahead == 0:
        return float(sizes[0])
    share = gaps[ahead - 1] / (gaps[ahead - 1] - gaps[ahead])
    return math.exp(math.log(sizes[ahead - 1]) + share * math.log(sizes[ahead] / sizes[ahead - 1]))


def draw(rows: list[Row], path: Path, axis: str = "image size, pixels", unit: str = "px") -> None:
    """Time and memory against size, one line per model; marks the size from which the first model is ahead.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    labels = list(dict.fromkeys(row["model"] for row in rows))
    ours = {row["model"] for row in rows if row["ours"]}
    first, versus = labels[0], rows[0]["versus"]
    panels = [("median_ms", "time per forward pass, ms"), ("peak_mb", "peak memory beyond weights and image, MB")]
    panels = [panel for panel in panels if all(row[panel[0]] for row in rows)]
    figure = Figure(figsize=(5.4 * len(panels), 4.4), layout="constrained")
    colours = dict(zip(labels, COLOURS, strict=False))
    for index, (key, title) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        lines = {label: [(r["size"], r[key]) for r in rows if r["model"] == label] for label in labels}
        for label, points in lines.items():
            style = "-" if label in ours else ":" if ATTENTION[1] in label else "--"
            axes.plot(*zip(*points, strict=True), style, marker="o", ms=4, lw=2, color=colours.get(label), label=label)
        sizes = [size for size, _ in lines[first]]
        if versus != first and len(ours) == 1:
            start = crossing(sizes, [v for _, v in lines[first]], [v for _, v in lines[versus]])
            if start is not None and start < sizes[-1]:
                axes.axvspan(start, sizes[-1], color=colours[first], alpha=0.07, lw=0)
                late = math.log(start / sizes[0]) > 0.6 * math.log(sizes[-1] / sizes[0])
                axes.annotate(
                    f"{first.split('_patch')[0]} is ahead\nfrom {start:.0f} {unit}",
                    (start, 0.03),
                    xycoords=("data", "axes fraction"),
                    xytext=(-4 if late else 4, 0),
                    ha="right" if late else "left",
                    textcoords="offset points",
                    fontsize=8,
                    color=colours[first],
                )
        axes.set(xscale="log", yscale="log", xlabel=axis, title=title)
        axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(11)
        if index == 0:
            axes.legend(frameon=False, fontsize=8, loc="upper left")
    note = rows[0]
    caption = f"{note['machine']}, {note['threads']} thread(s), batch {note['batch']}, fp32, torch {note['torch']}"
    figure.suptitle(caption, x=0.01, ha="left", fontsize=8, color="0.4")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
