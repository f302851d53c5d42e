"""Recurrences with the calling convention of `torch.nn.LSTM`.

    layer = sinuous.nn.Mamba2(input_size=40, hidden_size=64, num_layers=2, bidirectional=True)
    output, state = layer(x)                    # x [T, B, 40], unbatched [T, 40], or a PackedSequence
    output, state = layer(next_x, state)        # goes on

`Recurrent("mamba2", …)` takes any causal mixer by name; `sinuous.nn.Mamba2` is the same with the name filled in, and
there is one such class for every causal mixer that is registered (`dir(sinuous.nn)` lists them). A layer, where
`nn.LSTM` has h_t = cell(W x_t, h_{t-1}), is

    y = mixer(W x + b)                          W is left out where the sizes agree already
    y = W x + b + mixer(norm(W x + b))          with residual=True, norm="rms"

Differences from `nn.LSTM`:

- The state is not (h, c) but a tuple with the state of each mixer, a NamedTuple of tensors, batch first whatever
  `batch_first` says.
- A mixer projects its output itself, so that the output is no part of the state; `proj_size` projects the output only.
- Deep stacks need `residual=True, norm="rms"`. They are off by default, as `nn.LSTM` has neither.
- Every layer is built as the first of its kind. Mixers of a `SequenceModel` may hand tensors from block to block
  (RWKV-7 its first values), which needs inputs of one width; the widths of layers may differ.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.utils import _pytree as pytree

from sinuous.core.checks import check_arguments, check_range, check_sizes, described
from sinuous.core.mixers import Mixer, build_mixer, calls, list_mixers, mixer_class, mixer_options
from sinuous.core.parts import NORMS
from sinuous.core.ragged import run_ragged

State = tuple[Any, ...]
"""For each layer the state of its mixer, or of its two mixers, the one that runs from the beginning first."""


class _Direction(nn.Module):
    """One mixer of one layer, with its projections and its norm."""

    def __init__(
        self,
        mixer: Mixer,
        input_size: int,
        hidden_size: int,
        proj_size: int,
        bias: bool,
        residual: bool,
        norm: str | None,
        dd: dict[str, Any],
    ) -> None:
        super().__init__()
        self.residual = residual
        differ = input_size != hidden_size
        self.input_proj = nn.Linear(input_size, hidden_size, bias, **dd) if differ else nn.Identity()
        self.norm = nn.Identity() if norm is None else NORMS[norm](hidden_size, **dd)
        self.mixer = mixer
        self.output_proj = nn.Linear(hidden_size, proj_size, False, **dd) if proj_size else nn.Identity()

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        x = self._project(x)
        y, state = self.mixer.prefill(self.norm(x), state)
        return self._finish(x, y), state

    def _project(self, x: Tensor) -> Tensor:
        try:
            projected: Tensor = self.input_proj(x)
        except RuntimeError:
            calls.check_place(self, x)
            raise
        calls.check_output(self, x, projected)
        return projected

    def step(self, x_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        x_t = self._project(x_t)
        y, state = self.mixer.step(self.norm(x_t), state)
        return self._finish(x_t, y), state

    def _finish(self, x: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.output_proj(x + y if self.residual else y)
        return out


class Recurrent(nn.Module):
    """Layers of one causal mixer, called like `torch.nn.LSTM`.

    Args:
        mixer: a causal mixer by its registered name.
        input_size: features of the input.
        hidden_size: width of the mixers.
        num_layers: layers, one on the other.
        bias: a bias in the projections of inputs.
        batch_first: input and output are `[B, T, ·]` and not `[T, B, ·]`.
        dropout: rate between layers, in training.
        bidirectional: a second mixer in each layer runs from the end; outputs stand side by side.
        proj_size: features of each direction's output; 0 leaves it at `hidden_size`.
        residual: add each mixer's input to its output.
        norm: `"rms"` or `"layer"` in front of each mixer, or `None`.
        **mixer_options: for the mixer's constructor.

    Shapes: `D` is 2 where the layer is bidirectional, else 1; features of the output are D times `proj_size` or
    `hidden_size`.

    Raises:
        ValueError: if a size is less than 1, a choice is unknown, or the mixer is unknown or not causal.
        TypeError: if the mixer has no such option.
    """

    @check_arguments
    def __init__(
        self,
        mixer: str,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        residual: bool = False,
        norm: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **mixer_options: Any,
    ) -> None:
        super().__init__()
        check_sizes(input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        if proj_size < 0:
            raise ValueError(f"proj_size must be at least 1, or 0 for no projection (got {proj_size})")
        check_range(0, 1, dropout=dropout)
        if norm is not None and norm not in NORMS:
            raise ValueError(f"norm must be None or one of {', '.join(map(repr, NORMS))} (got {norm!r})")
        if not mixer_class(mixer).causal:
            raise ValueError(
                f"mixer {mixer!r} looks at the future and has no state; choose one of {', '.join(causal())}"
            )
        if dropout and num_layers == 1:
            warnings.warn(
                f"dropout={dropout} acts between layers, of which there is one; give num_layers, or leave it out",
                UserWarning,
                stacklevel=2,
            )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.mixer = mixer
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = dropout
        self.bidirectional = bidirectional
        self.proj_size = proj_size
        directions = 2 if bidirectional else 1
        width = (proj_size or hidden_size) * directions
        self.drop = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            _Direction(
                build_mixer(mixer, hidden_size, **mixer_options, **dd),
                input_size if layer == 0 else width,
                hidden_size,
                proj_size,
                bias,
                residual,
                norm,
                dd,
            )
            for layer in range(num_layers)
            for _ in range(directions)
        )

    def init_weights(self) -> None:
        """Fill every parameter and buffer anew."""
        for direction in self._directions():
            for part in (direction.input_proj, direction.norm, direction.output_proj):
                if not isinstance(part, nn.Identity):
                    cast("nn.Linear", part).reset_parameters()
            direction.mixer.init_weights()

    reset_parameters = init_weights

    def flatten_parameters(self) -> None:
        """Do nothing: `nn.LSTM` packs its weights for cuDNN here, and code that calls it may go on doing so."""

    def no_weight_decay(self) -> set[str]:
        numbered = enumerate(self._directions())
        return {f"layers.{i}.mixer.{name}" for i, direction in numbered for name in direction.mixer.no_weight_decay()}

    def _directions(self) -> list[_Direction]:
        return [cast("_Direction", direction) for direction in self.layers]

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """State before the first step, from which a call without a state starts."""
        return tuple(d.mixer.initial_state(batch_size, device, dtype) for d in self._directions())

    def forward(self, x: Tensor | PackedSequence, state: State | None = None) -> tuple[Any, State]:
        """Run all layers over a batch of sequences.

        Args:
            x: `[T, B, input_size]`, `[B, T, input_size]` where `batch_first`, `[T, input_size]` for one sequence, or
                a `PackedSequence`.
            state: state that an earlier call returned; `None` for the start. For mixers that run from the end it is the
                state before their first step, which is the last of the sequence.

        Returns:
            The output, in the form of `x`; and the state after the last step, without batch axes if `x` has none.

        Raises:
            ValueError: if the input has another shape, or states of sequences of different lengths, which grow with
                them, cannot be put in one tensor.
        """
        if isinstance(x, PackedSequence):
            return self._run_packed(x, state)
        self._parts(state)  # refuses one that is not made of as many parts
        if not isinstance(x, Tensor):
            raise ValueError(
                f"x must be a tensor or a PackedSequence (got {described(x)}); convert it with torch.tensor"
            )
        if x.ndim not in (2, 3) or x.shape[-1] != self.input_size:
            layout = "[B, T, input_size]" if self.batch_first else "[T, B, input_size]"
            raise ValueError(
                f"x must be {layout} or [T, input_size] with input_size {self.input_size} (got {list(x.shape)})"
            )
        if x.ndim == 2:
            state = pytree.tree_map(lambda t: t.unsqueeze(0), state) if state is not None else None
            y, state = self._run(x.unsqueeze(0), [x.shape[0]], state)
            return y.squeeze(0), pytree.tree_map(lambda t: t.squeeze(0), state)
        x = x if self.batch_first else x.transpose(0, 1)
        y, state = self._run(x, [x.shape[1]] * x.shape[0], state)
        return y if self.batch_first else y.transpose(0, 1), state

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """Run one step: `[B, input_size]` and a state to `[B, ·]` and the next state.

        Raises:
            NotImplementedError: if the layer is bidirectional.
        """
        if not isinstance(x_t, Tensor) or x_t.ndim != 2 or x_t.shape[-1] != self.input_size:
            shown = list(x_t.shape) if isinstance(x_t, Tensor) else described(x_t)
            raise ValueError(f"x_t must be a tensor [B, input_size] with input_size {self.input_size} (got {shown})")
        if self.bidirectional:
            raise NotImplementedError("a bidirectional layer reads from the end and cannot step; call it on the whole")
        after = []
        for layer, (direction, before) in enumerate(zip(self._directions(), self._parts(state), strict=True)):
            x_t, new = direction.step(x_t if layer == 0 else self.drop(x_t), before)
            after.append(new)
        return x_t, tuple(after)

    def _run_packed(self, x: PackedSequence, state: State | None) -> tuple[PackedSequence, State]:
        padded, lengths = pad_packed_sequence(x, batch_first=True)
        y, state = self._run(padded, lengths.tolist(), state)
        order = torch.arange(y.shape[0]) if x.sorted_indices is None else x.sorted_indices.cpu()
        rows = torch.cat([order[:n] for n in x.batch_sizes.tolist()]).to(y.device)
        steps = torch.arange(len(x.batch_sizes)).repeat_interleave(x.batch_sizes).to(y.device)
        return PackedSequence(y[rows, steps], x.batch_sizes, x.sorted_indices, x.unsorted_indices), state

    def _run(self, x: Tensor, lengths: list[int], state: State | None) -> tuple[Tensor, State]:
        """Run all layers, batch first; steps beyond a row's length are not read, and their outputs mean nothing."""
        before, after = self._parts(state), []
        per_layer = 2 if self.bidirectional else 1
        for layer in range(self.num_layers):
            x = x if layer == 0 else self.drop(x)
            outputs = []
            for k in range(per_layer):
                i = layer * per_layer + k
                turned = x if k == 0 else _turn(x, lengths)
                y, new = _carry(self._directions()[i], turned, lengths, before[i])
                outputs.append(y if k == 0 else _turn(y, lengths))
                after.append(new)
            x = outputs[0] if per_layer == 1 else torch.cat(outputs, -1)
        return x, tuple(after)

    def _parts(self, state: State | None) -> State:
        is_row = isinstance(state, tuple | list)
        if state is not None and not (
            is_row and len(state) == len(self.layers) and all(isinstance(part, tuple) for part in state)
        ):
            raise ValueError(
                f"the state must have one part for each of the {len(self.layers)} mixers "
                f"(got {len(state) if is_row else described(state)}); give what a call of this layer returned"
            )
        return (None,) * len(self.layers) if state is None else state

    def extra_repr(self) -> str:
        return f"{self.mixer!r}, {self.input_size}, {self.hidden_size}, num_layers={self.num_layers}"


