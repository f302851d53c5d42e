"""`sinuous demo`: what trained models do, on samples that come with the package or on your own files."""

from __future__ import annotations

from sinuous.apps.parts import run_part
from sinuous.core.domains import domains


def main(argv: list[str]) -> int:
    """`sinuous demo DOMAIN [options]`; each domain's options are in its own `--help`.

    Raises:
        ValueError: for what cannot be shown.
    """
    demos = {name: domain.demo for name, domain in domains().items()}
    return run_part("demo", __doc__ or "", {name: part for name, part in demos.items() if part is not None}, argv)
