"""Programs that draw samples of a model, and the interpreter in C that runs them.

A program is a list of instructions over one buffer of weights in single precision and over a memory for each row of a
batch, where activations and states have places. `Assembler` writes one; `Interpreter.run` draws thousands of samples
in a call that holds no lock of Python's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sinuous.kernels.cpu import build
from sinuous.kernels.cpu.call import Call, fields

_OPERATIONS = [
    "embed", "copy", "add", "linear", "layer_norm", "scalar_norm", "gelu", "relu", "glu", "gate", "lti", "delay",
    "read", "store", "logistic", "sample",
]  # fmt: skip
_FIELDS = fields(
    "threads rows stride steps length program weights memory positions current codes uniforms bits settings failed"
)
MOST_LOGISTICS = 64
"""Logistics that a mixture may have at most."""
FAR = 1e6
"""Where the border of the last code lies, and the gaps between the first and the last border and their neighbours."""
LARGEST_RANK = 2
"""Ranks that the interpreter's linear systems may have at most."""


class Place(NamedTuple):
    """Numbers in a row's memory: where they begin, how many they are, and how many there are with the zeros behind."""

    begin: int
    width: int
    padded: int


class Slots(NamedTuple):
    """Places of one width in a row, `[length, width]`: a ring, a queue, or a group that becomes one input."""

    begin: int
    length: int
    width: int
    padded: int
    position: int
    """Index of the counter that says which slot is next; -1 for none."""

    def at(self, slot: int) -> Place:
        return Place(self.begin + slot * self.padded, self.width, self.padded)

    def write(self, memory: Tensor, values: Tensor) -> None:
        """Put `values` `[B, length, width]` into `memory` `[B, …]`."""
        self._seen(memory)[..., : self.width] = values

    def read(self, memory: Tensor) -> Tensor:
        """Values `[B, length, width]`."""
        return self._seen(memory)[..., : self.width].clone()

    def _seen(self, memory: Tensor) -> Tensor:
        slots: Tensor = memory[:, self.begin : self.begin + self.length * self.padded].unflatten(
            1, (self.length, self.padded)
        )
        return slots


