"""Fill in the middle: spans cut out of a protein and set behind it, so that a causal model reads both sides of a gap.

    MKTAYIAKQR  without 2:4 and 7:8   →   <cls> M K <mask-1> Y I A <mask-2> Q R <eos> <mask-1> T A <mask-2> K
    position ids                          0     1 2 3        5 6 7 8        9 10 0   3        3 4 8        8

Positions are those of the whole protein, `<cls>` being 0: a mask stands, in both places, at its span's first residue,
and `<eos>` at 0. A protein without spans stays as it is, and has no `<eos>`.

Source: Schmidinger et al., "Bio-xLSTM" (arXiv 2411.04165), section 3 and ml-jku/Prot-xLSTM, after ProtMamba
(Sgarbossa et al., bioRxiv 2024.05.24.595730).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sinuous.core.checks import described, is_whole

MOST = 5
"""Spans of one protein: the vocabulary has `<mask-1>` to `<mask-5>`."""
LAST_POSITION = 2047
"""Positions beyond it are read as this one, as in the published models."""
LONGEST_SHARE = 0.2
"""Drawn spans are shorter than this share of the way to the next span's start."""

Spans = Sequence[tuple[int, int]]
"""First residue and the one behind the last, from 0."""


class Marks(NamedTuple):
    """Ids that are no residues: in front of a protein, between it and its spans, and in the place of each span."""

    start: int
    end: int
    masks: tuple[int, ...]


def marks_of(tokenizer: Any) -> Marks:
    """Ids of `<cls>`, `<eos>` and `<mask-1>` to `<mask-5>`.

    Raises:
        ValueError: if the tokenizer lacks them.
    """
    if not hasattr(tokenizer, "span_masks"):
        raise ValueError(
            f"spans are cut where the vocabulary has <cls>, <eos> and <mask-1> to <mask-{MOST}> "
            f"(got {described(tokenizer)}); use a ProteinTokenizer"
        )
    return Marks(tokenizer.start, tokenizer.end, tuple(tokenizer.span_masks.tolist()))


def cut(ids: Tensor, spans: Spans, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Cut spans out of a protein and set them behind it.

    Args:
        ids: residues of one protein, `[T]`, as `encode` gives them: without `<cls>`.
        spans: at most five, not overlapping, in any order.
        tokenizer: of proteins.

    Returns:
        `<cls>`, the residues with a mask for each span, and behind `<eos>` each mask again with its span, int64
        `[T + 1]` without spans, else `[T + 2 + 2 · spans]`; and the position ids of these tokens.

    Raises:
        ValueError: if a span is empty, outside or overlaps another, there are more than five, or `ids` have tokens that
            mark something else.
    """
    marks = marks_of(tokenizer)
    ordered = check_spans(spans, len(ids))
    if len(ordered) > MOST:
        raise ValueError(f"spans must be at most {MOST} (got {len(ordered)}); fill_spans takes more, in rounds")
    strangers = torch.isin(ids, ids.new_tensor([marks.start, marks.end, *marks.masks]))
    if strangers.any():
        place = int(strangers.nonzero()[0])
        raise ValueError(
            f"ids must be residues of one protein (got {int(ids[place])} at {place}); give what encode returns"
        )
    places = torch.arange(1, len(ids) + 1, device=ids.device).clamp(max=LAST_POSITION)
    body, behind = [(marks.start, 0)], [(marks.end, 0)] if ordered else []
    residues = list(zip(ids.tolist(), places.tolist(), strict=True))
    done = 0
    for mask, (first, stop) in zip(marks.masks, ordered, strict=False):
        sign = (mask, residues[first][1])
        body += [*residues[done:first], sign]
        behind += [sign, *residues[first:stop]]
        done = stop
    tokens = torch.tensor(body + residues[done:] + behind, dtype=torch.long, device=ids.device)
    return tokens[:, 0], tokens[:, 1]


def join(ids: Tensor, tokenizer: Any) -> Tensor:
    """Put the spans of a cut protein back: the inverse of `cut`.

    Args:
        ids: of one protein, with or without `<cls>` in front, `[T]`.
        tokenizer: of proteins.

    Returns:
        Its residues.

    Raises:
        ValueError: if a mask has no span behind the protein, or a span no mask in it.
    """
    marks = marks_of(tokenizer)
    tokens = ids.tolist()
    tokens = tokens[1:] if tokens[:1] == [marks.start] else tokens
    end = tokens.index(marks.end) if marks.end in tokens else len(tokens)
    spans: dict[int, list[int]] = {}
    span: list[int] | None = None
    for token in tokens[end + 1 :]:
        if token in marks.masks and token not in spans:
            span = spans[token] = []
        elif span is None or token in (marks.start, marks.end, *marks.masks):
            raise ValueError(f"behind <eos> there must be each mask once, then its span (got {tokens[end + 1 :]})")
        else:
            span.append(token)
    masked = [token for token in tokens[:end] if token in marks.masks]
    if sorted(masked) != sorted(spans):
        raise ValueError(f"each mask must have a span behind <eos> (got masks {masked}, and spans of {list(spans)})")
    residues = [residue for token in tokens[:end] for residue in spans.get(token, [token])]
    return torch.tensor(residues, dtype=ids.dtype, device=ids.device)


def draw(length: int, generator: torch.Generator | None = None) -> list[tuple[int, int]]:
    """Draw spans of a protein for training: Poisson(1) of them but at most five, from starts chosen evenly, and each
    shorter than a fifth of the way to the next start, or of one residue.

    Args:
        length: number of residues.
        generator: torch's global one if absent.
    """
    count = length + MOST
    while count > min(length, MOST):
        count = int(torch.poisson(torch.ones(()), generator=generator))
    starts = sorted(torch.randperm(length, generator=generator)[:count].tolist())
    spans = []
    for start, following in zip(starts, [*starts[1:], length], strict=False):
        stop = max(int(LONGEST_SHARE * (following - start)), 2)
        spans.append((start, start + int(torch.randint(1, stop, (), generator=generator))))
    return spans


def check_spans(spans: Spans, length: int) -> list[tuple[int, int]]:
    """Sort spans, and refuse those that are empty, outside a sequence of `length` residues, or overlap.

    Raises:
        ValueError: naming the span.
    """
    try:
        pairs = [(first, stop) for first, stop in spans]
    except (TypeError, ValueError):
        raise ValueError(f"spans must be pairs of residues, as [(10, 20)] (got {described(spans)})") from None
    for first, stop in pairs:
        if not (is_whole(first) and is_whole(stop) and 0 <= first < stop <= length):
            raise ValueError(
                f"a span must have a first residue and, above it, the one behind the last, from 0 to {length} "
                f"(got {first!r}-{stop!r}); a sequence of {length} residues is 0-{length} as a whole"
            )
    ordered = sorted((int(first), int(stop)) for first, stop in pairs)
    for (first, stop), (following, after) in itertools.pairwise(ordered):
        if following < stop:
            raise ValueError(f"spans must not overlap (got {first}-{stop} and {following}-{after}); join the two")
    return ordered
