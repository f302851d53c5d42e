"""Engines that draw clips and score them: `torch`, the model's own steps, and `c`, a program that C runs.

An engine goes on from a `ClipState` and returns one; the states in it are the model's own, so that any engine goes on
where another has stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sinuous.audio.lowering import NotLowered, lower
from sinuous.core import norms
from sinuous.core.checks import check_choice
from sinuous.core.mixers.contract import register_state
from sinuous.core.modes import stepping
from sinuous.core.ragged import select_rows
from sinuous.core.sampling import Sampling

READ = 4096
"""Codes that are read at a time, which bounds the memory of long prompts."""


@register_state
class ClipState(NamedTuple):
    """Where clips are.

    Attributes:
        model: the model's own state, behind all codes but the last.
        last: the last code of each clip, which the model reads next, int64 `[B]`.
        drawn: how many codes of each clip were drawn, int64 `[B]`.
    """

    model: Any
    last: Tensor
    drawn: Tensor


class TorchEngine:
    """Steps of the model itself, from systems that are discretised once."""

    name = "torch"

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = stepping(model)
        self.device = next(model.parameters()).device

    def score(self, codes: Tensor, silence: int) -> Tensor:
        """Bits `[B, T]` of codes `[B, T]`, from the start."""
        before, state = torch.full_like(codes[:, :1], silence), None
        bits = [torch.zeros(len(codes), 0)]
        for start in range(0, codes.shape[1], READ):
            part = codes[:, start : start + READ].to(self.device)
            logits, state = self.model.prefill(torch.cat([before.to(self.device), part[:, :-1]], 1), state)
            bits.append(bits_of(logits[..., : self.model.vocab_size], part, start))
            before = part[:, -1:]
        return torch.cat(bits, 1)

    def initial_state(self, rows: int, silence: int) -> ClipState:
        """Before the first sample: silence is the last code that there was."""
        last = torch.full((rows,), silence, device=self.device)
        return ClipState(self.model.initial_state(rows), last, torch.zeros_like(last))

    def read(self, state: ClipState, codes: Tensor) -> ClipState:
        """Go on over codes `[B, T]` that are known; on a CPU clip by clip, so that each is read as alone."""
        read = torch.cat([state.last[:, None], codes[:, :-1]], 1)
        groups = [[clip] for clip in range(len(read))] if self.device.type == "cpu" else [list(range(len(read)))]
        inners = []
        for rows in groups:
            inner = select_rows(state.model, rows)
            for part in read[rows].split(READ, 1):
                _, inner = self.model.prefill(part, inner, last_only=True)
            inners.append(inner)
        joined = pytree.tree_map(lambda *clips: torch.cat(clips), *inners)
        return state._replace(model=joined, last=codes[:, -1])

    def draw(self, state: ClipState, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor, ClipState]:
        """Draw codes by random numbers `[B, n]`; returns codes and bits `[B, n]`, and the state behind them."""
        inner, code, vocab_size = state.model, state.last, self.model.vocab_size
        codes, bits = [code[:, None][:, :0].cpu()], [torch.zeros(len(code), 0)]
        for numbers in uniform.to(self.device).split(256, 1) if uniform.shape[1] else ():
            drawn, said = [], []
            for number in numbers.unbind(1):
                logits, inner = self.model.step(code, inner)
                logits = logits[:, :vocab_size]
                code = sampling.choose(logits, number)
                drawn.append(code)
                said.append(logits)
            chosen = torch.stack(drawn, 1)
            bits.append(bits_of(torch.stack(said, 1), chosen, sum(part.shape[1] for part in codes)))
            codes.append(chosen.cpu())
        return torch.cat(codes, 1), torch.cat(bits, 1), ClipState(inner, code, state.drawn + uniform.shape[1])


class CEngine:
    """A program of the model that is run in C, thousands of steps a call. Known codes are read by the model."""

    name = "c"

    def __init__(self, model: nn.Module) -> None:
        self.program = lower(model)
        self.reader = TorchEngine(model)
        self.initial_state, self.read = self.reader.initial_state, self.reader.read

    def score(self, codes: Tensor, silence: int) -> Tensor:
        """Bits `[B, T]` of codes `[B, T]`, from the start."""
        before = torch.full((len(codes),), silence)
        return self.program.run(before, torch.zeros(codes.shape, dtype=torch.float64), codes=codes).bits.float()

    def draw(self, state: ClipState, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor, ClipState]:
        """Draw codes by random numbers `[B, n]`; returns codes and bits `[B, n]`, and the state behind them."""
        options: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p, "state": state.model}
        codes, bits, inner = self.program.run(state.last, uniform, **options)
        last = torch.cat([state.last[:, None], codes], 1)[:, -1]
        return codes, bits.float(), ClipState(inner, last, state.drawn + uniform.shape[1])


Engine = TorchEngine | CEngine
ENGINES: dict[str, Callable[[nn.Module], Engine]] = {"c": CEngine, "torch": TorchEngine}
"""Engines by name, the fastest first."""


def engine_of(model: nn.Module, name: str | None) -> Engine:
    """The engine of this name, or the fastest that can run the model.

    Raises:
        ValueError: if there is none of this name, or it cannot run the model, saying why.
    """
    if name is not None:
        check_choice("engine", name, ENGINES)
    try:
        return ENGINES[name or "c"](model)
    except NotLowered as reason:
        if name is None:
            return TorchEngine(model)
        raise ValueError(f"{reason}; give engine='torch', or leave it out") from None


def bits_of(logits: Tensor, codes: Tensor, start: int) -> Tensor:
    """Bits `[B, T]` of codes under logits `[B, T, V]`, which must be numbers; `start` codes came before."""
    log_p = norms.at_least_fp32(logits).log_softmax(-1)
    bits = -log_p.gather(-1, codes.unsqueeze(-1)).squeeze(-1) / math.log(2)
    if bits.isnan().any():
        clip, place = bits.isnan().nonzero()[0].tolist()
        raise FloatingPointError(
            f"the logits of clip {clip} are not numbers after {start + place} codes; check the weights, or use a wider "
            "dtype"
        )
    return bits.float().cpu()


def repeated(state: ClipState, rows: int) -> ClipState:
    """A state of so many clips, of which each is as often there as any other, side by side."""
    copies = rows // len(state.last)
    widened: ClipState = select_rows(state, [i // copies for i in range(rows)])
    return widened
