"""Wrong options of constructors end in a ValueError that names the option: mixers, stacks, models, layers, routes."""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from sinuous.core import mixers
from sinuous.core.nn import Recurrent
from sinuous.core.scan_routes import list_routes, scan_route, to_cells, to_sequence
from sinuous.core.sequence_model import SequenceModel
from sinuous.core.stack import Stack

DIM = 24
STRANGE: dict[Any, tuple[Any, ...]] = {
    int: ("4", [4], {"a": 4}, 4.0, math.nan, True, np.array([4, 4]), torch.tensor([4, 4]), -1, -7, 0),
    float: ("0.5", [0.5], {"a": 0.5}, math.nan, math.inf, True, np.array([0.5]), torch.tensor([0.5, 0.5])),
    bool: ("yes", 1, [True], 0.0, np.array([True]), torch.tensor([True])),
    str: (1, ["abc"], True, np.array(["abc"]), "no such choice"),
    torch.dtype: ("float32", 32, float, np.float32, [torch.float32]),
}
FREE_WORDS = {"mixer_options", "device"}


def strange_values(hint: Any) -> tuple[Any, ...]:
    """Values that no argument annotated so can have."""
    parts = set(typing.get_args(hint)) or {hint}
    kinds = [kind for kind in (str, bool, int, float, torch.dtype) if kind in parts]
    if len(kinds) != 1 or not parts <= {kinds[0], type(None)}:
        return () if kinds or Any in parts else (5, "abc", math.nan)
    return STRANGE[kinds[0]] + (() if type(None) in parts else (None,))


ZERO = {"block_index", "proj_size", "dropout", "num_classes"}
"""Options that 0 leaves out, or that count from it; and of `slstm` alone the convolution."""


def misunderstood(build: Callable[..., object], zero: set[str] = ZERO, **needed: Any) -> list[str]:
    """Options of a constructor with values of other kinds that do not end in a ValueError that names the option."""
    wrong = []
    constructor = build.__init__ if inspect.isclass(build) else build
    hints = typing.get_type_hints(constructor)
    for name in inspect.signature(constructor).parameters:
        for value in strange_values(hints[name]) if name in hints and name not in FREE_WORDS else ():
            if name in zero and isinstance(value, int | float) and value == 0:
                continue
            if not is_told(build, name, {**needed, name: value}):
                wrong.append(f"{name}={value!r}")
    return wrong


def is_told(build: Callable[..., object], name: str, options: Mapping[str, Any]) -> bool:
    try:
        build(**options)
    except ValueError as error:
        if name in ("name", "mixer") and isinstance(options[name], str):
            return "'no such choice'; did you mean" in str(error)
        return name in str(error) and ("(got " in str(error) or repr(options[name]) in str(error))
    except Exception:
        return False
    return False


@pytest.mark.parametrize("name", mixers.list_mixers())
def test_a_mixer_names_a_wrong_option(name: str) -> None:
    assert misunderstood(mixers.mixer_class(name), ZERO | ({"conv_size"} if name == "slstm" else set()), dim=DIM) == []


@pytest.mark.parametrize(
    ("build", "needed"),
    [
        (mixers.Bidirectional, {"name": "mamba", "dim": DIM}),
        (Stack, {"dim": DIM, "depth": 2}),
        (SequenceModel, {"vocab_size": 13, "dim": DIM, "depth": 2}),
        (Recurrent, {"mixer": "mamba", "input_size": 5, "hidden_size": DIM, "num_layers": 2}),
        (scan_route, {"name": "windows", "height": 3, "width": 4}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_constructors_name_a_wrong_option(build: Callable[..., object], needed: dict[str, Any]) -> None:
    assert misunderstood(build, ZERO | {"height", "width"}, **needed) == []


OUT_OF_RANGE = {
    "drop_rate": (-0.1, 1.1, 2),
    "drop_path_rate": (-0.1, 1.1, 2),
    "mlp_ratio": (0.0, -4.0),
    "norm_eps": (-1e-5,),
    "mlp": ("no such", ["gelu"], {"mamba": "no such"}, {"mamba": 3}),
    "pattern": ([], "no such", ["mamba", "no such"], [3], {"mamba"}),
    "mixer_options": ({"gla": {}}, {"mamba": 3}, ["mamba"], "mamba"),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in OUT_OF_RANGE.items() for value in values]
)
def test_stacks_and_models_name_an_option_out_of_range(name: str, value: Any) -> None:
    for build, needed in ((Stack, {}), (SequenceModel, {"vocab_size": 13})):
        with pytest.raises(ValueError, match=rf"{name}|there is no mixer 'no such'"):
            build(**needed, **{"dim": DIM, "depth": 2, name: value})


@pytest.mark.parametrize("cap", [0.0, -30.0, math.inf])
def test_a_model_names_a_cap_that_is_none(cap: float) -> None:
    with pytest.raises(ValueError, match="logit_cap must be more than 0"):
        SequenceModel(13, DIM, 2, logit_cap=cap)


@pytest.mark.parametrize("dropout", [-0.1, 1.5])
def test_a_layer_names_a_rate_out_of_range(dropout: float) -> None:
    with pytest.raises(ValueError, match="dropout must lie between 0 and 1"):
        Recurrent("mamba", 5, 8, num_layers=2, dropout=dropout)


def test_options_that_are_right_pass_in_other_clothes() -> None:
    """Numbers of NumPy, whole ones for floats, lists for tuples: as configurations give them."""
    mixers.build_mixer("mamba", np.int64(DIM), d_state=np.int32(8), expand=1)
    mixers.build_mixer("mamba2", DIM, d_state=8, dt_limit=[0, math.inf])
    SequenceModel(13, DIM, 2, pattern=["mamba", "gla"], mixer_options={"mamba": {"expand": np.float32(1)}})


@pytest.mark.parametrize("name", list_routes())
def test_a_route_is_of_the_grid_of_the_cells(name: str) -> None:
    cells = torch.randn(2, 12, 5)
    height, width = (3, 4)
    assert torch.equal(to_cells(to_sequence(cells, name, height, width), name, height, width), cells)
    for call in (to_sequence, to_cells):
        for grid in ((3, 3), (4, 4), (2, 5)):
            with pytest.raises(ValueError, match=rf"as many cells as there are tokens, 12 \(got {grid[0]} x {grid[1]}"):
                call(cells, name, *grid)
        for wrong in (None, [[1.0]], "abc", torch.randn(12)):
            with pytest.raises(ValueError, match=r"(cells|sequence) must be a tensor"):
                call(wrong, name, 3, 4)
        for side in (-3, 3.0, "3", None):
            with pytest.raises(ValueError, match="height must"):
                call(cells, name, side, 4)
    route = scan_route(name, 3, 4)
    for call in (route.to_sequence, route.to_cells):
        with pytest.raises(ValueError, match="as many cells as the route has steps, 12"):
            call(torch.randn(2, 13, 5))


@pytest.mark.parametrize("route", ["rasta", 3, None, ["raster"]])
def test_a_strange_route_is_named(route: Any) -> None:
    for call in (to_sequence, to_cells):
        with pytest.raises(ValueError, match=r"no scan route .*did you mean|name must be a word"):
            call(torch.randn(2, 12, 5), route, 3, 4)
