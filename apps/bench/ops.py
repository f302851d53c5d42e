"""Time and memory of the recurrences, ours beside the implementations people use today."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from sinuous.apps.bench.op_cases import CASES, FASTEST, Case, Inputs, Peer, Prepared, Shape, backends, ours
from sinuous.core.bench import measure
from sinuous.core.bench.options import add_machine, add_outputs, positive_integers
from sinuous.core.tables import Row, command, show, write_csv, write_markdown

PROBE_LENGTH = 256
"""A candidate's first run: short enough for the slowest, and where outputs are compared."""

RECURRENT_LENGTH = 2048
"""The longest sequence that the step-by-step definitions are timed on."""

PASSES = ("forward", "forward+backward")

COLUMNS = ("pass", "length", "implementation", "median_ms", "ratio", "peak_mb", "us_per_token", "difference")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", choices=sorted(CASES), action="append", help="one op (default: all; may be repeated)")
    parser.add_argument("--lengths", default="512,2048,8192", help="comma-separated sequence lengths")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--state", type=int, default=16, help="states per channel of the selective scan")
    parser.add_argument("--repeats", type=int, default=5, help="samples per candidate, of which the median is shown")
    add_machine(parser)
    parser.add_argument("--versus", help="the peer that ratios refer to (default: each op's usual one)")
    parser.add_argument("--clock", default="wall", choices=sorted(measure.CLOCKS), help="cpu suits a busy machine")
    parser.add_argument(
        "--max-seconds", type=float, default=30.0, help="leave out a candidate expected to need longer for one call"
    )
    parser.add_argument("--no-memory", action="store_true", help="skip the peaks, each of which starts a process")
    parser.add_argument("--no-peers", action="store_true", help="our own backends only")
    parser.add_argument("--scaling", action="store_true", help="our own backends at lengths up to 131072, batch 1")
    add_outputs(parser)


METHOD = """Candidates take turns in one process, so that a disturbance of the machine meets all of them alike; times
are medians. `ratio` is the time of the peer named in `versus` over that of the row: above 1, the row is faster. Peak
memory is what one call needs beyond its inputs, read in a fresh process per row. `difference` is the relative distance
of the output from the step-by-step definition in the same precision; it is empty where a candidate computes another
function. Each peer has its inputs in its own memory layout beforehand."""


def _call(prepared: Prepared, which: str) -> Callable[[], object]:
    """One forward pass, or one with the gradients of all leaves under a fixed cotangent."""

    def forward() -> Tensor:
        with torch.no_grad():
            return prepared.call()

    if which == "forward":
        return forward
    cotangent = torch.randn_like(forward())
    return lambda: torch.autograd.grad(prepared.call(), list(prepared.leaves), cotangent)


def prepare(case: Case, name: str, inputs: Inputs) -> Prepared:
    """The candidate `name`, one of our backends or a peer, on `inputs`."""
    peers = {peer.name: peer for peer in case.peers}
    return peers[name].prepare(inputs) if name in peers else ours(case, name, inputs)


def measure_peak(
    family: str, name: str, shape: Shape, device: str, threads: int, passes: tuple[str, ...] = PASSES
) -> dict[str, float] | None:
    """Peak memory of one candidate in this process beyond its inputs; run it in a fresh one."""
    torch.set_num_threads(threads)
    case, place = CASES[family], torch.device(device)
    # What the first call brings in, compiled kernels and thread pools, is no part of a call's need.
    warm = prepare(case, name, case.make(shape._replace(length=16), place))
    for which in passes:
        _call(warm, which)()
    prepared = prepare(case, name, case.make(shape, place))

    def both() -> object:
        # Not `_call`, whose trial run for the cotangent would leave memory behind to profit from.
        y = prepared.call()
        return torch.autograd.grad(y, list(prepared.leaves), torch.ones_like(y))

    calls = {"forward": _call(prepared, "forward"), "forward+backward": both}
    return measure.peak_growth({which: calls[which] for which in passes}, place)


