"""Recurrent cells whose output feeds their gates: four heads, with the projection of the input, as a layer has it."""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.apps.bench.op_cases.contract import Case, Inputs, Peer, Prepared, Shape, leaves, lstm
from sinuous.core import ops
from sinuous.core.ops.slstm import FAMILY as SLSTM_FAMILY

HEADS = 4


def _inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    heads = HEADS if shape.dim % HEADS == 0 else 1
    width = shape.dim // heads

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    arguments = {
        "x": normal(shape.batch, shape.length, shape.dim),
        "weight": normal(4 * shape.dim, shape.dim) / shape.dim**0.5,
        "R": normal(4, heads, width, width) / (2 * width**0.5),
        "bias": normal(4, heads, width),
    }
    return leaves({name: t.to(device, dtype) for name, t in arguments.items()})


def _slstm(backend: str, x: Tensor, weight: Tensor, R: Tensor, bias: Tensor) -> Tensor:
    gates = F.linear(x, weight).unflatten(-1, bias.shape)
    y = ops.slstm(gates, R, bias, backend=backend)
    assert isinstance(y, Tensor)
    return y.flatten(2)


def _nx_ai(inputs: Inputs) -> Prepared:
    module = importlib.import_module("xlstm.blocks.slstm.src.vanilla")
    cell = module.slstm_pointwise_function_registry["slstm"]
    x, weight, R, bias = inputs.values()

    def call() -> Tensor:
        gates = F.linear(x, weight).transpose(0, 1)
        state = x.new_zeros(4, x.shape[0], x.shape[2])
        states, _, _ = module.slstm_forward(gates, state, R.transpose(0, 1).flatten(1, 2), bias.flatten(), cell)
        y: Tensor = states[0, 1:].transpose(0, 1)
        return y

    return Prepared(call, list(inputs.values()))


SLSTM = Case(
    family=SLSTM_FAMILY,
    make=_inputs,
    run=_slstm,
    peers=(
        Peer("xlstm", "xlstm", _nx_ai, quadratic=True),
        Peer("nn.LSTM", "torch", lstm, same_function=False),
    ),
    versus="nn.LSTM",
)
