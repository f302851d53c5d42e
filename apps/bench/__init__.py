"""`sinuous bench`: measurements that anyone can repeat, of ops, backbones, what layers learn and how models write."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def _parser() -> argparse.ArgumentParser:
    from sinuous.apps.bench import backbones, generation, ops, recall

    parser = argparse.ArgumentParser(prog="sinuous bench", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    for name, module in (("ops", ops), ("backbones", backbones), ("recall", recall), ("generation", generation)):
        command = commands.add_parser(
            name, help=(module.__doc__ or "").split(": ", 1)[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `sinuous bench <what> ...`.

    Raises:
        ValueError: for arguments that cannot be met.
    """
    from sinuous.apps.bench.options import check

    options = _parser().parse_args(argv)
    check(options)
    options.run(options, lambda line: print(line, file=sys.stderr))
    return 0
