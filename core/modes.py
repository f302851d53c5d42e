"""Modes of a model for the time of a call."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode; afterwards each of its modules is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def stepping(model: nn.Module) -> nn.Module:
    """A twin of a model for many steps, in evaluation mode: it shares the parameters, and the model stays as it is.

    Parts that have `for_steps() -> nn.Module` are replaced by what that returns: a module that makes the same steps,
    with all that depends on parameters alone computed once. So the twin does not see later changes of parameters.
    """
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    twin: nn.Module = copy.deepcopy(model, shared).eval()
    for module in list(twin.modules()):
        for name, part in module.named_children():
            make = getattr(part, "for_steps", None)
            if callable(make):
                setattr(module, name, make())
    return twin