def _carry(direction: _Direction, x: Tensor, lengths: list[int], state: Any) -> tuple[Tensor, Any]:
    if len(set(lengths)) < 2:
        y: Tensor
        y, state = direction(x, state)
        return y, state
    stages, groups = run_ragged(direction, x, lengths, state)
    if len(groups) > 1:
        raise ValueError(
            "the states of this mixer grow with the sequence and cannot be put in one tensor for sequences of "
            f"{len(groups)} lengths; call the layer on sequences of equal length"
        )
    parts = []
    for stage in stages:
        rows = torch.tensor(stage.rows, device=x.device)
        whole = stage.output.new_zeros(x.shape[0], *stage.output.shape[1:])
        parts.append(whole.index_copy(0, rows, stage.output))
    return torch.cat(parts, 1), groups[0].state


def _turn(x: Tensor, lengths: list[int]) -> Tensor:
    """Turn each row back to front within its length."""
    if len(set(lengths)) < 2:
        return x.flip(1)
    steps = torch.arange(x.shape[1], device=x.device)
    ends = torch.tensor(lengths, device=x.device)[:, None]
    places = torch.where(steps < ends, ends - 1 - steps, steps)
    return x.gather(1, places[..., None].expand_as(x))


def causal() -> list[str]:
    """Names of the mixers that a layer can be made of."""
    return [name for name in list_mixers() if mixer_class(name).causal]


