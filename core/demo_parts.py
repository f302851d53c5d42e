"""What all parts of the demo need: a model with weights, bars of progress, checks of the files to write."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import nn

from sinuous.core.hub import load
from sinuous.core.weights import all_weights

PICTURES = (".png", ".pdf", ".svg")

Tell = Callable[[str, int, int], None]
"""Called with what is done, how much of it, and of how much."""


def model_with_weights(name: str | None, default: str) -> nn.Module:
    """A model by the name of its weights or from a folder, in evaluation mode.

    Raises:
        ValueError: if there are no such weights.
    """
    if name is None and default not in all_weights():
        raise ValueError(
            f"the weights {default} do not come with this version of the package; give a model of your own with "
            "--model, a folder that sinuous.save has written"
        )
    return load(name or default).eval()


@contextlib.contextmanager
def progress_bar() -> Iterator[Tell]:
    """A bar on the terminal, behind the name of what is done; gone in the end."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading", total=None)

        def tell(what: str, done: int, of: int) -> None:
            progress.update(task, description=what, completed=done, total=of)

        yield tell


def check_output(flag: str, path: Path | None, endings: Sequence[str], others: Sequence[Path | None] = ()) -> None:
    """Refuse a file that cannot be written as asked for.

    Args:
        flag: that names it.
        path: of the file; None passes.
        endings: that its name may have.
        others: files that it must not be.

    Raises:
        ValueError: naming the flag and what it must be.
    """
    if path is None:
        return
    if path.is_dir() or path.suffix.lower() not in [ending.lower() for ending in endings]:
        listed = " or ".join(endings) if len(endings) < 3 else f"{', '.join(endings[:-1])} or {endings[-1]}"
        raise ValueError(f"{flag} must be a file that ends in {listed}, such as found{endings[0]} (got {path})")
    if path.resolve() in [other.resolve() for other in others if other is not None]:
        raise ValueError(f"{flag} must not be a file that is read or written otherwise (got {path}); give another name")
