"""Runs an op through one of its forms, gradients included, and measures how far two runs are apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sinuous.core.ops.laws import Laws

Arguments = dict[str, Any]


def draw(laws: Laws, variant: str, batch: int, length: int, sequences: int | None = None, seed: int = 0) -> Arguments:
    """Sample arguments of an op, in float64 on the CPU."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return laws.variants[variant](random, batch, length, batch if sequences is None else sequences)


def cast(arguments: Arguments, to: torch.dtype | str) -> Arguments:
    """Convert the floating point tensors to a dtype, or all tensors to a device."""

    def applies(v: Any) -> bool:
        return isinstance(v, Tensor) and (isinstance(to, str) or v.is_floating_point())

    return {k: v.to(to) if applies(v) else v for k, v in arguments.items()}


def run(laws: Laws, form: str, arguments: Arguments) -> tuple[Tensor, Tensor]:
    return laws.call(**arguments, return_state=True, backend=form)


def run_with_gradients(laws: Laws, form: str, arguments: Arguments, seed: int = 1) -> dict[str, Tensor]:
    """Outputs and the gradient of each tensor argument for random cotangents of both outputs."""
    leaves = {
        k: v.clone().requires_grad_() for k, v in arguments.items() if isinstance(v, Tensor) and v.is_floating_point()
    }
    outputs = run(laws, form, {**arguments, **leaves})
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    return {"y": outputs[0].detach(), "state": outputs[1].detach(), **dict(zip(leaves, gradients, strict=True))}


@torch.no_grad()
def error(found: Tensor, wanted: Tensor) -> float:
    """RMS of the difference over RMS of the wanted; absolute where the wanted is zero."""
    assert found.shape == wanted.shape
    if wanted.numel() == 0:
        return 0.0
    difference = (found.double() - wanted.double()).square().mean().sqrt()
    return float(difference / wanted.double().square().mean().sqrt().clamp_min(1e-30 if wanted.any() else 1.0))


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], bound: float) -> None:
    errors = {k: error(found[k], wanted[k]) for k in wanted}
    assert all(e <= bound for e in errors.values()), errors
