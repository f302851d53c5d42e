"""Checks of the calls of mixers: one place for all of them.

A call is looked at where it has failed, and its output where it has not, so that checks take no time from the calls
that go well, which are a step each when a model generates. What would pass in silence, boundaries of packed sequences
and grids, is looked at ahead of the work. Compiled, exported, scripted and traced calls are not checked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor, nn

from sinuous.core.checks import check_grid, described, is_whole
from sinuous.core.ops.checks import check_packing

if TYPE_CHECKING:
    from sinuous.core.mixers.contract import Mixer
    from sinuous.core.stack import Stack

Method = TypeVar("Method", bound=Callable[..., Any])


@dataclass(frozen=True)
class StateForm:
    """What a mixer's state looks like: its class, names of its parts, and their shapes without the batch axis; an axis
    that grows with time is -1."""

    kind: type
    names: tuple[str, ...]
    tails: tuple[tuple[int, ...], ...]
    last: list[Any] = field(default_factory=lambda: [None, []])
    """The last batch size that was asked for, and the shapes for it: decoding asks for one again and again."""

    def shapes(self, batch: int) -> list[torch.Size]:
        if self.last[0] != batch:
            self.last[:] = batch, [torch.Size((batch, *tail)) for tail in self.tails]
        shapes: list[torch.Size] = self.last[1]
        return shapes


def check_input(mixer: Mixer | Stack, x: Any, axes: int) -> None:
    """Refuse an input that is not `[B, T, dim]` (three axes) or `[B, dim]` (two), or has no data where the mixer has.

    Raises:
        ValueError: naming the argument, what it must be, what it is, and the remedy.
    """
    width = mixer.model_dim
    if not isinstance(x, Tensor):
        refuse_input(x, axes, width)
    shape = x.shape
    if len(shape) != axes or (shape[-1] != width and width > 0):
        refuse_input(x, axes, width)
    if x.is_meta and not any(p.is_meta for p in mixer.parameters()):
        check_place(mixer, x)


def refuse_input(x: object, axes: int, width: int) -> NoReturn:
    """Say what an input must be.

    Raises:
        ValueError: always.
    """
    name, layout = ("x", "[B, T, dim]") if axes == 3 else ("x_t", "[B, dim]")
    dim = f" with dim {width}" if width > 0 else ""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor {layout}{dim} (got {described(x)}); convert it with torch.as_tensor")
    if x.ndim == axes:
        remedy = f"build the mixer for a width of {x.shape[-1]}, or project the input"
    else:
        remedy = "add the missing axis with unsqueeze" if x.ndim < axes else "drop or merge axes"
    raise ValueError(f"{name} must have shape {layout}{dim} (got {list(x.shape)}); {remedy}")


def check_boundaries(x: Any, cu_seqlens: Any, grid: Any) -> None:
    """Refuse boundaries of packed sequences and grids that do not fit an input `[B, T, dim]`.

    Raises:
        ValueError: naming the argument.
    """
    if torch.jit.is_tracing() or not isinstance(x, Tensor):  # type: ignore[attr-defined, no-untyped-call]
        return
    if cu_seqlens is not None:
        if not isinstance(cu_seqlens, Tensor):
            raise ValueError(
                f"cu_seqlens must be an int32 or int64 tensor [sequences + 1] (got {described(cu_seqlens)}); "
                "convert it with torch.tensor"
            )
        check_packing(cu_seqlens, x.shape[0], x.shape[1])
    if grid is not None:
        if not (isinstance(grid, tuple | list) and 1 <= len(grid) <= 3 and all(map(_is_side, grid))):
            raise ValueError(
                f"grid must be one to three whole numbers, such as (height, width) (got {described(grid)}); "
                "give (14, 14)"
            )
        check_grid(list(grid), x.shape[1], cu_seqlens)


def _is_side(side: object) -> bool:
    return isinstance(side, torch.SymInt) or (is_whole(side) and int(side) >= 0)  # type: ignore[call-overload]


def check_state(mixer: Mixer, state: Any, batch: int) -> None:
    """Refuse a state of another mixer or of another batch.

    Raises:
        ValueError: naming the part of the state.
    """
    form = state_form(mixer)
    if form is None:
        return
    kind = type(state)
    if (kind is form.kind or kind is tuple) and len(state) == len(form.tails):
        shapes = [getattr(part, "shape", None) for part in state]
        if shapes != form.shapes(batch):
            _check_parts(form, state, batch)
    else:
        is_form = isinstance(state, tuple) and kind is not tuple
        raise ValueError(
            f"state must be a {form.kind.__name__} of {', '.join(form.names)} "
            f"(got {f'a {kind.__name__}' if is_form else described(state)}); "
            "give what initial_state or prefill of this mixer returned"
        )


def _fits(shape: torch.Size, form: tuple[int, ...]) -> bool:
    return len(shape) == len(form) and all(size in (-1, actual) for actual, size in zip(shape, form, strict=True))


def _check_parts(form: StateForm, state: Any, batch: int) -> None:
    for name, part, tail in zip(form.names, state, form.tails, strict=True):
        shape = f"[{', '.join(['S' if size < 0 else str(size) for size in (batch, *tail)])}]"
        if not isinstance(part, Tensor):
            raise ValueError(f"state.{name} must be a tensor of shape {shape} (got {described(part)})")
        if not _fits(part.shape, (batch, *tail)):
            raise ValueError(
                f"state.{name} must have shape {shape} for a batch of {batch} (got {list(part.shape)}); "
                f"give the state of these sequences, or initial_state({batch})"
            )


def state_form(mixer: Mixer) -> StateForm | None:
    """The form of a mixer's states, `None` where it has none or none of this kind.

    It is found once: nothing that a module goes through changes the sizes of its states."""
    found: StateForm | None
    try:
        found = mixer.__dict__["_state_form"]
    except KeyError:
        found = mixer.__dict__["_state_form"] = _find_state_form(mixer)
    return found


def _find_state_form(mixer: Mixer) -> StateForm | None:
    try:
        state = mixer.initial_state(1, torch.device("meta"))
    except NotImplementedError:
        return None
    if not isinstance(state, tuple) or not all(isinstance(part, Tensor) for part in state):
        return None
    tails = [tuple(part.shape[1:]) for part in state]
    if not mixer.constant_state:
        tails = [(-1, *tail[1:]) for tail in tails]
    names = getattr(state, "_fields", tuple(map(str, range(len(state)))))
    return StateForm(type(state), names, tuple(tails))


def check_place(module: nn.Module, *tensors: Any) -> None:
    """Refuse tensors of a dtype or on a device that no parameter has.

    Raises:
        ValueError: naming the argument.
    """
    parameters = [p for p in module.parameters() if p.is_floating_point()]
    if not parameters:
        return
    for name, t in zip(("x", "state"), tensors, strict=False):
        for part in t if isinstance(t, tuple) else (t,):
            if not isinstance(part, Tensor):
                if name == "state" and part is not None:
                    raise ValueError(f"state must be made of tensors (got {described(part)}); use torch.as_tensor")
                continue
            devices = dict.fromkeys(p.device for p in parameters)
            if part.device not in devices:
                place = str(next(iter(devices)))
                raise ValueError(
                    f"{name} is on {part.device} and the parameters on {place}; move it with .to({place!r})"
                )
            dtypes = dict.fromkeys(p.dtype for p in parameters)
            if part.is_meta:  # which autocast knows nothing of
                continue
            if name == "x" and part.dtype not in dtypes and not torch.is_autocast_enabled(part.device.type):
                wanted = next(iter(dtypes))
                raise ValueError(
                    f"{name} must have the dtype of the parameters, {wanted} (got {part.dtype}); "
                    f"convert it with .to({wanted})"
                )


def explain(module: Mixer | Stack, x: Any, axes: int, state: Any = None) -> None:
    """Say what was wrong with the arguments of a call that has failed; return where nothing was.

    A stack looks at its states itself.

    Raises:
        ValueError: naming the argument, what it must be, what it is, and the remedy.
    """
    if isinstance(x, torch.fx.Proxy):
        return
    check_input(module, x, axes)
    if state is not None:
        check_state(cast("Mixer", module), state, x.shape[0])
    check_place(module, x, state)


def check_stream(stack: Stack, x: Any) -> None:
    """Refuse a residual stream that is not floating point, or has no data where the stack has.

    Raises:
        ValueError: naming it.
    """
    if isinstance(x, Tensor) and (not x.is_floating_point() or x.is_meta):
        check_place(stack, x)


def check_positions(position_ids: Any, x: Any) -> None:
    """Refuse positions that are not int64 numbers, one for each token of `[B, T, dim]` or `[B, dim]`.

    Raises:
        ValueError: naming them.
    """
    if position_ids is None or not isinstance(x, Tensor):
        return
    wanted = f"position_ids must be int64 {'[B, T]' if x.ndim == 3 else '[B]'}, one for each token"
    if not isinstance(position_ids, Tensor):
        raise ValueError(f"{wanted} (got {described(position_ids)}); convert them with torch.tensor")
    if position_ids.dtype != torch.int64:
        raise ValueError(f"{wanted} (got {position_ids.dtype}); convert them with .long()")
    if position_ids.shape != x.shape[:-1]:
        raise ValueError(
            f"{wanted} (got {list(position_ids.shape)} for {list(x.shape[:-1])} tokens); give every row its positions"
        )
    if position_ids.device != x.device:
        raise ValueError(
            f"{wanted} on the device of the tokens (got {position_ids.device}); move them with .to({str(x.device)!r})"
        )


def check_output(module: nn.Module, x: Any, y: Any) -> None:
    """Refuse an input that only shows in the output to have had the wrong dtype, or no data.

    Raises:
        ValueError: naming the input.
    """
    if not isinstance(y, Tensor):
        return
    if x.is_meta or y.is_meta or (y.dtype != x.dtype and not torch.is_autocast_enabled(y.device.type)):
        check_place(module, x)


def checked(argument: str, place_of_state: int = 1) -> Callable[[Method], Method]:
    """Decorate `prefill` and its like, whose input is `x`, or `step`, whose input is `x_t`: where it fails and
    arguments were wrong, the error says so."""
    axes = 2 if argument == "x_t" else 3

    def decorate(method: Method) -> Method:
        @functools.wraps(method)
        def call(self: Mixer, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return method(self, *args, **kwargs)
            x = args[0] if args else kwargs.get(argument)
            try:
                result = method(self, *args, **kwargs)
            except Exception:
                if self.causal:
                    after = len(args) > place_of_state
                    explain(self, x, axes, args[place_of_state] if after else kwargs.get("state"))
                raise
            check_output(self, x, result[0])
            return result

        return call  # type: ignore[return-value]

    return decorate


def checked_start(method: Method) -> Method:
    """Decorate `initial_state`: a batch size is a whole number, 0 or more."""

    @functools.wraps(method)
    def start(self: Mixer, batch_size: int, *args: Any, **kwargs: Any) -> Any:
        if self.causal:
            check_batch_size(batch_size)
        return method(self, batch_size, *args, **kwargs)

    return start  # type: ignore[return-value]


def check_batch_size(batch_size: Any) -> None:
    """Refuse a batch size that is no whole number or negative.

    Raises:
        ValueError: if it is.
    """
    if not _is_side(batch_size):
        raise ValueError(f"batch_size must be a whole number, 0 or more (got {described(batch_size)})")
