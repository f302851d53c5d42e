"""Language modelling: the next byte, in bits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric

from sinuous.apps.data_module import ByteText
from sinuous.apps.tasks.task import Task
from sinuous.core.generation import generate
from sinuous.core.text import BYTES


class LanguageModelling(Task):
    """Trains a causal model `bytes [B, T] -> logits [B, T, V]` on the next byte.

    Args:
        model: a sequence model; it may have more logits than there are bytes.
        sample_bytes: how many bytes of its own a tested model writes, to be looked at.
        prompt: what it goes on from.
        **options: of `Task`.
    """

    def __init__(self, model: nn.Module, *, sample_bytes: int = 400, prompt: str = "Chapter", **options: Any) -> None:
        super().__init__(model, **options)
        self.sample_bytes, self.prompt = sample_bytes, prompt
        self.bits = MeanMetric()

    def _nats(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        given, following = batch
        logits = model(given)[..., :BYTES].float()
        return F.cross_entropy(logits.flatten(0, 1), following.flatten())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self._nats(self.model, batch)
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._score("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._score("test", batch)

    def _score(self, split: str, batch: tuple[Tensor, Tensor]) -> None:
        self.bits(self._nats(self.evaluated, batch) / math.log(2), batch[1].numel())
        self.log(f"{split}/bits_per_byte", self.bits, on_step=False, on_epoch=True, prog_bar=True)

    def report(self, data: ByteText, folder: Path, split: str, title: str) -> list[str]:
        bits = float(self.trainer.callback_metrics["test/bits_per_byte"])
        scored = len(data.split(split)) * data.length
        lines = [f"{split} bits per byte {bits:.4f} on {scored:,} bytes, each seen after at most {data.length - 1:,}"]
        if self.sample_bytes:
            lines.append(f"sample: {self.write(folder / 'sample.txt')}")
        return lines

    def write(self, path: Path) -> Path:
        """Let the model go on from the prompt; the text lands in `path`."""
        prompt = torch.tensor([list(self.prompt.encode())], device=self.device)
        written = generate(self.evaluated.eval(), prompt, max_new_tokens=self.sample_bytes, temperature=0.8, seed=0)
        path.write_bytes(self.prompt.encode() + bytes(b for b in written.tokens[0] if b < BYTES) + b"\n")
        return path
