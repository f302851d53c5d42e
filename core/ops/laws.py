"""What each op declares of itself: sample inputs, the laws that hold, and the inputs it refuses.

The shared test runs every law on every form; a family without an entry here fails it. `sinuous info kernels` and the
documentation read the same table.

Laws:
    split: a call equals the calls on its two halves with the state carried over.
    step: T calls of one step equal one call.
    reverse: `reverse=True` equals flip, call, flip.
    packed: packed sequences equal the separate calls.
    linear: total allocation grows linearly with T, backward too, and no tensor of T × state size is made.
    isolation: a NaN in one row of the batch reaches no other row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.core.ops.causal_conv1d import causal_conv1d
from sinuous.core.ops.family import FAMILIES, Family
from sinuous.core.ops.selective_scan import selective_scan

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Laws:
    """The declaration of one op.

    Attributes:
        family: the registered family.
        call: its public function.
        variants: name -> sample(random, batch, length, sequences) -> keyword arguments in float64, where `random` is a
            function of a shape and `sequences` is the number of states to carry.
        time: arguments whose axis 1 is time.
        holds: names of the laws that hold.
        refusals: a piece of the error message -> a change to valid arguments that must raise it as a ValueError.
        bf16: relative RMS bound on outputs and on gradients for bf16 inputs, as measured.
    """

    family: Family
    call: Callable[..., Any]
    variants: dict[str, Callable[[Callable[..., Tensor], int, int, int], Arguments]]
    time: tuple[str, ...]
    holds: frozenset[str]
    refusals: dict[str, Callable[[Arguments], Arguments]] = field(default_factory=dict)
    bf16: tuple[float, float] = (5e-3, 2e-2)


ALL = frozenset({"split", "step", "reverse", "packed", "linear", "isolation"})


def _selective_scan_sample(width: int, state: int, groups: int | None, full: bool) -> Callable[..., Arguments]:
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


def _causal_conv1d_sample(width: int, taps: int, full: bool, activation: str | None) -> Callable[..., Arguments]:
    def sample(random: Callable[..., Tensor], batch: int, length: int, sequences: int) -> Arguments:
        arguments = {"x": random(batch, length, width), "weight": random(width, taps), "activation": activation}
        extras = {"bias": random(width), "initial_state": random(sequences, taps - 1, width)}
        return {**arguments, **extras} if full else arguments

    return sample


LAWS: dict[str, Laws] = {
    "selective_scan": Laws(
        family=FAMILIES["selective_scan"],
        call=selective_scan,
        variants={
            "plain": _selective_scan_sample(6, 4, None, full=False),
            "full": _selective_scan_sample(19, 16, None, full=True),
            "groups": _selective_scan_sample(10, 3, 2, full=True),
            "one_channel": _selective_scan_sample(1, 1, None, full=True),
        },
        time=("u", "dt", "B", "C", "z"),
        holds=ALL,
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
    ),
    "causal_conv1d": Laws(
        family=FAMILIES["causal_conv1d"],
        call=causal_conv1d,
        variants={
            "plain": _causal_conv1d_sample(6, 4, full=False, activation=None),
            "full": _causal_conv1d_sample(19, 4, full=True, activation="silu"),
            "widest": _causal_conv1d_sample(5, 8, full=True, activation="silu"),
            "one_tap": _causal_conv1d_sample(1, 1, full=True, activation=None),
        },
        time=("x",),
        holds=ALL,
        refusals={
            r"x must have shape \[B, T, D\]": lambda a: {**a, "x": a["x"][0]},
            r"weight must have shape \[D, W\].*squeeze": lambda a: {**a, "weight": a["weight"][:, None]},
            r"1 ≤ W ≤ 8 \(got \[19, 9\]\)": lambda a: {**a, "weight": a["weight"].new_zeros(19, 9)},
            r"bias must have shape \[19\]": lambda a: {**a, "bias": a["bias"][:3]},
            r"activation must be 'silu' or None": lambda a: {**a, "activation": "gelu"},
            r"x must be real floating point": lambda a: {**a, "x": a["x"].long()},
            r"initial_state must have shape": lambda a: {**a, "initial_state": a["initial_state"][:, :1]},
        },
    ),
}
