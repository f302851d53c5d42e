"""One opaque operator per family of recurrences: schema, fake, autograd and dispatch, written once for all of them.

`Family` holds what differs; `define` registers `sinuous::<name>` and `sinuous::<name>_backward`. Both are opaque to
torch.compile, torch.export, FX and TorchScript, and check their arguments in their bodies, since fake functions do
not run in eager mode and a check there would never reach the user.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sinuous.core.ops import differentiation, dispatch, flops
from sinuous.core.ops.checks import REAL, check_device, check_floating
from sinuous.kernels.precision import working_dtype
from sinuous.kernels.torch.differentiation import autograd_inside_an_op

Optionals = Sequence[Tensor | None]

FAMILIES: dict[str, Family] = {}
"""Every defined family by name."""


@dataclass(frozen=True)
class Family:
    """Parts that one op is made of.

    Attributes:
        name: the op is `torch.ops.sinuous.<name>`.
        schema: its arguments in torch's schema language; the last one is `str backend`.
        outputs: names of the outputs that users see, all tensors.
        saved: further outputs, which only the backward pass reads (states at chunk starts): name -> shape, computed
            from the arguments and options. The op carries them flat, since an axis of chunks that is 1 for short
            input would tie an exported graph to short input.
        integers: tensor arguments without a gradient.
        forms: the backends that exist.
        fake: keyword arguments -> empty visible outputs of the right shape, dtype and device.
        check: keyword arguments -> None, or raises ValueError for shapes and values; dtypes and devices are right.
        recurrent: the definition, keyword arguments -> outputs and what is saved, differentiable by autograd.
        options: fixed keyword arguments that kernels get besides the schema's (a chunk size).
        check_dtype: name and tensor -> None, or raises ValueError; called where the dtype is not one of `checks.REAL`.
        time_axes: how many axes of the first argument, from axis 1, the recurrence runs along; 0 on a graph.
        traced: the definition in operators that a tracer should see, where its own loop over time does not become one
            scan; see `sinuous.core.ops.tracing`.
        multiply_adds: keyword arguments, tensors as their shapes -> the definition's multiply-adds; see
            `sinuous.core.ops.flops`.
    """

    name: str
    schema: str
    outputs: tuple[str, ...]
    saved: dict[str, Callable[..., tuple[int, ...]]]
    integers: tuple[str, ...]
    forms: tuple[str, ...]
    fake: Callable[..., tuple[Tensor, ...]]
    check: Callable[..., None]
    recurrent: Callable[..., tuple[Tensor, ...]]
    options: dict[str, Any]
    multiply_adds: Callable[..., int]
    check_dtype: Callable[[str, Tensor], None] = check_floating
    time_axes: int = 1
    traced: Callable[..., tuple[Tensor, ...]] | None = None

    @property
    def arguments(self) -> list[tuple[str, str]]:
        """Pairs (type, name) of all arguments but the backend."""
        pairs = [entry.strip().split("=")[0].split() for entry in self.schema.split(",")]
        return [(kind, name) for kind, name in pairs if name != "backend"]

    @property
    def differentiable(self) -> list[str]:
        """Names of the tensor arguments that have a gradient."""
        return [name for kind, name in self.arguments if kind.startswith("Tensor") and name not in self.integers]


def _empty_for_none(tensors: Optionals, like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if t is None else t.contiguous() for t in tensors)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Switch autocast off, which would turn the matrix products inside an op's body to half precision."""
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            yield
    else:
        yield


def recurrent_backward(family: Family, grads: Optionals, args: dict[str, Any]) -> list[Tensor | None]:
    """Gradients of the definition, by autograd; every other backward is measured against them."""
    leaves = {n: args[n].detach().requires_grad_() for n in family.differentiable if args[n] is not None}
    gradients: Optionals = [None] * len(leaves)
    with autograd_inside_an_op():
        outputs = family.recurrent(**{**args, **leaves}, **family.options)
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=False) if g is not None and o.requires_grad]
        if pairs:
            outs, gs = zip(*pairs, strict=True)
            gradients = torch.autograd.grad(outs, list(leaves.values()), gs, allow_unused=True)
    grads_of = dict(zip(leaves, gradients, strict=True))
    zeros = {n: torch.zeros_like(t) for n, t in leaves.items() if grads_of[n] is None}
    return [zeros.get(n, grads_of.get(n)) for n in family.differentiable]


