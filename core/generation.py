"""Sampling from a causal `SequenceModel`: the prompt in chunks, then one step a token, with the state carried.

    from sinuous.core.generation import Sampling, generate, stream

    result = generate(model, [b"It is a truth", b"Chapter"], Sampling(temperature=0.8, top_p=0.95, seed=0))
    for token in stream(model, b"It is a truth", Sampling(max_new_tokens=200)):
        print(chr(token.id), end="", flush=True)

Rows of a batch do not meet: prompts of different lengths are read without padding (`core/ragged.py`), and each row
draws from a generator of its own. A row gives the same tokens as alone, up to the rounding of batched products.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from sinuous.core.checks import described
from sinuous.core.modes import evaluating
from sinuous.core.ragged import run_ragged, select_rows
from sinuous.core.sampling import Sampling, check_setting
from sinuous.core.sequence_model import SequenceModel

__all__ = ["Allowed", "Generation", "Prompt", "Sampling", "Token", "generate", "stream"]

Prompt = Sequence[int] | Tensor
Allowed = Callable[[int, Sequence[int], int, Tensor], Tensor]
"""`(row, its new tokens, how many may still come, logits [V]) -> bool [V]`: the tokens that may come next."""

DRAWN_AT_ONCE = 256
"""Random numbers that are drawn at a time for each row."""


class Token(NamedTuple):
    """A new token of a row."""

    row: int
    id: int


@dataclass(frozen=True)
class Generation:
    """New tokens of all rows, and the time that they took.

    Attributes:
        tokens: new tokens of each row, without the prompt and the stop token or sequence; int64, on the CPU.
        stop_reasons: `"length"`, `"stop_token"` or `"stop_sequence"` for each row.
        prompt_tokens: number of tokens read, in all rows.
        new_tokens: number of tokens chosen, in all rows, those included that stopped a row.
        prefill_seconds: time spent on the prompts.
        decode_seconds: time spent on new tokens.
    """

    tokens: list[Tensor]
    stop_reasons: list[str]
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows, over the time after the prompts."""
        return self.new_tokens / max(self.decode_seconds, 1e-9)

    @property
    def prefill_tokens_per_second(self) -> float:
        """Tokens of all prompts, over the time that they took."""
        return self.prompt_tokens / max(self.prefill_seconds, 1e-9)

    def padded(self, pad_id: int) -> Tensor:
        """Stack the rows, `[B, longest]`, with `pad_id` after the shorter ones."""
        return nn.utils.rnn.pad_sequence(self.tokens, batch_first=True, padding_value=pad_id)


def generate(
    model: SequenceModel,
    prompts: Prompt | Sequence[Prompt],
    sampling: Sampling | None = None,
    *,
    pad_id: int | None = None,
    prefill_chunk: int = 2048,
    position_ids: Prompt | Sequence[Prompt] | None = None,
    allowed: Allowed | None = None,
) -> Generation:
    """Go on from prompts until each row ends.

    The model is put into evaluation mode for the time, and no gradients are recorded.

    Args:
        model: a causal one.
        prompts: ids of one prompt or several, as tensors, sequences of numbers, or, for a model of bytes, `bytes`.
            Several may have different lengths.
        sampling: how tokens are chosen and when rows end; greedy, 128 tokens, if absent.
        pad_id: where prompts are a padded tensor `[B, T]`: the token in front of shorter rows or behind them, which is
            not read there; between others it is a token like them.
        prefill_chunk: steps of a prompt that are read at a time, which bounds the memory of long prompts.
        position_ids: for models that read positions, those of the tokens of each prompt, in the form of the prompts;
            positions beyond a prompt's length are those of its first new tokens. From there on they count up by one.
        allowed: tells before each choice which tokens may come next, for output that keeps to a grammar; all may, if
            absent. Stop tokens too must be allowed where a row may end.

    Raises:
        ValueError: if a prompt is empty, too long, or has ids that the model lacks, a token has no position, or none is
            allowed.
        NotImplementedError: if the model is not causal.
        FloatingPointError: if the model gives logits that are not numbers.
    """
    run = _Run(model, prompts, sampling or Sampling(), pad_id, prefill_chunk, position_ids, allowed)
    for _ in run.decode():
        pass
    return Generation(
        tokens=[torch.tensor(row.tokens, dtype=torch.long) for row in run.rows],
        stop_reasons=[row.reason for row in run.rows],
        prompt_tokens=sum(len(row.prompt) for row in run.rows),
        new_tokens=sum(row.chosen for row in run.rows),
        prefill_seconds=run.prefill_seconds,
        decode_seconds=run.decode_seconds,
    )


