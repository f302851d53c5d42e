"""Rows as a table in the terminal and as CSV."""

from __future__ import annotations

import argparse
import csv
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


def cell(value: Any) -> str:
    """A value as the tables show it."""
    if value is None:
        return "-"
    if isinstance(value, float):
        if value != 0 and abs(value) < 1e-3:
            return f"{value:.1e}"
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def show(rows: Sequence[Row], columns: Sequence[str], *, title: str, group: Sequence[str]) -> None:
    """Print `columns` of the rows; a line separates rows that differ in a `group` column. Our own rows are bold."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        numeric = any(isinstance(row[column], int | float) for row in rows)
        table.add_column(column.replace("_", " "), justify="right" if numeric else "left")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        ends = following is not None and any(row[g] != following[g] for g in group)
        table.add_row(*(cell(row[c]) for c in columns), end_section=ends, style="bold" if row.get("ours") else None)
    console = Console()
    # A file or a pipe has no width to fit into.
    (console if console.is_terminal else Console(width=140)).print(table)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write the rows with a header; floats keep five significant digits, more than any timing has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{v:.5g}" if isinstance(v, float) else v for key, v in row.items()})


def write_markdown(
    rows: Sequence[Row], columns: Sequence[str], path: Path, *, title: str, method: str, notes: Sequence[str] = ()
) -> None:
    """Write a page with the table, how it was measured, and the command that measures it again."""
    head = [f"# {title}", "", method, "", *(f"- {note}" for note in notes), *([""] if notes else [])]
    table = markdown_table(
        [
            {c: f"**{cell(row[c])}**" if row.get("ours") and c == "median_ms" else cell(row[c]) for c in columns}
            for row in rows
        ],
        columns,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*head, table]))


def markdown_table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A table of cells that are text already."""
    head = ["| " + " | ".join(c.replace("_", " ") for c in columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*head, *("| " + " | ".join(row[c] for c in columns) + " |" for row in rows), ""])


def command(verb: str, options: argparse.Namespace) -> str:
    """The command line that `options` came from, without the places it wrote to."""
    words = [f"sinuous bench {verb}"]
    for name, value in vars(options).items():
        if name in ("run", "what", "csv", "markdown", "figure", "resume") or value is None or value is False:
            continue
        flag = "--" + name.replace("_", "-")
        values = value if isinstance(value, list) else [value]
        words += [flag if v is True else f"{flag} {shlex.quote(str(v))}" for v in values]
    return " ".join(words)
