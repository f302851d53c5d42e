"""Language modelling: the next byte, in bits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric

from sinuous.apps.data_module import ByteText, Splits
from sinuous.apps.tasks.task import Task
from sinuous.core.generation import Sampling, generate
from sinuous.core.sequence_model import SequenceModel


class LanguageModelling(Task):
    """Trains a causal model `bytes [B, T] -> logits [B, T, V]` on the next byte.

    Args:
        model: a sequence model of 256 tokens.
        sample_bytes: how many bytes of its own a tested model writes, to be looked at.
        prompt: what it goes on from.
        **options: of `Task`.

    Raises:
        ValueError: if `sample_bytes` is negative, or a sample has no prompt.
    """

    takes: ClassVar[type[Splits]] = ByteText

    def __init__(self, model: nn.Module, *, sample_bytes: int = 400, prompt: str = "Chapter", **options: Any) -> None:
        super().__init__(model, **options)
        if sample_bytes < 0 or (sample_bytes and not prompt):
            raise ValueError(
                f"a sample of task.sample_bytes={sample_bytes} bytes goes on from task.prompt={prompt!r}; give a "
                "prompt, and 0 bytes for no sample"
            )
        self.sample_bytes, self.prompt = sample_bytes, prompt
        self.bits = MeanMetric()
        self.scored = 0

    def _nats(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        given, following = batch
        logits = model(given).float()
        return F.cross_entropy(logits.flatten(0, 1), following.flatten())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self._nats(self.model, batch)
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._score("val", batch)

    def on_test_start(self) -> None:
        self.scored = 0

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._score("test", batch)
        self.scored += batch[1].numel() * self.trainer.world_size

    def _score(self, split: str, batch: tuple[Tensor, Tensor]) -> None:
        self.bits(self._nats(self.evaluated, batch) / math.log(2), batch[1].numel())
        self.log(f"{split}/bits_per_byte", self.bits, on_step=False, on_epoch=True, prog_bar=True)

    def report(self, data: ByteText, folder: Path, split: str, title: str) -> list[str]:
        bits = float(self.trainer.callback_metrics["test/bits_per_byte"])
        lines = [f"{split} bits per byte {bits:.4f} on {self.scored:,} bytes, after at most {data.length - 1:,} others"]
        if self.sample_bytes:
            lines.append(f"sample: {self.write(folder / 'sample.txt')}")
        return lines

    def write(self, path: Path) -> Path:
        """Let the model go on from the prompt; the text lands in `path`."""
        sampling = Sampling(temperature=0.8, max_new_tokens=self.sample_bytes, seed=0)
        written = generate(cast("SequenceModel", self.evaluated), self.prompt.encode(), sampling)
        path.write_bytes(self.prompt.encode() + bytes(written.tokens[0].tolist()) + b"\n")
        return path
