"""The laws of selective_scan."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.core.ops.laws.declaration import ALL, Arguments, Laws
from sinuous.core.ops.selective_scan import FAMILY, selective_scan


def sample_of(width: int, state: int, groups: int | None, full: bool) -> Callable[..., Arguments]:
    def sample(random: Callable[..., Tensor], batch: int, length: int, sequences: int) -> Arguments:
        shape = (batch, length, state) if groups is None else (batch, length, groups, state)
        arguments = {
            "u": random(batch, length, width),
            "dt": random(batch, length, width),
            "A": -F.softplus(random(width, state)),
            "B": random(*shape),
            "C": random(*shape),
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
    call=selective_scan,
    variants={
        "plain": sample_of(6, 4, None, full=False),
        "full": sample_of(19, 16, None, full=True),
        "groups": sample_of(10, 3, 2, full=True),
        "one_channel": sample_of(1, 1, None, full=True),
    },
    wide=sample_of(200, 16, None, full=True),
    time=("u", "dt", "B", "C", "z"),
    holds=ALL,
    state="D N",
    parallel_cost="4 D N",
    step_cost="4 D N",
    refusals={
        r"dt must have shape \[2, 5, 19\]": lambda a: {**a, "dt": a["dt"][:, :, :3]},
        r"u must have shape \[B, T, D\]": lambda a: {**a, "u": a["u"][0]},
        r"A must have shape \[D, N\]": lambda a: {**a, "A": a["A"].T},
        r"A must be ≤ 0 .*pass -exp\(A_log\)": lambda a: {**a, "A": -a["A"]},
        r"B and C must have the same shape": lambda a: {**a, "B": a["B"][:, :, None]},
        r"groups, which do not divide": lambda a: {**a, "B": a["B"][:, :, None].expand(-1, -1, 4, -1)},
        r"z must be real floating point .*complex": lambda a: {**a, "z": a["z"].to(torch.complex64)},
        r"initial_state must have shape": lambda a: {**a, "initial_state": a["initial_state"][:1]},
        r"packed input has batch size 1": lambda a: {**a, "cu_seqlens": torch.tensor([0, 5])},
        r"cu_seqlens must be int32 or int64": lambda a: {**a, "cu_seqlens": torch.tensor([0.0, 5.0])},
        r"backend must be one of": lambda a: {**a, "backend": "cuda"},
    },
)
