"""Runs an op through one of its forms, gradients included, and measures how far two runs are apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path, tree_map, tree_map_with_path

from sinuous.core.ops.laws import Laws
from sinuous.core.ops.laws.declaration import Sample

Arguments = dict[str, Any]

COMPLEX = {torch.float64: torch.complex128, torch.float32: torch.complex64}


def draw_from(sample: Sample, batch: int, length: int, sequences: int | None = None, seed: int = 0) -> Arguments:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return sample(random, batch, length, batch if sequences is None else sequences)


def draw(laws: Laws, variant: str, batch: int, length: int, sequences: int | None = None, seed: int = 0) -> Arguments:
    """Sample arguments of an op, in float64 on the CPU."""
    return draw_from(laws.variants[variant], batch, length, sequences, seed)


def inexact(v: Any) -> bool:
    """Whether `v` is a tensor that can have a gradient."""
    return isinstance(v, Tensor) and (v.is_floating_point() or v.is_complex())


def cast(arguments: Arguments, to: torch.dtype | str) -> Arguments:
    """Convert the floating point and complex tensors to a precision, or all tensors to a device."""

    def convert(v: Any) -> Any:
        if isinstance(to, str):
            return v.to(to) if isinstance(v, Tensor) else v
        return v.to(COMPLEX[to] if v.is_complex() else to) if inexact(v) else v

    return tree_map(convert, arguments)


def run(laws: Laws, form: str, arguments: Arguments) -> tuple[Tensor, Any]:
    return laws.call(**arguments, return_state=True, backend=form)


def path_name(path: tuple[Any, ...]) -> str:
    """`initial_state.0` for the first part of an initial state."""
    return ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)


def tensors(tree: Any) -> dict[str, Tensor]:
    """The tensors of a dict of arguments, or of anything nested, by their paths."""
    return {path_name(path): v for path, v in tree_flatten_with_path(tree)[0] if isinstance(v, Tensor)}


def named(outputs: tuple[Tensor, Any]) -> dict[str, Tensor]:
    """The outputs by name: `y`, and `state` or its parts."""
    return tensors({"y": outputs[0], "state": outputs[1]})


def with_leaves(arguments: Arguments) -> tuple[Arguments, dict[str, Tensor]]:
    """The arguments with every tensor that can have a gradient replaced by a leaf, and the leaves by name."""
    leaves: dict[str, Tensor] = {}

    def visit(path: tuple[Any, ...], v: Any) -> Any:
        if not inexact(v):
            return v
        leaves[path_name(path)] = v.detach().clone().requires_grad_()
        return leaves[path_name(path)]

    return tree_map_with_path(visit, arguments), leaves


def cotangents(outputs: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """A random cotangent for each output, the same for the same shapes whatever the dtype."""
    generator = torch.Generator().manual_seed(seed)

    def normal(o: Tensor) -> Tensor:
        dtype = torch.complex128 if o.is_complex() else torch.float64
        return torch.randn(o.shape, generator=generator, dtype=dtype).to(o)

    return {name: normal(o) for name, o in outputs.items()}


def gradients(outputs: dict[str, Tensor], leaves: dict[str, Tensor], grads: dict[str, Tensor]) -> dict[str, Tensor]:
    actual = torch.autograd.grad(list(outputs.values()), list(leaves.values()), [grads[k] for k in outputs])
    return dict(zip(leaves, actual, strict=True))


def run_with_gradients(laws: Laws, form: str, arguments: Arguments, seed: int = 1) -> dict[str, Tensor]:
    """Outputs and the gradient of each tensor argument for random cotangents of all outputs."""
    arguments, leaves = with_leaves(arguments)
    outputs = named(run(laws, form, arguments))
    actual = gradients(outputs, leaves, cotangents(outputs, seed))
    return {**{k: o.detach() for k, o in outputs.items()}, **actual}


@torch.no_grad()
def error(actual: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of `expected`; absolute where `expected` is zero."""
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    dtype = torch.complex128 if expected.is_complex() else torch.float64
    # Infinities agree where they are equal, and have no size.
    difference = (actual.to(dtype) - expected.to(dtype)).masked_fill(actual == expected, 0).abs().square().mean().sqrt()
    size = expected.to(dtype).masked_fill(expected.isinf(), 0).abs().square().mean().sqrt()
    return float(difference / size.clamp_min(1e-30 if expected.any() else 1.0))


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    errors = {k: error(actual[k], expected[k]) for k in expected}
    assert all(e <= bound for e in errors.values()), errors
