"""Every argument of every op with every kind of wrong value: a sentence that names the argument, and nothing else."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from parity import draw
from torch import Tensor

from sinuous.core.ops.dag_scan import dag_scan
from sinuous.core.ops.laws import LAWS

Arguments = dict[str, Any]
Wrong = Callable[[Any], Any]

NOT_TENSORS: dict[str, Wrong] = {
    "a list": lambda t: t.tolist(),
    "numpy": lambda t: t.numpy(),
    "a word": lambda t: "u" * 5000,
    "a number": lambda t: 3,
    "a type": lambda t: Tensor,
    "a tuple of tensors": lambda t: (t, t),
}

WRONG_TENSORS: dict[str, Wrong] = {
    "integers": lambda t: t.long(),
    "8 bits": lambda t: t.to(torch.float8_e4m3fn),
    "sparse": lambda t: t.to_sparse(),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "meta": lambda t: t.to("meta"),
}

BOOLEANS: dict[str, Wrong] = {"complex": lambda t: t.to(torch.complex64), "boolean": lambda t: t > 0}

BOUNDS: dict[str, Wrong] = {
    "floats": lambda t: t.float(),
    "two axes": lambda t: t[None],
    "no axis": lambda t: t[0],
    "one bound": lambda t: t[:1],
    "not from 0": lambda t: t + 1,
    "too short": lambda t: t - torch.tensor([0, 0, 1]),
    "falling": lambda t: torch.tensor([0, 9, 5]),
    "negative": lambda t: torch.tensor([0, -1, 5]),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
}

STATES: dict[str, Wrong] = {
    "too few parts": lambda s: s[:-1],
    "too many parts": lambda s: (*s, s[0]),
    "no part": lambda s: (),
    "one tensor": lambda s: torch.stack([s[0]] * len(s)),
    "a part is None": lambda s: (s[0], None, *s[2:]),
    "a part is a list": lambda s: (s[0].tolist(), *s[1:]),
    "a word": lambda s: "Cnm",
    "a word as long": lambda s: "s" * len(s),
    "a number": lambda s: 3,
    "a dictionary": lambda s: dict.fromkeys(range(len(s)), s[0]),
}

SWITCHES: dict[str, Wrong] = {
    "a word": lambda b: "no",
    "None": lambda b: None,
    "a number": lambda b: 2,
    "a list": lambda b: [True],
    "a tensor": lambda b: torch.ones(2),
}

NUMBERS: dict[str, Wrong] = {
    "a word": lambda f: "half",
    "a list": lambda f: [0.5],
    "a tensor": lambda f: torch.ones(3),
    "NaN": lambda f: float("nan"),
    "infinite": lambda f: float("inf"),
    "complex": lambda f: 1j,
    "a switch": lambda f: True,
}

WORDS: dict[str, Wrong] = {
    "another word": lambda s: "elu",
    "no word": lambda s: "",
    "a number": lambda s: 3,
    "a list": lambda s: ["zoh"],
    "a tensor": lambda s: torch.ones(2),
}

COUNTS: dict[str, Wrong] = {
    "a word": lambda o: "0123",
    "a number": lambda o: 2,
    "none": lambda o: [],
    "floats": lambda o: [0.0, 1.0, 2.0, 3.0],
    "words": lambda o: ["0", "1", "2", "3"],
    "negative": lambda o: [0, 1, 2, -1],
    "too many": lambda o: [0, 1, 2, 3, 0],
    "a tensor": lambda o: torch.ones(4),
}

RANGES: dict[tuple[str, str], dict[str, Wrong]] = {
    ("selective_scan", "A"): {"positive": lambda t: -t},
    ("lti_conv", "dt"): {"negative": lambda t: -t, "zero": lambda t: t * 0, "one is zero": lambda t: t * (t != t[0])},
    ("delta_rule", "beta"): {"negative": lambda t: t - 3, "above 2": lambda t: t + 3},
    ("mlstm", "eps"): {"negative": lambda t: -1e-6, "None": lambda t: None},
    **{(op, "log_decay"): {"positive": lambda t: -t} for op in ("ssd", "gla", "delta_rule", "dplr")},
}

RIGHT = {
    "dag_scan": {
        "v": ("axis 2 longer", "axis 2 empty"),
        "edges": ("integers",),
        "line_edges": ("integers",),
    },
    "causal_conv1d": {"x": ("axis 1 longer", "axis 1 empty")},
    "slstm": {"gates": ("axis 1 longer", "axis 1 empty")},
    "lti_conv": {
        "u": ("axis 1 longer", "axis 1 empty"),
        "P": ("an axis less", "axis 0 longer"),
        **dict.fromkeys("ABC", ("an axis less",)),
    },
}
"""Changes that make another valid call: time is an axis of one argument alone, constants may leave out the channels, V
is the values' own, and edges are integers."""

OPTIONS = {"scale": 0.5, "eps": 1e-4, "orientations": [0, 1, 2, 3]}


def shapes(t: Tensor) -> Iterator[tuple[str, Wrong]]:
    yield "an axis more", lambda t: t[None]
    yield "no axis", lambda t: t.sum()
    yield "an axis less", lambda t: t[0]
    for axis in range(t.ndim):
        yield f"axis {axis} longer", lambda t, axis=axis: torch.cat([t, t.narrow(axis, 0, 1)], axis)
        yield f"axis {axis} empty", lambda t, axis=axis: t.narrow(axis, 0, 0)


