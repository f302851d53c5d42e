"""Tasks of pictures as codes: a tokenizer that learns its codebook, and a model that draws the codes of a class."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric

from sinuous.core.checks import check_positive, check_range, check_sizes
from sinuous.core.data import Data
from sinuous.core.tasks.language_modelling import LanguageModelling
from sinuous.core.tasks.task import Task


class Tokenizing(Task):
    r"""Trains diffusers' `VQModel` on pictures `[B, C, h, w]` from -1 to 1.

        z = encoder(x);   q = the nearest code to each vector of z;   x̂ = decoder(q)
        loss = mean |x̂ - x| + mean (x̂ - x)² + w (‖z - sg q‖² + β ‖sg z - q‖²)        gradients of q go to z

    The last term is diffusers', whose β of 0.25 is on the codebook. Codebooks of small models are known to collapse
    onto a few codes. A code that no vector of the last `patience` batches was nearest to therefore begins anew, at a
    vector that the encoder has just made; so the codebook also finds its scale in the first batches.

    Source: van den Oord et al. (arXiv 1711.00937), equation 3; Dhariwal et al. (2005.00341), section 3.1, for the new
    beginnings.

    Args:
        commitment: w.
        patience: batches.
        columns: pictures of the sheet that `report` writes, above what is made of their codes.

    Scores are the mean absolute difference of pixels from 0 to 1, `error`, and the loss of it that training has.

    Raises:
        ValueError: if a number is out of its range.
    """

    takes: ClassVar[type] = Data

    def __init__(self, commitment: float = 1.0, patience: int = 50, columns: int = 16) -> None:
        super().__init__({"loss": MeanMetric(), "error": MeanMetric()})
        check_positive(**{"task.commitment": commitment})
        check_sizes(**{"task.patience": patience, "task.columns": columns})
        self.commitment, self.patience, self.columns = commitment, patience, columns

    def prepare(self, model: nn.Module) -> None:
        codes = cast("Any", model).quantize.embedding.num_embeddings
        self.register_buffer("idle", torch.full((codes,), self.patience))

    def loss(self, model: nn.Module, batch: Sequence[Any]) -> Tensor:
        latents = cast("Any", model).encode(batch[0]).latents
        self._renew(cast("Any", model).quantize.embedding.weight, latents)
        loss, _, codes = self._terms(model, batch[0], latents)
        idle = cast("Tensor", self.idle)
        idle += 1
        idle[codes] = 0
        return loss

    def score(self, model: nn.Module, batch: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Update the scores; returns the codes `[B, T]`, and the first pictures with what is made of theirs."""
        pictures = batch[0]
        loss, made, codes = self._terms(model, pictures, cast("Any", model).encode(pictures).latents)
        self.count("loss", loss, len(pictures))
        self.count("error", (made.clamp(-1, 1) - pictures).abs().mean() / 2, len(pictures))
        return codes.view(len(pictures), -1), pictures[: self.columns], made[: self.columns]

    def report(
        self, model: nn.Module, data: Any, seen: Sequence[Any], scores: Mapping[str, float], folder: Path, split: str
    ) -> list[str]:
        from sinuous.vision.generation.drawing import save_rows

        codes = torch.cat([codes.flatten() for codes, _, _ in seen])
        shares = torch.bincount(codes, minlength=len(cast("Tensor", self.idle))).double() / len(codes)
        cast("Any", model).save_pretrained(folder / "tokenizer")
        sheet = folder / f"samples_{split}.png"
        save_rows((torch.cat(seen[0][1:]) / 2 + 0.5).clamp(0, 1), sheet, len(seen[0][1]))
        return [
            f"{split} error {scores['error']:.4f} of pixels from 0 to 1, loss {scores['loss']:.4f}",
            f"{int((shares > 0).sum())} of {len(shares)} codes in use, as many as {_perplexity(shares):.0f} equal ones",
            f"pictures and what is made of their codes in {sheet}, the tokenizer in {folder / 'tokenizer'}",
        ]

    def _terms(self, model: nn.Module, pictures: Tensor, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, what is made of the codes, and the codes."""
        quantized, commitment, (_, _, codes) = cast("Any", model).quantize(latents)
        made: Tensor = cast("Any", model).decode(quantized, force_not_quantize=True).sample
        loss = F.l1_loss(made, pictures) + F.mse_loss(made, pictures) + self.commitment * commitment
        return loss, made, codes

    @torch.no_grad()
    def _renew(self, codebook: Tensor, latents: Tensor) -> None:
        """Move codes that nothing has used for long to vectors of `latents` `[B, D, h, w]`, drawn at random."""
        idle = cast("Tensor", self.idle)
        unused = (idle >= self.patience).nonzero().flatten()
        vectors = latents.permute(0, 2, 3, 1).flatten(0, 2)
        chosen = torch.randperm(len(vectors))[: len(unused)].to(vectors.device)
        unused = unused[: len(chosen)]
        codebook[unused] = vectors[chosen].to(codebook.dtype)
        idle[unused] = 0


def _perplexity(shares: Tensor) -> float:
    return float(torch.special.entr(shares).sum().exp())


class CodeModelling(LanguageModelling):
    """Trains `AiM` on the codes of pictures, and leaves an `AiMPipeline` and a sheet of what it draws.

    Batches are `(codes [B, T - 1], codes [B, T], {"class_labels": [B]})`. The sheet, `samples_SPLIT.png`, has a row for
    each class; picture i of a row is drawn from seed + i. With a judge more are drawn, of the classes in turn,
    and `picture_scores.json` holds what `sinuous.vision.generation.scores` finds of them beside those of the split.

    Args:
        unit: as of `LanguageModelling`.
        class_dropout: probability with which a picture loses its class in training, so that guidance can be used.
        rows: of the sheet, a class each.
        columns: of the sheet.
        guidance_scale: of each picture, which the pipeline has as its default, too.
        temperature: likewise.
        top_k: likewise; absent for all codes.
        top_p: likewise; absent for all codes.
        seed: of the first column, and of the first picture that is scored.
        judge: name of a classifier of the data, by which pictures are scored; None scores none.
        pictures: that are scored.

    Raises:
        ValueError: if a number is out of its range.
    """

    def __init__(
        self,
        unit: str,
        class_dropout: float = 0.1,
        rows: int = 10,
        columns: int = 10,
        guidance_scale: float = 1.5,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        judge: str | None = None,
        pictures: int = 1000,
    ) -> None:
        super().__init__(unit)
        check_range(0, 1, **{"task.class_dropout": class_dropout})
        check_sizes(**{"task.rows": rows, "task.columns": columns, "task.pictures": pictures})
        self.class_dropout, self.rows, self.columns, self.seed = class_dropout, rows, columns, seed
        self.judge, self.pictures = judge, pictures
        options = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        self.drawing = {name: value for name, value in options.items() if value is not None}

    def loss(self, model: nn.Module, batch: Sequence[Any]) -> Tensor:
        codes, targets, conditions = batch
        labels = conditions["class_labels"]
        dropped = torch.rand(len(labels)).to(labels.device) < self.class_dropout
        labels = torch.where(dropped, cast("Any", model).num_classes, labels)
        batch = codes, targets, {**conditions, "class_labels": labels}
        return super().loss(model, cast("Any", batch))

    def report(
        self, model: nn.Module, data: Any, seen: Sequence[Any], scores: Mapping[str, float], folder: Path, split: str
    ) -> list[str]:
        from sinuous.vision.generation.aim_pipeline import AiMPipeline
        from sinuous.vision.generation.drawing import draw, save_rows

        lines = super().report(model, data, seen, scores, folder, split)
        names = dict(enumerate(data.classes))
        pipeline = AiMPipeline(model, data.tokenizer, id2label=names, defaults=self.drawing)
        pipeline.save_pretrained(folder / "pipeline")
        rows = min(self.rows, len(names))
        labels = [label for label in range(rows) for _ in range(self.columns)]
        pictures = draw(pipeline, labels, [self.seed + column for _ in range(rows) for column in range(self.columns)])
        sheet = folder / f"samples_{split}.png"
        save_rows(pictures, sheet, self.columns)
        lines.append(f"{len(pictures)} pictures of {rows} classes in {sheet}, the pipeline in {folder / 'pipeline'}")
        if self.judge is not None:
            lines.append(
                score_drawn(pipeline, data.pictures(split), self.judge, self.pictures, self.seed, folder, split)
            )
        return lines


def score_drawn(pipeline: Any, real: Dataset[Any], judge: str, count: int, seed: int, folder: Path, split: str) -> str:
    """A line on scores of pictures of all classes in turn, which go into `folder`. The run is over: where there can be
    none, the line says why."""
    from sinuous.vision.generation.drawing import draw
    from sinuous.vision.generation.scores import score

    labels = torch.arange(count) % len(pipeline.config.id2label)
    made = 2 * draw(pipeline, labels.tolist(), range(seed, seed + count)) - 1
    known = torch.cat([pictures for pictures, _ in DataLoader(real, 250)])
    try:
        values = score(made, labels, real=known, judge=judge)
    except ValueError as error:
        return f"{split} pictures are not scored: {error}"
    (folder / "picture_scores.json").write_text(json.dumps({split: values}, indent=2) + "\n")
    told = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    return f"{split} {count} pictures beside {len(known):,} real ones: {told}"
