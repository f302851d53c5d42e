from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from sinuous.core.ops import dispatch, linear_scan

CPU, FLOAT = torch.device("cpu"), torch.float32
FORMS = ("triton", "torch", "recurrent")


def test_an_argument_beats_the_context_and_the_context_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SINUOUS_BACKEND", "recurrent")
    assert dispatch.choose("x", FORMS, "", CPU, FLOAT) == "recurrent"
    with dispatch.backend("torch"):
        assert dispatch.choose("x", FORMS, "", CPU, FLOAT) == "torch"
        assert dispatch.choose("x", FORMS, "recurrent", CPU, FLOAT) == "recurrent"
    assert dispatch.choose("x", FORMS, "", CPU, FLOAT) == "recurrent"


def test_an_argument_that_cannot_be_met_is_an_error() -> None:
    with pytest.raises(ValueError, match="x has no cpu form"):
        dispatch.choose("x", FORMS, "cpu", CPU, FLOAT)


def test_a_wish_that_cannot_be_met_warns_once_and_takes_the_fastest() -> None:
    dispatch._warned.clear()
    with dispatch.backend("cpu"):
        with pytest.warns(RuntimeWarning, match="does not follow the wish for backend 'cpu'"):
            assert dispatch.choose("x", ("torch", "recurrent"), "", CPU, FLOAT) == "torch"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            dispatch.choose("x", ("torch", "recurrent"), "", CPU, FLOAT)


def test_an_unknown_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = r"must be one of 'triton', 'cpu', 'torch', 'recurrent' \(got 'cuda'\)"
    with pytest.raises(ValueError, match=f"backend {unknown}"):
        dispatch.choose("x", FORMS, "cuda", CPU, FLOAT)
    with pytest.raises(ValueError, match=f"backend {unknown}"), dispatch.backend("cuda"):
        pass
    monkeypatch.setenv("SINUOUS_BACKEND", "cuda")
    with pytest.raises(ValueError, match=f"SINUOUS_BACKEND {unknown}"):
        dispatch.choose("x", FORMS, "", CPU, FLOAT)


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """The threads on which ops run, forward and backward, and the backends that are chosen there."""
    made: list[tuple[int, str]] = []
    choose = dispatch.choose

    def noted(*arguments: Any) -> str:
        made.append((threading.get_ident(), choose(*arguments)))
        return made[-1][1]

    monkeypatch.setattr(dispatch, "choose", noted)
    return made


def in_two_threads(function: Callable[[], Any]) -> dict[str, int]:
    """Call `function` in two threads at once, each with a backend of its own; return their identities by backend."""
    both = threading.Barrier(2)

    def call(name: str) -> tuple[str, int]:
        with dispatch.backend(name):
            both.wait(timeout=60)
            function()
            both.wait(timeout=60)
            function()
        return name, threading.get_ident()

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(call, ("torch", "recurrent")))


def ones() -> tuple[Tensor, Tensor]:
    return torch.ones(1, 5, 2, requires_grad=True), torch.ones(1, 5, 2)


def test_each_thread_has_its_own_wish(choices: list[tuple[int, str]]) -> None:
    threads = in_two_threads(lambda: linear_scan(*ones()).sum().backward())
    assert set(choices) == {(thread, name) for name, thread in threads.items()}
    assert len(choices) == 8


def test_each_thread_has_its_own_wish_in_compiled_code(choices: list[tuple[int, str]]) -> None:
    compiled = torch.compile(linear_scan, backend="aot_eager", fullgraph=True)
    compiled(*ones()).sum().backward()
    choices.clear()
    threads = in_two_threads(lambda: compiled(*ones()).sum().backward())
    assert set(choices) == {(thread, name) for name, thread in threads.items()}
    assert len(choices) == 8


def test_a_block_takes_back_its_own_wish_and_not_the_newest() -> None:
    first, second = dispatch.backend("torch"), dispatch.backend("recurrent")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert dispatch.choose("x", FORMS, "", CPU, FLOAT) == "recurrent"
    second.__exit__(None, None, None)
    assert dispatch.wishes() == ()


class _Deep(torch.autograd.Function):
    """Runs a backward pass inside its own, `depth` deep, where the thread is another, and there `innermost`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, depth: int, innermost: Callable[[], Any]) -> Tensor:
        ctx.depth, ctx.innermost = depth, innermost
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.depth == 0:
            ctx.innermost()
        else:
            with torch.enable_grad():
                _Deep.apply(grad.detach().requires_grad_(), ctx.depth - 1, ctx.innermost).sum().backward()
        return grad, None, None


def on_a_thread_of_autograd(function: Callable[[], Any]) -> None:
    _Deep.apply(torch.ones(1, requires_grad=True), 100, function).sum().backward()


def test_a_backward_pass_on_another_thread_has_the_wish_of_its_forward_pass(choices: list[tuple[int, str]]) -> None:
    with dispatch.backend("recurrent"):
        y = linear_scan(*ones()).sum()
    on_a_thread_of_autograd(y.backward)
    (here, forward), (there, backward) = choices
    assert here != there
    assert forward == backward == "recurrent"


def test_threads_of_autograd_have_the_wish_of_the_thread_that_started_them(choices: list[tuple[int, str]]) -> None:
    def inside() -> None:
        with torch.enable_grad():
            linear_scan(*ones()).sum().backward()

    with dispatch.backend("recurrent"):
        on_a_thread_of_autograd(inside)
    assert {name for _, name in choices} == {"recurrent"}
    assert threading.get_ident() not in {thread for thread, _ in choices}


def test_a_block_inside_compiled_code_holds_or_is_refused(choices: list[tuple[int, str]]) -> None:
    def function(x: Tensor, a: Tensor) -> Tensor:
        with dispatch.backend("recurrent"):
            return linear_scan(x, a)

    torch.compile(function, backend="aot_eager")(*ones())
    assert choices[-1][1] == "recurrent"
    torch.compiler.reset()  # or the function, known to break, is run as it is
    with pytest.raises(Exception, match="put it around the call"):
        torch.compile(function, backend="aot_eager", fullgraph=True)(*ones())
