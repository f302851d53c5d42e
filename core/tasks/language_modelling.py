"""Language modelling: the next token, or masked tokens, of any vocabulary, in bits per unit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric

from sinuous.core.data import TokenData
from sinuous.core.tasks.task import Task, apply, more_of

IGNORED = -100
"""The target of positions that do not count."""


class Masking:
    """BERT's choice of tokens to guess (Devlin et al., arXiv 1810.04805, section 3.1).

    Each position is chosen with probability `rate`; of the chosen, 80 % are replaced by the mask token, 10 % by a
    random one, 10 % stay.

    Args:
        rate: above 0 and at most 1.
        mask_token: id that stands for a hidden token.
        vocab_size: random tokens are drawn from all ids below it.

    Raises:
        ValueError: if a number is out of its range.
    """

    def __init__(self, rate: float, mask_token: int, vocab_size: int) -> None:
        if not 0 < rate <= 1:
            raise ValueError(f"masking.rate must lie above 0 and not above 1 (got {rate})")
        if not 0 <= mask_token < vocab_size:
            raise ValueError(f"masking.mask_token must lie between 0 and {vocab_size - 1} (got {mask_token})")
        self.rate, self.mask_token, self.vocab_size = rate, mask_token, vocab_size

    def __call__(self, ids: Tensor, targets: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Hide tokens of `ids`: the ids with some of them replaced, and the targets with `IGNORED` at all others.

        Positions whose target is `IGNORED` are never chosen. Random numbers are drawn on the CPU.
        """
        draws = torch.rand(2, *ids.shape, generator=generator).to(ids.device)
        noise = torch.randint(self.vocab_size, ids.shape, generator=generator).to(ids.device)
        chosen = (draws[0] < self.rate) & (targets != IGNORED)
        hidden = torch.where(chosen & (draws[1] < 0.8), self.mask_token, ids)
        hidden = torch.where(chosen & (draws[1] >= 0.9), noise, hidden)
        return hidden, torch.where(chosen, targets, IGNORED)


class LanguageModelling(Task):
    """Cross entropy of logits `[B, T, V]` with targets `[B, T]`, of which those of -100 do not count.

    The data says what is to be guessed: with targets one step later than the ids, the next token. With `masking`,
    the targets are the ids themselves and some of them are hidden. Scores are bits per unit, over all targets that
    count.

    Args:
        unit: what one token is, in the singular; the score is called `bits_per_<unit>`.
        masking: hides tokens of each batch, in training anew each time, in evaluation the same ones for the same batch.
    """

    takes: ClassVar[type] = TokenData

    def __init__(self, unit: str, masking: Masking | None = None) -> None:
        self.unit = unit
        self.bits = f"bits_per_{unit.replace(' ', '_')}"
        super().__init__({self.bits: MeanMetric()})
        self.masking = masking

    def loss(self, model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        if self.masking is not None:
            batch = (*self.masking(batch[0], batch[1]), *batch[2:])
        return nats(model, batch) / (batch[1] != IGNORED).sum().clamp(min=1)

    def score(self, model: nn.Module, batch: Sequence[Tensor]) -> int:
        """Update the score; returns the number of targets that counted."""
        batch = self.hidden(batch)
        count = int((batch[1] != IGNORED).sum())
        if count:
            self.count(self.bits, nats(model, batch) / (count * math.log(2)), count)
        return count

    def hidden(self, batch: Sequence[Any]) -> Sequence[Any]:
        """The batch as it is scored: with `masking`, the same tokens of it hidden each time."""
        if self.masking is None:
            return batch
        generator = torch.Generator().manual_seed(int(batch[0].sum()) % 2**63)
        return (*self.masking(batch[0], batch[1], generator), *batch[2:])

    def report(
        self, model: nn.Module, data: Any, seen: Sequence[Any], scores: Mapping[str, float], folder: Path, split: str
    ) -> list[str]:
        named = f"{self.unit}s"
        return [f"{split} bits per {self.unit} {scores[self.bits]:.4f} on {sum(seen):,} {named}"]


def nats(model: nn.Module, batch: Sequence[Any], reduction: str = "sum") -> Tensor:
    """Cross entropy of a batch, summed or, with the reduction `none`, of each position in one row: 0 where ignored.

    A model with a `loss` of its own, as `SequenceModel` has, computes it without the logits of all positions at once.
    """
    loss = getattr(model, "loss", None)
    if callable(loss):
        losses: Tensor = loss(batch[0], batch[1], ignore_index=IGNORED, reduction="none", **more_of(batch)).flatten()
        return losses.sum() if reduction == "sum" else losses
    logits = apply(model, batch).float()
    return F.cross_entropy(logits.flatten(0, -2), batch[1].flatten(), ignore_index=IGNORED, reduction=reduction)
