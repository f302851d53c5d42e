"""`sinuous models`: what there is to build, with sizes, inputs, weights and measured scores."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console
from rich.table import Table

import sinuous
from sinuous.core.domains import domains
from sinuous.core.registry import ModelInfo


def main(argv: list[str]) -> int:
    """`sinuous models [PATTERN] [--domain DOMAIN] [--pretrained]`."""
    names = ", ".join(domains())
    parser = argparse.ArgumentParser(prog="sinuous models", description="List the models.")
    parser.add_argument("pattern", nargs="?", default="", help="a glob that the whole name must match, such as 'vim*'")
    parser.add_argument("--domain", help=f"only those of this domain: {names}")
    parser.add_argument("--pretrained", action="store_true", help="only those that come with weights")
    options = parser.parse_args(argv)
    infos, reasons = [], {}
    for name in sinuous.list_models(options.pattern, domain=options.domain):
        try:
            info = sinuous.model_info(name)
        except ImportError as error:  # of a package of an extra
            reasons[name] = str(error)
            continue
        if info.weights or not options.pretrained:
            infos.append(info)
    for reason in dict.fromkeys(reasons.values()):
        names_of = ", ".join(name for name, why in reasons.items() if why == reason)
        print(f"left out: {names_of} ({reason})", file=sys.stderr)
    if reasons and not infos:
        return 1
    if options.domain and not sinuous.list_models(domain=options.domain):
        raise ValueError(f"there is no model of the domain {options.domain!r}; the domains are {names}")
    if not infos:
        asked = " ".join(filter(None, (options.pattern, options.domain, "with weights" if options.pretrained else "")))
        raise ValueError(
            f"no model matches {asked!r}; `sinuous models` alone lists all, and '*' stands for any letters"
        )
    Console().print(table(infos))
    return 0


def table(infos: list[ModelInfo]) -> Table:
    """One row per model."""
    drawn = Table(pad_edge=False)
    drawn.add_column("model", no_wrap=True)
    drawn.add_column("domain")
    drawn.add_column("parameters", justify="right", no_wrap=True)
    drawn.add_column("input", no_wrap=True)
    drawn.add_column("weights")
    drawn.add_column("score")
    drawn.add_column("paper")
    for info in infos:
        drawn.add_row(
            info.name,
            info.domain,
            f"{info.params:,}",
            "×".join(map(str, info.input_size or ())),
            ", ".join(info.weights),
            scores(info),
            (info.paper or "").rpartition(", ")[2],  # its number; the title is in sinuous.model_info(name)
        )
    return drawn


def scores(info: ModelInfo) -> str:
    """Measured scores of a model's weights on the test set, each under its name; empty where nothing was measured."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in info.scores.items())