def stream(
    model: SequenceModel,
    prompts: Prompt | Sequence[Prompt],
    sampling: Sampling | None = None,
    *,
    pad_id: int | None = None,
    prefill_chunk: int = 2048,
    position_ids: Prompt | Sequence[Prompt] | None = None,
    allowed: Allowed | None = None,
) -> Iterator[Token]:
    """Yield the tokens of `generate`, each as soon as it is certain.

    Tokens that may begin a stop sequence are held back until they do not. The model is in evaluation mode until the
    iterator ends or is closed. Arguments and errors are those of `generate`.
    """
    return _Run(model, prompts, sampling or Sampling(), pad_id, prefill_chunk, position_ids, allowed).decode()


@dataclass
class _Row:
    index: int
    prompt: Tensor
    limit: int
    sampling: Sampling
    positions: Tensor | None = None
    tokens: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    chosen: int = 0
    reason: str = ""

    def position(self) -> int:
        """Position of the token that was chosen last."""
        assert self.positions is not None
        place = len(self.prompt) + self.chosen - 1
        ahead = max(place - len(self.positions) + 1, 0)
        return int(self.positions[place - ahead]) + ahead

    def take(self, token: int) -> list[Token]:
        """Take a chosen token in and return the tokens that are now certain."""
        self.chosen += 1
        if token in self.sampling.stop_tokens:
            self.reason = "stop_token"
            return self._release(0)
        self.held.append(token)
        for stop in self.sampling.stop_sequences:
            if self.held[-len(stop) :] == list(stop):
                del self.held[-len(stop) :]
                self.reason = "stop_sequence"
                return self._release(0)
        if self.chosen == self.limit:
            self.reason = "length"
            return self._release(0)
        return self._release(max(map(self._begun, self.sampling.stop_sequences), default=0))

    def _begun(self, stop: Sequence[int]) -> int:
        """Length of the longest beginning of `stop` with which the held tokens end."""
        return next(n for n in range(len(stop) - 1, -1, -1) if self.held[len(self.held) - n :] == list(stop[:n]))

    def _release(self, keep: int) -> list[Token]:
        certain, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        self.tokens += certain
        return [Token(self.index, token) for token in certain]