def _layers() -> dict[str, str]:
    """Map the names of the layer classes, which are those of the mixers' classes, to the mixers' registered names."""
    return {mixer_class(name).__name__: name for name in reversed(causal())}


def _layer_class(name: str, mixer: str) -> type[Recurrent]:
    def __init__(self: Recurrent, input_size: int, hidden_size: int, *args: Any, **kwargs: Any) -> None:
        Recurrent.__init__(self, mixer, input_size, hidden_size, *args, **kwargs)

    taken = inspect.signature(mixer_class(mixer)).parameters
    options = [p.replace(kind=p.KEYWORD_ONLY) for key, p in taken.items() if key in mixer_options(mixer)]
    shared = list(inspect.signature(Recurrent).parameters.values())[1:-1]
    options = [p for p in options if p.name not in {q.name for q in shared}]
    __init__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY), *shared, *options]
    )
    summary = (inspect.getdoc(mixer_class(mixer)) or "").partition("\n")[0]
    doc = f"`Recurrent({mixer!r}, ...)`, called like `torch.nn.LSTM`: {summary}"
    return type(name, (Recurrent,), {"__init__": __init__, "__doc__": doc, "__module__": __name__})


def __getattr__(name: str) -> Any:
    mixer = _layers().get(name)
    if mixer is None:
        raise AttributeError(f"sinuous.nn has no layer {name!r}; it has Recurrent, {', '.join(sorted(_layers()))}")
    return globals().setdefault(name, _layer_class(name, mixer))


def __dir__() -> list[str]:
    return sorted({"Recurrent", *_layers()})
