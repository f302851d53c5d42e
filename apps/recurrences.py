"""The recurrences of the core as a page: every op from its declaration of laws, every mixer from the registry."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

from sinuous.apps import backends
from sinuous.core import mixers, tables
from sinuous.core.ops.laws import LAWS, Laws
from sinuous.core.tables import Row

WIDTH = 256
"""Width of the mixers whose parameters and states are counted."""

LENGTH = 64
"""Steps after which a state that grows is counted."""

_INTRODUCTION = """# Recurrences

Made by `sinuous info recurrences --markdown docs/recurrences.md` from the declarations in `core/ops/laws` and the
registry of mixers; a test keeps it so.

## Ops

`sinuous.ops.<name>`. State and costs are those of one sequence and, where there are heads, of one head. Costs are
multiplications per time step: in the parallel form, in chunks of C steps, and in a call of a single step. Every op has
exact gradients through its inputs and its initial and final state. `core/ops/laws/declaration.py` states the laws; the
form named first is the fastest.
"""

_MIXERS = f"""
## Mixers

`sinuous.core.mixers.build_mixer(name, dim)`, counted at dim = {WIDTH} with the default options. A state is counted for
one sequence, in numbers, after {LENGTH} steps.
"""


def ops() -> list[Row]:
    """One row per op, in the order of their names."""
    return [_op(name, LAWS[name]) for name in sorted(LAWS)]


def _op(name: str, laws: Laws) -> Row:
    module = inspect.getmodule(laws.family.recurrent)
    source = re.search(r"Sources?: (.+?)\.?\n\n", inspect.cleandoc(inspect.getdoc(laws.call) or "") + "\n\n", re.DOTALL)
    assert source is not None, f"the docstring of {name} names no source"
    return {
        "op": name,
        "equation": _first_display(inspect.getdoc(module) or ""),
        "state": laws.state,
        "cost, parallel": laws.parallel_cost,
        "cost, single step": laws.step_cost,
        "forms": ", ".join(laws.family.forms),
        "laws": ", ".join(sorted(laws.holds)),
        "source": " ".join(source.group(1).split()),
    }


def _first_display(doc: str) -> str:
    """The lines of the first indented block."""
    lines: list[str] = []
    for line in doc.splitlines():
        if line.startswith("    "):
            lines.append(line.strip())
        elif lines and line.strip():
            break
    return "\n".join(line for line in lines if line)


def all_mixers() -> list[Row]:
    """One row per mixer, in the order of their names."""
    return [_mixer(name) for name in mixers.list_mixers()]


def _mixer(name: str) -> Row:
    cls = mixers.mixer_class(name)
    torch.manual_seed(0)
    mixer = mixers.build_mixer(name, WIDTH).eval()
    used = backends.of_model(mixer, torch.zeros(1, 2, WIDTH))
    paragraph = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())
    described = re.sub(r" \([^()]*arXiv[^()]*\)", "", re.split(r"(?<!et al)\.(?: |$)", paragraph)[0])
    papers = _papers(paragraph) or _papers(inspect.getdoc(inspect.getmodule(cls)))
    state: int | None = None
    if cls.causal:
        with torch.no_grad():
            _, carried = mixer.prefill(torch.zeros(1, LENGTH, WIDTH), mixer.initial_state(1))
        state = sum(t.numel() for t in tree_leaves(carried))
    return {
        "mixer": name,
        "description": described,
        "ops": ", ".join(used) or "attention",
        "state": "looks both ways" if state is None else f"{state:,}" + ("" if cls.constant_state else ", grows"),
        "parameters": f"{sum(p.numel() for p in mixer.parameters()):,}",
        "source": ", ".join(f"arXiv {number}" for number in papers),
    }


def _papers(doc: str | None) -> list[str]:
    return list(dict.fromkeys(re.findall(r"\b\d{4}\.\d{5}\b", doc or "")))


def show() -> None:
    """Print both tables."""
    for title, rows in (("ops", ops()), ("mixers", all_mixers())):
        tables.show(rows, list(rows[0]), title=title, group=list(rows[0])[:1])


def markdown() -> str:
    """The page."""
    return _INTRODUCTION + "\n" + _table(ops()) + _MIXERS + "\n" + _table(all_mixers())


def write(path: Path) -> None:
    """Write the page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(markdown())


def _table(rows: list[Row]) -> str:
    cells = [{column: _cell(column, text) for column, text in row.items()} for row in rows]
    return tables.markdown_table(cells, list(rows[0]))


def _cell(column: str, text: str) -> str:
    text = text.replace("|", "\\|")
    if column == "equation":
        return "<br>".join(f"`{re.sub(' {2,}', '   ', line)}`" for line in text.splitlines())
    if column in ("op", "mixer", "cost, parallel", "cost, single step"):
        return f"`{text}`"
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)