class _Run:
    """One call of `generate` or `stream`: its rows, its random numbers and its clock."""

    def __init__(
        self,
        model: SequenceModel,
        prompts: Prompt | Sequence[Prompt],
        sampling: Sampling,
        pad_id: int | None,
        prefill_chunk: int,
        position_ids: Prompt | Sequence[Prompt] | None,
        allowed: Allowed | None,
    ) -> None:
        _check_model(model)
        if not isinstance(sampling, Sampling):
            raise ValueError(f"sampling must be a Sampling (got {described(sampling)}); give Sampling(temperature=0.8)")
        check_setting("pad_id", pad_id)
        check_setting("prefill_chunk", prefill_chunk)
        self.model, self.sampling, self.prefill_chunk, self.allowed = model, sampling, prefill_chunk, allowed
        self.device = next(model.parameters()).device
        self.prefill_seconds = self.decode_seconds = 0.0
        rows = [_checked(row, i, model.vocab_size) for i, row in enumerate(_rows(prompts, pad_id))]
        positions = _positions(position_ids, rows, pad_id)
        self.rows = [
            _Row(i, prompt, _limit(prompt, i, sampling), sampling, places)
            for i, (prompt, places) in enumerate(zip(rows, positions, strict=True))
        ]
        self.generators = [torch.Generator().manual_seed(seed) for seed in _seeds(sampling.seed, len(rows))]

    @torch.inference_mode()
    def decode(self) -> Iterator[Token]:
        with evaluating(self.model):
            begin = time.perf_counter()
            groups = self._prefill()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.prefill_seconds = time.perf_counter() - begin
            for step in itertools.count():
                if step % DRAWN_AT_ONCE == 0:
                    uniform = self._draw()
                for group in groups:
                    begin = time.perf_counter()
                    ids, rows = self._choose(group, uniform[:, step % DRAWN_AT_ONCE]), group.rows
                    chosen = ids.tolist()
                    certain = [
                        t for row, token in zip(rows, chosen, strict=True) for t in row.take(_number(row, token))
                    ]
                    between = time.perf_counter()
                    yield from certain
                    between = time.perf_counter() - between
                    group.go_on(self.model, ids)
                    self.decode_seconds += time.perf_counter() - begin - between
                groups = [group for group in groups if group.rows]
                if not groups:
                    return

    def _choose(self, group: _Batch, uniform: Tensor) -> Tensor:
        if self.allowed is not None:
            marks = [
                self.allowed(row.index, row.tokens + row.held, row.limit - row.chosen, logits)
                for row, logits in zip(group.rows, group.logits.cpu(), strict=True)
            ]
            allowed = torch.stack(marks).to(self.device)
            if not allowed.any(-1).all():
                row = group.rows[int(allowed.any(-1).int().argmin())]
                raise ValueError(f"allowed gives no token for row {row.index} after {row.chosen} new tokens; give one")
            group.logits = group.logits.masked_fill(~allowed & ~group.logits.isnan(), -torch.inf)
        return group.choose(self.sampling, uniform)

    def _draw(self) -> Tensor:
        """Draw the random numbers of the next steps, `[rows, steps]`: the same ones in blocks of any size."""
        draws = [torch.rand(DRAWN_AT_ONCE, generator=g, dtype=torch.float64) for g in self.generators]
        return torch.stack(draws).to(self.device)

    def _prefill(self) -> list[_Batch]:
        """Read the prompts, those that are alike once."""
        alike: dict[tuple[bytes, bytes], list[_Row]] = {}
        for row in self.rows:
            position_bytes = b"" if row.positions is None else row.positions.numpy().tobytes()
            alike.setdefault((row.prompt.numpy().tobytes(), position_bytes), []).append(row)
        copies = list(alike.values())
        firsts = [rows[0] for rows in copies]
        ids = nn.utils.rnn.pad_sequence([row.prompt for row in firsts], batch_first=True)
        places = [row.positions[: len(row.prompt)] for row in firsts if row.positions is not None]
        if places:
            ids = torch.stack([ids, nn.utils.rnn.pad_sequence(places, batch_first=True)], -1)
        stages, groups = run_ragged(self._read, ids.to(self.device), [len(row.prompt) for row in firsts])
        logits = {
            row: stage.output[i] for stage in stages for i, row in enumerate(stage.rows)
        }  # the last stage's stays
        batches = []
        for group in groups:
            pairs = sorted(
                ((i, row) for i, first in enumerate(group.rows) for row in copies[first]),
                key=lambda pair: pair[1].index,
            )
            rows, sources = [row for _, row in pairs], [i for i, _ in pairs]
            seen = None
            if self.sampling.repetition_penalty != 1:
                seen = torch.zeros(len(rows), self.model.vocab_size, dtype=torch.bool, device=self.device)
                for i, row in enumerate(rows):
                    seen[i, row.prompt.to(self.device)] = True
            last = torch.stack([logits[group.rows[i]] for i in sources])[:, : self.model.vocab_size]
            batches.append(_Batch(rows, select_rows(group.state, sources), last, seen))
        return batches

    def _read(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        for chunk in ids.split(self.prefill_chunk, 1):
            if chunk.ndim == 3:  # positions beside the ids
                places = chunk[..., 1]
                logits, state = self.model.prefill(chunk[..., 0], state, last_only=True, position_ids=places)
            else:
                logits, state = self.model.prefill(chunk, state, last_only=True)
        return logits.squeeze(1), state


@dataclass
class _Batch:
    """Rows that step together, the logits of their next tokens, and the tokens under the repetition penalty."""

    rows: list[_Row]
    state: Any
    logits: Tensor
    seen: Tensor | None

    def choose(self, sampling: Sampling, uniform: Tensor) -> Tensor:
        places = torch.tensor([row.index for row in self.rows], device=uniform.device)
        ids = sampling.choose(self.logits, uniform[places], self.seen)
        return ids.masked_fill(self.logits.isnan().any(-1), -1)

    def go_on(self, model: SequenceModel, ids: Tensor) -> None:
        """Drop the rows that have ended and step the others over their tokens."""
        alive = [i for i, row in enumerate(self.rows) if not row.reason]
        ids, self.state = select_rows((ids, self.state), alive)
        self.rows = [self.rows[i] for i in alive]
        if self.seen is not None:
            self.seen = select_rows(self.seen, alive).scatter(1, ids[:, None], True)
        if self.rows:
            places: dict[str, Tensor] = {}
            if self.rows[0].positions is not None:
                places["position_ids"] = torch.tensor([row.position() for row in self.rows], device=ids.device)
            logits, self.state = model.step(ids, self.state, **places)
            self.logits = logits[:, : model.vocab_size]


def _check_model(model: object) -> None:
    if not (isinstance(model, nn.Module) and all(hasattr(model, name) for name in ("prefill", "step", "vocab_size"))):
        raise ValueError(f"model must be a SequenceModel (got {described(model)})")


def _rows(prompts: Prompt | Sequence[Prompt], pad_id: int | None) -> list[Tensor]:
    """Split prompts into one tensor of ids for each row, on the CPU, without padding."""
    if isinstance(prompts, Tensor):
        rows = list(prompts) if prompts.ndim == 2 else [prompts]
    else:
        try:
            single = not len(prompts) or isinstance(prompts[0], Integral)
            several = cast("Sequence[Prompt]", [prompts] if single else prompts)
            text = any(isinstance(row, str) for row in (prompts, *several))
            rows = [] if text else [row if isinstance(row, Tensor) else torch.tensor(list(row)) for row in several]
        except (TypeError, KeyError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"prompts must be ids of tokens, one row or several (got {described(prompts)}); give [1, 2] or "
                "[[1, 2], [3]]"
            ) from error
        if text:
            raise ValueError("a prompt must be ids of tokens (got text); encode it, for a model of bytes by .encode()")
    if not rows:
        raise ValueError("there is no prompt (got an empty batch); give at least one")
    rows = [row.cpu() for row in rows]
    return rows if pad_id is None else [_without_padding(row, i, pad_id) for i, row in enumerate(rows)]


def _positions(
    position_ids: Prompt | Sequence[Prompt] | None, prompts: list[Tensor], pad_id: int | None
) -> list[Tensor] | list[None]:
    """Split positions as the prompts are, on the CPU."""
    if position_ids is None:
        return [None] * len(prompts)
    if pad_id is not None:
        raise ValueError("position_ids do not go with pad_id (got both); give the prompts as a list, without padding")
    rows = _rows(position_ids, None)
    for i, (row, prompt) in enumerate(itertools.zip_longest(rows, prompts)):
        if row is None or prompt is None or row.ndim != 1 or len(row) < len(prompt) or row.is_floating_point():
            got = f"{len(rows)} rows" if row is None or prompt is None else f"{row.dtype} {list(row.shape)} in row {i}"
            raise ValueError(
                f"position_ids must have a whole number for each token of the {len(prompts)} prompts (got {got}); "
                "give as many as there are tokens, or more for new ones"
            )
    return [row.long() for row in rows]


def _without_padding(row: Tensor, index: int, pad_id: int) -> Tensor:
    places = (row != pad_id).nonzero()
    if row.numel() and not places.numel():
        raise ValueError(
            f"a prompt must be more than padding (got nothing but pad_id {pad_id} in row {index}); "
            "begin an empty one with the token that starts a text"
        )
    return row[int(places[0]) : int(places[-1]) + 1] if places.numel() else row


def _checked(prompt: Tensor, row: int, vocab_size: int) -> Tensor:
    if prompt.ndim != 1 or not prompt.numel():
        raise ValueError(
            f"a prompt must be a row of at least one token (got shape {list(prompt.shape)} in row {row}); "
            "begin an empty one with the token that starts a text"
        )
    if prompt.is_floating_point() or prompt.is_complex() or prompt.dtype == torch.bool:
        raise ValueError(f"a prompt must have whole numbers (got {prompt.dtype} in row {row}); give ids of tokens")
    low, high = int(prompt.min()), int(prompt.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"ids must lie between 0 and {vocab_size - 1} (got {low if low < 0 else high} in row {row}); "
            "use the tokenizer that the model was trained with"
        )
    return prompt.long()


def _limit(prompt: Tensor, row: int, sampling: Sampling) -> int:
    if sampling.max_length is None:
        return sampling.max_new_tokens
    if sampling.max_length <= len(prompt):
        raise ValueError(
            f"max_length {sampling.max_length} leaves no room after the {len(prompt)} tokens of row {row}; "
            "give a larger one or a shorter prompt"
        )
    return min(sampling.max_new_tokens, sampling.max_length - len(prompt))


def _seeds(seed: int | Sequence[int] | None, rows: int) -> list[int]:
    if seed is None:
        return [int(s) for s in torch.randint(2**62, (rows,))]
    if isinstance(seed, int):
        return [seed + row for row in range(rows)]
    if len(seed) != rows:
        raise ValueError(f"seed must have one number for each of the {rows} rows (got {len(seed)}), or be one number")
    return list(seed)


def _number(row: _Row, token: int) -> int:
    if token < 0:
        raise FloatingPointError(
            f"the logits of row {row.index} are not numbers after {row.chosen} new tokens; "
            "check the weights, or use a wider dtype"
        )
    return token
