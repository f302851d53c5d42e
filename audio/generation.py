"""Sound from a causal model of codes, a sample at a time with the state carried, and the bits that sound costs it.

    result = generate(model, 80_000, num_clips=4, prompt=codes, temperature=0.95, seed=0)
    wave = codec("mu_law").decode(result.codes)  # [4, 80_000]
    result = generate(model, 80_000, state=result.state)  # the next samples of the same clips

Any model with `prefill`, `step` and `vocab_size` will do: SaShiMi, WaveNet, a `SequenceModel`. The code at time t is
drawn from what the model says after the codes before t; before the first one stands silence. Clip i draws from a
generator of its own, so that it is what it would be alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sinuous.audio.engines import ClipState, engine_of, repeated
from sinuous.core.checks import check_range, check_sizes, described, is_whole
from sinuous.core.ragged import select_rows
from sinuous.core.sampling import Sampling

__all__ = ["ClipState", "Clips", "generate", "score", "stream"]

CHUNK = 2048
"""Samples that an engine makes at a time."""
CANDIDATES_APART = 0x9E3779B1
"""Seeds between the candidates of a clip: torch's generator on a CPU takes 32 bits of a seed, over which multiples of
this number are spread evenly."""

Codes = Sequence[int] | Sequence[Sequence[int]] | Tensor


@dataclass(frozen=True)
class Clips:
    """New codes of all clips.

    Attributes:
        codes: int64 `[num_clips, num_samples]`, on the CPU, without the prompt.
        bits: `-log2 p` of each code under the model at temperature 1, without top-p, float32 likewise.
        state: to go on from.
        samples_per_second: new codes of all clips over the time that they took, that of the prompt left out.
        engine: what made them.
    """

    codes: Tensor
    bits: Tensor
    state: ClipState
    samples_per_second: float
    engine: str


def generate(
    model: nn.Module,
    num_samples: int,
    *,
    num_clips: int = 1,
    prompt: Codes | None = None,
    state: ClipState | None = None,
    temperature: float = 1.0,
    top_p: float | None = None,
    seed: int = 0,
    engine: str | None = None,
    best_of: int = 1,
    silence: int | None = None,
) -> Clips:
    """Draw clips, or go on with them.

    Args:
        model: a causal model of codes. It is read as in evaluation mode and stays as it is.
        num_samples: codes of each clip. (With codecs of two codes a sample, a sample has two.)
        num_clips: how many; clips that go on from one prompt or one state differ by their draws.
        prompt: codes that the clips begin with, `[T]` for all or `[num_clips, T]`.
        state: of an earlier result, whose clips go on; with a prompt they hear it first.
        temperature: logits are divided by it; 0 takes the most probable code.
        top_p: draw from the fewest most probable codes that together have this probability.
        seed: clip i draws from `torch.Generator().manual_seed(seed + i)`; a clip that goes on from a state, from where
            it stopped there, so that two calls with one seed draw what one would.
        engine: `"c"`, for SaShiMi with `s4` or `s4d` and for WaveNet on a CPU with a C compiler, or `"torch"`, which
            runs every model; None takes the first that can run, and the result says which did.
        best_of: of so many candidates for each clip, that which costs the fewest bits is kept. Candidate j of clip i
            draws from `seed + i + 2654435761 j`.
        silence: the code before the first sample, which a codec knows; half of `vocab_size` if absent.

    Raises:
        ValueError: if an argument has a value that it cannot have, or numbers of clips do not go together.
        NotImplementedError: if the model is not causal.
        FloatingPointError: if the model gives logits that are not numbers.
    """
    check_sizes(best_of=best_of)
    run = _Run(model, num_clips, prompt, state, temperature, top_p, seed, engine, best_of, silence)
    parts = list(run.parts(_checked_count(num_samples), CHUNK))
    codes, bits = (torch.cat([getattr(part, name) for part in parts], 1) for name in ("codes", "bits"))
    whole = dataclasses.replace(parts[-1], codes=codes, bits=bits, samples_per_second=run.samples_per_second)
    return whole if best_of == 1 else _kept(whole, best_of)


def stream(
    model: nn.Module,
    num_samples: int | None = None,
    *,
    chunk: int = CHUNK,
    num_clips: int = 1,
    prompt: Codes | None = None,
    state: ClipState | None = None,
    temperature: float = 1.0,
    top_p: float | None = None,
    seed: int = 0,
    engine: str | None = None,
    silence: int | None = None,
) -> Iterator[Clips]:
    """Yield the clips of `generate` in parts of `chunk` codes, each with the state behind it.

    Args:
        num_samples: codes of each clip; None goes on without end.
        chunk: codes of a part; the last one may have fewer.

    The other arguments, and the errors, are those of `generate`.
    """
    check_sizes(chunk=chunk)
    run = _Run(model, num_clips, prompt, state, temperature, top_p, seed, engine, 1, silence)
    return run.parts(None if num_samples is None else _checked_count(num_samples), chunk)


@torch.inference_mode()
def score(model: nn.Module, codes: Codes, *, engine: str | None = None, silence: int | None = None) -> Tensor:
    """Bits `-log2 p(code_t | codes before t)` of codes, the first after silence, float32 `[B, T]` on the CPU.

    Args:
        model: a causal model of codes, read as in evaluation mode.
        codes: `[B, T]`, or `[T]` for one clip, whose bits are `[T]`.
        engine: as in `generate`; None takes `"torch"`, which reads many steps at once.
        silence: as in `generate`.

    Raises:
        ValueError: if they are no codes of the model.
        NotImplementedError: if the model is not causal.
        FloatingPointError: if the model gives logits that are not numbers.
    """
    rows = _checked_codes("codes", codes, _vocab_size(model))
    scored = engine_of(model, engine or "torch").score(rows, _silence(silence, model)).clone()
    return scored[0] if isinstance(codes, Tensor) and codes.ndim == 1 else scored


class _Run:
    """One call of `generate` or `stream`: its clips, their random numbers and its clock."""

    def __init__(
        self,
        model: nn.Module,
        num_clips: int,
        prompt: Codes | None,
        state: ClipState | None,
        temperature: float,
        top_p: float | None,
        seed: int,
        engine: str | None,
        candidates: int,
        silence: int | None,
    ) -> None:
        vocab_size = _vocab_size(model)
        check_sizes(num_clips=num_clips)
        if not is_whole(seed) or abs(seed) >= 1 << 62:
            raise ValueError(f"seed must be a whole number of 62 bits (got {described(seed)}); give 0")
        self.sampling = Sampling(temperature=temperature, top_p=top_p)
        self.engine = engine_of(model, engine)
        self.prompt = None if prompt is None else _checked_codes("prompt", prompt, vocab_size)
        if state is not None and not isinstance(state, ClipState):
            raise ValueError(f"state must be that of an earlier result (got {described(state)}); give result.state")
        self.num_clips = _agreed(num_clips, self.prompt, state)
        self.start = state
        self.silence = _silence(silence, model)
        self.seeds = [seed + i + j * CANDIDATES_APART for i in range(self.num_clips) for j in range(candidates)]
        self.candidates = candidates
        self.drawn, self.seconds = 0, 0.0

    @property
    def samples_per_second(self) -> float:
        return self.drawn / max(self.seconds, 1e-9)

    def parts(self, num_samples: int | None, chunk: int) -> Iterator[Clips]:
        state = self._read()
        draws = [_Draws(seed, drawn) for seed, drawn in zip(self.seeds, state.drawn.tolist(), strict=True)]
        for count in _counts(num_samples, chunk):
            uniform = torch.stack([draw.take(count) for draw in draws])
            began = time.perf_counter()
            with torch.inference_mode():
                codes, bits, after = self.engine.draw(state, uniform, self.sampling)
            seconds = time.perf_counter() - began
            state = pytree.tree_map(torch.clone, after)  # training refuses what inference mode has made
            self.drawn, self.seconds = self.drawn + codes.numel(), self.seconds + seconds
            yield Clips(codes.clone(), bits.clone(), state, codes.numel() / max(seconds, 1e-9), self.engine.name)

    def _read(self) -> ClipState:
        """State of all clips and candidates behind the prompt. What is alike is read once."""
        state, prompt = self.start, self.prompt
        rows = max(1 if state is None else len(state.last), 1 if prompt is None else len(prompt))
        with torch.inference_mode():
            state = self.engine.initial_state(rows, self.silence) if state is None else repeated(state, rows)
            if prompt is not None and prompt.shape[1]:
                state = self.engine.read(state, prompt.to(state.last.device).expand(rows, -1))
        widened = repeated(repeated(state, self.num_clips), self.num_clips * self.candidates)
        owned: ClipState = pytree.tree_map(torch.clone, widened)
        return owned


class _Draws:
    """Random numbers of a clip, in double precision, behind those that it has used: the same in parts of any size."""

    def __init__(self, seed: int, used: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        for start in range(0, used, 1 << 20):
            self.take(min(1 << 20, used - start))

    def take(self, count: int) -> Tensor:
        return torch.rand(count, generator=self.generator, dtype=torch.float64)


def _counts(num_samples: int | None, chunk: int) -> Iterable[int]:
    """Sizes of parts; one without samples where there are to be none, for the state."""
    if num_samples is None:
        return itertools.repeat(chunk)
    return [min(chunk, num_samples - start) for start in range(0, num_samples, chunk)] or [0]


def _kept(clips: Clips, candidates: int) -> Clips:
    """The candidate of each clip that costs the fewest bits."""
    best = clips.bits.double().mean(1).nan_to_num().unflatten(0, (-1, candidates)).argmin(1)
    rows = (torch.arange(len(best)) * candidates + best).tolist()
    codes, bits, state = select_rows((clips.codes, clips.bits, clips.state), rows)
    return dataclasses.replace(clips, codes=codes, bits=bits, state=state)


def _agreed(num_clips: int, prompt: Tensor | None, state: ClipState | None) -> int:
    """The number of clips: of those that are told, all that are not 1 must agree."""
    counts = {
        "num_clips": num_clips,
        "prompt": 1 if prompt is None else len(prompt),
        "state": 1 if state is None else len(state.last),
    }
    several = {name: count for name, count in counts.items() if count != 1}
    if len(set(several.values())) > 1:
        listed = " and ".join(f"{count} of {name}" for name, count in several.items())
        raise ValueError(f"numbers of clips must agree (got {listed}); give one number, or 1")
    return max(counts.values())


def _checked_count(num_samples: int) -> int:
    if not is_whole(num_samples):
        raise ValueError(f"num_samples must be a whole number (got {described(num_samples)}); give 0 or more")
    check_range(0, math.inf, num_samples=num_samples)
    return int(num_samples)


def _checked_codes(name: str, codes: Any, vocab_size: int) -> Tensor:
    """Codes `[B, T]` on the CPU."""
    try:
        tensor = torch.as_tensor(codes).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name} must be codes [B, T] or [T], rows of one length (got {described(codes)}); encode a wave by a codec"
        ) from error
    if not tensor.numel():
        tensor = tensor.long()
    if tensor.ndim not in (1, 2) or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} must be whole numbers, [B, T] or [T] (got {described(codes)}); encode a wave first")
    tensor = tensor.long() if tensor.ndim == 2 else tensor.long()[None]
    if not len(tensor):
        raise ValueError(f"{name} must have at least one clip (got {described(codes)}); give [T] or [B, T]")
    if tensor.numel():
        low, high = int(tensor.min()), int(tensor.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"{name} must lie between 0 and {vocab_size - 1} (got {low if low < 0 else high}); use the codec that "
                "the model was trained with"
            )
    return tensor


def _vocab_size(model: Any) -> int:
    """Number of codes of a model, which must be one of codes."""
    calls = ("prefill", "step", "initial_state", "vocab_size")
    if not (isinstance(model, nn.Module) and all(hasattr(model, name) for name in calls)):
        raise ValueError(f"model must be a model of codes, such as sashimi_nano (got {described(type(model))})")
    return int(model.vocab_size)  # type: ignore[arg-type]


def _silence(silence: int | None, model: Any) -> int:
    if silence is None:
        return int(model.vocab_size) // 2
    if not is_whole(silence) or not 0 <= silence < model.vocab_size:
        raise ValueError(
            f"silence must be a code from 0 to {model.vocab_size - 1} (got {described(silence)}); give codec.silence"
        )
    return silence
