"""One opaque operator per family of recurrences: schema, fake, autograd and dispatch, written once for all of them.

`Family` holds what differs; `define` registers `sinuous::<name>` and `sinuous::<name>_backward`. Both are opaque to
torch.compile, torch.export, FX and TorchScript, and check their arguments in their bodies, since fake functions do
not run in eager mode and a check there would never reach the user.
"""

from __future__ import annotations

import functools
import math
import typing
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


TORCH_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    float: "float",
    float | None: "float?",
    str: "str",
    Sequence[int]: "int[]",
}
"""What an argument may be, and its name in torch's schema language."""


@dataclass(frozen=True)
class Family:
    """Parts that one op is made of.

    Attributes:
        name: the op is `torch.ops.sinuous.<name>`.
        arguments: the record of its arguments (`sinuous.kernels.arguments`); its schema has a last one, `str backend`.
        outputs: names of the outputs that users see, all tensors.
        saved: further outputs, which only the backward pass reads (states at chunk starts): name -> shape, computed
            from the record and options. The op carries them flat, since an axis of chunks that is 1 for short input
            would tie an exported graph to short input.
        integers: tensor arguments without a gradient.
        forms: the backends that exist.
        fake: record -> empty visible outputs of the right shape, dtype and device.
        check: record -> None, or raises ValueError for shapes and values; dtypes and devices are right.
        recurrent: the definition, record and options -> outputs and what is saved, differentiable by autograd.
        options: fixed keyword arguments that kernels get besides the record (a chunk size).
        check_dtype: name and tensor -> None, or raises ValueError; called where the dtype is not one of `checks.REAL`.
        time_axes: how many axes of the first argument, from axis 1, the recurrence runs along; 0 on a graph.
        traced: the definition in operators that a tracer should see, where its own loop over time does not become one
            scan; see `sinuous.core.ops.tracing`.
        multiply_adds: record with shapes for tensors -> the definition's multiply-adds; see `sinuous.core.ops.flops`.
    """

    name: str
    arguments: type[Any]
    outputs: tuple[str, ...]
    saved: dict[str, Callable[..., tuple[int, ...]]]
    integers: tuple[str, ...]
    forms: tuple[str, ...]
    fake: Callable[[Any], tuple[Tensor, ...]]
    check: Callable[[Any], None]
    recurrent: Callable[..., tuple[Tensor, ...]]
    options: dict[str, Any]
    multiply_adds: Callable[[Any], int]
    check_dtype: Callable[[str, Tensor], None] = check_floating
    time_axes: int = 1
    traced: Callable[..., tuple[Tensor, ...]] | None = None

    @functools.cached_property
    def types(self) -> dict[str, str]:
        """Names of all arguments but the backend, in order, and their types in torch's schema language."""
        hints = typing.get_type_hints(self.arguments)
        return {name: TORCH_TYPES[hints[name]] for name in self.arguments._fields}

    @functools.cached_property
    def tensors(self) -> list[str]:
        """Names of the tensor arguments."""
        return [name for name, kind in self.types.items() if kind.startswith("Tensor")]

    @functools.cached_property
    def differentiable(self) -> list[str]:
        """Names of the tensor arguments that have a gradient."""
        return [name for name in self.tensors if name not in self.integers]

    def bind(self, *values: Any, backend: str = "", **named: Any) -> tuple[Any, str]:
        """The record and the backend of a call of the op."""
        count = len(self.types)
        return self.arguments(*values[:count], **named), (values[count] if len(values) > count else backend)


