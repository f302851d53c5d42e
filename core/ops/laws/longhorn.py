"""The laws of longhorn."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sinuous.core.ops.laws.declaration import ALL, Arguments, Laws
from sinuous.core.ops.longhorn import FAMILY, longhorn


def sample_of(width: int, state: int, full: bool) -> Callable[..., Arguments]:
    def sample(random: Callable[..., Tensor], batch: int, length: int, sequences: int) -> Arguments:
        arguments = {
            "x": random(batch, length, width),
            "dt": random(batch, length, width),
            "k": random(batch, length, state),
            "q": random(batch, length, state),
        }
        extras = {
            "D": random(width),
            "z": random(batch, length, width),
            "dt_bias": random(width),
            "initial_state": random(sequences, width, state),
        }
        return {**arguments, **extras} if full else arguments

    return sample


LAWS = Laws(
    family=FAMILY,
    call=longhorn,
    variants={
        "plain": sample_of(6, 4, full=False),
        "full": sample_of(19, 16, full=True),
        "one_number": sample_of(1, 1, full=True),
    },
    wide=sample_of(200, 16, full=True),
    time=("x", "dt", "k", "q", "z"),
    holds=ALL,
    state="D N",
    parallel_cost="4 D N",
    step_cost="4 D N",
    refusals={
        r"dt must have shape \[2, 5, 19\]": lambda a: {**a, "dt": a["dt"][:, :, :3]},
        r"x must have shape \[B, T, D\]": lambda a: {**a, "x": a["x"][0]},
        r"k must have shape \[2, 5, N\], one key for all channels": lambda a: {**a, "k": a["k"][:, :, None]},
        r"q must have shape \[2, 5, 16\]": lambda a: {**a, "q": a["q"][..., :8]},
        r"D must have shape \[19\]": lambda a: {**a, "D": a["D"][:3]},
        r"dt_bias must have shape \[19\]": lambda a: {**a, "dt_bias": a["dt_bias"][:, None]},
        r"z must be real floating point .*complex": lambda a: {**a, "z": a["z"].to(torch.complex64)},
        r"initial_state must have shape": lambda a: {**a, "initial_state": a["initial_state"][:1]},
        r"packed input has batch size 1": lambda a: {**a, "cu_seqlens": torch.tensor([0, 5])},
        r"cu_seqlens must be int32 or int64": lambda a: {**a, "cu_seqlens": torch.tensor([0.0, 5.0])},
        r"backend must be one of": lambda a: {**a, "backend": "cuda"},
    },
)
