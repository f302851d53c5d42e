"""Sampling from a causal `SequenceModel`: the prompt in chunks, then one step a token, with the state carried.

    from sinuous.core.generation import Sampling, generate, stream

    result = generate(model, [b"It is a truth", b"Chapter"], Sampling(temperature=0.8, top_p=0.95, seed=0))
    for token in stream(model, b"It is a truth", Sampling(max_new_tokens=200)):
        print(chr(token.id), end="", flush=True)

Rows of a batch do not meet: prompts of different lengths are read without padding (`core/ragged.py`), and each row
draws from a generator of its own. A row gives the same tokens as alone, up to the rounding of batched products.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from sinuous.core import norms
from sinuous.core.checks import check_sizes
from sinuous.core.ragged import run_ragged, select_rows
from sinuous.core.sequence_model import SequenceModel

Prompt = Sequence[int] | Tensor


@dataclass(frozen=True)
class Sampling:
    """Rules by which tokens are chosen and rows end.

    They act in this order: repetition penalty, temperature, top-k, top-p, min-p. A token is drawn from those that are
    left, in proportion to their probabilities.

    Attributes:
        temperature: logits are divided by it; 0 takes the most probable token.
        top_k: keep the k most probable tokens.
        top_p: keep the fewest most probable tokens that together have at least this probability.
        min_p: keep tokens at least this many times as probable as the most probable.
        repetition_penalty: above 1, positive logits of tokens seen in the prompt or the output are divided by it and
            negative ones multiplied (Keskar et al., arXiv 1909.05858, section 4.1).
        max_new_tokens: a row ends after so many tokens.
        max_length: a row ends when prompt and output have so many tokens together.
        stop_tokens: a row ends before any of these.
        stop_sequences: a row ends before any of these sequences of tokens.
        seed: one for each row, or the first row's, which rows after it count up from; `None` draws them from torch's
            global generator. A row's numbers are drawn on the CPU and so are the same on every device.

    Raises:
        ValueError: if a number is out of its range, or tokens are to be chosen among at temperature 0.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    max_new_tokens: int = 128
    max_length: int | None = None
    stop_tokens: Sequence[int] = ()
    stop_sequences: Sequence[Sequence[int]] = ()
    seed: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        _check(self.temperature >= 0, "temperature", self.temperature, "be 0 or more")
        _check(self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "be more than 0")
        check_sizes(max_new_tokens=self.max_new_tokens, top_k=1 if self.top_k is None else self.top_k)
        _check(self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "lie above 0 and not above 1")
        _check(self.min_p is None or 0 <= self.min_p <= 1, "min_p", self.min_p, "lie between 0 and 1")
        _check(
            all(len(s) for s in self.stop_sequences), "stop_sequences", self.stop_sequences, "have no empty sequence"
        )
        filters = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        if self.temperature == 0 and filters:
            raise ValueError(
                f"{filters[0]} has no effect at temperature 0, which takes the most probable token; "
                "give a temperature above 0, or leave it out"
            )

    def choose(self, logits: Tensor, uniform: Tensor, seen: Tensor | None = None) -> Tensor:
        """Choose tokens `[n]` by inverting the cumulated probabilities.

        Args:
            logits: `[n, V]`.
            uniform: random numbers in [0, 1), `[n]`.
            seen: tokens under the repetition penalty, bool `[n, V]`; none if absent.
        """
        logits = norms.at_least_fp32(logits)
        if seen is not None:
            penalty = self.repetition_penalty
            logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits / self.temperature
        if self.top_k is not None:
            smallest = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < smallest, -torch.inf)
        if self.top_p is not None:
            ordered, places = logits.sort(dim=-1, descending=True)
            p = ordered.softmax(-1)
            dropped = torch.zeros_like(p, dtype=torch.bool).scatter(-1, places, p.cumsum(-1) - p >= self.top_p)
            logits = logits.masked_fill(dropped, -torch.inf)
        if self.min_p is not None:
            p = logits.softmax(-1)
            logits = logits.masked_fill(p < self.min_p * p.amax(-1, keepdim=True), -torch.inf)
        cumulated = logits.double().softmax(-1).cumsum(-1)
        total = cumulated[:, -1:]
        # Below the total, so that the first place above it has a probability that is not zero.
        quantile = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
        return torch.searchsorted(cumulated, quantile, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


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
) -> Generation:
    """Go on from prompts until each row ends.

    The model is put into evaluation mode for the time, and no gradients are recorded.

    Args:
        model: a causal one.
        prompts: ids of one prompt or several, as tensors, sequences of numbers, or, for a model of bytes, `bytes`.
            Several may have different lengths.
        sampling: how tokens are chosen and when rows end; greedy, 128 tokens, if absent.
        pad_id: where prompts are a padded tensor `[B, T]`: the token in front of shorter rows, which is not read.
        prefill_chunk: steps of a prompt that are read at a time, which bounds the memory of long prompts.

    Raises:
        ValueError: if a prompt is empty, too long, or has ids that the model lacks.
        NotImplementedError: if the model is not causal.
        FloatingPointError: if the model gives logits that are not numbers.
    """
    run = _Run(model, prompts, sampling or Sampling(), pad_id, prefill_chunk)
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
) -> Iterator[Token]:
    """Yield the tokens of `generate`, each as soon as it is certain.

    Tokens that may begin a stop sequence are held back until they do not. The model is in evaluation mode until the
    iterator ends or is closed. Arguments and errors are those of `generate`.
    """
    return _Run(model, prompts, sampling or Sampling(), pad_id, prefill_chunk).decode()


