"""Recurrences of matrix states: heads of 64 key and 64 value channels each, as many as the width holds."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sinuous.apps.bench.op_cases.contract import (
    FASTEST,
    Case,
    Inputs,
    Peer,
    Prepared,
    Shape,
    heads_of,
    leaves,
    lstm,
    mild,
)
from sinuous.core.ops.laws import additive_decay, delta_rule, dplr, gla, mlstm, ssd
from sinuous.core.ops.laws.declaration import Sample

CHUNK = 64
"""Chunk of the peers that let one choose: the value their packages use."""


def _heads(sample_of: Callable[..., Sample], **options: Any) -> Callable[[Shape], Sample]:
    """The sample of an op with as many keys as values."""

    def sample(shape: Shape) -> Sample:
        heads, channels = heads_of(shape)
        return sample_of(heads, channels, channels, **options)

    return sample


def _function(module: str, name: str) -> Any:
    """A function without the wrapper that may fetch a CUDA kernel from a hub; its torch code is the peer here."""
    return inspect.unwrap(getattr(importlib.import_module(module), name))


def _first(y: Any) -> Tensor:
    first: Tensor = y[0] if isinstance(y, tuple) else y
    return first


# ssd: one decay per head and step.


def _fla_simple_gla(inputs: Inputs) -> Prepared:
    function = _function("fla.ops.simple_gla.naive", "naive_chunk_simple_gla")
    q, k, v, g = inputs.values()
    return Prepared(lambda: _first(function(q, k, v, g, chunk_size=CHUNK)), [q, k, v, g])


def _transformers_mamba2(inputs: Inputs) -> Prepared:
    function = _function("transformers.models.mamba2.modeling_mamba2", "mamba2_chunk_scan")
    q, k, v, g = inputs.values()
    scale, A = q.shape[-1] ** -0.5, -torch.ones(v.shape[2], device=v.device)

    def call() -> Tensor:
        # Mamba-2 multiplies its input by the step size; dividing by it first leaves v.
        return _first(function(v / -g[..., None], -g, A, k, q * scale, chunk_size=CHUNK))

    return Prepared(call, [q, k, v, g])


def _fla_chunk(module: str, name: str) -> Callable[[Inputs], Prepared]:
    def prepare(inputs: Inputs) -> Prepared:
        function, tensors = getattr(importlib.import_module(module), name), list(inputs.values())
        return Prepared(lambda: _first(function(*tensors)), tensors)

    return prepare


SSD = Case(
    laws=ssd.LAWS,
    sample=lambda shape: ssd.sample_of(heads_of(shape)[0], *heads_of(shape), heads_of(shape)[1], "steps"),
    uses=("q", "k", "v", "log_decay"),
    change=mild,
    peers=(
        Peer("fla naive chunk", "fla", _fla_simple_gla, quadratic=True),
        Peer("transformers", "transformers", _transformers_mamba2, quadratic=True),
        Peer("fla", "fla", _fla_chunk("fla.ops.simple_gla", "chunk_simple_gla"), cuda_only=True),
        Peer("nn.LSTM", "torch", lstm, same_function=False),
    ),
    versus=FASTEST,
)


# gla: one decay per key channel and step.


def _fla_recurrent_gla(inputs: Inputs) -> Prepared:
    function = _function("fla.ops.gla.naive", "naive_recurrent_gla")
    q, k, v, g = inputs.values()
    return Prepared(lambda: _first(function(q, k, v, g)), [q, k, v, g])


GLA = Case(
    laws=gla.LAWS,
    sample=_heads(gla.sample_of, state=False),
    uses=("q", "k", "v", "log_decay"),
    change=mild,
    peers=(
        Peer("fla naive recurrent", "fla", _fla_recurrent_gla, quadratic=True),
        Peer("fla", "fla", _fla_chunk("fla.ops.gla", "chunk_gla"), cuda_only=True),
        Peer("nn.LSTM", "torch", lstm, same_function=False),
    ),
    versus=FASTEST,
)


# additive_decay: the decay that a new key's share of the softmax leaves.


def _cumulative_softmax(inputs: Inputs) -> Prepared:
    """The naive recurrence of gla, with the decays of LightNet: fla has a kernel of its own for CUDA only."""
    function = _function("fla.ops.gla.naive", "naive_recurrent_gla")
    q, k, v = inputs.values()

    def call() -> Tensor:
        z = k.logcumsumexp(1)
        decay = torch.cat([torch.zeros_like(z[:, :1]), z[:, :-1] - z[:, 1:]], 1)
        return _first(function(q, (k - z).exp(), v, decay))

    return Prepared(call, [q, k, v])


ADDITIVE_DECAY = Case(
    laws=additive_decay.LAWS,
    sample=_heads(additive_decay.sample_of, state=False),
    uses=("q", "k", "v"),
    peers=(
        Peer("fla naive", "fla", _cumulative_softmax, quadratic=True),
        Peer("fla", "fla", _fla_chunk("fla.ops.lightnet", "chunk_lightnet"), cuda_only=True),
        Peer("nn.LSTM", "torch", lstm, same_function=False),
    ),
    versus=FASTEST,
)


# delta_rule, gated: keys of length one.


def _chunk_gated_delta_rule(module: str, name: str) -> Callable[[Inputs], Prepared]:
    def prepare(inputs: Inputs) -> Prepared:
        function = _function(module, name)
        q, k, v, beta, g = inputs.values()
        return Prepared(lambda: _first(function(q, k, v, g=g, beta=beta)), [q, k, v, beta, g])

    return prepare


_QWEN = "transformers.models.qwen3_next.modeling_qwen3_next"

DELTA_RULE = Case(
    laws=delta_rule.LAWS,
    sample=_heads(delta_rule.sample_of, full=True),
    uses=("q", "k", "v", "beta", "log_decay"),
    change=mild,
    peers=(
        Peer(
            "fla naive chunk",
            "fla",
            _chunk_gated_delta_rule("fla.ops.gated_delta_rule.naive", "naive_chunk_gated_delta_rule"),
            quadratic=True,
        ),
        Peer(
            "transformers",
            "transformers",
            _chunk_gated_delta_rule(
                "transformers.models.qwen3_next.modeling_qwen3_next", "torch_chunk_gated_delta_rule"
            ),
            quadratic=True,
        ),
        Peer(
            "fla", "fla", _chunk_gated_delta_rule("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"), cuda_only=True
        ),
        Peer("nn.LSTM", "torch", lstm, same_function=False),
    ),
    versus=FASTEST,
)


# dplr, as Kimi delta attention, which is what its peers compute: the delta rule after a decay of each key channel.


def _as_kda(inputs: Inputs) -> Inputs:
    inputs = mild(inputs)
    key, beta = inputs["a"], -(inputs["a"] * inputs["b"]).sum(-1, keepdim=True)
    return {**inputs, "k": key * beta, "a": key * inputs["log_decay"].exp(), "b": -key * beta}


def _kda(module: str, name: str, *, pads: bool = True) -> Callable[[Inputs], Prepared]:
    def prepare(inputs: Inputs) -> Prepared:
        function = _function(module, name)
        q, written, v, g = (inputs[n].detach().requires_grad_() for n in ("q", "k", "v", "log_decay"))
        beta = written.detach().norm(dim=-1)
        tensors = [q, (written.detach() / beta[..., None]).requires_grad_(), v, g, beta.requires_grad_()]
        options = {} if pads else {"chunk_size": math.gcd(CHUNK, q.shape[1])}
        return Prepared(lambda: _first(function(*tensors, **options)), tensors)

    return prepare


def _fla_dplr(inputs: Inputs) -> Prepared:
    function = _function("fla.ops.generalized_delta_rule.dplr.naive", "dplr_chunkwise")
    moved = leaves({n: t.detach().transpose(1, 2).contiguous() for n, t in inputs.items()})
    q, k, v, g, a, b = moved.values()
    length = math.gcd(CHUNK, q.shape[2])
    return Prepared(
        lambda: _first(function(q, k, v, a, b, g, chunk_size=length)), [q, k, v, a, b, g], channels_first=True
    )


DPLR = Case(
    laws=dplr.LAWS,
    sample=_heads(dplr.sample_of, state=False),
    uses=("q", "k", "v", "log_decay", "a", "b"),
    change=_as_kda,
    peers=(
        Peer("fla naive chunk", "fla", _fla_dplr, quadratic=True),
        Peer("fla naive chunk KDA", "fla", _kda("fla.ops.kda.naive", "naive_chunk_kda", pads=False), quadratic=True),
        Peer(
            "transformers",
            "transformers",
            _kda("transformers.models.kimi_linear.modeling_kimi_linear", "chunk_kimi_delta_attention"),
            quadratic=True,
        ),
        Peer("fla", "fla", _kda("fla.ops.kda", "chunk_kda"), cuda_only=True),
        Peer("nn.LSTM", "torch", lstm, same_function=False),
    ),
    versus=FASTEST,
)


# mlstm: exponential input gate, sigmoid forget gate.


def _nx_ai(module: str, name: str) -> Callable[[Inputs], Prepared]:
    def prepare(inputs: Inputs) -> Prepared:
        function = getattr(importlib.import_module(module), name)
        moved = leaves({n: t.detach().transpose(1, 2).contiguous() for n, t in inputs.items()})
        q, k, v, i, f = moved.values()
        return Prepared(
            lambda: _first(function(q, k, v, i=i, f=f, chunk_size=math.gcd(CHUNK, q.shape[2]))),
            [q, k, v, i, f],
            channels_first=True,
        )

    return prepare


_NX_AI = "mlstm_kernels.torch.chunkwise."

MLSTM = Case(
    laws=mlstm.LAWS,
    sample=_heads(mlstm.sample_of, state=False),
    uses=("q", "k", "v", "input_gate", "forget_gate"),
    peers=(
        Peer(
            "mlstm_kernels",
            "mlstm_kernels",
            _nx_ai(_NX_AI + "native", "mlstm_chunkwise__native_custbw"),
        ),
        Peer(
            "mlstm_kernels autograd",
            "mlstm_kernels",
            _nx_ai(_NX_AI + "native", "mlstm_chunkwise__native_autograd"),
            quadratic=True,
        ),
        Peer(
            "mlstm_kernels Triton",
            "mlstm_kernels",
            _nx_ai(_NX_AI + "triton_xl_chunk", "mlstm_chunkwise__xl_chunk"),
            cuda_only=True,
        ),
        Peer("nn.LSTM", "torch", lstm, same_function=False),
    ),
    versus=FASTEST,
)
