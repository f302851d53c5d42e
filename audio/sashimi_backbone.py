"""SaShiMi's net: residual blocks at several rates, joined by pools, on streams `[B, T, D]`.

    down    x_0 = x;   x_{i+1} = down_i(x_i)                     wider by `expand`, shorter by `pool[i]`
    centre  z = x_n + layers(x_n)-th stream                      `depth` pairs of blocks
    up      z ← up_i(z) + x_i;   z ← layers(z) + z               `depth` pairs of blocks for each pool
    pair    z ← z + mixer(norm z);   z ← z + W' gelu(W norm z)

The U-Net has `depth` pairs ahead of each pool as well, and each block on the way up adds the stream ahead of the block
on the way down that mirrors it. All this makes a U of the residual stream, not a chain: the blocks are core's, but the
net runs them itself.

Causal nets go a step at a time, and from any prefix. A pool's state is the part of a group that it has read, and the
steps that it has made but not given; their number says at which place of the group a sequence is.

Source: Goel et al., "It's Raw! Audio Generation with State-Space Models" (arXiv 2202.09729), section 4 and appendix
C.2; names of parameters as in state-spaces/s4 (`models/sashimi/sashimi.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, NoReturn, cast

import torch
from timm.models import checkpoint
from torch import Tensor, nn

from sinuous.audio.pools import DownPool, UpPool
from sinuous.core import norms
from sinuous.core.blocks import ResidualBlock
from sinuous.core.checks import check_arguments, check_choice, check_range, check_sizes, described
from sinuous.core.mixers import S4, Bidirectional, Mixer, build_mixer, calls, mixer_class, register_state
from sinuous.core.mixers import mixer_options as options_of
from sinuous.kernels.precision import real_dtype

NORMS = ("layer", "scalar")
S4_OPTIONS: dict[str, Any] = {"n_ssm": 1, "dt_transform": "softplus"}
"""Options of S4 mixers that the authors' experiments have and S4's own defaults have not."""


@register_state
class SashimiState(NamedTuple):
    """State of a SaShiMi net, batch first.

    Attributes:
        mixers: states of all mixers, in the order in which a step meets them.
        gathered: for each pool, finest first, the steps of a group that is not whole, `[B, 0 … p-1, D]`.
        queued: for each pool, finest first, the steps that are made but not given, `[B, 1 … p, D]`.
    """

    mixers: tuple[Any, ...]
    gathered: tuple[Tensor, ...]
    queued: tuple[Tensor, ...]


class ScalarNorm(nn.Module):
    """Layer norm with two learned numbers, `y = s (x - mean(x) + m) / std(x)`, over the last axis, without an eps.

    Source: `TransposedLN` of state-spaces/s4, whose published checkpoints have it in every block.
    """

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.norm = nn.ParameterDict({"m": torch.zeros(1, **dd), "s": torch.ones(1, **dd)})

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.norm["m"])
        nn.init.ones_(self.norm["s"])

    def forward(self, x: Tensor) -> Tensor:
        m, s = self.norm["m"], self.norm["s"]
        deviation, mean = torch.std_mean(x, dim=-1, correction=0, keepdim=True)
        y: Tensor = s / deviation * (x - mean + m)
        return y.to(s.dtype)


class MixerBlock(ResidualBlock):
    """Residual block around a mixer: `x + drop(layer(norm(x)))`."""

    mixer_name: ClassVar[str] = "layer"
    layer: Mixer

    def __init__(self, mixer: Mixer, norm: nn.Module, drop_rate: float) -> None:
        super().__init__(mixer, None, lambda: norm, scale=lambda: nn.Dropout(drop_rate))

    @property
    def mixer(self) -> Mixer:  # type: ignore[override]
        return self.layer


class FeedForward(nn.Module):
    """`W' drop(gelu(W x + b)) + b'`, with as many times the width between as `expand` says."""

    def __init__(self, dim: int, expand: int, drop_rate: float, dd: dict[str, Any]) -> None:
        super().__init__()
        first = nn.Sequential(nn.Linear(dim, dim * expand, **dd), nn.GELU())
        self.ff = nn.Sequential(first, nn.Dropout(drop_rate), nn.Linear(dim * expand, dim, **dd))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.ff(x)
        return y


class FeedForwardBlock(nn.Module):
    """Residual block around a `FeedForward`: `x + drop(layer(norm(x)))`."""

    def __init__(self, layer: FeedForward, norm: nn.Module, drop_rate: float) -> None:
        super().__init__()
        self.layer, self.norm, self.drop = layer, norm, nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.drop(self.layer(self.norm(x)))
        return y


class SashimiBackbone(nn.Module):
    """SaShiMi's net, `[B, T, embed_dim]` to `[B, T, embed_dim]`, of any length T.

    Args:
        embed_dim: width of the finest stream.
        depth: pairs of a mixer's block and a feed-forward block at each rate.
        pool: steps that each pool makes one of, finest first.
        expand: how many times wider each pool makes the stream.
        ff: width of the feed-forward blocks between their layers, over that of the stream; 0 for none.
        unet: pairs on the way down as well, and a skip around every block.
        causal: `False` for a net that sees both sides: mixers that do are taken as they are, others get a twin that
            runs from the end. Where T is no multiple of the pools, zeros follow.
        shift: pools on the way up give the steps of the group before. Causal nets need it; the authors' class has it
            in bidirectional nets as well, their diffusion model has not.
        norm: `"layer"`, or `"scalar"` for the layout of the published checkpoints: blocks with a `ScalarNorm` and, in
            nets without `unet`, weight-normed pools.
        mixer: name of a registered mixer.
        mixer_options: keyword arguments of its constructor, over `n_ssm=1` and `dt_transform="softplus"` for S4's
            family.
        drop_rate: dropout behind mixers and feed-forward layers and inside both, where the mixer has it.

    Raises:
        ValueError: if a size or a choice is not allowed, the mixer is unknown or looks ahead in a causal net, or a
            causal net has no shift.
        TypeError: if the mixer has no such option.
    """

    @check_arguments
    def __init__(
        self,
        embed_dim: int = 64,
        depth: int = 8,
        pool: Sequence[int] = (4, 4),
        expand: int = 2,
        ff: int = 2,
        unet: bool = False,
        causal: bool = True,
        shift: bool = True,
        norm: str = "layer",
        mixer: str = "s4",
        mixer_options: Mapping[str, Any] | None = None,
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(embed_dim=embed_dim, depth=depth, expand=expand)
        check_range(0, 1024, ff=ff)
        check_range(0, 1, drop_rate=drop_rate)
        check_choice("norm", norm, NORMS)
        for size in pool:
            check_sizes(pool=size)
        _check_direction(mixer, causal, shift)
        self.num_features = self.embed_dim = self.dim = embed_dim
        self.depth, self.pool, self.expand, self.ff = depth, tuple(map(int, pool)), expand, ff
        self.unet, self.causal, self.shift, self.norm_kind = unet, causal, shift, norm
        self.mixer_name, self.drop_rate = mixer, drop_rate
        self.mixer_options = mixer_defaults(mixer, drop_rate) | dict(mixer_options or {})
        self.widths = [embed_dim * expand**i for i in range(len(self.pool) + 1)]
        self.grad_checkpointing = False
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        weight_norm = norm == "scalar" and not unet

        down: list[nn.Module] = []
        up: list[nn.Module] = []
        for width, wide, size in zip(self.widths, self.widths[1:], self.pool, strict=False):
            down += self.layers(width, dd) if unet else []
            down.append(DownPool(width, wide, size, weight_norm, not causal, dd))
            up.append(nn.ModuleList([UpPool(wide, width, size, weight_norm, shift, dd), *self.layers(width, dd)]))
        self.d_layers = nn.ModuleList(down)
        self.c_layers = nn.ModuleList(self.layers(self.widths[-1], dd))
        self.u_layers = nn.ModuleList(up[::-1])
        self.norm = norms.LayerNorm(embed_dim, **dd)

    def layers(self, dim: int, dd: dict[str, Any]) -> list[nn.Module]:
        """Make the `depth` pairs of blocks of one rate. A subclass with blocks of its own replaces this and `run`."""
        blocks: list[nn.Module] = []
        for _ in range(self.depth):
            options = {**self.mixer_options, **dd}
            twin = not self.causal and mixer_class(self.mixer_name).causal
            mixer = (Bidirectional if twin else build_mixer)(self.mixer_name, dim, **options)
            blocks.append(MixerBlock(mixer, self._norm(dim, dd), self.drop_rate))
            if self.ff:
                layer = FeedForward(dim, self.ff, self.drop_rate, dd)
                blocks.append(FeedForwardBlock(layer, self._norm(dim, dd), self.drop_rate))
        return blocks

    def _norm(self, dim: int, dd: dict[str, Any]) -> nn.Module:
        return ScalarNorm(dim, **dd) if self.norm_kind == "scalar" else norms.LayerNorm(dim, **dd)

    def blocks(self) -> Iterator[MixerBlock]:
        """Yield the blocks around mixers, in the order in which a step meets them."""
        return (module for module in self._in_order() if isinstance(module, MixerBlock))

    def _in_order(self) -> Iterator[nn.Module]:
        yield from self.d_layers
        yield from self.c_layers
        for tier in self.u_layers:
            yield from cast("nn.ModuleList", tier)

    def init_weights(self) -> None:
        """Fill every parameter and buffer anew: mixers by their own rules, others as torch's layers start."""
        mixers = {id(part) for block in self.blocks() for part in block.mixer.modules()}
        for module in self.modules():
            if id(module) not in mixers and module is not self:
                reset = getattr(module, "reset_parameters", None)
                if reset is not None:
                    reset()
        for block in self.blocks():
            block.mixer.init_weights()

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that weight decay should leave alone: those that mixers name, and scalar norms."""
        names: set[str] = set()
        for place, module in self.named_modules():
            if isinstance(module, Mixer):
                names |= {f"{place}.{name}" for name in module.no_weight_decay()}
            elif isinstance(module, ScalarNorm):
                names |= {f"{place}.norm.m", f"{place}.norm.s"}
        return names

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each block again in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def run(self, x: Tensor, call: Callable[[nn.Module, Tensor, int], Tensor]) -> Tensor:
        """Run the net, each block and pool by `call(layer, x, length)`, up to the last norm.

        `length` is that of the stream behind the layer, which pools on the way up are told.
        """
        passed = [x]
        for layer in self.d_layers:
            x = call(layer, x, 0)
            passed.append(x)
        for layer in self.c_layers:
            x = call(layer, x, 0)
        x = x + passed.pop()
        for tier in self.u_layers:
            up, *blocks = cast("nn.ModuleList", tier)
            x = skip = call(up, x, passed[-1].shape[1]) + passed.pop()
            for layer in blocks:
                x = call(layer, x, 0)
                if self.unet:
                    x = x + passed.pop()
            if not self.unet:
                x = x + skip
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Features `[B, T, embed_dim]` of a stream `[B, T, embed_dim]`.

        Raises:
            ValueError: if `x` has another shape.
        """
        self._check(x, 3)

        def call(layer: nn.Module, x: Tensor, length: int) -> Tensor:
            if isinstance(layer, UpPool):
                return cast("Tensor", layer(x, length))
            if self.grad_checkpointing and self.training:
                return cast("Tensor", checkpoint(layer, x))
            return cast("Tensor", layer(x))

        return self._finish(self.run(norms.at_least_fp32(x), call))

    def prefill(self, x: Tensor, state: SashimiState | None = None) -> tuple[Tensor, SashimiState]:
        """Read a part of a stream, of any length, and go on from `state`; `None` at the start of a sequence.

        Returns:
            Features `[B, T, embed_dim]`, and the state after the last step.

        Raises:
            ValueError: if `x` or `state` has another form.
            NotImplementedError: if the net is not causal.
        """
        self._check(x, 3)
        if state is None:
            state = self.initial_state(x.shape[0], x.device)

        def go_on(block: MixerBlock, x: Tensor, before: Any) -> tuple[Tensor, Any]:
            return block.prefill(x, before)

        return self._carry(x, state, go_on)

    def step(self, x_t: Tensor, state: SashimiState) -> tuple[Tensor, SashimiState]:
        """One step: `[B, embed_dim]` and a state to `[B, embed_dim]` and the next state.

        Raises:
            ValueError: if `x_t` or `state` has another form.
            NotImplementedError: if the net is not causal.
        """
        self._check(x_t, 2)

        def go_on(block: MixerBlock, x: Tensor, before: Any) -> tuple[Tensor, Any]:
            y, after = block.step(x.squeeze(1), before)
            return y.unsqueeze(1), after

        y, after = self._carry(x_t.unsqueeze(1), state, go_on)
        return y.squeeze(1), after

    def initial_state(
        self, batch_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> SashimiState:
        """The state before the first step, on the device and in the dtype of the parameters if none is given.

        Raises:
            NotImplementedError: if the net is not causal.
        """
        if not self.causal:
            _no_state()
        calls.check_batch_size(batch_size)
        weight = self.norm.weight
        device, wide = device or weight.device, real_dtype(dtype or weight.dtype)
        mixers = tuple(block.mixer.initial_state(batch_size, device, dtype) for block in self.blocks())
        gathered = [torch.zeros(batch_size, 0, width, device=device, dtype=wide) for width in self.widths[:-1]]
        queued = [
            torch.zeros(batch_size, size, width, device=device, dtype=wide)
            for size, width in zip(self.pool, self.widths, strict=False)
        ]
        return SashimiState(mixers, tuple(gathered), tuple(queued))

    def _carry(
        self, x: Tensor, state: SashimiState, go_on: Callable[[MixerBlock, Tensor, Any], tuple[Tensor, Any]]
    ) -> tuple[Tensor, SashimiState]:
        """Run a part of a stream; rates at which no step is due are left out."""
        self._check_state(state, x.shape[0])
        mixers, gathered, queued = map(list, state)
        places = {id(block): i for i, block in enumerate(self.blocks())}
        levels = {id(pool): i for i, pool in enumerate(m for m in self.d_layers if isinstance(m, DownPool))}
        levels |= {id(tier[0]): len(self.pool) - 1 - i for i, tier in enumerate(cast("Any", self.u_layers))}

        def call(layer: nn.Module, x: Tensor, length: int) -> Tensor:
            if isinstance(layer, DownPool):
                level = levels[id(layer)]
                y, gathered[level] = layer.prefill(x, gathered[level])
            elif isinstance(layer, UpPool):
                level = levels[id(layer)]
                y, queued[level] = layer.prefill(x, queued[level], length)
            elif not x.shape[1]:
                y = x
            elif isinstance(layer, MixerBlock):
                place = places[id(layer)]
                y, mixers[place] = go_on(layer, x, mixers[place])
            else:
                y = layer(x)
            return y

        features = self._finish(self.run(norms.at_least_fp32(x), call))
        return features, SashimiState(tuple(mixers), tuple(gathered), tuple(queued))

    def _finish(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.norm(x))

    def _check(self, x: Any, ndim: int) -> None:
        if not isinstance(x, Tensor) or x.ndim != ndim or x.shape[-1] != self.embed_dim or not x.is_floating_point():
            name, axes = ("x", "[B, T, embed_dim]") if ndim == 3 else ("x_t", "[B, embed_dim]")
            raise ValueError(
                f"{name} must be a floating tensor {axes} with embed_dim {self.embed_dim} (got {described(x)}); "
                "reshape it, or build the net for its width"
            )

    def _check_state(self, state: Any, batch: int) -> None:
        if not self.causal:
            _no_state()
        shape = [len(part) for part in state] if isinstance(state, tuple) and len(state) == 3 else None
        pools = len(self.pool)
        if shape != [sum(1 for _ in self.blocks()), pools, pools]:
            raise ValueError(
                f"state must be a SashimiState of this net (got {described(state)}); "
                "give what initial_state or prefill returned"
            )
        for name, part, widths in (("gathered", state[1], self.widths), ("queued", state[2], self.widths)):
            for tensor, width in zip(part, widths, strict=False):
                if not isinstance(tensor, Tensor) or tensor.ndim != 3 or tensor.shape[::2] != (batch, width):
                    raise ValueError(
                        f"state.{name} must have tensors [{batch}, steps, {width}] for a batch of {batch} "
                        f"(got {described(tensor)}); give the state of these sequences, or initial_state({batch})"
                    )


def mixer_defaults(name: str, drop_rate: float = 0.0) -> dict[str, Any]:
    """Options that a mixer gets where its user gave none."""
    options = dict(S4_OPTIONS) if issubclass(mixer_class(name), S4) else {}
    return options | ({"dropout": drop_rate} if drop_rate and "dropout" in options_of(name) else {})


def _check_direction(mixer: str, causal: bool, shift: bool) -> None:
    if causal and not mixer_class(mixer).causal:
        raise ValueError(
            f"mixer {mixer!r} looks at the future and the net is causal; choose another mixer or causal=False"
        )
    if causal and not shift:
        raise ValueError("shift=False lets steps see the rest of their group (got causal=True); give causal=False too")


def _no_state() -> NoReturn:
    raise NotImplementedError("this net looks at the future (causal=False) and has no state to carry; call forward")
