"""Models of codes as programs of the engine in C: frozen once, then thousands of samples a call.

    program = lower(model)
    codes, bits, state = program.run(torch.tensor([128]), torch.rand(1, 16000, dtype=torch.float64))

A program has the model's weights as they were, in single precision: systems discretised in double, matrices laid out
as the interpreter reads them. Its states are the model's own, so that either goes on where the other stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sinuous.audio.pools import DownPool, UpPool
from sinuous.audio.sashimi import Sashimi
from sinuous.audio.sashimi_backbone import MixerBlock, SashimiBackbone, SashimiState, ScalarNorm
from sinuous.audio.wave_codes import FLOOR, LARGEST, OFFSET, SMALLEST
from sinuous.audio.wavenet import WaveNet, WaveNetState
from sinuous.core import norms
from sinuous.core.mixers.s4 import S4, LTIState
from sinuous.core.modes import evaluating
from sinuous.kernels import cpu
from sinuous.kernels.cpu.sample_program import (
    LARGEST_RANK,
    Assembler,
    Interpreter,
    Place,
    Slots,
    System,
    SystemStates,
)


class NotLowered(Exception):
    """A model has no program; the message says why, in one sentence."""


class Drawn(NamedTuple):
    """Result of a call.

    Attributes:
        codes: `[B, T]`.
        bits: of each code under the untempered model, `[B, T]`, float64.
        state: the model's, after the last code that was read, which is the one before the last of `codes`.
    """

    codes: Tensor
    bits: Tensor
    state: Any


class States(Protocol):
    """Where a model's states lie in the rows' memory."""

    def write(self, memory: Tensor, positions: Tensor, state: Any) -> None: ...

    def read(self, memory: Tensor, positions: Tensor) -> Any: ...


class Program:
    """A model that is ready to run in C; made by `lower`."""

    def __init__(self, model: nn.Module, interpreter: Interpreter, states: States) -> None:
        self._model, self._interpreter, self._states = cast("Any", model), interpreter, states
        self._codes: int = self._model.vocab_size

    def run(
        self,
        current: Tensor,
        uniforms: Tensor,
        *,
        temperature: float = 1.0,
        top_p: float | None = None,
        state: Any = None,
        codes: Tensor | None = None,
    ) -> Drawn:
        """Draw as many samples as there are random numbers, as `sinuous.core.sampling.Sampling.choose` draws.

        Args:
            current: the code of each row that comes before its first sample and has not been read, `[B]`.
            uniforms: random numbers in [0, 1), `[B, T]`, float64.
            temperature: logits are divided by it; 0 takes the most probable code.
            top_p: draw among the fewest most probable codes that together have at least this probability.
            state: the model's, of B rows, before `current` is read; that at the start of a sequence if absent.
            codes: codes that are told and not drawn, `[B, T]`; -1 where one is to be drawn.

        Raises:
            ValueError: if a code is not one of the model's.
            FloatingPointError: if logits are not numbers.
        """
        for name, numbers, least in (("current", current, 0), ("codes", codes, -1)):
            if numbers is not None and numbers.numel() and not least <= numbers.min() <= numbers.max() < self._codes:
                raise ValueError(
                    f"{name} must lie between {least} and {self._codes - 1} (got {int(numbers.min())} to "
                    f"{int(numbers.max())}); use the codec that the model was trained with"
                )
        state = self._model.initial_state(len(current)) if state is None else state
        memory = torch.zeros(len(current), self._interpreter.stride)
        positions = torch.zeros(self._interpreter.counters, dtype=torch.int64)
        self._states.write(memory, positions, state)
        drawn = self._interpreter.run(
            current, uniforms, memory, positions, temperature=temperature, top_p=top_p, codes=codes
        )
        dtype = next(leaf.dtype for leaf in pytree.tree_leaves(state))
        after = pytree.tree_map(lambda t: t.to(dtype), self._states.read(memory, positions))
        return Drawn(drawn.codes, drawn.bits, after)


@torch.no_grad()
def lower(model: nn.Module) -> Program:
    """Freeze a model into a program.

    Args:
        model: a causal `Sashimi` with mixers `s4` or `s4d`, or a `WaveNet`, on the CPU.

    Raises:
        NotLowered: if it is another model, or there is no C compiler here.
    """
    lowering = next((function for kind, function in _LOWERINGS.items() if isinstance(model, kind)), None)
    if lowering is None:
        raise NotLowered(f"engine 'c' runs SaShiMi and WaveNet, and this is a {type(model).__name__}")
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise NotLowered(f"engine 'c' runs on the CPU, and the model is on {device}")
    problem = cpu.interpreter_unavailable()
    if problem is not None:
        raise NotLowered(f"engine 'c' cannot run here: {problem}")
    assembler = Assembler()
    with evaluating(model):
        states = lowering(assembler, cast("Any", model))
    return Program(model, assembler.finish(), states)


class _WaveNetStates:
    """Rings of past inputs, whose oldest entry is the next to be written over."""

    def __init__(self, rings: Sequence[Slots]) -> None:
        self.rings = rings

    def write(self, memory: Tensor, positions: Tensor, state: WaveNetState) -> None:
        pasts = state.past.split([ring.length for ring in self.rings], 1)
        for ring, past in zip(self.rings, pasts, strict=True):
            ring.write(memory, past)

    def read(self, memory: Tensor, positions: Tensor) -> WaveNetState:
        begun = [int(positions[ring.position]) for ring in self.rings]
        pasts = [ring.read(memory).roll(-at, 1) for ring, at in zip(self.rings, begun, strict=True)]
        return WaveNetState(torch.cat(pasts, 1))


def _wavenet(assembler: Assembler, model: WaveNet) -> _WaveNetStates:
    net, taps = model.model, model.kernel_size - 1
    width, inner = model.residual_channels, net.residual_convs[0].in_channels
    stream, gated = assembler.place(width), assembler.slots(2, inner)
    heard, skips = assembler.slots(taps + 1, width), assembler.slots(len(model.dilations), inner)
    assembler.embed(stream, model.start(torch.arange(model.vocab_size), 1))
    rings = []
    for layer, dilation in enumerate(model.dilations):
        ring = assembler.slots(taps * dilation, width, counter=True)
        assembler.delay(heard, stream, ring)
        weight, bias = model.gated(layer)
        assembler.linear(gated, heard, weight.transpose(1, 2).flatten(1), bias)
        assembler.gate(skips.at(layer), gated)
        residual = net.residual_convs[layer]
        assembler.linear(stream, skips.at(layer), residual.weight.squeeze(2), residual.bias, add=True)
        rings.append(ring)
    weight, bias = model.skips()
    summed, end = assembler.place(weight.shape[0]), assembler.place(net.end_conv_1.out_channels)
    assembler.linear(summed, skips, weight, bias)
    assembler.relu(summed, summed)
    assembler.linear(end, summed, net.end_conv_1.weight.squeeze(2), net.end_conv_1.bias)
    assembler.relu(end, end)
    # No activation lies between the last two matrices.
    last, head = net.end_conv_2, model.decoder[0].output_transform
    weight = head.weight.double() @ last.weight.squeeze(2).double()
    bias = head.weight.double() @ cast("Tensor", last.bias).double() + head.bias.double()
    logits = assembler.place(model.vocab_size)
    assembler.linear(logits, end, weight, bias)
    assembler.sample(logits)
    return _WaveNetStates(rings)


class _SashimiStates:
    """States of the systems, and of each pool the group that it gathers and the queue that it gives from; the counter
    of both is the number of steps that are gathered."""

    def __init__(self) -> None:
        self.mixers: list[SystemStates] = []
        self.groups: list[Slots] = []
        self.queues: list[Slots] = []

    def write(self, memory: Tensor, positions: Tensor, state: SashimiState) -> None:
        for place, mixer in zip(self.mixers, state.mixers, strict=True):
            place.write(memory, mixer.hidden)
        for group, queue, gathered, queued in zip(self.groups, self.queues, state.gathered, state.queued, strict=True):
            position = gathered.shape[1]
            positions[group.position] = position
            group.write(memory, F.pad(gathered, (0, 0, 0, group.length - position)))
            queue.write(memory, F.pad(queued, (0, 0, position, 0)))

    def read(self, memory: Tensor, positions: Tensor) -> SashimiState:
        places = [int(positions[group.position]) for group in self.groups]
        return SashimiState(
            tuple(LTIState(place.read(memory)) for place in self.mixers),
            tuple(group.read(memory)[:, :at] for group, at in zip(self.groups, places, strict=True)),
            tuple(queue.read(memory)[:, at:] for queue, at in zip(self.queues, places, strict=True)),
        )


class _SashimiLowering:
    """Writes the instructions of a step of SaShiMi's net, in the order of `SashimiBackbone.run`."""

    def __init__(self, assembler: Assembler, net: SashimiBackbone) -> None:
        self.assembler, self.net, self.states = assembler, net, _SashimiStates()
        levels: list[list[nn.Module]] = [[]]
        self.pools: list[DownPool] = []
        for layer in net.d_layers:
            if isinstance(layer, DownPool):
                self.pools.append(layer)
                levels.append([])
            else:
                levels[-1].append(layer)
        self.down = levels[:-1]
        self.up = [list(cast("nn.ModuleList", tier)) for tier in net.u_layers][::-1]

    def level(self, level: int, stream: Place) -> None:
        """Instructions of the net from `level` on, 0 the finest, which change the stream in place."""
        assembler = self.assembler
        if level == len(self.pools):
            skip = assembler.place(stream.width)
            assembler.copy(skip, stream)
            for layer in self.net.c_layers:
                self.block(layer, stream)
            assembler.add(stream, skip)
            return
        passed = []
        for layer in self.down[level]:
            passed.append(assembler.place(stream.width))
            assembler.copy(passed[-1], stream)
            self.block(layer, stream)
        pool, (up, *blocks) = self.pools[level], self.up[level]
        group = assembler.slots(pool.pool, stream.width, counter=True)
        queue = assembler.slots(pool.pool, stream.width, counter=group.position)
        self.states.groups.append(group)
        self.states.queues.append(queue)
        given = assembler.place(stream.width)
        assembler.read(given, queue)  # before a whole group writes the queue anew
        store = assembler.store(group, stream)
        wide = assembler.place(pool.linear.bias.shape[0])
        # Columns of the matrix, and rows of the other, have the steps of a group within each channel.
        weight = pool.linear.weight.unflatten(1, (stream.width, pool.pool)).transpose(1, 2).flatten(1)
        assembler.linear(wide, group, weight, pool.linear.bias)
        kept = assembler.place(stream.width)
        self.level(level + 1, wide)
        linear = cast("UpPool", up).linear
        weight = linear.weight.unflatten(0, (stream.width, pool.pool)).transpose(0, 1).flatten(0, 1)
        bias = linear.bias.unflatten(0, (stream.width, pool.pool)).transpose(0, 1).flatten()
        assembler.linear(queue, wide, weight, bias)
        assembler.land(store)
        assembler.add(stream, given)
        if not self.net.unet:
            assembler.copy(kept, stream)
        for layer in blocks:
            self.block(layer, stream)
            if self.net.unet:
                assembler.add(stream, passed.pop())
        if not self.net.unet:
            assembler.add(stream, kept)

    def block(self, layer: nn.Module, stream: Place) -> None:
        """Instructions of a residual block."""
        normed = self.assembler.scratch("normed", stream.width)
        self.norm(normed, stream, cast("Any", layer).norm)
        if isinstance(layer, MixerBlock):
            self.mixer(stream, normed, layer.layer)
            return
        first, _, last = cast("Any", layer).layer.ff
        hidden = self.assembler.scratch("hidden", first[0].out_features)
        self.assembler.linear(hidden, normed, first[0].weight, first[0].bias)
        self.assembler.gelu(hidden, hidden)
        self.assembler.linear(stream, hidden, last.weight, last.bias, add=True)

    def norm(self, out: Place, x: Place, norm: nn.Module) -> None:
        if isinstance(norm, ScalarNorm):
            self.assembler.scalar_norm(out, x, norm.norm["m"], norm.norm["s"])
        else:
            layer = cast("norms.LayerNorm", norm)
            self.assembler.layer_norm(out, x, layer.weight, layer.bias, layer.eps)

    def mixer(self, stream: Place, x: Place, mixer: nn.Module) -> None:
        """Instructions of an S4 mixer, whose output is added to the stream."""
        if not isinstance(mixer, S4) or mixer.two_sided:
            raise NotLowered(f"engine 'c' runs the mixers s4 and s4d, and this model has {type(mixer).__name__}")
        assembler, system = self.assembler, frozen(mixer)
        if len(system.p) > LARGEST_RANK:
            raise NotLowered(f"engine 'c' runs systems of rank {LARGEST_RANK} at most (got {len(system.p)})")
        if mixer.channels > 1:
            repeated = assembler.scratch("repeated", mixer.channels * x.width)
            assembler.linear(repeated, x, torch.eye(x.width).repeat(mixer.channels, 1), None)
            x = repeated
        read = assembler.scratch("read", x.width)
        self.states.mixers.append(assembler.systems(read, x, system))
        assembler.gelu(read, read)
        linear = cast("nn.Linear", mixer.output_linear[0])
        if isinstance(mixer.output_linear[1], nn.GLU):
            halves = assembler.halves(stream.width)
            assembler.linear(halves, read, linear.weight, linear.bias)
            assembler.glu(stream, halves, add=True)
        else:
            assembler.linear(stream, read, linear.weight, linear.bias, add=True)


