"""Residual blocks around mixers chosen by name, and the one place where they are run one after another.

    x ← x + mixer(norm(x));  x ← x + mlp(norm(x))         `depth` times, the mixers taken in turn from `pattern`

Every backbone is something in front of a `Stack` and something behind it. The stack knows what a block alone cannot:
its place in depth, the tensors that it shares with other blocks, the scale of what it writes to the residual stream,
its rate of stochastic depth, and whether its activations are kept or computed again.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, cast

import torch
from timm.layers import LayerScale
from timm.models import checkpoint
from torch import Tensor, nn

from sinuous.core.blocks import PLACEMENTS, ResidualBlock, Sharing, SharingBlock, carry
from sinuous.core.cells import Cells
from sinuous.core.checks import (
    check_arguments,
    check_choice,
    check_positive,
    check_range,
    check_sizes,
    described,
    is_whole,
)
from sinuous.core.mixers import calls, mixer_class
from sinuous.core.mixers import mixer_options as options_of
from sinuous.core.parts import (
    MLPS,
    NORMS,
    PLACE,
    ROUNDINGS,
    check_pattern,
    drop_path_rates,
    mixer_of,
    mlp_of,
    mlp_width,
    options_by_place,
    place_options,
)

State = tuple[Any, ...]
"""The states of all mixers, first block first."""


class Stack(nn.ModuleList):
    """`depth` residual blocks. A model keeps it as `layers`, so that parameters are called `layers.N.mixer.…`.

    Args:
        dim: width of the residual stream.
        depth: number of blocks.
        pattern: names of mixers, taken in turn and over again; one name stands for itself.
        mixer_options: for each name of the pattern that needs any, keyword arguments of its constructor; or a list of
            them, one for each place of the pattern, which may repeat a name. Mixers that have `num_blocks` or
            `block_index` are told `depth` and their place; those that share with their name in later blocks (rwkv7 its
            first values) read, in each but the first of them, the shared tensors.
        mlp: `"none"`, `"gelu"`, `"geglu"` or `"swiglu"`, after every mixer; or one of them for each name whose mixers
            have one, others having none.
        mlp_ratio: width of the MLP between its layers, over `dim`.
        mlp_multiple_of: that width is rounded to a multiple of this, `mlp_rounding` `"up"` or `"down"`.
        mlp_bias: biases in the MLP.
        norm: `"rms"`, `"layer"` or `"layer_no_bias"`.
        norm_eps: added under its root.
        norm_placement: `"pre"`, `"post"` or `"both"`; see `ResidualBlock`.
        causal: `False` for a stack that sees both sides: causal mixers get a twin that runs from the end.
        residual_in_fp32: keep the residual stream in fp32 whatever the dtype of the parameters.
        weight_init: `"gpt2"`, `"xlstm"` or `"small"`; see `init_weights`.
        drop_rate: dropout inside the MLPs.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first; or that of each block,
            for a stack that is a part of a deeper model.
        init_values: start of a learned scale, per channel, of what mixers and MLPs add; `None` for none.
        blocks: classes of the blocks, a `ResidualBlock` and a `Sharing` one, of models with names of their own.

    Shapes: B batch, T steps. Packed sequences are `[1, ΣT, dim]` with `cu_seqlens`.

    Raises:
        ValueError: if a size or a choice is not allowed, a mixer is unknown or is not causal in a causal stack, or
            options are for a mixer that is not in the pattern.
        TypeError: if a mixer has no such option.
    """

    @check_arguments
    def __init__(
        self,
        dim: int,
        depth: int,
        pattern: str | Sequence[str] = ("mamba",),
        mixer_options: Mapping[str, Mapping[str, Any]] | Sequence[Mapping[str, Any]] | None = None,
        mlp: str | Mapping[str, str] = "none",
        mlp_ratio: float = 4.0,
        mlp_multiple_of: int = 1,
        mlp_rounding: str = "up",
        mlp_bias: bool = False,
        norm: str = "rms",
        norm_eps: float = 1e-5,
        norm_placement: str = "pre",
        causal: bool = True,
        residual_in_fp32: bool = True,
        weight_init: str = "gpt2",
        drop_rate: float = 0.0,
        drop_path_rate: float | Sequence[float] = 0.0,
        init_values: float | None = None,
        blocks: tuple[type[ResidualBlock], type[Sharing]] = (ResidualBlock, SharingBlock),
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim = self.model_dim = dim
        self.pattern = (pattern,) if isinstance(pattern, str) else tuple(pattern)
        self.causal = causal
        self.depth = depth
        self.weight_init = weight_init
        self.grad_checkpointing = False
        self.checkpoint_layers, self.checkpoint_steps = 1, 0
        options = options_by_place(self.pattern, {} if mixer_options is None else mixer_options)
        mlps = dict.fromkeys(self.pattern, "none")
        mlps.update(dict.fromkeys(self.pattern, mlp) if isinstance(mlp, str) else mlp)
        check_sizes(dim=dim, depth=depth, mlp_multiple_of=mlp_multiple_of)
        rates = drop_path_rate if isinstance(drop_path_rate, Sequence) else drop_path_rates(depth, drop_path_rate)
        if len(rates) != depth:
            raise ValueError(
                f"drop_path_rate must be one number, or one for each of the {depth} blocks (got {len(rates)})"
            )
        for rate in rates:
            check_range(0, 1, drop_rate=drop_rate, drop_path_rate=rate)
        check_range(0, 1, norm_eps=norm_eps)
        check_positive(mlp_ratio=mlp_ratio)
        check_range(0, sys.float_info.max, init_values=init_values)
        for kind in mlps.values():
            check_choice("mlp", kind, ("none", *MLPS))
        check_choice("mlp_rounding", mlp_rounding, ROUNDINGS)
        check_choice("norm", norm, NORMS)
        check_choice("norm_placement", norm_placement, PLACEMENTS)
        check_choice("weight_init", weight_init, ("gpt2", "xlstm", "small"))
        check_pattern(self.pattern, mlps, causal)

        make_norm = functools.partial(NORMS[norm], dim, eps=norm_eps, **dd)
        scale: Callable[[], nn.Module] = nn.Identity
        if init_values is not None:
            scale = functools.partial(LayerScale, dim, init_values, **dd)
        hidden = 0
        if any(kind != "none" for kind in mlps.values()):
            hidden = mlp_width(dim, mlp_ratio, mlp_multiple_of, mlp_rounding)
        mlp_options = {"bias": mlp_bias, "drop": drop_rate, **dd}
        names = [self.pattern[i % len(self.pattern)] for i in range(depth)]
        for i, (name, rate) in enumerate(zip(names, rates, strict=True)):
            block = blocks[mixer_class(name).shared_option is not None]
            mixer = mixer_of(name, dim, {**place_options(names, i), **options[i % len(options)], **dd}, causal)
            mlp_of_block = mlp_of(mlps[name], dim, hidden, mlp_options)
            self.append(block(mixer, mlp_of_block, make_norm, norm_placement, rate, residual_in_fp32, scale))

    def __getitem__(self, index: int | slice) -> Any:
        """A block, or some as a plain list of modules: a stack is not made of blocks but of names."""
        if isinstance(index, slice):
            return nn.ModuleList(list(self._modules.values())[index])
        return super().__getitem__(index)

    def init_weights(self) -> None:
        """Fill every parameter and buffer anew, the mixers by their own rules.

        With `"gpt2"`, all that writes to the residual stream (`Mixer.output_weights` and the last layers of MLPs), as
        other rules leave it, is divided by the root of the number of its summands, except in mixers that are told
        `num_blocks` and have a rule of their own. With `"xlstm"`, the first layers of MLPs are N(0, 2 / (5 dim)) and
        their last layers N(0, 4 / (depth² dim)), as in NX-AI/xlstm. With `"small"`, both are N(0, 2 / (5 n)) for n
        inputs, as in ml-jku/plstm.

        Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), section 2.3; for the small
        start, Nguyen and Salazar (arXiv 1910.05895), section 2.2.
        """
        scaled, last = self.weight_init != "small", 2 / (len(self) * math.sqrt(self.dim))
        blocks = [cast("ResidualBlock", block) for block in self]
        summands = sum(1 + block.mixes_channels for block in blocks)
        for block in blocks:
            block.init_weights()
        with torch.no_grad():
            for name, block in zip(self._names(), blocks, strict=True):
                writes: list[Tensor] = []
                if scaled and not PLACE & options_of(name):
                    writes += [block.mixer.get_parameter(key) for key in sorted(block.mixer.output_weights())]
                if self.weight_init != "gpt2":
                    for key, parameter in block.mlp.named_parameters():
                        if parameter.ndim == 2:
                            std = math.sqrt(2 / (5 * parameter.shape[1]))
                            parameter.normal_(std=last if scaled and key == "fc2.weight" else std)
                elif block.mixes_channels:
                    writes.append(block.mlp.get_parameter("fc2.weight"))
                for weight in writes:
                    weight.div_(math.sqrt(summands))

    def no_weight_decay(self) -> set[str]:
        blocks = [cast("ResidualBlock", block) for block in self]
        return {f"{i}.{b.mixer_name}.{name}" for i, b in enumerate(blocks) for name in b.mixer.no_weight_decay()}

    def set_grad_checkpointing(self, enable: bool = True, *, layers: int = 1, steps: int | None = None) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations.

        Args:
            enable: `False` keeps them.
            layers: blocks that are recomputed together.
            steps: of a causal stack, steps that are recomputed together, see `multi_axis`; all of them, if absent.
                With `forward_intermediates`, all of them are.

        Raises:
            ValueError: if a size is less than 1, or `steps` is given and the stack is not causal.
        """
        check_sizes(layers=layers, **({} if steps is None else {"steps": steps}))
        blind = [type(block).__name__ for block in self if cast("ResidualBlock", block).looks_ahead]
        if steps is not None and (blind or not self.causal):
            why = f"of {blind[0]}" if blind else "with causal=False"
            raise ValueError(f"steps={steps} is for causal models (got one {why}, which looks ahead); leave steps out")
        self.grad_checkpointing = enable
        self.checkpoint_layers, self.checkpoint_steps = layers, steps or 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        x = args[0] if args else kwargs.get("x")
        calls.check_stream(self, x)
        calls.check_positions(args[4] if len(args) > 4 else kwargs.get("position_ids"), x)
        try:
            return super().__call__(*args, **kwargs)
        except Exception:
            calls.explain(self, x, 3)
            raise

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        grid: list[int] | None = None,
        orders: list[Tensor] | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Residual stream after the last block.

        Args:
            x: `[B, T, dim]`, the stream ahead of the first block.
            cu_seqlens: boundaries of packed sequences, `[sequences + 1]`.
            grid: its sides where the tokens are the cells of a grid, the last axis fastest.
            orders: in what order the blocks visit the tokens, taken in turn: int64 `[2, T]` each, the token at every
                step, and the step of every token. What comes out is in the order of `x`.
            position_ids: int64 `[B, T]`, for mixers that read positions; they count from 0 in each sequence if absent.
        """
        taps: list[int] = []
        return self.run(x, cu_seqlens, grid, orders, taps, None, position_ids)[0]

    def forward_intermediates(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        grid: list[int] | None = None,
        orders: list[Tensor] | None = None,
        *,
        taps: Iterable[int],
        stop_early: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Residual stream after the last block, and after each block of `taps`, in the order of depth.

        Args:
            x, cu_seqlens, grid, orders: as in `forward`.
            taps: indices of blocks, from 0.
            stop_early: leave out the blocks after the last of `taps`; the first result is then that block's.
        """
        indices = self._blocks(taps)
        calls.check_stream(self, x)
        try:
            depth = indices[-1] + 1 if stop_early and indices else None
            return self.run(x, cu_seqlens, grid, orders, indices, depth)
        except Exception:
            calls.explain(self, x, 3)
            raise

    def _blocks(self, taps: Any) -> list[int]:
        indices = list(taps) if isinstance(taps, Iterable) else [taps]
        if not (isinstance(taps, Iterable) and all(is_whole(i) and 0 <= i < len(self) for i in indices)):
            raise ValueError(
                f"taps must be indices of the {len(self)} blocks, from 0 (got {described(taps)}); give [0]"
            )
        return sorted(indices)

    def run(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None,
        grid: list[int] | None,
        orders: list[Tensor] | None,
        taps: list[int],
        depth: int | None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the first `depth` blocks, or all, one after another, and keep the stream behind those of `taps`.

        Whatever runs a stack in another way replaces this. TorchScript compiles it, and takes neither arguments by
        keyword alone nor results of two kinds: hence the two methods in front of it."""
        tapped: list[Tensor] = []
        shared: dict[str, list[Tensor]] = {}
        steps: Tensor | None = None  # of the tokens, in the order in which the stream now is
        first, last = 0, self.depth if depth is None else depth
        while first < last:
            stop = last
            for tap in taps:
                if first <= tap and tap < stop:
                    stop = tap + 1
            if torch.jit.is_scripting():  # type: ignore[attr-defined]
                x, steps, position_ids, shared = self.run_some(
                    first, stop, x, cu_seqlens, grid, orders, steps, position_ids, shared
                )
            elif self.grad_checkpointing:
                if self.checkpoint_steps > 0 and torch.is_grad_enabled() and last == self.depth and len(taps) == 0:
                    return self._run_cells(x, cu_seqlens, orders, position_ids), tapped
                stop = min(stop, first + self.checkpoint_layers)
                x, steps, position_ids, shared = checkpoint(
                    self.run_some, first, stop, x, cu_seqlens, grid, orders, steps, position_ids, shared,
                    use_reentrant=False,
                )  # fmt: skip
            else:
                x, steps, position_ids, shared = self.run_some(
                    first, stop, x, cu_seqlens, grid, orders, steps, position_ids, shared
                )
            if stop - 1 in taps:
                tapped.append(x if steps is None else x.index_select(1, steps))
            first = stop
        return x if steps is None else x.index_select(1, steps), tapped

    def run_some(
        self,
        first: int,
        stop: int,
        x: Tensor,
        cu_seqlens: Tensor | None,
        grid: list[int] | None,
        orders: list[Tensor] | None,
        steps: Tensor | None,
        position_ids: Tensor | None,
        shared: dict[str, list[Tensor]],
    ) -> tuple[Tensor, Tensor | None, Tensor | None, dict[str, list[Tensor]]]:
        """Run the blocks from `first` to before `stop`: the stream, the steps of its tokens, the positions and what
        blocks share, each in the order of the last block."""
        shared = shared.copy()
        for i, block in enumerate(self):
            if first <= i and i < stop:
                if orders is not None and (i == 0 or len(orders) > 1):
                    order = orders[i % len(orders)]
                    move = order[0] if steps is None else steps.index_select(0, order[0])
                    x, steps = x.index_select(1, move), order[1]
                    if position_ids is not None:
                        position_ids = position_ids.index_select(1, move)
                    for name in list(shared.keys()):
                        shared[name] = [tensor.index_select(1, move) for tensor in shared[name]]
                if block.shares:
                    name = self.pattern[i % len(self.pattern)]
                    x, *shared[name] = block(x, cu_seqlens, grid, *shared.get(name, []))
                elif block.reads_positions:
                    x = block(x, cu_seqlens, grid, position_ids)
                else:
                    x = block(x, cu_seqlens, grid)
        return x, steps, position_ids, shared

    def _run_cells(
        self, x: Tensor, cu_seqlens: Tensor | None, orders: list[Tensor] | None, position_ids: Tensor | None
    ) -> Tensor:
        for name, value in (("cu_seqlens", cu_seqlens), ("orders", orders)):
            if value is not None:
                raise ValueError(
                    f"{name} does not go with steps={self.checkpoint_steps} of set_grad_checkpointing, which cuts all "
                    "rows at the same steps; leave steps out"
                )
        return Cells(list(self), self.checkpoint_layers, self.checkpoint_steps)(x, position_ids=position_ids)[0]

    def prefill(
        self, x: Tensor, state: State | None = None, position_ids: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Read a part of a sequence `[B, T, dim]` and go on from `state`; `None` at the start of a sequence.

        `position_ids`, int64 `[B, T]`, are for mixers that read positions. They go on from the last one if absent.

        Returns:
            The residual stream `[B, T, dim]`, and the states after the last step.

        Raises:
            NotImplementedError: if the stack is not causal.
        """
        return self._carry("prefill", x, (None,) * len(self) if state is None else state, position_ids)

    def step(self, x_t: Tensor, state: State, position_ids: Tensor | None = None) -> tuple[Tensor, State]:
        """One step: `[B, dim]`, states, and positions `[B]` if they are not the next ones, to `[B, dim]` and the next
        states.

        Raises:
            NotImplementedError: if the stack is not causal.
        """
        return self._carry("step", x_t, state, position_ids)

    def _carry(self, call: str, x: Tensor, state: State, position_ids: Tensor | None) -> tuple[Tensor, State]:
        if not self.causal:
            _no_state()
        if not isinstance(state, tuple | list) or len(state) != len(self):
            length = f"{len(state)} parts" if isinstance(state, tuple | list) else described(state)
            raise ValueError(
                f"state must be a tuple with a part for each of the {len(self)} blocks (got {length}); "
                "give what initial_state or prefill returned"
            )
        calls.check_stream(self, x)
        calls.check_positions(position_ids, x)
        try:
            stream, after = carry(call, self, x, state, {}, position_ids)
        except Exception:
            if not torch.compiler.is_compiling():
                calls.explain(self, x, 3 if call == "prefill" else 2)
            raise
        return stream, tuple(after)

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """States before the first step, on the device and in the dtype of the parameters if none is given.

        Raises:
            NotImplementedError: if the stack is not causal.
        """
        if not self.causal:
            _no_state()
        return tuple(cast("Any", block).mixer.initial_state(batch_size, device, dtype) for block in self)

    def _names(self) -> list[str]:
        """Names of the mixers, block by block."""
        return [self.pattern[i % len(self.pattern)] for i in range(len(self))]


def _no_state() -> NoReturn:
    raise NotImplementedError("this model looks at the future (causal=False) and has no state to carry; call forward")
