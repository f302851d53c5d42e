"""Backends that compute the families of ops, on a machine and in a model."""

from __future__ import annotations

import importlib
import pkgutil

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sinuous.core import ops
from sinuous.core.ops import dispatch
from sinuous.core.ops.family import Family


def families() -> list[Family]:
    """All families of ops, by name."""
    modules = (importlib.import_module(f"{ops.__name__}.{info.name}") for info in pkgutil.iter_modules(ops.__path__))
    declared = (getattr(module, "FAMILY", None) for module in modules)
    by_name = {family.name: family for family in declared if isinstance(family, Family)}
    return [by_name[name] for name in sorted(by_name)]


class _Calls(TorchDispatchMode):
    """Notes which of our operators run while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function.namespace == "sinuous":
            self.names.add(function._opname)
        return function(*args, **(kwargs or {}))


def of_model(model: nn.Module, example: Tensor) -> dict[str, str]:
    """Family to backend for the ops that `model` calls on `example`, on the device where it lies."""
    parameter = next(model.parameters())
    training = model.training
    with torch.no_grad(), _Calls() as calls:
        model.eval()(example.to(parameter.device, parameter.dtype if example.is_floating_point() else None))
    model.train(training)
    used = [family for family in families() if family.name in calls.names]
    return {f.name: dispatch.choose(f.name, f.forms, "", parameter.device, parameter.dtype) for f in used}
