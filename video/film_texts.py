"""Rows of text and frames for Video-Ma2mba, from lessons."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from sinuous.core.checks import check_sizes
from sinuous.core.data import check_split
from sinuous.video.lessons import FilmLessons, Part
from sinuous.video.text_tokens import END_OF_TEXT, IGNORED, Script, Tokens, load_tokens


class FilmTexts:
    """Lessons as a model reads them: batches `(ids [B, T], targets [B, T], {"frames": uint8 [B, N, 3, H, W]})`.

    Targets are the next tokens where they are learned, else -100. Behind the shorter rows of a batch stand ends of
    text that are not learned; a causal model's other tokens do not see them.

    Args:
        lessons: `lessons(split, num_frames=…, img_size=…, length=…)` makes a split, see `sinuous.video.lessons`.
        length: the most tokens of a row; those behind are left out.
        num_frames, img_size: of a film, and its frames.
        tokens_per_frame: as the model has.
        vocab_size: as the model has; the id behind the vocabulary stands for frames.
        tokenizer_file: a `tokenizer.json`; bytes, if absent.
        end_of_text: its token behind a text.
        lengths: number of lessons of splits.
        root: a folder of yours in the place of `lessons`, see `FilmLessons`.
        fps: given to `FilmLessons`. Films then have different numbers of frames, and batches one film each.

    Raises:
        ValueError: if a size is less than 1, or the tokenizer is for another vocabulary.
        FileNotFoundError: if there is no such tokenizer.
    """

    noun = "films"

    def __init__(
        self,
        lessons: Callable[..., Any],
        *,
        length: int,
        num_frames: int,
        img_size: int,
        tokens_per_frame: int,
        vocab_size: int = 256,
        tokenizer_file: str | os.PathLike[str] | None = None,
        end_of_text: str = END_OF_TEXT,
        lengths: Mapping[str, int] | None = None,
        root: str | os.PathLike[str] | None = None,
        fps: float | None = None,
    ) -> None:
        sizes = {"length": length, "num_frames": num_frames, "img_size": img_size, "tokens_per_frame": tokens_per_frame}
        check_sizes(**sizes)
        self.length, self.num_frames, self.img_size, self.tokens_per_frame = sizes.values()
        self.vocab_size, self.lengths = vocab_size, dict(lengths or {})
        self.tokens: Tokens = load_tokens(tokenizer_file, vocab_size, end_of_text)
        self.unit = self.tokens.unit
        self.lessons, self.root, self.fps = lessons, root, fps

    def split(self, name: str) -> Dataset[tuple[Tensor, Tensor, Tensor]]:
        options: dict[str, Any] = {"num_frames": self.num_frames, "img_size": self.img_size}
        options["length"] = self.lengths.get(check_split(name))
        if self.root is None:
            return _Rows(self, self.lessons(name, **options))
        return _Rows(self, FilmLessons(name, root=self.root, fps=self.fps, **options))

    def row(self, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
        """Ids and targets `[T]` of a lesson.

        Raises:
            ValueError: if its frames alone have more tokens than a row, or nothing of it is learned.
        """
        script = Script(self.tokens, self.vocab_size, self.tokens_per_frame)
        speak: dict[str, Callable[[Any], None]] = {
            "watch": script.watch,
            "read": script.read,
            "ask": script.ask,
            "say": script.say,
            "say on": lambda text: script.say(text, ends=False),
        }
        for kind, value in parts:
            speak[kind](value)
        ids, targets = script.pair()
        if bool((ids[self.length :] == self.vocab_size).any()) or bool((targets[: self.length] == IGNORED).all()):
            raise ValueError(
                f"data.length={self.length} must be enough for the frames of a film and what is learned of it (got a "
                f"row of {len(ids)} tokens); give more, or fewer frames"
            )
        return ids[: self.length], targets[: self.length]

    def collate(self, rows: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        ids, targets, frames = zip(*rows, strict=True)
        if len(counts := sorted({len(film) for film in frames})) > 1:
            raise ValueError(
                f"films of a batch must have the same number of frames (got {counts[0]} and {counts[-1]}); give "
                "data.batch_size=1 and data.eval_batch_size=1"
            )
        pad = nn.utils.rnn.pad_sequence
        padded = pad(list(ids), True, self.tokens.end), pad(list(targets), True, IGNORED)
        return *padded, {"frames": torch.stack(frames)}

    def example(self) -> Tensor:
        return torch.full((1, self.length), self.tokens.end)

    def facts(self) -> dict[str, Any]:
        sizes = {"img_size": self.img_size, "tokens_per_frame": self.tokens_per_frame}
        return {"unit": self.unit, "vocab_size": self.vocab_size, **sizes}

    def model_options(self) -> dict[str, Any]:
        return {"img_size": self.img_size, "vocab_size": self.vocab_size}


class _Rows(Dataset[tuple[Tensor, Tensor, Tensor]]):
    def __init__(self, data: FilmTexts, lessons: Any) -> None:
        self.data, self.lessons = data, lessons

    def __len__(self) -> int:
        return len(self.lessons)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        frames, parts = self.lessons[index]
        return *self.data.row(parts), frames.contiguous()
