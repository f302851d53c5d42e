"""Recurrences and filters of single channels: selective scan, Longhorn, causal convolution, linear scan."""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.apps.bench.op_cases.contract import Case, Inputs, Peer, Prepared, channels_first, lstm
from sinuous.core.ops.laws import causal_conv1d, linear_scan, longhorn, selective_scan

# Selective scan with its skip.


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
    laws=selective_scan.LAWS,
    sample=lambda shape: selective_scan.sample_of(shape.dim, shape.state, None, full=True),
    uses=("u", "dt", "A", "B", "C", "D"),
    peers=(
        Peer("mambapy", "mambapy", _mambapy),
        Peer("transformers", "transformers", _transformers, quadratic=True),
        Peer("mamba_ssm", "mamba_ssm", _mamba_ssm, cuda_only=True),
        Peer("nn.LSTM", "torch", lstm, same_function=False),
    ),
    versus="mambapy",
)

# Longhorn with its skip.


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
    laws=longhorn.LAWS,
    sample=lambda shape: longhorn.sample_of(shape.dim, shape.state, full=True),
    uses=("x", "dt", "k", "q", "D"),
    peers=(
        Peer("mambapy", "mambapy", _mambapy_longhorn),
        Peer("nn.LSTM", "torch", lstm, same_function=False),
    ),
    versus="mambapy",
)


# Causal convolution: four taps, bias and SiLU, as in front of Mamba's scan.


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
    laws=causal_conv1d.LAWS,
    sample=lambda shape: causal_conv1d.sample_of(shape.dim, 4, full=True, activation="silu"),
    uses=("x", "weight", "bias"),
    options={"activation": "silu"},
    peers=(
        Peer("F.conv1d [B,D,T]", "torch", _conv1d),
        Peer("F.conv1d [B,T,D]", "torch", _conv1d_time_first),
        Peer("causal_conv1d", "causal_conv1d", _dao_causal_conv1d, cuda_only=True),
    ),
    versus="F.conv1d [B,T,D]",
)

# Linear scan: real, with a decay per step and channel.


def _mambapy_elementwise(inputs: Inputs) -> Prepared:
    pscan = importlib.import_module("mambapy.pscan").pscan
    x, a = inputs.values()
    return Prepared(lambda: pscan(a[..., None], x[..., None]).squeeze(3), [x, a])


LINEAR_SCAN = Case(
    laws=linear_scan.LAWS,
    sample=lambda shape: linear_scan.sample_of(shape.dim, full=False),
    uses=("x", "a"),
    peers=(
        Peer("mambapy", "mambapy", _mambapy_elementwise),
        Peer("nn.LSTM", "torch", lstm, same_function=False),
    ),
    versus="nn.LSTM",
)
