"""What a token mixer is, and the table of mixers by name."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from sinuous.core.checks import check_arguments, check_range, check_sizes, is_number, is_whole
from sinuous.core.mixers import calls

State = Any
"""A NamedTuple of tensors, batch first; each family has its own."""

Shared = tuple[Tensor, ...]
"""What a mixer hands on to those of its name in later blocks of a model, of its own input, steps on axis 1."""

MixerClass = TypeVar("MixerClass", bound="type[Mixer]")
StateClass = TypeVar("StateClass", bound=type)

_MIXERS: dict[str, type[Mixer]] = {}
_STATES: dict[str, type] = {}


class Mixer(nn.Module):
    """Mixes information along time: `[B, T, dim]` to `[B, T, dim]`.

    A causal mixer has `prefill`, `step` and `initial_state`, and obeys one law: `prefill` of a part of a sequence and
    `step`s through the rest give what `forward` gives for the whole.

    Attributes:
        causal: output t depends on inputs up to t only.
        constant_state: the state's size does not grow with the length of the past.
        reads_grid: the output depends on the grid, of mixers that look around and not only along the row.
        reads_positions: positions may be told: `forward` and `prefill` take `position_ids`, int64 `[B, T]`, as their
            last argument, `step` those of one step, `[B]`. Where they are absent a mixer counts.
        may_be_zero: whole-number options that are no sizes, besides those whose default is 0.
        model_dim: width of its input and output; 0 where its constructor has no argument `dim`.
        shared_option: for mixers that share tensors with those of their name in later blocks of a model, the option of
            the constructor that makes a later one, which reads them; `None` for mixers that share nothing.
    """

    causal: ClassVar[bool]
    constant_state: ClassVar[bool]
    reads_grid: ClassVar[bool] = False
    reads_positions: bool = False
    shared_option: ClassVar[str | None] = None
    may_be_zero: ClassVar[frozenset[str]] = frozenset()
    model_dim: int = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        if "__init__" in own:
            cls.__init__ = _checked_constructor(own["__init__"])  # type: ignore[method-assign]
        if "prefill" in own:
            cls._go_on = own["prefill"]  # type: ignore[method-assign]
            cls.prefill = calls.checked("x")(own["prefill"])  # type: ignore[method-assign]
        if "initial_state" in own:
            cls.initial_state = calls.checked_start(own["initial_state"])  # type: ignore[method-assign]
        if "mix_sharing" in own:
            cls.mix_sharing = calls.checked("x", 2)(own["mix_sharing"])  # type: ignore[method-assign]
        if "step" in own:
            cls.step = calls.checked("x_t")(own["step"])  # type: ignore[method-assign]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        x = args[0] if args else kwargs.get("x")
        try:
            if len(args) > 1 or kwargs:
                cu_seqlens = args[1] if len(args) > 1 else kwargs.get("cu_seqlens")
                grid = args[2] if len(args) > 2 else kwargs.get("grid")
                if cu_seqlens is not None or grid is not None:
                    calls.check_boundaries(x, cu_seqlens, grid)
            y = super().__call__(*args, **kwargs)
        except Exception:
            calls.explain(self, x, 3)
            raise
        calls.check_output(self, x, y)
        return y

    def forward(
        self, x: Tensor, cu_seqlens: Tensor | None = None, grid: list[int] | None = None
    ) -> Tensor:  # pragma: no cover
        """Mix a batch of sequences.

        Args:
            x: `[B, T, dim]`; packed sequences are `[1, ΣT, dim]` with `cu_seqlens`.
            cu_seqlens: boundaries of packed sequences, `[sequences + 1]`.
            grid: its sides where the tokens are the cells of a grid, the last axis fastest: (height, width) of a
                picture, (frames, height, width) of a clip; for mixers that look around.
        """
        raise NotImplementedError

    def prefill(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Mix `[B, T, dim]` and go on from `state`; returns the output and the state after the last step."""
        raise NotImplementedError(f"{type(self).__name__} looks at the future and has no state to carry; call forward")

    @calls.checked("x_t")
    def step(self, x_t: Tensor, state: State, position_ids: Tensor | None = None) -> tuple[Tensor, State]:
        """One step: `[B, dim]` and a state to `[B, dim]` and the next state."""
        positions = () if position_ids is None else (position_ids.unsqueeze(1),)
        y, state = self._go_on(x_t.unsqueeze(1), state, *positions)
        return y.squeeze(1), state

    _go_on = prefill
    """`prefill` without its checks, of which a step has its own."""

    def mix_sharing(
        self, x: Tensor, shared: Shared = (), state: State | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State, Shared]:
        """`forward` and `prefill` in one, of a mixer that shares: the output, the state after the last step, and what
        the next mixer of its name gets.

        Nothing shared is carried from step to step: what a step reads is of the same step of an earlier block.

        Args:
            x: `[B, T, dim]`; a single step has T = 1.
            shared: what the mixer of its name in the block before gave, `[B, T, …]` each, a step's beside the steps of
                `x`; empty for the first of them.
            state: before the first step, for a causal mixer.
            cu_seqlens: boundaries of packed sequences, which go without a state.
        """
        raise NotImplementedError(f"{type(self).__name__} shares nothing with other blocks; call it, or prefill")

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state before the first step, on the device and in the dtype of the parameters if none is given."""
        raise NotImplementedError(f"{type(self).__name__} looks at the future and has no state to carry; call forward")

    def init_weights(self) -> None:
        """Fill every parameter and buffer anew, as after `to_empty`."""
        raise NotImplementedError

    def output_weights(self) -> set[str]:
        """Names of own parameters that write to the residual stream: where they are zero, so is the output, or it is a
        constant. A deep model starts with smaller ones.

        Empty where the output passes through no weights, as that of a bounded state which is read as it is.
        """
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Names of own parameters that weight decay should leave alone."""
        return set()


