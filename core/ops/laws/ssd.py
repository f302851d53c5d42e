"""The laws of ssd."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.core.ops.laws.declaration import ALL, Arguments, Laws, Sample
from sinuous.core.ops.ssd import FAMILY, ssd


def sample_of(groups: int, heads: int, keys: int, values: int, decay: str) -> Sample:
    def sample(random: Callable[..., Tensor], batch: int, length: int, sequences: int) -> Arguments:
        arguments = {
            "q": random(batch, length, groups, keys),
            "k": random(batch, length, groups, keys),
            "v": random(batch, length, heads, values),
        }
        if decay == "none":
            return arguments
        shape = (heads,) if decay == "constant" else (batch, length, heads)
        state = random(sequences, heads, keys, values)
        return {**arguments, "log_decay": F.logsigmoid(random(*shape)), "initial_state": state}

    return sample


LAWS = Laws(
    family=FAMILY,
    call=ssd,
    variants={
        "plain": sample_of(3, 3, 4, 6, "none"),
        "full": sample_of(2, 4, 16, 12, "steps"),
        "constant": sample_of(2, 2, 5, 3, "constant"),
        "one_channel": sample_of(1, 1, 1, 1, "steps"),
    },
    wide=sample_of(2, 6, 128, 96, "steps"),
    time=("q", "k", "v", "log_decay"),
    holds=ALL,
    state="K V",
    parallel_cost="C (K + V) + 2 K V",
    step_cost="3 K V",
    refusals={
        r"q must have shape \[B, T, H, K\]": lambda a: {**a, "q": a["q"][0]},
        r"k must have shape \[2, 5, 2, 16\]": lambda a: {**a, "k": a["k"][..., :3]},
        r"v must have shape \[2, 5, H, V\]": lambda a: {**a, "v": a["v"][:1]},
        r"v has 3 heads and q has 2; v needs a multiple": lambda a: {**a, "v": a["v"][:, :, :3]},
        r"log_decay must have shape \[2, 5, 4\]": lambda a: {**a, "log_decay": a["log_decay"][..., :2]},
        r"log_decay must be ≤ 0 .*pass logsigmoid": lambda a: {**a, "log_decay": -a["log_decay"]},
        r"initial_state must have shape": lambda a: {**a, "initial_state": a["initial_state"][:1]},
        r"q must be real floating point": lambda a: {**a, "q": a["q"].long()},
        r"packed input has batch size 1": lambda a: {**a, "cu_seqlens": torch.tensor([0, 5])},
    },
)
