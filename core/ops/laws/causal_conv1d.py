"""The laws of causal_conv1d."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sinuous.core.ops.causal_conv1d import FAMILY, causal_conv1d
from sinuous.core.ops.laws.declaration import ALL, Arguments, Laws


def sample_of(width: int, taps: int, full: bool, activation: str | None) -> Callable[..., Arguments]:
    def sample(random: Callable[..., Tensor], batch: int, length: int, sequences: int) -> Arguments:
        arguments = {"x": random(batch, length, width), "weight": random(width, taps), "activation": activation}
        extras = {"bias": random(width), "initial_state": random(sequences, taps - 1, width)}
        return {**arguments, **extras} if full else arguments

    return sample


LAWS = Laws(
    family=FAMILY,
    call=causal_conv1d,
    variants={
        "plain": sample_of(6, 4, full=False, activation=None),
        "full": sample_of(19, 4, full=True, activation="silu"),
        "widest": sample_of(5, 8, full=True, activation="silu"),
        "one_tap": sample_of(1, 1, full=True, activation=None),
    },
    wide=sample_of(200, 4, full=True, activation="silu"),
    time=("x",),
    holds=ALL,
    state="D (W - 1)",
    parallel_cost="D W",
    step_cost="D W",
    refusals={
        r"x must have shape \[B, T, D\]": lambda a: {**a, "x": a["x"][0]},
        r"weight must have shape \[D, W\].*squeeze": lambda a: {**a, "weight": a["weight"][:, None]},
        r"1 ≤ W ≤ 8 \(got \[19, 9\]\)": lambda a: {**a, "weight": a["weight"].new_zeros(19, 9)},
        r"bias must have shape \[19\]": lambda a: {**a, "bias": a["bias"][:3]},
        r"activation must be 'silu' or None": lambda a: {**a, "activation": "gelu"},
        r"x must be real floating point": lambda a: {**a, "x": a["x"].long()},
        r"initial_state must have shape": lambda a: {**a, "initial_state": a["initial_state"][:, :1]},
    },
)
