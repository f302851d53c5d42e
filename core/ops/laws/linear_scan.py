"""The laws of linear_scan."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sinuous.core.ops.laws.declaration import ALL, Arguments, Laws, Sample
from sinuous.core.ops.linear_scan import FAMILY, linear_scan


def sample_of(width: int, *, full: bool, constant: bool = False, complex_: bool = False) -> Sample:
    def sample(random: Callable[..., Tensor], batch: int, length: int, sequences: int) -> Arguments:
        def draw(*shape: int) -> Tensor:
            return torch.complex(random(*shape), random(*shape)) if complex_ else random(*shape)

        a = draw(width) if constant else draw(batch, length, width)
        arguments = {"x": draw(batch, length, width), "a": a / (1 + a.abs())}
        extras = {"reset": random(batch, length) > 1.5, "initial_state": draw(sequences, width)}
        return {**arguments, **extras} if full else arguments

    return sample


LAWS = Laws(
    family=FAMILY,
    call=linear_scan,
    variants={
        "plain": sample_of(6, full=False),
        "full": sample_of(19, full=True),
        "constant": sample_of(5, full=True, constant=True),
        "complex": sample_of(19, full=True, complex_=True),
        "complex_constant": sample_of(3, full=True, constant=True, complex_=True),
        "one_channel": sample_of(1, full=True),
    },
    wide=sample_of(200, full=True),
    time=("x", "a", "reset"),
    holds=ALL,
    state="1 per channel",
    parallel_cost="1 per channel",
    step_cost="1 per channel",
    refusals={
        r"x must have shape \[B, T, D\]": lambda a: {**a, "x": a["x"][0]},
        r"a must have shape \[2, 5, 19\]": lambda a: {**a, "a": a["a"][..., :3]},
        r"a must have shape \[19\]": lambda a: {**a, "a": a["a"][0, 0, :3]},
        r"both must be real or both complex; pass x.to": lambda a: {**a, "a": a["a"].to(torch.complex64)},
        r"x must be real or complex": lambda a: {**a, "x": a["x"].long()},
        r"reset must be bool.*reset.bool": lambda a: {**a, "reset": a["reset"].int()},
        r"reset must have shape \[2, 5\]": lambda a: {**a, "reset": a["reset"][:1]},
        r"initial_state must have shape": lambda a: {**a, "initial_state": a["initial_state"][:1]},
        r"packed input has batch size 1": lambda a: {**a, "cu_seqlens": torch.tensor([0, 5])},
    },
)
