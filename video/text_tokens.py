"""Tokens of the text around frames: bytes, or those of a tokenizer's file; and how films, questions and answers stand.

    <|user|> frames … question <|endoftext|> <|assistant|> answer <|endoftext|> <|user|> question …

Source: Lee et al. (arXiv 2411.19460), section 3.1, whose model is that of Mamba-2 with the GPT-NeoX tokenizer.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sinuous.core.extras import package

USER, ASSISTANT = "<|user|>", "<|assistant|>"
END_OF_TEXT = "<|endoftext|>"
IGNORED = -100
"""The target of tokens that are not learned."""


class Tokens(Protocol):
    """Ids of a text.

    Attributes:
        size: ids are below it.
        end: the token behind a text.
        unit: what a token is, in the singular.
    """

    size: int
    end: int
    unit: str

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class ByteTokens:
    """A text's bytes in UTF-8; byte 0 ends it."""

    size, end, unit = 256, 0, "byte"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")


class FileTokens:
    """Tokens of a `tokenizer.json`, by the package tokenizers.

    Args:
        path: of the file.
        end_of_text: the token behind a text.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no tokenizer, or has no such token.
        ModuleNotFoundError: if the package is not installed.
    """

    unit = "token"

    def __init__(self, path: str | os.PathLike[str], end_of_text: str = END_OF_TEXT) -> None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no tokenizer {path}; give the path of a tokenizer.json")
        kind: Any = package("tokenizers", "video").Tokenizer
        try:
            self.tokenizer: Any = kind.from_file(os.fspath(path))
        except Exception as error:  # the package raises nothing narrower
            raise ValueError(f"{path} is no tokenizer ({error}); give a tokenizer.json") from error
        end = self.tokenizer.token_to_id(end_of_text)
        if end is None:
            raise ValueError(f"the tokenizer {path} has no token {end_of_text!r}; name its own by end_of_text")
        self.end: int = end
        self.size = 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids))
        return text


def load_tokens(path: str | os.PathLike[str] | None, vocab_size: int, end_of_text: str = END_OF_TEXT) -> Tokens:
    """Tokens of a file, or bytes without one, for a model of `vocab_size` tokens.

    Raises:
        ValueError: as `FileTokens`, or if there are more tokens than the model has: the next one stands for frames.
    """
    tokens: Tokens = ByteTokens() if path is None else FileTokens(path, end_of_text)
    if tokens.size > vocab_size or (path is None and vocab_size != tokens.size):
        what = "without tokenizer_file, text is bytes" if path is None else f"the tokenizer {path}"
        raise ValueError(
            f"{what}, {tokens.size} tokens, and the model has {vocab_size}; give the tokenizer_file that it was "
            "trained with"
        )
    return tokens


class Script:
    """A row of tokens, made part by part, and which of them are learned.

    Args:
        tokens: of the text.
        frame_id: stands for a token of a frame.
        tokens_per_frame: as many as a frame has.
    """

    def __init__(self, tokens: Tokens, frame_id: int, tokens_per_frame: int) -> None:
        self.tokens, self.frame_id, self.tokens_per_frame = tokens, frame_id, tokens_per_frame
        self.ids: list[int] = []
        self.learned: list[bool] = []

    def add(self, ids: Sequence[int], learned: bool = False) -> None:
        self.ids += ids
        self.learned += [learned] * len(ids)

    def watch(self, frames: int) -> None:
        """Frames."""
        self.add([self.frame_id] * (frames * self.tokens_per_frame))

    def read(self, text: str) -> None:
        """A text that is given."""
        self.add(self.tokens.encode(text))

    def ask(self, question: str) -> None:
        """A question, up to where its answer begins."""
        self.read(question)
        self.add([self.tokens.end])
        self.read(ASSISTANT)

    def say(self, text: str, ends: bool = True) -> None:
        """A text that is learned, and the token behind it."""
        self.add([*self.tokens.encode(text), *([self.tokens.end] if ends else [])], learned=True)

    def pair(self) -> tuple[Tensor, Tensor]:
        """Ids `[T]`, and the next ones as targets `[T]` where they are learned, else -100."""
        ids = torch.tensor(self.ids)
        learned = torch.tensor(self.learned)[1:]
        return ids[:-1], ids[1:].where(learned, IGNORED)
