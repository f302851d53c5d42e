"""Labelled pictures as the codes that a tokenizer gives them."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sinuous.core.modes import evaluating
from sinuous.vision.datasets import LabelledImages

_BATCH = 250


class PictureCodes(LabelledImages):
    """Codes of the pictures of a collection: `(codes [T - 1], codes [T], {"class_labels": class})`, row by row.

    A picture is tokenized once, when its split is first read; of a training picture its mirror image is, too, and one
    of the two is drawn at each visit.

    Args:
        tokenizer: as `load_vq_tokenizer` takes it; read when a picture is first tokenized.
        vocab_size: number of codes of the tokenizer.
        num_tokens: T, codes of a picture.
        **pictures: of `LabelledImages`; transforms are to give what the tokenizer reads, without augmentation.
    """

    noun = "pictures"
    unit = "code"

    def __init__(
        self,
        *,
        tokenizer: str | os.PathLike[str],
        vocab_size: int,
        num_tokens: int,
        eval_transform: Any,
        **pictures: Any,
    ) -> None:
        pictures.pop("train_transform", None)
        super().__init__(train_transform=eval_transform, eval_transform=eval_transform, **pictures)
        self.path, self.vocab_size, self.num_tokens = tokenizer, vocab_size, num_tokens
        self.length = num_tokens

    @functools.cached_property
    def tokenizer(self) -> Any:
        """diffusers' `VQModel`.

        Raises:
            ValueError: if there is none, or it has another number of codes.
        """
        from sinuous.vision.generation.tokenizers import load_vq_tokenizer

        tokenizer = load_vq_tokenizer(self.path)
        codes = tokenizer.config.num_vq_embeddings
        if codes != self.vocab_size:
            raise ValueError(
                f"the tokenizer has {codes} codes and the model predicts {self.vocab_size}; give "
                f"data.vocab_size={codes}"
            )
        return tokenizer

    def split(self, name: str) -> Any:
        pictures = self.pictures(name)
        mirrored = name == "train" and self.augment
        return CodedPictures(*self._codes_of(pictures, mirrored), pictures.classes)

    def pictures(self, name: str) -> Any:
        """The pictures themselves, `(picture [C, H, W], class)`."""
        return super().split(name)

    def example(self) -> Tensor:
        return torch.zeros(1, self.num_tokens - 1, dtype=torch.long)

    def model_options(self) -> dict[str, Any]:
        return {"vocab_size": self.vocab_size, "num_tokens": self.num_tokens, "num_classes": self.num_classes}

    @torch.no_grad()
    def _codes_of(self, pictures: Any, mirrored: bool) -> tuple[Tensor, Tensor]:
        """Codes `[N, 1 or 2, T]` and classes `[N]`."""
        codes, labels = [], []
        with evaluating(self.tokenizer):
            for batch, of_batch in DataLoader(pictures, _BATCH):
                both = torch.cat([batch, batch.flip(-1)]) if mirrored else batch
                tokens = self.tokenizer.quantize(self.tokenizer.encode(both).latents)[2][2]
                codes.append(tokens.view(-1, len(batch), tokens.numel() // len(both)).transpose(0, 1))
                labels.append(of_batch)
        made = torch.cat(codes)
        if made.shape[-1] != self.num_tokens:
            raise ValueError(
                f"the tokenizer gives a picture {made.shape[-1]} codes and the model predicts {self.num_tokens}; give "
                f"data.num_tokens={made.shape[-1]}"
            )
        return made, torch.cat(labels)


class CodedPictures(Dataset[Any]):
    """Codes `[N, versions, T]` with classes `[N]`; one of the versions is drawn where there are several."""

    def __init__(self, codes: Tensor, labels: Tensor, classes: list[str]) -> None:
        self.codes, self.labels, self.classes = codes, labels, classes

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        versions = self.codes[index]
        codes = versions[torch.randint(len(versions), ()) if len(versions) > 1 else 0]
        return codes[:-1], codes, {"class_labels": self.labels[index]}
