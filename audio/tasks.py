"""Tasks of sound beyond `sinuous.core.tasks`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sinuous.core.tasks.language_modelling import IGNORED, LanguageModelling, nats


class SampleModelling(LanguageModelling):
    """`LanguageModelling` of codes of sound, in bits per sample; what is reported names the codec that they belong to.

    Args:
        unit: as of `LanguageModelling`.
        codes_per_sample: of the codec: bits of a sample are the sum over its codes.
    """

    def __init__(self, unit: str = "sample", codes_per_sample: int = 1) -> None:
        super().__init__(unit)
        self.codes_per_sample = codes_per_sample

    def score(self, model: nn.Module, batch: Sequence[Any]) -> int:
        """Update the score; returns the number of samples that counted."""
        count = int((batch[1] != IGNORED).sum()) // self.codes_per_sample
        if count:
            self.count(self.bits, nats(model, batch) / (count * math.log(2)), count)
        return count

    def report(
        self, model: nn.Module, data: Any, seen: Sequence[Any], scores: Mapping[str, float], folder: Path, split: str
    ) -> list[str]:
        lines = super().report(model, data, seen, scores, folder, split)
        return [*lines, f"codec {data.codec.name}, {data.vocab_size} codes, {data.sample_rate:,} Hz"]
