"""Models as ONNX files, which other runtimes read: a whole forward pass, or one step of a model that carries a state.

    from sinuous.core.onnx import export, export_step

    export(sinuous.create_model("vim_nano.fashion_mnist"), torch.zeros(1, 1, 28, 28), "vim_nano.onnx")
    export_step(language_model, torch.zeros(1, dtype=torch.long), "step.onnx")

Ops are written by their definitions (`sinuous.core.ops.tracing`). A recurrence becomes an ONNX `Scan`, so that a file
is little larger than its weights, whatever the number of tokens. The size of the batch is free; all other sizes are
those of the example. It needs the packages of `sinuous[export]`. onnxruntime runs each file, and its outputs are
compared with the model's before the call returns.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sinuous.core.mixers import Mixer
from sinuous.core.modes import evaluating
from sinuous.core.ops.tracing import definitions

PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class _Step(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, next_state = self.model.step(x, state)  # type: ignore[operator]
        return y, next_state


def export(
    model: nn.Module,
    example: Tensor,
    path: str | os.PathLike[str],
    *,
    tolerance: float = 1e-5,
    metadata: Mapping[str, str] | None = None,
) -> float:
    """Write `model(x)`, in the mode of evaluation, with an input `x` and an output `y`.

    Args:
        model: in fp32; its forward pass takes one tensor and returns one.
        example: an input of the size that the file is for, batch on axis 0.
        path: the file; a `.data` beside it holds the weights where they exceed ONNX's 2 GB.
        tolerance: the largest difference between onnxruntime's outputs and the model's that is accepted, over the
            largest output; outputs are compared on the example and on a larger batch.
        metadata: words to keep in the file, by name.

    Returns:
        The largest difference between onnxruntime's outputs and the model's, over the largest output.

    Raises:
        ModuleNotFoundError: if a package of `sinuous[export]` is missing.
        ValueError: if the model is not in fp32, has a part that ONNX cannot express, or the outputs differ by more than
            `tolerance`; no file is then left.
    """
    return _export(model, (_rows(example, 2),), ("x",), path, tolerance, metadata)


def export_step(
    model: nn.Module,
    example: Tensor,
    path: str | os.PathLike[str],
    *,
    tolerance: float = 1e-5,
    metadata: Mapping[str, str] | None = None,
) -> float:
    """Write `model.step(x, state)` of a `SequenceModel`, a layer of `sinuous.nn` or a mixer.

    Inputs are `x` and one for each tensor of the state, such as `state_0_memory`: block and field of its NamedTuple.
    Outputs are `y` and `next_state_0_memory`, …, the inputs of the next call. `model.initial_state(batch)` has the
    values before the first step.

    Args:
        model: in fp32, with `step` and `initial_state`.
        example: ids `[B]`, or values `[B, width]`.
        path, tolerance, metadata: as in `export`.

    Returns:
        As `export`.

    Raises:
        ModuleNotFoundError, ValueError: as `export`; also if the model has no step, or a state that grows.
    """
    growing = [m for m in model.modules() if isinstance(m, Mixer) and not m.constant_state]
    if not hasattr(model, "step") or not hasattr(model, "initial_state"):
        raise ValueError(f"{type(model).__name__} has no step and no state; export its forward pass")
    if growing:
        raise ValueError(
            f"the state of {type(growing[0]).__name__} grows from step to step; export a model whose mixers all have a "
            "state of constant size"
        )
    x = _rows(example, 2)
    return _export(_Step(model), (x, model.initial_state(x.shape[0])), ("x", "state"), path, tolerance, metadata)  # type: ignore[operator]


def _export(
    model: nn.Module,
    inputs: tuple[Any, ...],
    names: tuple[str, ...],
    path: str | os.PathLike[str],
    tolerance: float,
    metadata: Mapping[str, str] | None,
) -> float:
    for package in PACKAGES:
        _import(package)
    kind = type(model.model if isinstance(model, _Step) else model).__name__
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise ValueError(f"{name} of {kind} is {parameter.dtype}; export model.float()")
    input_names = [name for key, value in zip(names, inputs, strict=True) for name in _names(key, value)]
    sizes = pytree.tree_map(lambda t: {0: torch.export.Dim("batch")}, inputs)
    with evaluating(model), torch.no_grad():
        outputs = model(*inputs)
        parts = outputs if isinstance(model, _Step) else (outputs,)
        keys = ("y", "next_state")[: len(parts)]
        output_names = [name for key, value in zip(keys, parts, strict=True) for name in _names(key, value)]
        try:
            with definitions():
                graph = torch.export.export(model, inputs, dynamic_shapes=sizes, strict=False)
            values = pytree.tree_leaves([node.meta.get("val") for node in graph.graph.nodes])
            if any(isinstance(value, Tensor) and value.is_complex() for value in values):
                raise ValueError("it computes with complex numbers, which ONNX lacks; choose another mixer")
            program = torch.onnx.export(
                graph, dynamo=True, verbose=False, input_names=input_names, output_names=output_names
            )
        except Exception as error:
            sentence = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ValueError(f"{kind} cannot be written as ONNX: {sentence}") from error
        assert program is not None
        # The exporter notes in every node from which line of which file it came.
        _import("onnx_ir.passes.common").ClearMetadataAndDocStringPass()(program.model)
        program.model.metadata_props.update(metadata or {})
        for value in (*program.model.graph.inputs, *program.model.graph.outputs):
            shape: Any = value.shape
            shape[0] = "batch"
        program.save(os.fspath(path))
        try:
            difference = max(
                _difference(model, pytree.tree_map(lambda t, n=n: _rows(t, n), inputs), path) for n in (2, 3)
            )
            if not difference <= tolerance:
                raise ValueError(
                    f"onnxruntime's outputs of {kind} differ from the model's by {difference:.2g} of the largest; "
                    f"export in another precision, or accept it with tolerance={difference:.0e}"
                )
        except Exception:
            Path(path).unlink()
            raise
    return difference


def _import(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        message = f"writing ONNX needs {error.name}, which is not installed: pip install 'sinuous[export]'"
        raise ModuleNotFoundError(message, name=error.name) from error


def _rows(t: Tensor, rows: int) -> Tensor:
    """At least so many rows: a batch of one would be taken for a constant."""
    if t.ndim == 0:
        raise ValueError("the example must have a batch on axis 0 (got a single number)")
    return t if t.shape[0] >= rows else torch.cat([t, t[:1].expand(rows - t.shape[0], *t.shape[1:])])


def _names(key: str, value: Any) -> list[str]:
    """For each tensor of a tree its place in it: `state_0_memory`."""
    found, _ = pytree.tree_flatten_with_path(value)
    places = ("".join(map(str, path)) for path, _ in found)
    return [
        "_".join([key, *place.replace("[", ".").replace("]", "").replace("'", "").split(".")[1:]]) for place in places
    ]


def _difference(model: nn.Module, inputs: tuple[Any, ...], path: str | os.PathLike[str]) -> float:
    """Largest difference between the outputs of the file and of the model, each tensor's over its largest number."""
    session = _import("onnxruntime").InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    values = zip(session.get_inputs(), pytree.tree_leaves(inputs), strict=False)
    actual = session.run(None, {argument.name: value.numpy(force=True) for argument, value in values})
    expected = [value.numpy(force=True) for value in pytree.tree_leaves(model(*inputs))]
    pairs = [(a, e) for a, e in zip(actual, expected, strict=True) if e.size]
    return max(float(abs(a - e).max() / max(abs(e).max(), 1e-30)) for a, e in pairs)
