"""Registers, spills and shared memory of the Triton kernels, read off compiled code without a GPU.

    python tools/aot_table.py                       writes docs/benchmarks/aot.md
    python tools/aot_table.py --check               compiles and checks only
    python tools/aot_table.py --only "ssd bf16"     prints the rows of some cases

The launches are those the ops make: `forward` and `backward` are called on meta tensors, which have shapes and no
data, and every kernel launch is recorded and compiled for each target instead of run. A launch fails the check if it
spills, asks for more shared memory than its target has, or reads scratch memory in another layout than it wrote it in,
so that threads would have to wait for each other's stores.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import triton
from aot_cases import cases
from aot_compile import TARGETS, cost

ROOT = Path(__file__).resolve().parent.parent
SIZES = ("BT", "BD", "BN", "BW", "BH", "BK", "BV", "KEYS", "ADJOINT", "GRADIENT")
"""Compile-time arguments that the table shows."""


def table(only: str) -> tuple[list[str], list[str]]:
    """Rows of the Markdown table, and what breaks a limit."""
    rows, broken = [], []
    for case, launches in cases():
        for launch in launches if only in case else ():
            described = ", ".join(f"{k} {launch.arguments[k]}" for k in SIZES if k in launch.arguments)
            cells = []
            for name, (target, limit) in TARGETS.items():
                found = cost(launch, target)
                cells.append(f"{found.registers} / {found.spilled} / {found.shared / 1024:.1f}")
                what = f"{case}, {launch.kernel.__name__} on {name}"
                if found.spilled:
                    broken.append(f"{what}: spills {found.spilled} bytes")
                if "scratch" in launch.arguments and found.layouts != 1:
                    broken.append(f"{what}: accesses scratch memory in {found.layouts} layouts")
                if found.shared > limit * 1024:
                    broken.append(f"{what}: needs {found.shared} bytes of shared memory of {limit} KiB")
            row = f"| {case} | {launch.kernel.__name__} | {described} | {launch.options['num_warps']} | "
            rows.append(row + " | ".join(cells) + " |")
    # A backward pass may launch what the forward pass did.
    return list(dict.fromkeys(rows)), broken


def main() -> int:
    """Compile every configuration, write the table, and fail where one breaks a limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks" / "aot.md")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="check only the cases that name TEXT; writes nothing"
    )
    options = parser.parse_args()
    rows, broken = table(options.only)
    head = " | ".join(TARGETS)
    page = [
        "# Triton kernels, compiled ahead of time",
        "",
        "Registers of a thread / bytes spilled to its stack / KiB of shared memory of a program. On gfx942 the first",
        "figure is vector registers. D = 768 or 16 heads, T = 4096 (256 where B = 256, which takes the serial form;",
        "4 heads, T = 1024, B = 8 of cells); all optional arguments present. Nothing here was timed.",
        "",
        f"torch {torch.__version__.split('+')[0]}, triton {triton.__version__}: `python tools/aot_table.py`.",
        "",
        f"| case | kernel | block | warps | {head} |",
        "|" + "---|" * (4 + len(TARGETS)),
        *rows,
    ]
    if not (options.check or options.only):
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text("\n".join(page) + "\n")
    if options.only:
        print("\n".join(page[-len(rows) - 2 :]) if rows else f"no case has {options.only!r} in its name")
    for line in broken:
        print(line, file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
