"""What a model reads in sequences: features of letters, probabilities of the next one, and scores of whole texts.

    embed(model, texts)                        features of each letter
    position_probabilities(model, texts)       p(letter at t | letters before t), the specials at 0
    score(model, texts)                        mean or sum of log p(text_t | text_<t)

Texts of any lengths are packed, so that nothing is padded and no text meets another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sinuous.core import norms
from sinuous.core.checks import check_choice, described
from sinuous.core.modes import evaluating

PACKED = 16_384
"""Letters that are read together."""

Progress = Callable[[int, int], None]
"""Called with how many texts have been read, of how many."""


@torch.no_grad()
def embed(model: nn.Module, texts: Sequence[str]) -> list[Tensor]:
    """Features of each letter, `[T, D]` for each text, on the CPU: what `model.forward_features` gives for it alone.

    Models that were trained to continue sequences read the token that starts a sequence first, as in training; it has
    no features of its own here. Features of a model with shared strands are the first strand's, then the second's with
    its channels reversed.

    Args:
        model: any with a tokenizer.
        texts: of letters that it knows.

    Raises:
        ValueError: if the model has no tokenizer, or a text is none or has other letters.
    """
    tokenizer = tokenizer_of(model)
    rows = encode_all(tokenizer, texts)
    start = [tokenizer.start] if _continues(model) and tokenizer.start is not None else []
    rows = [torch.cat([row.new_tensor(start), row]) for row in rows]
    features: Any = model.forward_features
    return [row[len(start) :].cpu() for row in read_packed(model, features, rows)]


@torch.no_grad()
def position_probabilities(model: nn.Module, texts: Sequence[str]) -> list[Tensor]:
    """Probabilities of the letter at each place, given the letters before it, `[T, V]` for each text, on the CPU.

    Row t has read the token that starts a sequence and the first t letters. Tokens that are no letters, and letters
    that no score counts (N), have probability 0, and the others 1 together.

    Args:
        model: a causal one with a head for tokens.
        texts: of letters that it knows.

    Raises:
        ValueError: if the model is no such one, or a text is none or has other letters.
    """
    rows = encode_all(check_continues(model), texts)
    return [log_p.exp().cpu() for log_p in log_probabilities(model, rows)]


def score(model: nn.Module, texts: Sequence[str], reduce: str = "mean") -> Tensor:
    """Logarithms of the probabilities of the letters of each text, `[texts]`, on the CPU in fp64.

    They are those of `position_probabilities` at the letters that are there; N does not count.

    Args:
        model: a causal one with a head for tokens.
        texts: of letters that it knows.
        reduce: `"mean"` over the letters, or their `"sum"`: log p of the text.

    Raises:
        ValueError: if the model is no such one, a text is none or has other letters, or there is no letter to take a
            mean of.
    """
    check_choice("reduce", reduce, ("mean", "sum"))
    rows = encode_all(check_continues(model), texts)
    letters = score_rows(model, rows)
    if reduce == "sum":
        return torch.stack([row.sum() for row in letters]) if letters else torch.zeros(0, dtype=torch.float64)
    for i, row in enumerate(letters):
        if not len(row):
            raise ValueError(
                f"text {i + 1} has no letter that counts (got {described(texts[i])}); leave it out, or give "
                "reduce='sum'"
            )
    return torch.stack([row.mean() for row in letters]) if letters else torch.zeros(0, dtype=torch.float64)


@torch.no_grad()
def score_rows(model: Any, rows: Sequence[Tensor], progress: Progress | None = None) -> list[Tensor]:
    """Logarithms of the probabilities of the letters that count, one after another, of each row of ids, fp64 on the
    CPU."""
    ignored = model.tokenizer.ignored
    scores = []
    for row, log_p in zip(rows, log_probabilities(model, rows, progress), strict=True):
        letters = log_p.double().gather(1, row[:, None].to(log_p.device)).squeeze(1).cpu()
        scores.append(letters if ignored is None else letters[row != ignored])
    return scores


def log_probabilities(model: Any, rows: Sequence[Tensor], progress: Progress | None = None) -> Iterator[Tensor]:
    """Yield log p of the letters at each place of each row of ids, `[T, V]`, in at least fp32."""
    start = rows[0].new_tensor([model.tokenizer.start]) if rows else None
    before = [torch.cat([start, row[:-1]]) if start is not None and len(row) else row for row in rows]
    for logits in read_packed(model, model, before, progress, _long_logits(model)):
        yield letter_log_softmax(logits[:, : model.vocab_size], model.tokenizer)


def _long_logits(model: Any) -> Callable[[Tensor], Tensor]:
    """Call for one long sequence `[1, T]` of a causal model: in parts, with the state carried."""

    def read(ids: Tensor) -> Tensor:
        parts, state = [], None
        for part in ids.split(PACKED, 1):
            logits, state = model.prefill(part, state)
            parts.append(logits)
        return torch.cat(parts, 1)

    return read


def letter_log_softmax(logits: Tensor, tokenizer: Any) -> Tensor:
    """Log-softmax over the letters that count, -inf at all other tokens, in at least fp32."""
    counted = torch.zeros(logits.shape[-1], dtype=torch.bool)
    counted[tokenizer.letters] = True
    if tokenizer.ignored is not None:
        counted[tokenizer.ignored] = False
    return norms.at_least_fp32(logits).masked_fill(~counted.to(logits.device), -torch.inf).log_softmax(-1)


def read_packed(
    model: nn.Module,
    call: Callable[[Tensor, Tensor], Tensor],
    rows: Sequence[Tensor],
    progress: Progress | None = None,
    long: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Tensor]:
    """Yield what a call gives for each row of ids `[T]`, `[T, …]`; as many rows as make `PACKED` letters go together.

    Args:
        model: put into evaluation mode for the calls.
        call: takes ids `[1, ΣT]` and `cu_seqlens`.
        rows: ids.
        progress: told of the rows that were read.
        long: takes ids `[1, T]` of a row of more letters; `call` if absent.
    """
    device = next(model.parameters()).device
    done = 0
    while done < len(rows):
        total = 0
        group: list[Tensor] = []
        for row in rows[done:]:
            if group and total + len(row) > PACKED:
                break
            # A row without letters reads a letter, of which nothing is returned.
            group.append(row if len(row) else row.new_zeros(1))
            total += len(group[-1])
        ids = torch.cat(group)[None].to(device)
        lengths = [len(row) for row in group]
        with evaluating(model):
            if long is not None and total > PACKED:
                output = long(ids)[0]
            else:
                output = call(ids, torch.tensor([0, *lengths], device=device).cumsum(0))[0]
        for row, part in zip(rows[done : done + len(group)], output.split(lengths), strict=True):
            yield part[: len(row)]
        done += len(group)
        if progress is not None:
            progress(done, len(rows))


def encode_all(tokenizer: Any, texts: Sequence[str], noun: str = "text") -> list[Tensor]:
    """Ids of each text.

    Raises:
        ValueError: if `texts` are no list of texts, or a text has a letter that the tokenizer lacks.
    """
    if isinstance(texts, str | bytes) or not isinstance(texts, Sequence):
        raise ValueError(f"{noun}s must be a list of texts (got {described(texts)}); give a list, of one if need be")
    return [tokenizer.encode(text, name=f"{noun} {i + 1}") for i, text in enumerate(texts)]


def tokenizer_of(model: Any) -> Any:
    """The tokenizer of a model.

    Raises:
        ValueError: if it has none.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None or not hasattr(model, "forward_features"):
        raise ValueError(
            f"model must be a model of letters with its tokenizer (got {described(model)}); where the vocabulary is "
            "another one, set model.tokenizer"
        )
    return tokenizer


def check_continues(model: Any) -> Any:
    """The tokenizer of a causal model of tokens.

    Raises:
        ValueError: if the model looks ahead, or has a head of classes.
    """
    tokenizer = tokenizer_of(model)
    kind = type(model).__name__
    if not getattr(model, "causal", False):
        raise ValueError(
            f"model must be causal to give a letter's probability after those before it (got a {kind} that sees both "
            "sides); use one with direction='causal' and strands='single', or embed"
        )
    if not _continues(model):
        raise ValueError(f"model must have a head for letters (got a {kind} with classes); build it with head='lm'")
    return tokenizer


def _continues(model: Any) -> bool:
    return bool(getattr(model, "causal", False)) and getattr(model, "head_kind", "lm") == "lm"
