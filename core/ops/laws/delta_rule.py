"""The laws of delta_rule."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.core.ops.delta_rule import FAMILY, delta_rule
from sinuous.core.ops.laws.declaration import ALL, Arguments, Laws, Sample


def sample_of(heads: int, keys: int, values: int, *, factors: int | None = None, full: bool) -> Sample:
    def sample(random: Callable[..., Tensor], batch: int, length: int, sequences: int) -> Arguments:
        many = () if factors is None else (factors,)
        arguments = {
            "q": random(batch, length, heads, keys),
            "k": F.normalize(random(batch, length, *many, heads, keys), dim=-1),
            "v": random(batch, length, *many, heads, values),
            "beta": 0.1 + 1.8 * torch.sigmoid(random(batch, length, *many, heads)),
        }
        extras = {
            "log_decay": F.logsigmoid(random(batch, length, heads) + 1),
            "initial_state": random(sequences, heads, keys, values),
        }
        return {**arguments, **extras} if full else arguments

    return sample


LAWS = Laws(
    family=FAMILY,
    call=delta_rule,
    variants={
        "plain": sample_of(3, 4, 6, full=False),
        "full": sample_of(2, 16, 12, full=True),
        "product": sample_of(2, 5, 7, factors=2, full=True),
        "three_factors": sample_of(1, 4, 3, factors=3, full=False),
        "one_channel": sample_of(1, 1, 1, full=True),
    },
    wide=sample_of(3, 128, 96, full=True),
    time=("q", "k", "v", "beta", "log_decay"),
    holds=ALL,
    state="K V",
    parallel_cost="n (C (2 K + V) + 3 K V)",
    step_cost="4 n K V",
    refusals={
        r"q must have shape \[B, T, H, K\]": lambda a: {**a, "q": a["q"][0]},
        r"k must have shape \[2, 5, 2, 16\]": lambda a: {**a, "k": a["k"][..., :3]},
        r"k must have shape \[2, 5, 5, 2, 16\]": lambda a: {**a, "k": a["k"][:, None].expand(2, 3, 5, 2, 16)},
        r"v must have shape \[2, 5, 2, V\]": lambda a: {**a, "v": a["v"][:, :, :1]},
        r"beta must have shape \[2, 5, 2\]": lambda a: {**a, "beta": a["beta"][..., :1]},
        r"beta must lie in \[0, 2\] .*pass sigmoid": lambda a: {**a, "beta": a["beta"] * 3},
        r"log_decay must have shape \[2, 5, 2\]": lambda a: {**a, "log_decay": a["log_decay"][..., :1]},
        r"log_decay must be ≤ 0 .*pass logsigmoid": lambda a: {**a, "log_decay": -a["log_decay"]},
        r"initial_state must have shape": lambda a: {**a, "initial_state": a["initial_state"][:1]},
        r"packed input has batch size 1": lambda a: {**a, "cu_seqlens": torch.tensor([0, 5])},
    },
)