def define(family: Family) -> None:
    """Register the family's forward and backward operators, their fakes and the autograd that joins them."""
    FAMILIES[family.name] = family
    names = [name for _, name in family.arguments]
    tensor_arguments = [
        (n, name, kind == "Tensor?", name not in family.integers)
        for n, (kind, name) in enumerate(family.arguments)
        if kind.startswith("Tensor")
    ]
    visible = family.outputs
    forward_name, backward_name = f"sinuous::{family.name}", f"sinuous::{family.name}_backward"
    grad_schema = ", ".join(f"Tensor? grad_{n}" for n in visible)
    saved_schema = "".join(f"Tensor {n}, " for n in family.saved)
    backward_arguments = family.schema.replace("str backend", f"{saved_schema}str backend")

    def tensors(count: int) -> str:
        return "(" + ", ".join(["Tensor"] * count) + ")"

    torch.library.define(forward_name, f"({family.schema}) -> {tensors(len(family.outputs) + len(family.saved))}")
    torch.library.define(
        backward_name, f"({grad_schema}, {backward_arguments}) -> {tensors(len(family.differentiable))}"
    )

    def check_tensors(values: tuple[Any, ...]) -> None:
        first = values[0]
        device = None if first is None else first.device
        for n, name, optional, floating in tensor_arguments:
            t = values[n]
            if t is None:
                if not optional:
                    raise ValueError(f"{name} must be a tensor (got None); {family.name} cannot do without it")
                continue
            if floating and t.dtype not in REAL:
                family.check_dtype(name, t)
            # Boundaries may stay on the CPU, where the kernels of every device find them.
            if t.device != device and (floating or t.device.type != "cpu" or name != "cu_seqlens"):
                check_device(name, t, names[0], first)

    def run_definition(*values: Any) -> tuple[Tensor, ...]:
        return forward(*values[:-1], "recurrent")

    def forward(*values: Any) -> tuple[Tensor, ...]:
        args, requested = dict(zip(names, values[:-1], strict=True)), values[-1]
        check_tensors(values)
        family.check(**args)
        first = values[0]
        name = dispatch.choose(family.name, family.forms, requested, first.device, first.dtype)
        if name == "torch" and family.time_axes and math.prod(first.shape[1 : 1 + family.time_axes]) == 1:
            name = "recurrent"  # which is cheaper than a chunk of one step, and keeps the same for the backward pass
        function = family.recurrent if name == "recurrent" else dispatch.kernel(family.name, name).forward
        with _full_precision(first.device):
            outputs = function(**args, **family.options)
        count = len(visible)
        return _empty_for_none((*outputs[:count], *(t.flatten() for t in outputs[count:])), first)

    def backward(*values: Any) -> tuple[Tensor, ...]:
        count = len(visible)
        grads, rest, requested = values[:count], values[count:-1], values[-1]
        args = dict(zip(names, rest, strict=False))
        flat = zip(family.saved.items(), rest[len(names) :], strict=True)
        saved = {n: t.view(shape(**args, **family.options)) for (n, shape), t in flat}
        first = rest[0]
        name = dispatch.choose(family.name, family.forms, requested, first.device, first.dtype)
        gradients: Optionals
        with _full_precision(first.device):
            if name == "recurrent":
                gradients = recurrent_backward(family, grads, args)
            else:
                gradients = dispatch.kernel(family.name, name).backward(grads, **args, **saved, **family.options)
        typed = [g if g is None else g.to(args[n].dtype) for n, g in zip(family.differentiable, gradients, strict=True)]
        return _empty_for_none(typed, first)

    def forward_fake(*values: Any) -> tuple[Tensor, ...]:
        args = dict(zip(names, values[:-1], strict=True))
        check_tensors(values)  # one tensor on meta is enough for torch to call this and not the op's body
        first = values[0]
        sizes = (math.prod(shape(**args, **family.options)) for shape in family.saved.values())
        saved = (torch.empty(size, dtype=working_dtype(first.dtype), device=first.device) for size in sizes)
        return (*family.fake(**args), *saved)

    def backward_fake(*values: Any) -> tuple[Tensor, ...]:
        args = dict(zip(names, values[len(visible) :], strict=False))
        inputs = (args[n] for n in family.differentiable)
        return tuple(
            values[len(visible)].new_empty(0) if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device)
            for t in inputs
        )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors = [v for (kind, _), v in zip(family.arguments, inputs, strict=False) if kind.startswith("Tensor")]
        ctx.save_for_backward(*tensors, *output[len(visible) :])
        ctx.plain = [
            None if kind.startswith("Tensor") else v for (kind, _), v in zip(family.arguments, inputs, strict=False)
        ]
        ctx.backend, ctx.wishes = inputs[-1], dispatch.wishes()
        ctx.set_materialize_grads(False)

    def autograd_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        stored = list(ctx.saved_tensors)
        values = [
            stored.pop(0) if kind.startswith("Tensor") else plain
            for (kind, _), plain in zip(family.arguments, ctx.plain, strict=True)
        ]
        with dispatch.wishing(ctx.wishes):
            gradients = getattr(torch.ops.sinuous, f"{family.name}_backward")(
                *grads[: len(visible)], *values, *stored, ctx.backend
            )
        grad_of = dict(zip(family.differentiable, gradients, strict=True))
        present = {n for n, v in zip(names, values, strict=True) if v is not None}
        return (*(grad_of[n] if n in grad_of and n in present else None for n in names), None)

    def no_second_derivative(*_: Any) -> Any:
        raise RuntimeError(
            f"{family.name} has no second derivative; compute it from the definition (`from "
            f"sinuous.core.ops.{family.name} import recurrent`), which autograd differentiates to any order"
        )

    torch.library.impl(forward_name, "CompositeExplicitAutograd", forward)
    torch.library.impl(backward_name, "CompositeExplicitAutograd", backward)
    torch.library.register_fake(forward_name, forward_fake)
    torch.library.register_fake(backward_name, backward_fake)
    differentiation.register(forward_name, setup_context, autograd_backward, run_definition)
    differentiation.register(backward_name, lambda *_: None, no_second_derivative, no_second_derivative)
    flops.register(forward_name, names, family.multiply_adds)
    flops.register(backward_name, [*(f"grad_{n}" for n in visible), *names], family.multiply_adds, passes=2)
