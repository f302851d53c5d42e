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
    """Run `sinuous bench <what> ...`; 0 on success, 2 for arguments that cannot be met."""
    options = _parser().parse_args(argv)
    try:
        options.run(options, lambda line: print(line, file=sys.stderr))
    except ValueError as error:
        print(f"sinuous bench {options.what}: {error}", file=sys.stderr)
        return 2
    return 0
