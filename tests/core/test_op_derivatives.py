"""Derivatives of every op by the transforms of torch.func and in forward mode: right, or refused in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity import draw, inexact
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from sinuous.core.ops.laws import LAWS

every_op = pytest.mark.parametrize("name", LAWS)
close = torch.testing.assert_close


def function_of_one(name: str, form: str = "torch") -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The op as a function of its first argument, and a value of that."""
    laws = LAWS[name]
    arguments = draw(laws, "full", 2, 3)
    first = laws.time[0]

    def function(x: Tensor) -> Tensor:
        y: Tensor = laws.call(**{**arguments, first: x}, backend=form)
        return y

    return function, arguments[first]


def product(jacobian: Tensor, tangent: Tensor) -> Tensor:
    return torch.einsum("yx,x->y", jacobian.flatten(-tangent.ndim).flatten(0, -2), tangent.flatten())


@every_op
def test_reverse_mode_of_torch_func(name: str) -> None:
    function, x = function_of_one(name)
    jacobian = torch.autograd.functional.jacobian(function, x)
    close(jacrev(function)(x), jacobian)
    close(grad(lambda x: function(x).sum())(x), jacobian.sum(tuple(range(jacobian.ndim - x.ndim))))


@every_op
def test_forward_mode(name: str) -> None:
    function, x = function_of_one(name)
    jacobian = torch.autograd.functional.jacobian(function, x)
    tangent = torch.randn_like(x)
    close(jacfwd(function)(x), jacobian)
    y, derivative = jvp(function, (x,), (tangent,))
    close(y, function(x))
    close(derivative.flatten(), product(jacobian, tangent))
    with forward_ad.dual_level():
        derivative = forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent
        assert derivative is not None
        close(derivative.flatten(), product(jacobian, tangent))


@every_op
def test_forward_mode_is_in_every_argument_and_every_output(name: str) -> None:
    laws = LAWS[name]
    arguments = draw(laws, "full", 2, 3)
    for argument, value in arguments.items():
        if not inexact(value):
            continue
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(value, torch.ones_like(value))
            y, state = laws.call(**{**arguments, argument: dual}, return_state=True)
            outputs = (y, *state) if isinstance(state, tuple) else (y, state)
            assert any(forward_ad.unpack_dual(o).tangent is not None for o in outputs), argument


@every_op
def test_vmap_equals_the_separate_calls(name: str) -> None:
    function, x = function_of_one(name)
    gradient = grad(lambda x: function(x).square().sum())
    several = torch.stack([x, 2 * x, -x], 1)
    close(vmap(function, in_dims=1)(several), torch.stack([function(t) for t in several.unbind(1)]))
    close(vmap(gradient, in_dims=1)(several), torch.stack([gradient(t) for t in several.unbind(1)]))


def _grad_of_grad(function: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    return grad(lambda x: grad(function)(x).sum())(x)


def _backward_of_grad(function: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    grad(function)(x.requires_grad_()).sum().backward()


@pytest.mark.parametrize("second", [_grad_of_grad, _backward_of_grad, lambda f, x: hessian(f)(x)])
@every_op
def test_a_second_derivative_is_refused_and_not_wrong(name: str, second: Callable[..., Any]) -> None:
    function, x = function_of_one(name)
    with pytest.raises(RuntimeError, match=f"{name} has no second derivative; compute it from the definition"):
        second(lambda x: function(x).square().sum(), x)


def test_a_derivative_beside_another_transform_passes_through() -> None:
    function, x = function_of_one("linear_scan")
    outer = grad(lambda s: (grad(lambda x: function(x).sum())(x) * s).sum())(torch.tensor(2.0, dtype=torch.float64))
    close(outer, grad(lambda x: function(x).sum())(x).sum())