def front(name: str) -> Callable[..., Any]:
    """The public function of an op. Its laws call it too, those of a graph once for a batch of graphs."""
    return dag_scan if name == "dag_scan" else LAWS[name].call


def valid(name: str) -> Arguments:
    """Valid arguments of an op, all of them tensors where they can be, and every option that has a number or a list."""
    arguments = draw(LAWS[name], "full", 2, 5)
    if name == "dag_scan":
        arguments = {k: v[0] if isinstance(v, torch.Tensor) and "edges" not in k else v for k, v in arguments.items()}
    signature = inspect.signature(front(name)).parameters
    return {**{k: v for k, v in OPTIONS.items() if k in signature}, **arguments}


def wrong_values(name: str, argument: str) -> Iterator[tuple[str, Arguments]]:
    """Arguments of the op, all right but for `argument`, and what is wrong with it."""
    arguments = valid(name)
    parameter = inspect.signature(front(name)).parameters[argument]
    annotation, value = str(parameter.annotation), arguments.get(argument, parameter.default)
    kinds: dict[str, Wrong] = {}
    if argument == "cu_seqlens":
        arguments |= draw(LAWS[name], "full", 1, 5, sequences=2)
        value = torch.tensor([0, 2, 5])
        kinds = NOT_TENSORS | BOUNDS
    elif argument == "initial_state" and isinstance(value, tuple):
        kinds = dict(STATES)
        for part, t in enumerate(value):
            for kind, change in {**WRONG_TENSORS, **BOOLEANS, **dict(shapes(t))}.items():
                kinds[f"part {part}, {kind}"] = lambda s, n=part, f=change: tuple(
                    f(t) if i == n else t for i, t in enumerate(s)
                )
    elif isinstance(value, Tensor):
        kinds = NOT_TENSORS | WRONG_TENSORS | BOOLEANS | dict(shapes(value))
        if value.dtype == torch.bool:
            kinds = {k: v for k, v in kinds.items() if k not in ("boolean", "nested")}
        if name == "linear_scan" and value.dtype != torch.bool:
            kinds["complex"] = lambda t: t.to(torch.complex32)
    elif annotation.startswith("bool"):
        kinds = SWITCHES
    elif annotation.startswith("float"):
        kinds = NUMBERS
    elif annotation.startswith("str"):
        kinds = WORDS
    elif annotation.startswith("Sequence[int]"):
        kinds = COUNTS
    kinds = {**kinds, **RANGES.get((name, argument), {})}
    if parameter.default is inspect.Parameter.empty:
        kinds["None"] = lambda t: None
    for kind, change in kinds.items():
        if kind not in RIGHT.get(name, {}).get(argument, ()):
            yield kind, {**arguments, argument: change(value)}


CASES = [(name, argument) for name in LAWS for argument in inspect.signature(front(name)).parameters]


def fault(name: str, argument: str, kind: str, arguments: Arguments) -> str | None:
    """Say how a call with a wrong value ends, if not in a sentence; None where it does."""
    try:
        front(name)(**arguments)
    except ValueError as error:
        message = str(error)
        names = arguments if "axis" in kind else (argument,)  # a tensor of another size may be the one that is right
        part = r"initial_\w+|" if "axis" in kind or argument == "initial_state" else ""
        named = re.search(rf"\b({part}{'|'.join(names)})\b", message)
        said = re.search(r"\(got .*\)|has .* and .* has|is .* and .* is|on .* and .* on|has no", message)
        if named and said and len(message) < 300:
            return None
        return f"ValueError: {message[:300]}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "no error"


def faults(name: str, argument: str) -> dict[str, str]:
    """All that ends otherwise than in a sentence; each in a process of its own where it may end the process."""
    result = {}
    for kind, arguments in wrong_values(name, argument):
        if kind not in ("None", "meta", "a part is None"):
            found = fault(name, argument, kind, arguments)
        else:
            found = in_a_fork(lambda kind=kind, arguments=arguments: fault(name, argument, kind, arguments))
        if found is not None:
            result[kind] = found
    return result


def in_a_fork(function: Callable[[], str | None]) -> str | None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os.write(write, (function() or "").encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return f"the process ended with {status}" if status else said or None


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_a_wrong_value_ends_in_a_sentence(name: str, argument: str) -> None:
    assert faults(name, argument) == {}


@pytest.mark.parametrize("name", LAWS)
def test_the_values_that_are_made_wrong_are_right(name: str) -> None:
    front(name)(**valid(name))


@pytest.mark.parametrize("name", LAWS)
def test_an_operator_called_without_its_public_function_refuses_none(name: str) -> None:
    family = LAWS[name].family
    arguments = [torch.ones(1, 1, 1), *[None] * (len(family.types) - 1)]
    rest = {"bool": False, "str": "x", "float": 1.0, "int[]": [0]}
    values = [rest.get(kind, value) for kind, value in zip(family.types.values(), arguments, strict=True)]
    second = family.arguments._fields[1]

    def call() -> str:
        with pytest.raises(ValueError, match=rf"{second} must be a tensor \(got None\); {name} cannot do without it"):
            getattr(torch.ops.sinuous, name)(*values, "")
        return ""

    assert in_a_fork(call) is None


@pytest.mark.parametrize("name", LAWS)
def test_torch_fx_traces_the_public_function(name: str) -> None:
    arguments = valid(name)
    first = LAWS[name].time[0]
    x = arguments.pop(first)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Any:
            return front(name)(**{first: x}, **arguments)

    torch.testing.assert_close(torch.fx.symbolic_trace(Module())(x), Module()(x))
