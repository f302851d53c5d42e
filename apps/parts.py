"""A verb that runs one of several modules, each with `add_arguments(parser)` and `run(options)`."""

from __future__ import annotations

import argparse
import difflib
import inspect
from collections.abc import Callable, Mapping

from sinuous.core.domains import Part


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults that say something, and the lines of a docstring as they are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False or "default" in (action.help or "")
        return action.help if silent else super()._get_help_string(action)


def run_part(
    verb: str,
    description: str,
    parts: Mapping[str, Part],
    argv: list[str],
    check: Callable[[argparse.Namespace], None] | None = None,
) -> int:
    """Run the part that `argv` names with the options behind its name; the other parts are not imported.

    Args:
        verb: of the command line.
        description: of the verb.
        parts: by name.
        argv: arguments of the verb.
        check: called with the options before the part runs.
    """
    chosen = next((word for word in argv if not word.startswith("-")), None)
    if chosen is not None and chosen not in parts:
        near = difflib.get_close_matches(chosen, parts, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(parts)}"
        raise ValueError(f"there is no {verb} {chosen!r}; {hint}")
    parser = argparse.ArgumentParser(prog=f"sinuous {verb}", description=description)
    commands = parser.add_subparsers(dest="what", required=True, metavar="NAME")
    for name, part in parts.items():
        command = commands.add_parser(name, help=part.summary, formatter_class=_Help)
        if name == chosen:
            module = part.load()
            command.description = inspect.getdoc(module)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    options = parser.parse_args(argv)
    if check is not None:
        check(options)
    options.run(options)
    return 0
