"""Recurrences and filters of single channels: selective scan, Longhorn, causal convolution, linear scan."""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.apps.bench.op_cases.contract import Case, Inputs, Peer, Prepared, Shape, channels_first, leaves, lstm
from sinuous.core import ops
from sinuous.core.ops.causal_conv1d import FAMILY as CAUSAL_CONV1D_FAMILY
from sinuous.core.ops.linear_scan import FAMILY as LINEAR_SCAN_FAMILY
from sinuous.core.ops.longhorn import FAMILY as LONGHORN_FAMILY
from sinuous.core.ops.selective_scan import FAMILY as SELECTIVE_SCAN_FAMILY

# Selective scan: u, dt (before softplus), A, B, C and the skip D.


def _selective_scan_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    g = torch.Generator().manual_seed(0)
    batch, length, dim, state = shape

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g).to(device, dtype)

    A = -torch.arange(1, state + 1, dtype=torch.float32).expand(dim, state).contiguous().to(device)
    D = torch.ones(dim, device=device)
    return leaves(
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
        y: Tensor = (states @ C[..., None]).squeeze(3) + D * u
        return y

    return Prepared(call, list(inputs.values()))


def _transformers(inputs: Inputs) -> Prepared:
    module = importlib.import_module("transformers.models.mamba.modeling_mamba")
    # Around the torch code lies a wrapper that may fetch a CUDA kernel from the hub; the torch code is the peer here.
    scan = getattr(module.mamba_selective_scan, "__wrapped__", module.mamba_selective_scan)
    moved = channels_first(inputs, ("u", "dt"))
    by_time_last = channels_first({"B": inputs["B"], "C": inputs["C"]}, ("B", "C"))
    moved |= by_time_last
    u, dt, A, B, C, D = (moved[n] for n in ("u", "dt", "A", "B", "C", "D"))

    def call() -> Tensor:
        y = scan(u, dt, A, B, C, D, delta_softplus=True)
        first: Tensor = y[0] if isinstance(y, tuple) else y
        return first

    return Prepared(call, [u, dt, A, B, C, D], channels_first=True)


def _mamba_ssm(inputs: Inputs) -> Prepared:
    scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    moved = channels_first(inputs, ("u", "dt", "B", "C"))
    u, dt, A, B, C, D = (moved[n] for n in ("u", "dt", "A", "B", "C", "D"))
    return Prepared(lambda: scan(u, dt, A, B, C, D, delta_softplus=True), [u, dt, A, B, C, D], channels_first=True)


SELECTIVE_SCAN = Case(
    family=SELECTIVE_SCAN_FAMILY,
    make=_selective_scan_inputs,
    run=_selective_scan,
    peers=(
        Peer("mambapy", "mambapy", _mambapy),
        Peer("transformers", "transformers", _transformers, quadratic=True),
        Peer("mamba_ssm", "mamba_ssm", _mamba_ssm, cuda_only=True),
        Peer("nn.LSTM", "torch", lstm, same_function=False),
    ),
    versus="mambapy",
)

# Longhorn: x, dt (before the sigmoid), k, q and the skip D.


def _longhorn_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    g = torch.Generator().manual_seed(0)
    batch, length, dim, state = shape
    sizes = {"x": dim, "dt": dim, "k": state, "q": state}
    normal = {name: torch.randn(batch, length, size, generator=g).to(device, dtype) for name, size in sizes.items()}
    return leaves({**normal, "D": torch.ones(dim, device=device)})


def _longhorn(backend: str, x: Tensor, dt: Tensor, k: Tensor, q: Tensor, D: Tensor) -> Tensor:
    y = ops.longhorn(x, dt, k, q, D=D, backend=backend)
    assert isinstance(y, Tensor)
    return y


def _mambapy_longhorn(inputs: Inputs) -> Prepared:
    pscan = importlib.import_module("mambapy.pscan").pscan
    x, dt, k, q, D = inputs.values()

    def call() -> Tensor:
        beta = torch.sigmoid(dt)
        epsilon = (beta / (1 + beta * k.square().sum(-1, keepdim=True)))[..., None]
        keys = k[:, :, None]
        states = pscan(1 - epsilon * keys.square(), epsilon * x[..., None] * keys)
        y: Tensor = (states @ q[..., None]).squeeze(3) + D * x
        return y

    return Prepared(call, list(inputs.values()))


LONGHORN = Case(
    family=LONGHORN_FAMILY,
    make=_longhorn_inputs,
    run=_longhorn,
    peers=(
        Peer("mambapy", "mambapy", _mambapy_longhorn),
        Peer("nn.LSTM", "torch", lstm, same_function=False),
    ),
    versus="mambapy",
)


# Causal convolution: four taps, bias and SiLU, as in front of Mamba's scan.


def _causal_conv1d_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    g = torch.Generator().manual_seed(0)
    sizes = {"x": (shape.batch, shape.length, shape.dim), "weight": (shape.dim, 4), "bias": (shape.dim,)}
    return leaves({name: torch.randn(*size, generator=g).to(device, dtype) for name, size in sizes.items()})


def _causal_conv1d(backend: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = ops.causal_conv1d(x, weight, bias, activation="silu", backend=backend)
    assert isinstance(y, Tensor)
    return y


def _conv1d(inputs: Inputs) -> Prepared:
    moved = channels_first(inputs, ("x",))
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
    moved = channels_first(inputs, ("x",))
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

# Linear scan: real, with a decay per step and channel.


def _linear_scan_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    g = torch.Generator().manual_seed(0)
    size = (shape.batch, shape.length, shape.dim)
    x, a = torch.randn(*size, generator=g), torch.sigmoid(torch.randn(*size, generator=g) + 3)
    return leaves({"x": x.to(device, dtype), "a": a.to(device, dtype)})


def _linear_scan(backend: str, x: Tensor, a: Tensor) -> Tensor:
    y = ops.linear_scan(x, a, backend=backend)
    assert isinstance(y, Tensor)
    return y


def _mambapy_elementwise(inputs: Inputs) -> Prepared:
    pscan = importlib.import_module("mambapy.pscan").pscan
    x, a = inputs.values()
    return Prepared(lambda: pscan(a[..., None], x[..., None]).squeeze(3), [x, a])


LINEAR_SCAN = Case(
    family=LINEAR_SCAN_FAMILY,
    make=_linear_scan_inputs,
    run=_linear_scan,
    peers=(
        Peer("mambapy", "mambapy", _mambapy_elementwise),
        Peer("nn.LSTM", "torch", lstm, same_function=False),
    ),
    versus="nn.LSTM",
)
