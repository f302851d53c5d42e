"""Rules by which tokens are chosen: temperature, filters, repetition penalty, and when a row ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sinuous.core import norms
from sinuous.core.checks import described, is_number, is_whole


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
        for setting in fields(self):
            check_setting(setting.name, getattr(self, setting.name))
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


def check_setting(name: str, value: object) -> None:
    """Refuse a value that a setting of `Sampling`, `generate` or `stream` cannot have.

    Raises:
        ValueError: naming the setting.
    """
    kind = _KINDS[name]
    if not kind.holds(value):
        raise ValueError(f"{name} must {kind.must} (got {described(value)})")


def _are_ids(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(map(is_whole, value))


class _Kind(NamedTuple):
    """A value that a setting may have, and the same in words."""

    holds: Callable[[Any], bool]
    must: str


_COUNT = _Kind(lambda n: is_whole(n) and n >= 1, "be at least 1 and a whole number")
_SEED_LIMIT = 2**63
_KINDS = {
    "temperature": _Kind(lambda n: is_number(n) and 0 <= n < math.inf, "be 0 or more and finite"),
    "top_k": _Kind(lambda n: n is None or _COUNT.holds(n), f"{_COUNT.must}, or be None"),
    "top_p": _Kind(lambda p: p is None or (is_number(p) and 0 < p <= 1), "lie above 0 and not above 1, or be None"),
    "min_p": _Kind(lambda p: p is None or (is_number(p) and 0 <= p <= 1), "lie between 0 and 1, or be None"),
    "repetition_penalty": _Kind(lambda n: is_number(n) and 0 < n < math.inf, "be more than 0 and finite"),
    "max_new_tokens": _COUNT,
    "max_length": _Kind(lambda n: n is None or _COUNT.holds(n), f"{_COUNT.must}, or be None"),
    "stop_tokens": _Kind(_are_ids, "be a list of ids of tokens, as [0]"),
    "stop_sequences": _Kind(
        lambda stops: (
            isinstance(stops, Sequence)
            and not isinstance(stops, str)
            and all(_are_ids(stop) and len(stop) > 0 for stop in stops)
        ),
        "have no empty sequence, and be a list of lists of ids, as [[13, 10]]",
    ),
    "seed": _Kind(
        lambda s: s is None or all(is_whole(n) and -_SEED_LIMIT <= n < _SEED_LIMIT for n in _listed(s)),
        "be a whole number of 64 bits, one for each row, or None",
    ),
    "pad_id": _Kind(lambda n: n is None or is_whole(n), "be the id of a token, or None"),
    "prefill_chunk": _COUNT,
}
"""What the settings of `Sampling`, `generate` and `stream` may be."""


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