def _checked_constructor(constructor: Callable[..., None]) -> Callable[..., None]:
    """Check arguments against their annotations, whole numbers as sizes and others as finite, and keep the width."""
    parameters = inspect.signature(constructor).parameters

    @check_arguments
    @functools.wraps(constructor)
    def construct(self: Mixer, *args: Any, **kwargs: Any) -> None:
        options = dict(zip(list(parameters)[1:], args, strict=False)) | kwargs
        for name, value in options.items():
            if name not in parameters:  # of a mixer inside, which looks at it
                continue
            default: Any = parameters[name].default
            zero = name in self.may_be_zero or (is_whole(default) and default == 0)
            if is_whole(value) and "float" not in str(parameters[name].annotation):
                check_range(0, math.inf, **{name: value}) if zero else check_sizes(**{name: value})
            elif is_number(value):
                low = 0 if is_number(default) and default > 0 else -sys.float_info.max
                check_range(low, sys.float_info.max, **{name: value})
        constructor(self, *args, **kwargs)
        if "dim" in parameters:
            self.model_dim = options["dim"]

    return construct


def register_state(cls: StateClass) -> StateClass:
    """Make a NamedTuple of tensors known: exported programs that carry it can be saved, `sinuous.core.streaming` writes
    and reads it, and torch.load reads it with weights-only rules."""
    name = f"{cls.__module__}.{cls.__qualname__}"
    _pytree._register_namedtuple(cls, serialized_type_name=name)
    torch.serialization.add_safe_globals([cls])
    _STATES[name] = cls
    return cls


def state_classes() -> Mapping[str, type]:
    """The registered classes of states by name."""
    return _STATES


def register_mixer(name: str) -> Callable[[MixerClass], MixerClass]:
    """Class decorator: make a `Mixer` known to `build_mixer` under `name`.

    Raises:
        ValueError: if another mixer has that name.
    """

    def register(cls: MixerClass) -> MixerClass:
        known = _MIXERS.setdefault(name, cls)
        if known is not cls:
            raise ValueError(f"mixer name {name!r} is taken by {known.__module__}.{known.__qualname__}; choose another")
        return cls

    return register


def list_mixers() -> list[str]:
    """Names of all registered mixers, sorted."""
    return sorted(_MIXERS)


def mixer_class(name: str) -> type[Mixer]:
    """The class registered under `name`.

    Raises:
        ValueError: if there is none, naming the closest.
    """
    if name not in _MIXERS:
        close = difflib.get_close_matches(name, _MIXERS, n=3, cutoff=0.4) or list_mixers()
        raise ValueError(f"there is no mixer {name!r}; did you mean {' or '.join(map(repr, close))}?")
    return _MIXERS[name]


def mixer_options(name: str) -> frozenset[str]:
    """Names of the keyword arguments that the mixer's constructor takes, besides `dim`."""
    return frozenset(inspect.signature(mixer_class(name)).parameters) - {"dim"}


def build_mixer(name: str, dim: int, **kwargs: Any) -> Mixer:
    """A mixer of width `dim`; keyword arguments go to its constructor.

    Raises:
        ValueError: if there is no such mixer, naming the closest.
        TypeError: if the mixer does not take a keyword argument, naming those that it takes.
    """
    cls, known = mixer_class(name), mixer_options(name)
    if unknown := sorted(set(kwargs) - known):
        raise TypeError(f"mixer {name!r} has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    return cls(dim, **kwargs)
