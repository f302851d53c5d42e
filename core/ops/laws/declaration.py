"""Declaration of an op: sample inputs, the laws that hold, and the inputs it refuses.

The shared test runs every law on every form; a family without a declaration fails it. `sinuous info kernels` and the
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

from torch import Tensor

from sinuous.core.ops.family import Family

Arguments = dict[str, Any]


Sample = Callable[[Callable[..., Tensor], int, int, int], Arguments]
"""`(random, batch, length, sequences) -> keyword arguments` in float64, where `random` is a function of a shape and
`sequences` is the number of states to carry."""


@dataclass(frozen=True)
class Laws:
    """Declaration of one op.

    Attributes:
        family: the registered family.
        call: its public function.
        variants: sample inputs by name; `plain` has no optional argument and `full` all of them.
        wide: sample inputs that fill several blocks of a GPU kernel, the last one partly.
        time: arguments whose axis 1 is time.
        holds: names of the laws that hold.
        fails: variant -> names of the laws among them that it breaks.
        state: size of the state, in symbols, for one sequence and, where there are heads, for one head.
        parallel_cost: multiplications per time step of the same, in the parallel form with chunks of C steps.
        step_cost: multiplications of a single step.
        refusals: a piece of the error message -> a change to valid arguments that must raise it as a ValueError.
        bf16: relative RMS bound on outputs and on gradients for bf16 inputs, as measured.
    """

    family: Family
    call: Callable[..., Any]
    variants: dict[str, Sample]
    wide: Sample
    time: tuple[str, ...]
    holds: frozenset[str]
    state: str
    parallel_cost: str
    step_cost: str
    refusals: dict[str, Callable[[Arguments], Arguments]] = field(default_factory=dict)
    bf16: tuple[float, float] = (5e-3, 2e-2)
    fails: dict[str, frozenset[str]] = field(default_factory=dict)


ALL = frozenset({"split", "step", "reverse", "packed", "linear", "isolation"})
