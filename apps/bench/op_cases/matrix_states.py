"""Recurrences of matrix states: heads of 64 key and 64 value channels each, as many as the width holds."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.apps.bench.op_cases.contract import FASTEST, Case, Inputs, Peer, Prepared, Shape, leaves, lstm
from sinuous.core import ops
from sinuous.core.ops.additive_decay import FAMILY as ADDITIVE_DECAY_FAMILY
from sinuous.core.ops.delta_rule import FAMILY as DELTA_RULE_FAMILY
from sinuous.core.ops.dplr import FAMILY as DPLR_FAMILY
from sinuous.core.ops.gla import FAMILY as GLA_FAMILY
from sinuous.core.ops.mlstm import FAMILY as MLSTM_FAMILY
from sinuous.core.ops.ssd import FAMILY as SSD_FAMILY

CHANNELS = 64
CHUNK = 64
"""Chunk of the peers that let one choose: the value their packages use."""


def _inputs(
    shape: Shape, device: torch.device, dtype: torch.dtype, gates: dict[str, Callable[[Tensor], Tensor]]
) -> Inputs:
    """q, k, v and one gate per head, or per key channel where its name ends in `_K`."""
    generator = torch.Generator().manual_seed(0)
    channels = min(CHANNELS, shape.dim)
    size = (shape.batch, shape.length, max(shape.dim // channels, 1), channels)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    arguments = {name: normal(*size) for name in ("q", "k", "v")}
    for name, gate in gates.items():
        arguments[name.removesuffix("_K")] = gate(normal(*size) if name.endswith("_K") else normal(*size[:3]))
    return leaves({name: t.to(device, dtype) for name, t in arguments.items()})


def _decay(x: Tensor) -> Tensor:
    return F.logsigmoid(x) / 16


def _function(module: str, name: str) -> Any:
    """A function without the wrapper that may fetch a CUDA kernel from a hub; its torch code is the peer here."""
    return inspect.unwrap(getattr(importlib.import_module(module), name))


def _first(y: Any) -> Tensor:
    first: Tensor = y[0] if isinstance(y, tuple) else y
    return first


# ssd: one decay per head and step.


def _ssd(backend: str, **inputs: Any) -> Tensor:
    return _first(ops.ssd(**inputs, backend=backend))


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
    family=SSD_FAMILY,
    make=lambda shape, device, dtype: _inputs(shape, device, dtype, {"log_decay": _decay}),
    run=_ssd,
    peers=(
        Peer("fla naive chunk", "fla", _fla_simple_gla, quadratic=True),
        Peer("transformers", "transformers", _transformers_mamba2, quadratic=True),
        Peer("fla", "fla", _fla_chunk("fla.ops.simple_gla", "chunk_simple_gla"), cuda_only=True),
        Peer("nn.LSTM", "torch", lstm, same_function=False),
    ),
    versus=FASTEST,
)


# gla: one decay per key channel and step.


def _gla(backend: str, **inputs: Any) -> Tensor:
    return _first(ops.gla(**inputs, backend=backend))


def _fla_recurrent_gla(inputs: Inputs) -> Prepared:
    function = _function("fla.ops.gla.naive", "naive_recurrent_gla")
    q, k, v, g = inputs.values()
    return Prepared(lambda: _first(function(q, k, v, g)), [q, k, v, g])


GLA = Case(
    family=GLA_FAMILY,
    make=lambda shape, device, dtype: _inputs(shape, device, dtype, {"log_decay_K": _decay}),
    run=_gla,
    peers=(
        Peer("fla naive recurrent", "fla", _fla_recurrent_gla, quadratic=True),
        Peer("fla", "fla", _fla_chunk("fla.ops.gla", "chunk_gla"), cuda_only=True),
        Peer("nn.LSTM", "torch", lstm, same_function=False),
    ),
    versus=FASTEST,
)


# additive_decay: the decay that a new key's share of the softmax leaves.


def _additive_decay(backend: str, **inputs: Any) -> Tensor:
    return _first(ops.additive_decay(**inputs, backend=backend))


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
    family=ADDITIVE_DECAY_FAMILY,
    make=lambda shape, device, dtype: _inputs(shape, device, dtype, {}),
    run=_additive_decay,
    peers=(
        Peer("fla naive", "fla", _cumulative_softmax, quadratic=True),
        Peer("fla", "fla", _fla_chunk("fla.ops.lightnet", "chunk_lightnet"), cuda_only=True),
        Peer("nn.LSTM", "torch", lstm, same_function=False),
    ),
    versus=FASTEST,
)


# delta_rule, gated: keys of length one.


def _delta_rule_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    inputs = _inputs(shape, device, dtype, {"beta": torch.sigmoid, "log_decay": _decay})
    return leaves({n: (F.normalize(t, dim=-1) if n in "qk" else t).detach() for n, t in inputs.items()})


def _delta_rule(backend: str, **inputs: Any) -> Tensor:
    return _first(ops.delta_rule(**inputs, backend=backend))


def _chunk_gated_delta_rule(module: str, name: str) -> Callable[[Inputs], Prepared]:
    def prepare(inputs: Inputs) -> Prepared:
        function = _function(module, name)
        q, k, v, beta, g = inputs.values()
        return Prepared(lambda: _first(function(q, k, v, g=g, beta=beta)), [q, k, v, beta, g])

    return prepare


_QWEN = "transformers.models.qwen3_next.modeling_qwen3_next"

DELTA_RULE = Case(
    family=DELTA_RULE_FAMILY,
    make=_delta_rule_inputs,
    run=_delta_rule,
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


def _dplr_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    inputs = _inputs(shape, device, dtype, {"beta": torch.sigmoid, "log_decay_K": _decay})
    q, k, v, beta, g = (t.detach() for t in inputs.values())
    k = F.normalize(k, dim=-1)
    written = k * beta[..., None]
    return leaves({"q": q, "k": written, "v": v, "log_decay": g, "a": k * g.exp(), "b": -written})


def _dplr(backend: str, **inputs: Any) -> Tensor:
    return _first(ops.dplr(**inputs, backend=backend))


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
    family=DPLR_FAMILY,
    make=_dplr_inputs,
    run=_dplr,
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


def _mlstm(backend: str, **inputs: Any) -> Tensor:
    return _first(ops.mlstm(**inputs, backend=backend))


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
    family=MLSTM_FAMILY,
    make=lambda shape, device, dtype: _inputs(
        shape, device, dtype, {"input_gate": lambda x: x, "forget_gate": lambda x: x + 3}
    ),
    run=_mlstm,
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
