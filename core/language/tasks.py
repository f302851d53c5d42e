"""Modelling of bytes: the shared task of language modelling, with a sample of what the model writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn

from sinuous.core.generation import Sampling, generate
from sinuous.core.sequence_model import SequenceModel
from sinuous.core.tasks.language_modelling import LanguageModelling


class ByteModelling(LanguageModelling):
    """Trains a causal model of bytes on the next one; a tested model writes a sample.

    Args:
        sample_bytes: how many bytes the model writes, to be looked at.
        prompt: the text that it goes on from.
        **options: of `LanguageModelling`.

    Raises:
        ValueError: if `sample_bytes` is negative, or a sample has no prompt.
    """

    def __init__(self, sample_bytes: int = 400, prompt: str = "Chapter", **options: Any) -> None:
        super().__init__(**options)
        if sample_bytes < 0 or (sample_bytes and not prompt):
            raise ValueError(
                f"a sample of task.sample_bytes={sample_bytes} bytes goes on from task.prompt={prompt!r}; give a "
                "prompt, and 0 bytes for no sample"
            )
        self.sample_bytes, self.prompt = sample_bytes, prompt

    def report(
        self, model: nn.Module, data: Any, seen: Sequence[Any], scores: Mapping[str, float], folder: Path, split: str
    ) -> list[str]:
        line, *others = super().report(model, data, seen, scores, folder, split)
        lines = [f"{line}, after at most {data.length - 1:,} others", *others]
        if self.sample_bytes:
            lines.append(f"sample: {self.write(model, folder / 'sample.txt')}")
        return lines

    def write(self, model: nn.Module, path: Path) -> Path:
        """Let the model go on from the prompt; the text lands in `path`."""
        sampling = Sampling(temperature=0.8, max_new_tokens=self.sample_bytes, seed=0)
        written = generate(cast("SequenceModel", model), self.prompt.encode(), sampling)
        path.write_bytes(self.prompt.encode() + bytes(written.tokens[0].tolist()) + b"\n")
        return path
