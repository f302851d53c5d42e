"""Marks, packed sequences, gates and the comparison that the tests of Triton kernels in the interpreter share."""

from __future__ import annotations

import math

import pytest
import torch
from parity import Arguments, assert_close, cast, draw, run_with_gradients
from torch import Tensor

from sinuous.core.ops.laws import Laws
from sinuous.kernels.triton import INTERPRETED

MARKS = [
    pytest.mark.interpret,
    pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 in the environment"),
]

BOUNDS = [0, 0, 5, 64, 64, 127, 128, 130]
"""Empty sequences first and within, boundaries on and off the edge of a chunk, sequences of one and two steps."""

GATES = {
    "none": lambda z: 0 * z,
    "-20 each step": lambda z: torch.full_like(z, -20.0),
    "beyond every exponent": lambda z: -200 * z.abs(),
    "strong beside none": lambda z: torch.where(z > 1, -200 * z.abs(), -0.01 * z.abs()),
    "resets of single channels": lambda z: torch.where(z > 1.5, -math.inf, -0.1 * z.abs()),
    "resets of all channels": lambda z: torch.where(z[..., :1] > 1, -math.inf, -0.1 * z.abs()),
}
"""Logarithms of decays per channel that no single scale can hold, from normal noise."""


def single(laws: Laws, variant: str, batch: int, length: int, sequences: int | None = None) -> Arguments:
    """Sample arguments in single precision."""
    return cast(draw(laws, variant, batch, length, sequences), torch.float32)


def compare(laws: Laws, arguments: Arguments, bound: float = 1e-4) -> dict[str, Tensor]:
    """Outputs and gradients of the Triton form, once they are those of the definition in double precision."""
    wanted = run_with_gradients(laws, "recurrent", cast(arguments, torch.float64))
    found = run_with_gradients(laws, "triton", arguments)
    assert_close(found, wanted, bound)
    return found
