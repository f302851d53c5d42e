"""`sinuous info`: versions and devices; `sinuous info kernels`: which backend computes which op here, and why;
`sinuous info recurrences`: every op and mixer of the core."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from sinuous.apps import backends, recurrences
from sinuous.apps.packages import installed
from sinuous.core.ops import dispatch


def main(argv: list[str]) -> int:
    """`sinuous info [kernels | recurrences]`."""
    parser = argparse.ArgumentParser(prog="sinuous info", description="What this machine can run.")
    parser.add_argument(
        "topic",
        nargs="?",
        choices=["kernels", "recurrences"],
        help="kernels: which backend computes which op, and why; recurrences: every op and mixer of the core",
    )
    parser.add_argument("--markdown", type=Path, help="write the recurrences to this file instead")
    parser.add_argument("--dtype", default="float32", help="the dtype asked about (default: float32)")
    options = parser.parse_args(argv)
    console = Console()
    if options.markdown is not None and options.topic != "recurrences":
        parser.error("--markdown goes with the topic recurrences")
    if options.topic is None:
        console.print(machine())
        return 0
    if options.topic == "recurrences":
        recurrences.show() if options.markdown is None else recurrences.write(options.markdown)
        return 0
    dtype = getattr(torch, options.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"--dtype must name a floating-point dtype of torch, such as bfloat16 (got {options.dtype!r})")
    for device in devices():
        console.print(kernels(device, dtype))
    console.print(
        f"The order is {' → '.join(dispatch.PREFERENCE)}; SINUOUS_BACKEND=NAME or sinuous.backend(NAME) asks for one."
    )
    return 0


def devices() -> list[torch.device]:
    """The CPU and, if there is one, the first GPU."""
    return [torch.device("cpu")] + ([torch.device("cuda", 0)] if torch.cuda.is_available() else [])


def machine() -> Table:
    """Versions, processors and threads."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("python", platform.python_version())
    for package, version in installed().items():
        table.add_row(package, version or "not installed")
    table.add_row("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    table.add_row("gpu", ", ".join(gpus) or "none that torch can use")
    return table


def kernels(device: torch.device, dtype: torch.dtype) -> Table:
    """Per family of ops the backend that would compute it on `device`, and why those before it cannot."""
    table = Table(title=f"{device}, {dtype}", title_justify="left")
    table.add_column("op", no_wrap=True)
    table.add_column("runs as", no_wrap=True)
    table.add_column("and not as")
    for family in backends.families():
        chosen = dispatch.choose(family.name, family.forms, "", device, dtype)
        better = dispatch.PREFERENCE[: dispatch.PREFERENCE.index(chosen)]
        reasons = {name: dispatch.unavailable(family.name, family.forms, name, device, dtype) for name in better}
        table.add_row(family.name, chosen, "\n".join(f"{name}: {reason}" for name, reason in reasons.items()))
    return table
