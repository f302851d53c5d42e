"""`sinuous demo`: what trained models do, on samples that come with the package or on your own files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def _parser() -> argparse.ArgumentParser:
    from sinuous.vision.demo import MODEL

    parser = argparse.ArgumentParser(prog="sinuous demo", description=__doc__)
    domains = parser.add_subparsers(dest="domain", required=True)
    vision = domains.add_parser("vision", help="classify pictures of clothing, and show the evidence for each answer")
    vision.add_argument(
        "--image", type=Path, nargs="+", metavar="PATH", help="your pictures (default: bundled samples)"
    )
    vision.add_argument("--out", type=Path, default=Path("sinuous_vision.png"), metavar="PNG")
    vision.add_argument("--model", default=MODEL, help=f"a Vision Mamba with weights (default: {MODEL})")
    vision.set_defaults(run=_vision)
    return parser


def _vision(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from sinuous.vision import demo

    if options.out.is_dir() or not options.out.suffix:
        raise ValueError(f"--out must be a picture's file, such as {options.out / 'seen.png'} (got {options.out})")
    result = demo.run(options.image, model=options.model)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    demo.draw(result, options.out)
    table = Table(title=f"{result.model} sees", title_justify="left")
    for column in ("picture", "answer", "probability", "next", "then"):
        table.add_column(column, justify="right" if column == "probability" else "left")
    for finding in result.findings:
        (answer, probability), *others = finding.answers
        right = finding.truth in (None, answer)
        rest = [f"{name} {p:.1%}" for name, p in others]
        table.add_row(finding.name, answer if right else f"[red]{answer}[/]", f"{probability:.1%}", *rest)
    Console().print(table)
    if result.note:
        print(result.note)
    print(options.out)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `sinuous demo <domain> ...`.

    Raises:
        ValueError: for what cannot be shown.
    """
    options = _parser().parse_args(argv)
    options.run(options)
    return 0
