"""The laws of dplr."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.core.ops.dplr import FAMILY, dplr
from sinuous.core.ops.laws.declaration import ALL, Arguments, Laws, Sample


def sample_of(heads: int, keys: int, values: int, *, state: bool, opposite: bool = True) -> Sample:
    """Make a and b opposite, as in the delta rules, or independent; both short, so that the state does not grow."""

    def sample(random: Callable[..., Tensor], batch: int, length: int, sequences: int) -> Arguments:
        shape = (batch, length, heads, keys)
        a = F.normalize(random(*shape), dim=-1)
        b = -a * (0.1 + 1.8 * torch.sigmoid(random(*shape))) if opposite else F.normalize(random(*shape), dim=-1) / 4
        arguments: Arguments = {
            "q": random(*shape),
            "k": random(*shape),
            "v": random(batch, length, heads, values),
            "log_decay": F.logsigmoid(random(*shape) + 1),
            "a": a if opposite else a / 4,
            "b": b,
        }
        if state:
            arguments["initial_state"] = random(sequences, heads, keys, values)
        return arguments

    return sample


LAWS = Laws(
    family=FAMILY,
    call=dplr,
    variants={
        "plain": sample_of(3, 4, 6, state=False),
        "full": sample_of(2, 16, 12, state=True),
        "free": sample_of(2, 8, 5, state=True, opposite=False),
        "one_channel": sample_of(1, 1, 1, state=True),
    },
    wide=sample_of(3, 128, 96, state=True),
    time=("q", "k", "v", "log_decay", "a", "b"),
    holds=ALL,
    state="K V",
    parallel_cost="C (4 K + 3 V) + 4 K V",
    step_cost="5 K V",
    refusals={
        r"q must have shape \[B, T, H, K\]": lambda a: {**a, "q": a["q"][0]},
        r"k must have shape \[2, 5, 2, 16\]": lambda a: {**a, "k": a["k"][..., :3]},
        r"v has 1 heads and q has 2": lambda a: {**a, "v": a["v"][:, :, :1]},
        r"log_decay must have shape \[2, 5, 2, 16\].*key channel": lambda a: {**a, "log_decay": a["log_decay"][..., 0]},
        r"log_decay must be ≤ 0 .*pass logsigmoid": lambda a: {**a, "log_decay": -a["log_decay"]},
        r"a must have shape \[2, 5, 2, 16\].*reads the state": lambda a: {**a, "a": a["a"][:, :, :1]},
        r"b must have shape \[2, 5, 2, 16\].*is written": lambda a: {**a, "b": a["b"][..., :1]},
        r"b must be real floating point": lambda a: {**a, "b": a["b"].long()},
        r"initial_state must have shape": lambda a: {**a, "initial_state": a["initial_state"][:1]},
        r"packed input has batch size 1": lambda a: {**a, "cu_seqlens": torch.tensor([0, 5])},
    },
)
