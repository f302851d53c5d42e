"""How the threads of the process wait for each other, chosen before torch, and with it OpenMP's runtime, is loaded.

Small operations are so short that a thread waits for the others more often than it computes. GNU's OpenMP, which comes
with torch, lets it spin for some 15 ms before it sleeps. On a quiet machine the others are there at once. On one that
other programs keep busy, the thread that is waited for has often lost its core, and the one that spins keeps it from
getting another. A shorter spin costs nothing on the first and most of the loss is gone on the second; CHANGELOG.md has
the measured figures. The number of threads stays as it is, since sums over other parts differ in their last bits.
"""

from __future__ import annotations

import os
import sys

SPIN_COUNT = "10000"
WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""Variables by which GNU's OpenMP takes the way of waiting from its user."""


def choose_waiting() -> None:
    """Let threads that wait spin for about half a millisecond, unless the user has chosen or torch is loaded."""
    if "torch" not in sys.modules and not any(name in os.environ for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def waiting(count: int) -> str:
    """One line on how so many threads wait, and on what is faster where they wait in vain."""
    chosen = [f"{name}={os.environ[name]}" for name in WAITING if name in os.environ]
    return (
        f"{count} threads wait for each other as {' and '.join(chosen) or 'OpenMP does by default'}; on a machine that "
        "other programs keep busy OMP_NUM_THREADS=1 is faster"
    )
