"""The laws of additive_decay."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sinuous.core.ops.additive_decay import FAMILY, additive_decay
from sinuous.core.ops.laws.declaration import ALL, Arguments, Laws, Sample


def sample_of(
    heads: int, keys: int, values: int, *, state: bool = True, factor: bool = False, causal: bool = True
) -> Sample:
    def sample(random: Callable[..., Tensor], batch: int, length: int, sequences: int) -> Arguments:
        arguments: Arguments = {
            "q": random(batch, length, heads, keys),
            "k": random(batch, length, heads, keys),
            "v": random(batch, length, heads, values),
            "causal": causal,
        }
        if factor:
            arguments["factor"] = random(batch, length, heads, keys)
        if state:
            arguments["initial_state"] = (random(sequences, heads, keys, values), random(sequences, heads, keys))
        return arguments

    return sample


def _with_state(a: Arguments, n: int, change: Callable[[Tensor], Tensor]) -> Arguments:
    return {**a, "initial_state": tuple(change(t) if i == n else t for i, t in enumerate(a["initial_state"]))}


LAWS = Laws(
    family=FAMILY,
    call=additive_decay,
    variants={
        "plain": sample_of(3, 4, 6, state=False),
        "full": sample_of(2, 16, 12, factor=True),
        "causal": sample_of(2, 5, 7),
        "not_causal": sample_of(2, 5, 7, factor=True, causal=False),
        "fresh_not_causal": sample_of(3, 4, 2, state=False, causal=False),
        "one_channel": sample_of(1, 1, 1),
    },
    wide=sample_of(3, 128, 96, factor=True),
    time=("q", "k", "v", "factor"),
    holds=ALL,
    # Where every step sees all others, what a part gives is not what the whole does; states of parts merge all the
    # same, which is a law of tests/core/test_additive_decay.py.
    fails={"not_causal": frozenset({"split", "step"}), "fresh_not_causal": frozenset({"split", "step"})},
    state="K V + K",
    parallel_cost="C (K + V) + 2 K V",
    step_cost="3 K V",
    refusals={
        r"q must have shape \[B, T, H, K\]": lambda a: {**a, "q": a["q"][0]},
        r"k must have shape \[2, 5, 2, 16\]": lambda a: {**a, "k": a["k"][..., :3]},
        r"v has 1 heads and q has 2; v needs as many": lambda a: {**a, "v": a["v"][:, :, :1]},
        r"factor must have shape \[2, 5, 2, 16\]": lambda a: {**a, "factor": a["factor"][..., :1]},
        r"initial_S must have shape": lambda a: _with_state(a, 0, lambda t: t[:1]),
        r"initial_z must have shape": lambda a: _with_state(a, 1, lambda t: t[..., :3]),
        r"initial_state must be \(S, z\)": lambda a: {**a, "initial_state": a["initial_state"][:1]},
        r"k must be real floating point": lambda a: {**a, "k": a["k"].long()},
        r"packed input has batch size 1": lambda a: {**a, "cu_seqlens": torch.tensor([0, 5])},
    },
)