@dataclass
class _Row:
    index: int
    prompt: Tensor
    limit: int
    sampling: Sampling
    tokens: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    chosen: int = 0
    reason: str = ""

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
    ) -> None:
        check_sizes(prefill_chunk=prefill_chunk)
        self.model, self.sampling, self.prefill_chunk = model, sampling, prefill_chunk
        self.device = next(model.parameters()).device
        self.prefill_seconds = self.decode_seconds = 0.0
        rows = [_checked(row, i, model.vocab_size) for i, row in enumerate(_rows(prompts, pad_id))]
        self.rows = [_Row(i, prompt, _limit(prompt, i, sampling), sampling) for i, prompt in enumerate(rows)]
        seeds = _seeds(sampling.seed, len(rows))
        longest = max(row.limit for row in self.rows)
        draws = [torch.rand(longest, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
        self.uniform = torch.stack(draws).to(self.device)

    @torch.inference_mode()
    def decode(self) -> Iterator[Token]:
        with _evaluating(self.model):
            begin = time.perf_counter()
            groups = self._prefill()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.prefill_seconds = time.perf_counter() - begin
            for step in range(self.uniform.shape[1]):
                for group in groups:
                    begin = time.perf_counter()
                    ids, rows = group.choose(self.sampling, self.uniform[:, step]), group.rows
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

    def _prefill(self) -> list[_Batch]:
        lengths = [len(row.prompt) for row in self.rows]
        ids = nn.utils.rnn.pad_sequence([row.prompt for row in self.rows], batch_first=True).to(self.device)
        stages, groups = run_ragged(self._read, ids, lengths)
        logits = {
            row: stage.output[i] for stage in stages for i, row in enumerate(stage.rows)
        }  # the last stage's stays
        batches = []
        for group in groups:
            rows = [self.rows[i] for i in group.rows]
            seen = None
            if self.sampling.repetition_penalty != 1:
                seen = torch.zeros(len(rows), self.model.vocab_size, dtype=torch.bool, device=self.device)
                for i, row in enumerate(rows):
                    seen[i, row.prompt.to(self.device)] = True
            last = torch.stack([logits[i] for i in group.rows])[:, : self.model.vocab_size]
            batches.append(_Batch(rows, group.state, last, seen))
        return batches

    def _read(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        for chunk in ids.split(self.prefill_chunk, 1):
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
            logits, self.state = model.step(ids, self.state)
            self.logits = logits[:, : model.vocab_size]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _rows(prompts: Prompt | Sequence[Prompt], pad_id: int | None) -> list[Tensor]:
    """Split prompts into one tensor of ids for each row, on the CPU, without padding."""
    if isinstance(prompts, Tensor):
        rows = list(prompts) if prompts.ndim == 2 else [prompts]
    else:
        single = not len(prompts) or isinstance(prompts[0], Integral)
        several = cast("Sequence[Prompt]", [prompts] if single else prompts)
        if any(isinstance(row, str) for row in (prompts, *several)):
            raise ValueError("a prompt must be ids of tokens (got text); encode it, for a model of bytes by .encode()")
        rows = [row if isinstance(row, Tensor) else torch.tensor(list(row)) for row in several]
    if not rows:
        raise ValueError("there is no prompt (got an empty batch); give at least one")
    rows = [row.cpu() for row in rows]
    return rows if pad_id is None else [row[int((row != pad_id).cumsum(0).eq(0).sum()) :] for row in rows]


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


def _check(holds: bool, name: str, value: object, must: str) -> None:
    if not holds:
        raise ValueError(f"{name} must {must} (got {value})")
