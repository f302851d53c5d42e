"""The laws of gla."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.core.ops.gla import FAMILY, gla
from sinuous.core.ops.laws.declaration import ALL, Arguments, Laws, Sample


def sample_of(heads: int, keys: int, values: int, *, state: bool, bonus: bool = False, of: str = "keys") -> Sample:
    def sample(random: Callable[..., Tensor], batch: int, length: int, sequences: int) -> Arguments:
        arguments: Arguments = {
            "q": random(batch, length, heads, keys),
            "k": random(batch, length, heads, keys),
            "v": random(batch, length, heads, values),
            "log_decay": F.logsigmoid(random(batch, length, heads, keys if of == "keys" else values) + 1),
            "decay_of": of,
        }
        if bonus:
            arguments["bonus"] = random(heads, keys)
        if state:
            arguments["initial_state"] = random(sequences, heads, keys, values)
        return arguments

    return sample


LAWS = Laws(
    family=FAMILY,
    call=gla,
    variants={
        "plain": sample_of(3, 4, 6, state=False),
        "full": sample_of(2, 16, 12, state=True, bonus=True),
        "inclusive": sample_of(2, 16, 12, state=True),
        "values": sample_of(2, 5, 7, state=True, of="values"),
        "one_channel": sample_of(1, 1, 1, state=True),
    },
    wide=sample_of(3, 128, 96, state=True, bonus=True),
    time=("q", "k", "v", "log_decay"),
    holds=ALL,
    state="K V",
    parallel_cost="C (K + V) + 2 K V",
    step_cost="3 K V",
    refusals={
        r"q must have shape \[B, T, H, K\]": lambda a: {**a, "q": a["q"][0]},
        r"k must have shape \[2, 5, 2, 16\]": lambda a: {**a, "k": a["k"][..., :3]},
        r"v has 1 heads and q has 2": lambda a: {**a, "v": a["v"][:, :, :1]},
        r"log_decay must have shape \[2, 5, 2, 16\].*key channel": lambda a: {**a, "log_decay": a["log_decay"][..., 0]},
        r"log_decay must be ≤ 0 .*pass logsigmoid": lambda a: {**a, "log_decay": -a["log_decay"]},
        r"bonus must have shape \[2, 16\]": lambda a: {**a, "bonus": a["bonus"][:1]},
        r"bonus goes with decay_of='keys'": lambda a: {
            **a,
            "decay_of": "values",
            "log_decay": a["log_decay"][..., :12],
        },
        r"decay_of must be 'keys' or 'values'": lambda a: {**a, "decay_of": "heads"},
        r"initial_state must have shape": lambda a: {**a, "initial_state": a["initial_state"][:1]},
        r"packed input has batch size 1": lambda a: {**a, "cu_seqlens": torch.tensor([0, 5])},
    },
)
