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

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

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

    def at_size(
        self, sample: Sample, batch: int, length: int, *, sequences: int | None = None,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    ) -> Arguments:  # fmt: skip
        """Sample arguments as layers give them: what has a time axis in `dtype`, but for logarithms of decays, which
        are in fp32 as are parameters and states. On the device `meta` they have no values."""
        generator, place = torch.Generator().manual_seed(0), torch.device(device)

        def random(*shape: int) -> Tensor:
            return torch.empty(shape, device=place) if place.type == "meta" else torch.randn(shape, generator=generator)

        arguments = sample(random, batch, length, batch if sequences is None else sequences)
        return {name: self._converted(name, value, dtype, place) for name, value in arguments.items()}

    def _converted(self, name: str, value: Any, dtype: torch.dtype, device: torch.device) -> Any:
        real = dtype if name in self.time and name != "log_decay" else torch.float32

        def convert(v: Any) -> Any:
            if not isinstance(v, Tensor):
                return v
            kept = not (v.is_floating_point() or v.is_complex())
            return v.to(device, v.dtype if kept else real.to_complex() if v.is_complex() else real)

        return tree_map(convert, value)

    def record(self, arguments: Arguments) -> Any:
        """The record that the registered op gets for `arguments` of the public function, its state asked for."""
        with _Received(self.family) as mode:
            self.call(**arguments, return_state=True)
        return mode.arguments


class _Received(TorchDispatchMode):
    """Keeps the arguments of the last call of a family's op."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.family, self.arguments = family, None
        self.op = getattr(torch.ops.sinuous, family.name).default

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self.op:
            self.arguments, _ = self.family.bind(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


ALL = frozenset({"split", "step", "reverse", "packed", "linear", "isolation"})
