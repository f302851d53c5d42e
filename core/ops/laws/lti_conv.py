"""The laws of lti_conv."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.core.ops.laws.declaration import ALL, Arguments, Laws, Sample
from sinuous.core.ops.lti_conv import FAMILY, lti_conv


def sample_of(width: int, modes: int, rank: int, discretization: str, *, full: bool, shared: bool = False) -> Sample:
    def sample(random: Callable[..., Tensor], batch: int, length: int, sequences: int) -> Arguments:
        shape = (modes, 2) if shared else (width, modes, 2)
        decay, frequency = random(*shape).unbind(-1)
        arguments = {
            "u": random(batch, length, width),
            "dt": 0.1 * F.softplus(random(width)),
            "A": torch.stack([-F.softplus(decay), 5 * frequency], -1),
            "B": random(*shape),
            "C": random(width, modes, 2),
            "discretization": discretization,
        }
        low_rank = {"P": random(rank, *shape)} if rank else {}
        extras = {"D": random(width), "initial_state": random(sequences, width, modes, 2)}
        return {**arguments, **low_rank, **(extras if full else {})}

    return sample


LAWS = Laws(
    family=FAMILY,
    call=lti_conv,
    variants={
        "plain": sample_of(6, 4, 0, "zoh", full=False),
        "full": sample_of(7, 5, 1, "bilinear", full=True),
        "diagonal": sample_of(19, 16, 0, "zoh", full=True),
        "bilinear": sample_of(5, 3, 0, "bilinear", full=True, shared=True),
        "shared": sample_of(6, 4, 2, "bilinear", full=True, shared=True),
        "one_mode": sample_of(1, 1, 1, "bilinear", full=True),
    },
    wide=sample_of(200, 16, 0, "zoh", full=True),
    time=("u",),
    holds=ALL,
    state="D N",
    parallel_cost="D (2 N + C)",
    step_cost="3 D N",
    refusals={
        r"u must have shape \[B, T, D\]": lambda a: {**a, "u": a["u"][0]},
        r"dt must have shape \[7\]": lambda a: {**a, "dt": a["dt"][:3]},
        r"A must have shape \[D, M, 2\] or \[M, 2\]": lambda a: {**a, "A": a["A"][..., 0]},
        r"B must have shape \[7, 5, 2\]": lambda a: {**a, "B": a["B"][:, :2]},
        r"C must have shape \[5, 2\]": lambda a: {**a, "C": a["C"][0, :2]},
        r"pass torch.view_as_real\(B\)": lambda a: {**a, "B": torch.view_as_complex(a["B"])},
        r"P must have shape \[R, D, M, 2\] or \[R, M, 2\]": lambda a: {**a, "P": a["P"][0, 0]},
        r"P must have shape \[1, 7, 5, 2\]": lambda a: {**a, "P": a["P"][:, :2]},
        r"with P pass discretization='bilinear'": lambda a: {**a, "discretization": "zoh"},
        r"discretization must be 'zoh' or 'bilinear'": lambda a: {**a, "discretization": "euler"},
        r"D must have shape": lambda a: {**a, "D": a["D"][:1]},
        r"initial_state must have shape": lambda a: {**a, "initial_state": a["initial_state"][:1]},
        r"packed input has batch size 1": lambda a: {**a, "cu_seqlens": torch.tensor([0, 5])},
    },
)
