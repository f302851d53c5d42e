"""What `sinuous bench ops` compares: one case per op, each with our backends and the peers people use today.

A peer gets its inputs in its own layout, made before the clock starts, and computes the same function, which
`sinuous bench ops` checks on a short sequence; a reference (`nn.LSTM`) computes another one of the same width.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinuous.core import ops
from sinuous.core.ops import dispatch
from sinuous.core.ops.causal_conv1d import FAMILY as CAUSAL_CONV1D_FAMILY
from sinuous.core.ops.family import Family
from sinuous.core.ops.selective_scan import FAMILY as SELECTIVE_SCAN_FAMILY


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
    """One op: `make(shape, device, dtype)` gives its inputs, `run(backend, **inputs)` calls our op; `versus` names the
    peer that ratios refer to."""

    family: Family
    make: Callable[[Shape, torch.device, torch.dtype], Inputs]
    run: Callable[..., Tensor]
    peers: tuple[Peer, ...]
    versus: str


def _leaves(inputs: Inputs) -> Inputs:
    return {name: t.requires_grad_() for name, t in inputs.items()}


def ours(case: Case, backend: str, inputs: Inputs) -> Prepared:
    return Prepared(lambda: case.run(backend, **inputs), list(inputs.values()))


def _channels_first(inputs: Inputs, names: Sequence[str]) -> Inputs:
    """The same leaves with time last and contiguous, the layout of the authors' CUDA packages."""
    moved = {n: t.detach().transpose(1, 2).contiguous() if n in names else t.detach() for n, t in inputs.items()}
    return _leaves(moved)


# Selective scan: u, dt (before softplus), A, B, C and the skip D.


def _selective_scan_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    g = torch.Generator().manual_seed(0)
    batch, length, dim, state = shape

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g).to(device, dtype)

    A = -torch.arange(1, state + 1, dtype=torch.float32).expand(dim, state).contiguous().to(device)
    D = torch.ones(dim, device=device)
    return _leaves(
        {
            "u": normal(batch, length, dim),
            "dt": normal(batch, length, dim) - 4,
            "A": A,
            "B": normal(batch, length, state),
            "C": normal(batch, length, state),
            "D": D,
        }
    )


def _selective_scan(backend: str, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    y = ops.selective_scan(u, dt, A, B, C, D=D, backend=backend)
    assert isinstance(y, Tensor)
    return y


def _mambapy(inputs: Inputs) -> Prepared:
    pscan = importlib.import_module("mambapy.pscan").pscan
    u, dt, A, B, C, D = inputs.values()

    def call() -> Tensor:
        delta = F.softplus(dt)[..., None]
        states = pscan(torch.exp(delta * A), delta * B[:, :, None] * u[..., None])
        return (states @ C[..., None]).squeeze(3) + D * u

    return Prepared(call, list(inputs.values()))


def _transformers(inputs: Inputs) -> Prepared:
    module = importlib.import_module("transformers.models.mamba.modeling_mamba")
    # Around the torch code lies a wrapper that may fetch a CUDA kernel from the hub; the torch code is the peer here.
    scan = getattr(module.mamba_selective_scan, "__wrapped__", module.mamba_selective_scan)
    moved = _channels_first(inputs, ("u", "dt"))
    by_time_last = _channels_first({"B": inputs["B"], "C": inputs["C"]}, ("B", "C"))
    moved |= by_time_last
    u, dt, A, B, C, D = (moved[n] for n in ("u", "dt", "A", "B", "C", "D"))

    def call() -> Tensor:
        y = scan(u, dt, A, B, C, D, delta_softplus=True)
        return y[0] if isinstance(y, tuple) else y

    return Prepared(call, [u, dt, A, B, C, D], channels_first=True)


def _mamba_ssm(inputs: Inputs) -> Prepared:
    scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    moved = _channels_first(inputs, ("u", "dt", "B", "C"))
    u, dt, A, B, C, D = (moved[n] for n in ("u", "dt", "A", "B", "C", "D"))
    return Prepared(lambda: scan(u, dt, A, B, C, D, delta_softplus=True), [u, dt, A, B, C, D], channels_first=True)


def _lstm(inputs: Inputs) -> Prepared:
    u = inputs["u"]
    lstm = nn.LSTM(u.shape[2], u.shape[2], batch_first=True).to(u.device, u.dtype)
    return Prepared(lambda: lstm(u)[0], [u, *lstm.parameters()])


SELECTIVE_SCAN = Case(
    family=SELECTIVE_SCAN_FAMILY,
    make=_selective_scan_inputs,
    run=_selective_scan,
    peers=(
        Peer("mambapy", "mambapy", _mambapy),
        Peer("transformers", "transformers", _transformers, quadratic=True),
        Peer("mamba_ssm", "mamba_ssm", _mamba_ssm, cuda_only=True),
        Peer("nn.LSTM", "torch", _lstm, same_function=False),
    ),
    versus="mambapy",
)


# Causal convolution: four taps, bias and SiLU, as in front of Mamba's scan.


def _causal_conv1d_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    g = torch.Generator().manual_seed(0)
    sizes = {"x": (shape.batch, shape.length, shape.dim), "weight": (shape.dim, 4), "bias": (shape.dim,)}
    return _leaves({name: torch.randn(*size, generator=g).to(device, dtype) for name, size in sizes.items()})


def _causal_conv1d(backend: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = ops.causal_conv1d(x, weight, bias, activation="silu", backend=backend)
    assert isinstance(y, Tensor)
    return y


def _conv1d(inputs: Inputs) -> Prepared:
    moved = _channels_first(inputs, ("x",))
    x, weight, bias = moved.values()
    dim, taps = weight.shape

    def call() -> Tensor:
        return F.silu(F.conv1d(x, weight[:, None], bias, padding=taps - 1, groups=dim)[..., : x.shape[2]])

    return Prepared(call, [x, weight, bias], channels_first=True)


def _conv1d_time_first(inputs: Inputs) -> Prepared:
    x, weight, bias = inputs.values()
    dim, taps = weight.shape

    def call() -> Tensor:
        y = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=taps - 1, groups=dim)
        return F.silu(y[..., : x.shape[1]]).transpose(1, 2).contiguous()

    return Prepared(call, [x, weight, bias])


def _dao_causal_conv1d(inputs: Inputs) -> Prepared:
    function = importlib.import_module("causal_conv1d").causal_conv1d_fn
    moved = _channels_first(inputs, ("x",))
    x, weight, bias = moved.values()
    return Prepared(lambda: function(x, weight, bias, activation="silu"), [x, weight, bias], channels_first=True)


CAUSAL_CONV1D = Case(
    family=CAUSAL_CONV1D_FAMILY,
    make=_causal_conv1d_inputs,
    run=_causal_conv1d,
    peers=(
        Peer("F.conv1d [B,D,T]", "torch", _conv1d),
        Peer("F.conv1d [B,T,D]", "torch", _conv1d_time_first),
        Peer("causal_conv1d", "causal_conv1d", _dao_causal_conv1d, cuda_only=True),
    ),
    versus="F.conv1d [B,T,D]",
)

CASES = {case.family.name: case for case in (SELECTIVE_SCAN, CAUSAL_CONV1D)}


def backends(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """Our backends of the case's op, each with the reason why it cannot run here, or None."""
    family = case.family
    return {name: dispatch.unavailable(family.name, family.forms, name, device, dtype) for name in family.forms}
