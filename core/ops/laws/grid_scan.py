"""The laws of grid_scan."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sinuous.core.ops.grid_scan import FAMILY, grid_scan
from sinuous.core.ops.laws.declaration import Arguments, Laws, Sample


def sample_of(
    height: int, heads: int, keys: int, values: int, orientations: int, *, mode: str, full: bool = False
) -> Sample:
    def sample(random: Callable[..., Tensor], batch: int, length: int, sequences: int) -> Arguments:
        cells = (batch, length, height, heads)
        arguments: Arguments = {
            "q": random(*cells, keys),
            "k": random(*cells, keys),
            "v": random(*cells, values),
            "source": torch.sigmoid(random(*cells, orientations, 2)),
            "transition": torch.tanh(random(*cells, orientations, 2, 2)),
            "mark": torch.sigmoid(random(*cells, orientations, 2)),
            "mode": mode,
        }
        if full:
            arguments["direct"] = random(*cells)
            arguments["left"] = random(batch, height, heads, orientations, keys, values)
            arguments["up"] = random(batch, length, heads, orientations, keys, values)
        return arguments

    return sample


# Boundary states are two, and split and step go along two axes: tests/core/test_grid_scan.py has these laws, and the
# one on turning the grid, which is the reverse of either axis. Packed sequences have no grid.
LAWS = Laws(
    family=FAMILY,
    call=grid_scan,
    variants={
        "plain": sample_of(3, 2, 4, 6, 1, mode="P"),
        "full": sample_of(3, 2, 5, 4, 4, mode="D", full=True),
        "square": sample_of(9, 1, 3, 2, 2, mode="P", full=True),
        "one_cell_high": sample_of(1, 1, 1, 1, 1, mode="free"),
    },
    wide=sample_of(20, 3, 64, 48, 4, mode="P", full=True),
    time=("q", "k", "v", "source", "transition", "mark", "direct", "up"),
    holds=frozenset({"linear", "isolation"}),
    state="2 (X + Y) K V",
    parallel_cost="4 C K V + C² (K + V) + 2 C³ per orientation, in blocks of C · C",
    step_cost="8 K V per orientation",
    refusals={
        r"q must have shape \[B, X, Y, H, K\]": lambda a: {**a, "q": a["q"][0]},
        r"k must have shape \[2, 5, 3, 2, 5\]": lambda a: {**a, "k": a["k"][..., :3]},
        r"v must have shape \[2, 5, 3, 2, V\]": lambda a: {**a, "v": a["v"][:, :, :1]},
        r"mode must be one of 'P', 'D', 'free'": lambda a: {**a, "mode": "L"},
        r"orientations must be numbers from 0 to 3": lambda a: {**a, "orientations": (0, 1, 2, 4)},
        r"source must have shape \[2, 5, 3, 2, 3, 2\]": lambda a: {**a, "orientations": (0, 1, 2)},
        r"transition must have shape \[2, 5, 3, 2, 4, 2, 2\]": lambda a: {**a, "transition": a["transition"][:, :1]},
        r"mark must have shape \[2, 5, 3, 2, 4, 2\]": lambda a: {**a, "mark": a["mark"][..., :1]},
        r"direct must have shape \[2, 5, 3, 2\]": lambda a: {**a, "direct": a["direct"][..., 0]},
        r"left must have shape \[2, 3, 2, 4, 5, 4\]": lambda a: {**a, "left": a["up"]},
        r"up must have shape \[2, 5, 2, 4, 5, 4\]": lambda a: {**a, "up": a["left"]},
    },
)
