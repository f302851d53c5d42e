"""Derivatives of a registered operator, in reverse, forward and row by row, as torch and torch.func ask for them.

torch's own `register_autograd` has no forward mode: it would drop the tangents without a word. Nor do the transforms of
torch.func pass through it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

Outputs = tuple[Tensor, ...]

_LIBRARY = torch.library.Library("sinuous", "FRAGMENT")


def has_tangents(values: tuple[Any, ...]) -> bool:
    """Whether forward-mode differentiation is on and reaches one of the tensors among `values`."""
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(v).tangent is not None for v in values if isinstance(v, Tensor))


def may_be_differentiated(*tensors: Tensor | None) -> bool:
    """Whether what is computed from the tensors may be differentiated, in reverse, forward or by torch.func."""
    if forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None:
        return True
    return any(t is not None and t.requires_grad for t in tensors)


def register(
    name: str,
    setup_context: Callable[[Any, tuple[Any, ...], Outputs], None],
    backward: Callable[..., tuple[Tensor | None, ...]],
    forward_mode: Callable[..., Outputs | Tensor],
) -> None:
    """Give the operator `name` its derivatives.

    Args:
        name: the operator, `sinuous::<name>`.
        setup_context: `(ctx, all arguments, outputs)`, keeps in `ctx` what `backward` reads.
        backward: `(ctx, *gradients of outputs)` -> gradients of the arguments.
        forward_mode: computes the outputs by operations that autograd differentiates, called where there are tangents.
    """
    op = getattr(torch.ops.sinuous, name.partition("::")[2]).default
    below = torch._C._after_autograd_keyset
    defaults = tuple(argument.default_value for argument in op._schema.arguments)

    class Recorded(_SingleLevelFunction):  # torch.func has its own level at work here, and stops a plain Function
        @staticmethod
        def forward(ctx: Any, keyset: Any, *values: Any) -> Any:
            # An outer transform of torch.func lies below this one, and records only where gradients are on.
            with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd():
                outputs = op.redispatch(keyset & below, *values)
            setup_context(ctx, values, outputs if isinstance(outputs, tuple) else (outputs,))
            return outputs

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return (None, *backward(ctx, *grads))

    Recorded.__name__ = f"Recorded_{op._opname}"

    def differentiated(keyset: Any, *values: Any) -> Any:
        values += defaults[len(values) :]  # the dispatcher drops those at the end
        if has_tangents(values):
            return forward_mode(*values)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*values):
            with enable_single_level_autograd_function():
                return Recorded.apply(keyset, *values)  # type: ignore[attr-defined]
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & below, *values)

    def row_by_row(info: Any, in_dims: tuple[Any, ...], *values: Any) -> tuple[Outputs | Tensor, tuple[int, ...] | int]:
        axes = zip(values, in_dims, strict=True)
        columns = (v.unbind(d) if isinstance(d, int) else (v,) * info.batch_size for v, d in axes)
        rows = [op(*row) for row in zip(*columns, strict=True)]
        if isinstance(rows[0], Tensor):
            return torch.stack(rows), 0
        outputs = [torch.stack(parts) for parts in zip(*rows, strict=True)]
        return tuple(outputs), (0,) * len(outputs)

    _LIBRARY.impl(op._opname, differentiated, "Autograd", with_keyset=True)
    torch.library.register_vmap(name, row_by_row)