class Budget:
    """Foresees, from shorter runs, which calls would exceed the limit."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.seen: dict[tuple[str, str], tuple[int, float]] = {}

    def note(self, name: str, which: str, length: int, seconds: float) -> None:
        self.seen[name, which] = (length, seconds)

    def expected(self, name: str, which: str, length: int, quadratic: bool) -> float:
        before, seconds = self.seen[name, which]
        return seconds * (length / before) ** (2 if quadratic else 1)

    def allows(self, name: str, which: str, length: int, quadratic: bool) -> bool:
        return self.expected(name, which, length, quadratic) <= self.limit


def _relative_difference(a: Tensor, b: Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float(((a - b).pow(2).mean() / b.pow(2).mean()).sqrt())


def _quadratic(peer: Peer | None) -> bool:
    return peer is not None and peer.quadratic


def _probe(
    case: Case, names: Iterable[str], shape: Shape, device: torch.device, budget: Budget
) -> dict[str, float | None]:
    """Run every candidate once at a short length: how long it takes, and how far its output is from the definition's.

    Peers that compute another function have no difference."""
    short = shape._replace(length=min(PROBE_LENGTH, shape.length))
    inputs = case.make(short, device)
    others = {peer.name for peer in case.peers if not peer.same_function}
    with torch.no_grad():
        expected = case.run("recurrent", **inputs)
    differences: dict[str, float | None] = {}
    for name in names:
        prepared = prepare(case, name, inputs)
        with torch.no_grad():
            y = prepared.call()
        y = y.transpose(1, 2) if prepared.channels_first else y
        differences[name] = None if name in others else _relative_difference(y, expected)
        for which in PASSES:
            call = _call(prepared, which)
            call()
            budget.note(name, which, short.length, measure.seconds(call, device))
    return differences


def bench_case(case: Case, shapes: list[Shape], options: argparse.Namespace, say: Callable[[str], None]) -> list[Row]:
    """Rows of one op at all shapes, shortest first."""
    device = torch.device(options.device)
    usable: dict[str, Peer | None] = {}
    for name, reason in backends(case, device).items():
        if reason is None:
            usable[name] = None
        else:
            say(f"{case.name}: backend {name} left out: {reason}")
    for peer in () if options.no_peers else case.peers:
        reason = peer.unavailable(device)
        if reason is None:
            usable[peer.name] = peer
        else:
            say(f"{case.name}: {peer.name} left out: {reason}")
    versus = options.versus or case.versus
    if versus not in usable and versus != FASTEST and not options.no_peers:
        say(f"{case.name}: no ratios, since {versus} is not among {', '.join(usable)}")
    budget = Budget(options.max_seconds)
    differences = _probe(case, usable, shapes[0], device, budget)
    rows: list[Row] = []
    for shape in shapes:
        inputs = case.make(shape, device)
        prepared: dict[str, Prepared] = {}
        peaks: dict[str, dict[str, float] | None] = {}
        for which in PASSES:
            calls: dict[str, Callable[[], object]] = {}
            for name in usable:
                quadratic = _quadratic(usable[name])
                if name == "recurrent" and (options.scaling or shape.length > RECURRENT_LENGTH):
                    continue
                if not budget.allows(name, which, shape.length, quadratic):
                    expected = budget.expected(name, which, shape.length, quadratic)
                    say(f"{case.name}: {name}, {which}, length {shape.length} left out: about {expected:.0f} s")
                    continue
                if name not in prepared:
                    prepared[name] = prepare(case, name, inputs)
                calls[name] = _call(prepared[name], which)
            samples = measure.round_robin(calls, device, repeats=options.repeats, clock=options.clock)
            medians = {name: measure.median(values) for name, values in samples.items()}
            rivals = [n for n in medians if (rival := usable[n]) is not None and rival.same_function]
            against = min(rivals, key=medians.__getitem__, default="") if versus == FASTEST else versus
            for name, seconds in medians.items():
                budget.note(name, which, shape.length, seconds)
                if not options.no_memory and name not in peaks:
                    quadratic = _quadratic(usable[name])
                    passes = tuple(p for p in PASSES if budget.allows(name, p, shape.length, quadratic))
                    peaks[name] = measure.in_fresh_process(
                        measure_peak,
                        case.name,
                        name,
                        shape,
                        options.device,
                        options.threads,
                        passes,
                        timeout=60 + 10 * options.max_seconds,
                    )
                peak = (peaks.get(name) or {}).get(which)
                row: Row = {
                    "op": case.name,
                    "pass": which,
                    "length": shape.length,
                    "implementation": name,
                    "ours": usable[name] is None,
                    "median_ms": seconds * 1e3,
                    "fastest_ms": min(samples[name]) * 1e3,
                    "versus": against if against in medians else None,
                    "ratio": medians[against] / seconds if against in medians else None,
                    "peak_mb": None if peak is None else peak / 1e6,
                    "us_per_token": seconds * 1e6 / (shape.batch * shape.length),
                    "difference": differences[name],
                    "batch": shape.batch,
                    "dim": shape.dim,
                    "state": shape.state,
                    "repeats": options.repeats,
                    "clock": options.clock,
                }
                rows.append(row)
    return rows


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows that the options ask for, printed as they are ready.

    Raises:
        ValueError: for lengths that are no positive integers.
    """
    text = "2048,8192,32768,131072" if options.scaling else options.lengths
    if options.scaling:
        options.no_peers, options.batch = True, 1
    lengths = positive_integers("--lengths", text)
    shapes = [Shape(options.batch, length, options.dim, options.state) for length in lengths]
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    heading = (
        f"batch {options.batch}, width {options.dim}, fp32, {measure.machine(device)}, {options.threads} thread(s), "
        f"torch {torch.__version__}"
    )
    rows, left_out = [], []

    def tell(line: str) -> None:
        left_out.append(line)
        measure.say(line)

    for name in options.op or sorted(CASES):
        part = bench_case(CASES[name], shapes, options, tell)
        show(part, COLUMNS, title=f"{name}: {heading}", group=("pass", "length"))
        rows += part
    stamped = [
        row | {"machine": measure.machine(device), "threads": options.threads, "torch": torch.__version__}
        for row in rows
    ]
    if options.csv:
        write_csv(stamped, options.csv)
        print(options.csv)
    if options.markdown:
        method = f"{METHOD}\n\n    {command('ops', options)}"
        columns = ("op", "pass", "length", "implementation", "median_ms", "versus", *COLUMNS[4:])
        write_markdown(stamped, columns, options.markdown, title=f"Ops: {heading}", method=method, notes=left_out)
        print(options.markdown)
    return stamped
