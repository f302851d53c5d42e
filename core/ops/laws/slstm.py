"""The laws of slstm. Its time is sequential in every form: the output of a step stands inside the gates of the next."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sinuous.core.ops.laws.declaration import ALL, Arguments, Laws, Sample
from sinuous.core.ops.slstm import FAMILY, slstm


def sample_of(heads: int, width: int, *, state: bool = True, **options: object) -> Sample:
    def sample(random: Callable[..., Tensor], batch: int, length: int, sequences: int) -> Arguments:
        gates = random(batch, length, 4, heads, width)
        arguments: Arguments = {
            "gates": gates,
            "R": random(4, heads, width, width) / (2 * width**0.5),
            "bias": random(4, heads, width),
        }
        if state:
            y, c, n, m = (random(sequences, heads, width) for _ in range(4))
            # n is a sum of positive numbers. Units that were never written to have tests of their own: at them y jumps
            # and has no gradient to measure.
            arguments["initial_state"] = (y, c, n.abs() + 0.5, m)
        return {**arguments, **options}

    return sample


def _with_state(a: Arguments, n: int, change: Callable[[Tensor], Tensor]) -> Arguments:
    return {**a, "initial_state": tuple(change(t) if i == n else t for i, t in enumerate(a["initial_state"]))}


LAWS = Laws(
    family=FAMILY,
    call=slstm,
    variants={
        "plain": sample_of(3, 5, state=False),
        "full": sample_of(2, 19),
        "lstm": sample_of(2, 5, cell="lstm"),
        "gru": sample_of(2, 5, cell="gru"),
        "one_channel": sample_of(1, 1),
    },
    wide=sample_of(3, 40),
    time=("gates",),
    holds=ALL,
    state="4 D",
    parallel_cost="sequential",
    step_cost="4 D²",
    refusals={
        r"gates must have shape \[B, T, 4, H, D\]": lambda a: {**a, "gates": a["gates"][0]},
        r"in the order i, f, z, o \(got \[2, 5, 3": lambda a: {**a, "gates": a["gates"][:, :, :3]},
        r"R must have shape \[4, 2, 19, 19\]": lambda a: {**a, "R": a["R"][..., :3]},
        r"bias must have shape \[4, 2, 19\]": lambda a: {**a, "bias": a["bias"].flatten(1)},
        r"initial_y must have shape \[2, 2, 19\]": lambda a: _with_state(a, 0, lambda t: t[:1]),
        r"initial_c must have shape": lambda a: _with_state(a, 1, lambda t: t[..., :3]),
        r"initial_n must have shape": lambda a: _with_state(a, 2, lambda t: t[..., None]),
        r"initial_m must have shape": lambda a: _with_state(a, 3, lambda t: t[:, 0]),
        r"initial_state must be \(y, c, n, m\) \(got 2": lambda a: {**a, "initial_state": a["initial_state"][:2]},
        r"cell must be one of 'slstm', 'lstm', 'gru' \(got 'rnn'\)": lambda a: {**a, "cell": "rnn"},
        r"gates must be real floating point": lambda a: {**a, "gates": a["gates"].long()},
        r"packed input has batch size 1": lambda a: {**a, "cu_seqlens": torch.tensor([0, 5])},
    },
)
