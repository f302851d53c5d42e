"""The laws of mlstm."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sinuous.core.ops.laws.declaration import ALL, Arguments, Laws, Sample
from sinuous.core.ops.mlstm import FAMILY, mlstm


def sample_of(heads: int, keys: int, values: int, *, state: bool = True, **options: object) -> Sample:
    def sample(random: Callable[..., Tensor], batch: int, length: int, sequences: int) -> Arguments:
        arguments: Arguments = {
            "q": random(batch, length, heads, keys),
            "k": random(batch, length, heads, keys),
            "v": random(batch, length, heads, values),
            "input_gate": random(batch, length, heads) - 1,
            "forget_gate": random(batch, length, heads) + 2,
        }
        if state:
            C, n, m = (sequences, heads, keys, values), (sequences, heads, keys), (sequences, heads)
            arguments["initial_state"] = (random(*C), random(*n), random(*m))
        return {**arguments, **options}

    return sample


def _with_state(a: Arguments, n: int, change: Callable[[Tensor], Tensor]) -> Arguments:
    return {**a, "initial_state": tuple(change(t) if i == n else t for i, t in enumerate(a["initial_state"]))}


LAWS = Laws(
    family=FAMILY,
    call=mlstm,
    variants={
        "plain": sample_of(3, 4, 6, state=False),
        "full": sample_of(2, 16, 12, scale=0.5, eps=1e-4),
        "sigmoid": sample_of(2, 5, 3, input_activation="sigmoid"),
        "unnormalised": sample_of(2, 6, 6, input_activation="sigmoid", normalize=False),
        "one_channel": sample_of(1, 1, 1),
    },
    wide=sample_of(4, 128, 96),
    time=("q", "k", "v", "input_gate", "forget_gate"),
    holds=ALL,
    state="K V + K + 1",
    parallel_cost="C (K + V) + 2 K V",
    step_cost="3 K V",
    refusals={
        r"q must have shape \[B, T, H, K\]": lambda a: {**a, "q": a["q"][0]},
        r"k must have shape \[2, 5, 2, 16\]": lambda a: {**a, "k": a["k"][..., :3]},
        r"v has 1 heads and q has 2; v needs as many": lambda a: {**a, "v": a["v"][:, :, :1]},
        r"input_gate must have shape \[2, 5, 2\]": lambda a: {**a, "input_gate": a["input_gate"][..., :1]},
        r"forget_gate must have shape \[2, 5, 2\]": lambda a: {**a, "forget_gate": a["forget_gate"][:, :1]},
        r"initial_C must have shape": lambda a: _with_state(a, 0, lambda t: t[:1]),
        r"initial_n must have shape": lambda a: _with_state(a, 1, lambda t: t[..., :3]),
        r"initial_m must have shape": lambda a: _with_state(a, 2, lambda t: t[..., None]),
        r"initial_state must be \(C, n, m\)": lambda a: {**a, "initial_state": a["initial_state"][:2]},
        r"input_activation must be 'exp' or 'sigmoid' \(got 'silu'\)": lambda a: {**a, "input_activation": "silu"},
        r"normalize must be True with input_activation='exp'": lambda a: {**a, "normalize": False},
        r"eps must be ≥ 0 \(got -1": lambda a: {**a, "eps": -1.0},
        r"q must be real floating point": lambda a: {**a, "q": a["q"].long()},
        r"packed input has batch size 1": lambda a: {**a, "cu_seqlens": torch.tensor([0, 5])},
    },
)
