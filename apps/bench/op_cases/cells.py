"""Recurrent cells whose output feeds their gates: four heads, with the projection of the input, as a layer has it."""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.apps.bench.op_cases.contract import Case, Inputs, Peer, Prepared, Shape, leaves, lstm
from sinuous.core.ops.laws import slstm
from sinuous.core.ops.laws.declaration import Sample

HEADS = 4


def _sample(shape: Shape) -> Sample:
    heads = HEADS if shape.dim % HEADS == 0 else 1
    return slstm.sample_of(heads, shape.dim // heads, state=False)


class LayerCase(Case):
    """Gates come from a projection of the input, which torch's LSTM has inside."""

    def make(self, shape: Shape, device: torch.device) -> Inputs:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(shape.batch, shape.length, shape.dim, generator=generator)
        weight = torch.randn(4 * shape.dim, shape.dim, generator=generator) / shape.dim**0.5
        return {**leaves({"x": x.to(device), "weight": weight.to(device)}), **super().make(shape, device)}

    def run(self, backend: str, **inputs: Tensor) -> Tensor:
        x, weight, R, bias = inputs.values()
        return super().run(backend, gates=F.linear(x, weight).unflatten(-1, bias.shape), R=R, bias=bias).flatten(2)


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


SLSTM = LayerCase(
    laws=slstm.LAWS,
    sample=_sample,
    uses=("R", "bias"),
    peers=(
        Peer("xlstm", "xlstm", _nx_ai, quadratic=True),
        Peer("nn.LSTM", "torch", lstm, same_function=False),
    ),
    versus="nn.LSTM",
)
