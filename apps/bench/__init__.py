"""`sinuous bench`: measurements that anyone can repeat, of ops and layers and of what domains offer."""

from __future__ import annotations

from pathlib import Path

from sinuous.apps.parts import run_part
from sinuous.core.domains import Part, domains, summary

OWN = ("ops", "recall")


def benches() -> dict[str, Part]:
    """All measurements by name: those of the core, then those of the domains."""
    parts = [Part(name, f"{__name__}.{name}", summary(Path(__file__).with_name(f"{name}.py"))) for name in OWN]
    parts += [part for domain in domains().values() for part in domain.benches]
    known: dict[str, Part] = {}
    for part in parts:
        known.setdefault(part.name, part)
    return known


def main(argv: list[str]) -> int:
    """Run `sinuous bench NAME ...`.

    Raises:
        ValueError: for arguments that cannot be met.
    """
    from sinuous.core.bench.options import check

    return run_part("bench", __doc__ or "", benches(), argv, check)