class SystemStates(NamedTuple):
    """States of linear systems in a row: of `width` channels, `modes` pairs of numbers each."""

    begin: int
    width: int
    padded: int
    modes: int
    lanes: int

    def write(self, memory: Tensor, values: Tensor) -> None:
        """Put `values` `[B, width, modes, 2]` into `memory` `[B, …]`."""
        values = F.pad(values.flatten(2), (0, 0, 0, self.padded - self.width))
        self._seen(memory).copy_(values.unflatten(1, (-1, self.lanes)).transpose(2, 3))

    def read(self, memory: Tensor) -> Tensor:
        """Values `[B, width, modes, 2]`."""
        numbers = self._seen(memory).transpose(2, 3).flatten(1, 2)[:, : self.width]
        values: Tensor = numbers.unflatten(2, (self.modes, 2)).clone()
        return values

    def _seen(self, memory: Tensor) -> Tensor:
        size = 2 * self.modes * self.padded
        shape = (self.padded // self.lanes, 2 * self.modes, self.lanes)
        seen: Tensor = memory[:, self.begin : self.begin + size].unflatten(1, shape)
        return seen


class System(NamedTuple):
    """Discrete linear systems: factor λ, input b and readout C `[D, M, 2]`, low ranks p and q `[R, D, M, 2]`, R ≥ 0,
    and skip D `[D]`. With a^* x = 2 Re(Σ conj(a_m) x_m),

    x_t = λ ⊙ x_{t-1} - Σ_r p_r (q_r^* x_{t-1}) + b u_t,   y_t = conj(C)^* x_t + D u_t.
    """

    factor: Tensor
    b: Tensor
    readout: Tensor
    p: Tensor
    q: Tensor
    skip: Tensor


class Samples(NamedTuple):
    """What a call has drawn: `codes` `[B, T]`, and `bits` `[B, T]` of each under the untempered model."""

    codes: Tensor
    bits: Tensor


class Interpreter:
    """A program that is ready to run; made by `Assembler.finish`.

    Attributes:
        stride: numbers in a row's memory.
        counters: number of positions.
    """

    def __init__(self, instructions: Sequence[Sequence[int]], weights: Tensor, stride: int, counters: int) -> None:
        self._instructions = torch.tensor(instructions, dtype=torch.int64)
        self._weights = weights
        self.stride, self.counters = stride, counters

    def run(
        self,
        current: Tensor,
        uniforms: Tensor,
        memory: Tensor,
        positions: Tensor,
        *,
        temperature: float = 1.0,
        top_p: float | None = None,
        codes: Tensor | None = None,
    ) -> Samples:
        """Draw samples, and leave states and positions as they are after the last code that was read.

        Args:
            current: the code of each row that is read first, `[B]`.
            uniforms: random numbers in [0, 1), `[B, T]`, float64.
            memory: states of the rows, `[B, stride]`, in single precision.
            positions: of all rows together, int64 `[counters]`.
            temperature: logits are divided by it; 0 takes the most probable code.
            top_p: draw among the fewest most probable codes that together have at least this probability.
            codes: codes that are told, not drawn, `[B, T]`; -1 where one is to be drawn.

        Raises:
            FloatingPointError: if logits are not numbers.
        """
        rows, steps = uniforms.shape
        drawn = torch.full((rows, steps), -1) if codes is None else codes.to(torch.int64, copy=True).contiguous()
        bits = torch.empty(rows, steps, dtype=torch.float64)
        current, uniforms = current.to(torch.int64, copy=True), uniforms.double().contiguous()
        settings = torch.tensor([temperature, 2.0 if top_p is None else top_p], dtype=torch.float64)
        failed = torch.empty(1, dtype=torch.int64)
        call = Call("sample_program", _FIELDS, torch.float32)
        call.arguments |= {
            "rows": rows,
            "stride": self.stride,
            "steps": steps,
            "length": len(self._instructions),
            "program": self._instructions.data_ptr(),
            "weights": self._weights.data_ptr(),
            "memory": memory.data_ptr(),
            "positions": positions.data_ptr(),
            "current": current.data_ptr(),
            "codes": drawn.data_ptr(),
            "uniforms": uniforms.data_ptr(),
            "bits": bits.data_ptr(),
            "settings": settings.data_ptr(),
            "failed": failed.data_ptr(),
        }
        call.run(call.library.run)
        if int(failed) >= 0:
            raise FloatingPointError(
                f"the logits are not numbers at sample {int(failed)} of this call; check the weights of the model"
            )
        return Samples(drawn, bits)


class Assembler:
    """Writes a program, instruction by instruction, in the order in which they run.

    Raises:
        BuildError: if the interpreter cannot be compiled here.
    """

    def __init__(self) -> None:
        library = build.library("sample_program", 32)
        self.lanes, self.block = int(library.lanes()), int(library.block())
        self._instructions: list[list[int]] = []
        self._weights: list[Tensor] = []
        self._weight_count = 0
        self._stride = 0
        self._counters = 0
        self._scratch: dict[tuple[str, int], Place] = {}
        self._halves: dict[int, Slots] = {}

    def finish(self) -> Interpreter:
        ahead = torch.zeros(16 * self.block)  # the interpreter asks for weights before it needs them
        return Interpreter(self._instructions, torch.cat([*self._weights, ahead]), self._stride, self._counters)

    def padded(self, width: int) -> int:
        return -(-width // self.block) * self.block

    def place(self, width: int) -> Place:
        """New numbers that nothing else writes to."""
        return Place(self._allocate(self.padded(width)), width, self.padded(width))

    def scratch(self, name: str, width: int) -> Place:
        """The numbers of this name and width, new ones at first: for what is read before the name is used again."""
        key = (name, width)
        if key not in self._scratch:
            self._scratch[key] = self.place(width)
        return self._scratch[key]

    def halves(self, width: int) -> Slots:
        """Two slots of this width, as `scratch`."""
        if width not in self._halves:
            self._halves[width] = self.slots(2, width)
        return self._halves[width]

    def slots(self, count: int, width: int, counter: bool | int = False) -> Slots:
        """New slots, with a counter of their own or with that of others."""
        position = self.counter() if counter is True else -1 if counter is False else counter
        padded = self.padded(width)
        return Slots(self._allocate(count * padded), count, width, padded, position)

    def counter(self) -> int:
        self._counters += 1
        return self._counters - 1

    def embed(self, out: Place, table: Tensor) -> None:
        """Row `code` of the table `[V, width]`."""
        self._emit("embed", out.begin, w=self._keep(F.pad(table, (0, out.padded - out.width))), n=out.padded)

    def copy(self, out: Place, x: Place) -> None:
        self._emit("copy", out.begin, x.begin, n=x.padded)

    def add(self, out: Place, x: Place) -> None:
        self._emit("add", out.begin, x.begin, n=x.padded)

    def linear(
        self, out: Place | Slots, x: Place | Slots, weight: Tensor, bias: Tensor | None, add: bool = False
    ) -> None:
        """out = weight x + bias, or out += with `add`.

        Args:
            out: one place, or slots.
            x: one place, or slots.
            weight: `[outputs, inputs]`, of each the slots in turn.
            bias: `[outputs]`, or None for none.
            add: add to what is there.
        """
        outputs, inputs = self._spread(out), self._spread(x)
        whole = weight.new_zeros(outputs.shape[0], inputs.shape[0])
        whole[outputs[:, None] & inputs] = weight.flatten()
        shift = weight.new_zeros(outputs.shape[0])
        if bias is not None:
            shift[outputs] = bias
        blocks = whole.unflatten(0, (-1, self.block)).transpose(1, 2)
        packed = torch.cat([shift.view(-1, 1, self.block), blocks], 1)
        sizes = {"n": len(blocks), "m": whole.shape[1], "flag": int(add)}
        self._emit("linear", out.begin, x.begin, w=self._keep(packed), **sizes)

    def layer_norm(self, out: Place, x: Place, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
        ones, none = torch.ones(x.width), torch.zeros(x.width)
        rows = [F.pad((none if t is None else t).float(), (0, x.padded - x.width)) for t in (weight, bias)]
        if weight is None:
            rows[0] = F.pad(ones, (0, x.padded - x.width))
        self._emit(
            "layer_norm", out.begin, x.begin, w=self._keep(torch.cat([*rows, ones.new_full((1,), eps)])), n=x.width,
            m=x.padded,
        )  # fmt: skip

    def scalar_norm(self, out: Place, x: Place, shift: Tensor, scale: Tensor) -> None:
        """out = scale / std(x) (x - mean(x) + shift), scale and shift one number each."""
        self._emit(
            "scalar_norm", out.begin, x.begin, w=self._keep(torch.cat([shift.reshape(1), scale.reshape(1)])), n=x.width
        )

    def gelu(self, out: Place, x: Place) -> None:
        self._emit("gelu", out.begin, x.begin, n=x.padded)

    def relu(self, out: Place, x: Place) -> None:
        self._emit("relu", out.begin, x.begin, n=x.padded)

    def glu(self, out: Place, x: Slots, add: bool = False) -> None:
        """out = a σ(b) of the two slots a and b of x, or out += with `add`."""
        self._emit("glu", out.begin, x.begin, n=x.padded, m=x.padded, flag=int(add))

    def gate(self, out: Place, x: Slots) -> None:
        """out = tanh(a) σ(b) of the two slots a and b of x."""
        self._emit("gate", out.begin, x.begin, n=x.padded, m=x.padded)

    def systems(self, out: Place, x: Place, system: System) -> SystemStates:
        """Linear systems, one for each number of x.

        Raises:
            ValueError: if their rank is more than `LARGEST_RANK`.
        """
        width, modes, _ = system.factor.shape
        rank = system.p.shape[0]
        if rank > LARGEST_RANK:
            raise ValueError(f"the rank of a system must be at most {LARGEST_RANK} (got {rank})")
        readout = 2 * system.readout * system.readout.new_tensor([1.0, -1.0])
        low = [t for k in range(rank) for t in (system.p[k], 2 * system.q[k])]
        numbers = torch.cat([system.factor, system.b, readout, *low], -1).flatten(1)
        numbers = torch.cat([system.skip.unsqueeze(1), numbers], 1).float()
        lanes = F.pad(numbers, (0, 0, 0, x.padded - width)).unflatten(0, (-1, self.lanes)).transpose(1, 2)
        begin = self._allocate(x.padded * (2 * modes + rank))
        sizes = {"n": x.padded, "m": modes, "flag": rank, "extra": begin}
        self._emit("lti", out.begin, x.begin, w=self._keep(lanes), **sizes)
        return SystemStates(begin, width, x.padded, modes, self.lanes)

    def delay(self, out: Slots, x: Place, ring: Slots) -> None:
        """The slots of `out`: x as it was some steps ago, the oldest first, evenly spaced over `ring`, and x itself."""
        taps = out.length - 1
        sizes = {"n": x.padded, "m": ring.length // max(taps, 1), "flag": taps, "extra": ring.begin}
        self._emit("delay", out.begin, x.begin, position=ring.position, **sizes)

    def read(self, out: Place, queue: Slots) -> None:
        """The slot of the queue that is next; the counter stays."""
        self._emit("read", out.begin, queue.begin, n=queue.padded, position=queue.position)

    def store(self, group: Slots, x: Place) -> int:
        """Put x into the next slot of the group. What follows runs where that was the last one, up to the place in
        the program that `land` names for the number that is returned."""
        self._emit("store", group.begin, x.begin, n=x.padded, m=group.length, position=group.position)
        return len(self._instructions) - 1

    def land(self, store: int) -> None:
        """Let `store` go on here where its group is not full."""
        self._instructions[store][7] = len(self._instructions)

    def logistic(
        self, logits: Place, parameters: Place, levels: Tensor, floor: float, bounds: tuple[float, float]
    ) -> None:
        """Log-probabilities of codes under a mixture of logistics around the level of the last one, with borders
        half-way between levels.

        Args:
            logits: of as many codes as there are levels.
            parameters: logits of the shares of K logistics, then their offsets, then the logarithms of their scales.
            levels: of the codes, rising.
            floor: share of the uniform distribution.
            bounds: of the logarithms of scales.

        Raises:
            ValueError: if there are more than `MOST_LOGISTICS`.
        """
        components = parameters.width // 3
        if components > MOST_LOGISTICS:
            raise ValueError(f"a mixture must have at most {MOST_LOGISTICS} logistics (got {components})")
        spare = -len(levels) % self.lanes
        borders = (levels[1:].double() + levels[:-1].double()) / 2
        head = F.pad(torch.tensor([floor, *bounds]), (0, self.lanes - 3))
        parts = (
            F.pad(levels, (0, spare)),
            F.pad(borders, (0, spare + 1), value=FAR),
            F.pad(borders - borders.float(), (0, spare + 1)),
            F.pad(borders.diff(), (1, spare + 1), value=FAR),
        )
        w = self._keep(torch.cat([head, *(part.float() for part in parts)]))
        self._emit("logistic", logits.begin, parameters.begin, w=w, n=len(levels), m=components)

    def sample(self, logits: Place) -> None:
        self._emit("sample", 0, logits.begin, n=logits.width)

    def _spread(self, place: Place | Slots) -> Tensor:
        """Which of the numbers with zeros between them are numbers of the place."""
        count = place.length if isinstance(place, Slots) else 1
        return (torch.arange(place.padded) < place.width).repeat(count)

    def _allocate(self, count: int) -> int:
        self._stride += count
        return self._stride - count

    def _keep(self, weights: Tensor) -> int:
        flat = weights.detach().float().flatten()
        aligned = F.pad(flat, (0, -len(flat) % self.lanes))
        self._weights.append(aligned)
        self._weight_count += len(aligned)
        return self._weight_count - len(aligned)

    def _emit(
        self,
        operation: str,
        out: int,
        x: int = 0,
        *,
        w: int = 0,
        n: int = 0,
        m: int = 0,
        flag: int = 0,
        extra: int = 0,
        position: int = -1,
    ) -> None:
        self._instructions.append([_OPERATIONS.index(operation), out, x, w, n, m, flag, extra, position])


def self_test(dtype: torch.dtype) -> str | None:
    """Compile, load and run a program that counts to three; None if all is well."""
    assembler = Assembler()
    stream, logits = assembler.place(3), assembler.place(3)
    assembler.embed(stream, torch.eye(3))
    assembler.linear(logits, stream, 50 * torch.eye(3).roll(1, 0), None)
    assembler.sample(logits)
    program = assembler.finish()
    memory, positions = torch.zeros(1, program.stride), torch.zeros(program.counters, dtype=torch.int64)
    codes, _ = program.run(torch.tensor([0]), torch.full((1, 4), 0.5, dtype=torch.float64), memory, positions)
    if codes.tolist() != [[1, 2, 0, 1]]:
        return f"the compiled interpreter of samples is wrong on this machine (got {codes.tolist()})"
    return None
