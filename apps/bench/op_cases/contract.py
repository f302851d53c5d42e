"""Parts of a comparison of an op.

A peer gets its inputs in its own layout, made before the clock starts, and computes the same function, which
`sinuous bench ops` checks on a short sequence; a reference (`nn.LSTM`) computes another one of the same width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sinuous.core.ops import dispatch
from sinuous.core.ops.laws.declaration import Laws, Sample

FASTEST = "the fastest peer"
"""As `Case.versus`: ratios refer to the fastest peer that computes the same function, per length and pass."""


class Shape(NamedTuple):
    batch: int
    length: int
    dim: int
    state: int


class Prepared(NamedTuple):
    """A call without arguments, the leaves of its backward pass, and whether its output is `[B, D, T]`."""

    call: Callable[[], Tensor]
    leaves: Sequence[Tensor]
    channels_first: bool = False


Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Peer:
    """An implementation from elsewhere.

    Attributes:
        name: what it is called in tables.
        package: the package that must be installed.
        prepare: inputs of the case -> `Prepared`.
        cuda_only: it has no other device.
        quadratic: its time grows with the square of the length, in the backward pass if not in both.
        same_function: it computes what the op computes; a reference does not.
    """

    name: str
    package: str
    prepare: Callable[[Inputs], Prepared]
    cuda_only: bool = False
    quadratic: bool = False
    same_function: bool = True

    def unavailable(self, device: torch.device) -> str | None:
        """Why the peer cannot run on `device`, or None if it can."""
        if importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if self.cuda_only and device.type != "cuda":
            return f"{self.package} runs on CUDA only"
        return None


@dataclass(frozen=True)
class Case:
    """One op on the sample of its laws, at the size of a comparison.

    Attributes:
        laws: declaration of the op.
        sample: shape -> the laws' sample of that size.
        uses: the arguments of the sample that the peers have, too, in the order of `Inputs`.
        peers: what the op is compared with.
        versus: name of the peer that ratios refer to.
        options: further arguments of the op.
        change: what the comparison changes in the sample's arguments.
    """

    laws: Laws
    sample: Callable[[Shape], Sample]
    uses: tuple[str, ...]
    peers: tuple[Peer, ...]
    versus: str
    options: Mapping[str, Any] = field(default_factory=dict)
    change: Callable[[Inputs], Inputs] = lambda inputs: inputs

    @property
    def name(self) -> str:
        """The op's name."""
        return self.laws.family.name

    def make(self, shape: Shape, device: torch.device) -> Inputs:
        """Inputs in single precision, each a leaf."""
        arguments = self.laws.at_size(self.sample(shape), shape.batch, shape.length, device=device)
        return leaves(self.change({name: arguments[name] for name in self.uses}))

    def run(self, backend: str, **inputs: Tensor) -> Tensor:
        """Call our op."""
        y: Tensor = self.laws.call(**inputs, **self.options, backend=backend)
        return y


def mild(inputs: Inputs) -> Inputs:
    """Decays near 1, as layers have them: the samples' own forget within a few steps, which some peers overflow on."""
    return {**inputs, "log_decay": inputs["log_decay"] / 16}


def heads_of(shape: Shape) -> tuple[int, int]:
    """Heads of 64 channels each, as many as the width holds: how many, and how wide."""
    channels = min(64, shape.dim)
    return max(shape.dim // channels, 1), channels


def leaves(inputs: Inputs) -> Inputs:
    return {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in inputs.items()}


def ours(case: Case, backend: str, inputs: Inputs) -> Prepared:
    return Prepared(lambda: case.run(backend, **inputs), [t for t in inputs.values() if t.requires_grad])


def channels_first(inputs: Inputs, names: Sequence[str]) -> Inputs:
    """The same leaves with time last and contiguous, the layout of the authors' CUDA packages."""
    moved = {n: t.detach().transpose(1, 2).contiguous() if n in names else t.detach() for n, t in inputs.items()}
    return leaves(moved)


def lstm(inputs: Inputs) -> Prepared:
    """torch's LSTM on the first input, at its width: what people use today, and another function."""
    x = next(iter(inputs.values()))
    x = x.flatten(2).detach().requires_grad_()
    layer = nn.LSTM(x.shape[2], x.shape[2], batch_first=True).to(x.device, x.dtype)
    return Prepared(lambda: layer(x)[0], [x, *layer.parameters()])


def backends(case: Case, device: torch.device) -> dict[str, str | None]:
    """Our backends of the case's op, each with the reason why it cannot run here, or None."""
    forms = case.laws.family.forms
    return {name: dispatch.unavailable(case.name, forms, name, device, torch.float32) for name in forms}