def frozen(mixer: S4) -> System:
    """The systems of a mixer as a program has them."""
    factor, b, p, q, readout, skip = mixer.discrete()
    none = factor.new_zeros(0, *factor.shape)
    return System(factor, b, readout, none if p is None else p, none if q is None else q, skip)


def _sashimi(assembler: Assembler, model: Sashimi) -> _SashimiStates:
    if not model.causal:
        raise NotLowered("engine 'c' draws from causal models, and this one looks at the future")
    net, head = model.model, model.decoder[0].output_transform
    stream, logits = assembler.place(net.embed_dim), assembler.place(model.vocab_size)
    assembler.embed(stream, model._embed(torch.arange(model.vocab_size), 1))
    lowering = _SashimiLowering(assembler, net)
    lowering.level(0, stream)
    normed = assembler.scratch("normed", stream.width)
    lowering.norm(normed, stream, net.norm)
    if model.logistic:
        parameters = assembler.place(head.out_features)
        units = torch.ones(3, head.out_features // 3)
        units[1] = OFFSET
        weight, bias = units.view(-1, 1) * head.weight, units.flatten() * head.bias
        assembler.linear(parameters, normed, weight, bias)
        assembler.logistic(logits, parameters, cast("Tensor", model.levels), FLOOR, (SMALLEST, LARGEST))
    else:
        assembler.linear(logits, normed, head.weight, head.bias)
    assembler.sample(logits)
    return lowering.states


_LOWERINGS: dict[type[nn.Module], Any] = {WaveNet: _wavenet, Sashimi: _sashimi}