def _default(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(list(value) if isinstance(value, tuple) else value)


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


def recurrent_backward(family: Family, args: Any, grads: Optionals) -> list[Tensor | None]:
    """Gradients of the definition, by autograd; every other backward is measured against them."""
    present = {name: t for name in family.differentiable if (t := getattr(args, name)) is not None}
    leaves = {name: t.detach().requires_grad_() for name, t in present.items()}
    gradients: Optionals = [None] * len(leaves)
    with autograd_inside_an_op():
        outputs = family.recurrent(args._replace(**leaves), **family.options)
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
    record, names = family.arguments, list(family.types)
    tensor_arguments = [
        (names.index(name), name, family.types[name] == "Tensor?", name not in family.integers)
        for name in family.tensors
    ]
    gradient_of = [family.differentiable.index(name) if name in family.differentiable else None for name in names]
    visible, count, optional = len(family.outputs), len(names), record._field_defaults
    left_out = (*(optional.get(name) for name in names), "")  # by the dispatcher, at the end
    filled = tuple.__new__  # a record from all its fields, in a third of the time of its own constructor
    forward_name, backward_name = f"sinuous::{family.name}", f"sinuous::{family.name}_backward"

    def tensors(number: int) -> str:
        return "(" + ", ".join(["Tensor"] * number) + ")"

    typed = {name: f"{kind} {name}" for name, kind in family.types.items()}
    with_defaults = [f"{t}={_default(optional[name])}" if name in optional else t for name, t in typed.items()]
    torch.library.define(
        forward_name, f'({", ".join(with_defaults)}, str backend="") -> {tensors(visible + len(family.saved))}'
    )
    # Without defaults, of which the dispatcher would drop those at the end.
    gradients_in = [f"Tensor? grad_{n}" for n in family.outputs]
    saved_in = [f"Tensor {n}" for n in family.saved]
    everything = [*gradients_in, *typed.values(), *saved_in, "str backend"]
    torch.library.define(backward_name, f"({', '.join(everything)}) -> {tensors(len(family.differentiable))}")

    def check_tensors(args: Any) -> None:
        first = args[0]
        device = None if first is None else first.device
        for n, name, may_be_absent, floating in tensor_arguments:
            t = args[n]
            if t is None:
                if not may_be_absent:
                    raise ValueError(f"{name} must be a tensor (got None); {family.name} cannot do without it")
                continue
            if floating and t.dtype not in REAL:
                family.check_dtype(name, t)
            # Boundaries may stay on the CPU, where the kernels of every device find them.
            if t.device != device and (floating or t.device.type != "cpu" or name != "cu_seqlens"):
                check_device(name, t, names[0], first)

    def run_definition(*values: Any) -> tuple[Tensor, ...]:
        return forward(*values[:count], "recurrent")

    def forward(*values: Any) -> tuple[Tensor, ...]:
        values += left_out[len(values) :]
        args, requested = filled(record, values[:count]), values[count]
        check_tensors(args)
        family.check(args)
        first = args[0]
        name = dispatch.choose(family.name, family.forms, requested, first.device, first.dtype)
        if name == "torch" and family.time_axes and math.prod(first.shape[1 : 1 + family.time_axes]) == 1:
            name = "recurrent"  # which is cheaper than a chunk of one step, and keeps the same for the backward pass
        function = family.recurrent if name == "recurrent" else dispatch.kernel(family.name, name).forward
        with _full_precision(first.device):
            outputs = function(args, **family.options)
        return _empty_for_none((*outputs[:visible], *(t.flatten() for t in outputs[visible:])), first)

    def backward(*values: Any) -> tuple[Tensor, ...]:
        grads, rest, requested = values[:visible], values[visible:-1], values[-1]
        args = record._make(rest[:count])
        flat = zip(family.saved.items(), rest[count:], strict=True)
        saved = {n: t.view(shape(args, **family.options)) for (n, shape), t in flat}
        first = args[0]
        name = dispatch.choose(family.name, family.forms, requested, first.device, first.dtype)
        gradients: Optionals
        with _full_precision(first.device):
            if name == "recurrent":
                gradients = recurrent_backward(family, args, grads)
            else:
                gradients = dispatch.kernel(family.name, name).backward(args, grads, **saved, **family.options)
        pairs = zip(family.differentiable, gradients, strict=True)
        return _empty_for_none([g if g is None else g.to(getattr(args, n).dtype) for n, g in pairs], first)

    def forward_fake(*values: Any) -> tuple[Tensor, ...]:
        args, _ = family.bind(*values)
        check_tensors(args)  # one tensor on meta is enough for torch to call this and not the op's body
        first = args[0]
        sizes = (math.prod(shape(args, **family.options)) for shape in family.saved.values())
        saved = (torch.empty(size, dtype=working_dtype(first.dtype), device=first.device) for size in sizes)
        return (*family.fake(args), *saved)

    def backward_fake(*values: Any) -> tuple[Tensor, ...]:
        args = record._make(values[visible : visible + count])
        inputs = (getattr(args, n) for n in family.differentiable)
        return tuple(
            args[0].new_empty(0) if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in inputs
        )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*(inputs[n] for n, *_ in tensor_arguments), *output[visible:])
        ctx.plain = [None if isinstance(value, Tensor) else value for value in inputs[:count]]
        ctx.backend, ctx.wishes = inputs[-1], dispatch.wishes()
        ctx.set_materialize_grads(False)

    def autograd_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        values, stored = list(ctx.plain), ctx.saved_tensors
        for (n, *_), t in zip(tensor_arguments, stored, strict=False):
            values[n] = t
        with dispatch.wishing(ctx.wishes):
            gradients = getattr(torch.ops.sinuous, f"{family.name}_backward")(
                *grads[:visible], *values, *stored[len(tensor_arguments) :], ctx.backend
            )
        pairs = zip(gradient_of, values, strict=True)
        return (*(None if n is None or value is None else gradients[n] for n, value in pairs), None)

    def no_second_derivative(*_: Any) -> Any:
        raise RuntimeError(
            f"{family.name} has no second derivative; compute it from the definition, which autograd differentiates to "
            f"any order: sinuous.core.ops.{family.name}.recurrent of a sinuous.kernels.arguments.{record.__name__}"
        )

    torch.library.impl(forward_name, "CompositeExplicitAutograd", forward)
    torch.library.impl(backward_name, "CompositeExplicitAutograd", backward)
    torch.library.register_fake(forward_name, forward_fake)
    torch.library.register_fake(backward_name, backward_fake)
    differentiation.register(forward_name, setup_context, autograd_backward, run_definition)
    differentiation.register(backward_name, lambda *_: None, no_second_derivative, no_second_derivative)
    flops.register(forward_name, lambda *shapes, **named: family.multiply_adds(family.bind(*shapes, **named)[0]))
    flops.register(
        backward_name, lambda *shapes, **_: 2 * family.multiply_adds(record._make(shapes[visible : visible + count]))
    )
