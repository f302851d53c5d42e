"""Gaps of a protein filled by a model that reads both their sides, and other proteins before it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from sinuous.core.checks import described, is_whole
from sinuous.core.generation import Sampling, generate
from sinuous.core.sequence_model import SequenceModel
from sinuous.genomics import spans as fim
from sinuous.genomics.contexts import started
from sinuous.genomics.reading import check_continues, encode_all


def fill_spans(
    model: nn.Module,
    sequence: str,
    spans: fim.Spans,
    context: Sequence[str] = (),
    sampling: Sampling | None = None,
) -> str:
    """Write a protein anew with other residues in its spans, each as long as before.

    The residues in the spans are not read. Five spans are filled together, from the first on, each after those before
    it; more are filled in rounds of five, in which the spans of later rounds are read as X, an unknown residue.

    Args:
        model: a causal one of proteins, trained to fill in the middle.
        sequence: letters of a protein, without gaps; those in spans may be any, X for instance.
        spans: first residue, counted from 0, and the one behind the last; not overlapping, in any order.
        context: proteins that are read first, such as homologs.
        sampling: how residues are chosen among the twenty; the most probable each time if absent. What it says of
            lengths and stops has no meaning here.

    Returns:
        The whole protein, in upper case.

    Raises:
        ValueError: if the model is another one, a span is empty, outside or overlaps another, or a letter is unknown.
    """
    tokenizer = check_continues(model)
    fim.marks_of(tokenizer)
    ids = _without_gaps(tokenizer, sequence)
    ordered = fim.check_spans(spans, len(ids))
    chosen = _sampling(sampling)
    before = [started(row, tokenizer) for row in encode_all(tokenizer, context, "context")]
    for first, stop in ordered:
        ids[first:stop] = tokenizer.encode("X")
    for number in range(0, len(ordered), fim.MOST):
        now = ordered[number : number + fim.MOST]
        # Another round draws other numbers.
        seed = None if chosen.seed is None else cast("int", chosen.seed) + number
        _fill(model, ids, now, before, dataclasses.replace(chosen, seed=seed))
    filled: str = tokenizer.decode(ids)
    return filled


def _fill(
    model: Any, ids: Tensor, spans: list[tuple[int, int]], before: list[tuple[Tensor, Tensor]], sampling: Sampling
) -> None:
    """Fill at most five spans of a protein, in place: the model goes on from `<eos>`, each mask being a must."""
    tokenizer = model.tokenizer
    cut, positions = fim.cut(ids, spans, tokenizer)
    end = len(cut) - sum(1 + stop - first for first, stop in spans)
    prompt = torch.cat([*(row for row, _ in before), cut[:end]])
    places = torch.cat([*(row for _, row in before), positions])
    behind = cut[end:]
    natural = torch.zeros(model.vocab_size, dtype=torch.bool)
    natural[tokenizer.natural] = True
    is_mask = torch.isin(behind, tokenizer.span_masks)

    def allowed(row: int, tokens: Sequence[int], left: int, logits: Tensor) -> Tensor:
        if not is_mask[len(tokens)]:
            return natural
        return torch.arange(model.vocab_size) == behind[len(tokens)]

    sampling = dataclasses.replace(sampling, max_new_tokens=len(behind))
    (new,) = generate(cast("SequenceModel", model), [prompt], sampling, position_ids=[places], allowed=allowed).tokens
    residues = new[~is_mask].split([stop - first for first, stop in spans])
    for (first, stop), span in zip(spans, residues, strict=True):
        ids[first:stop] = span


def _without_gaps(tokenizer: Any, sequence: str) -> Tensor:
    if not isinstance(sequence, str):
        raise ValueError(f"sequence must be the letters of a protein (got {described(sequence)})")
    text = sequence.removesuffix("*")
    ids: Tensor = tokenizer.encode(text, name="sequence")
    if len(ids) != len(text):
        raise ValueError(
            f"sequence must have no gaps, since spans count its letters (got {len(text) - len(ids)} of - and .); "
            "leave them out, and write X for residues that are to be filled"
        )
    return ids


def _sampling(sampling: Sampling | None) -> Sampling:
    """Rules of choice for one protein, without those of lengths and stops."""
    sampling = Sampling() if sampling is None else sampling
    if not isinstance(sampling, Sampling):
        raise ValueError(f"sampling must be a Sampling (got {described(sampling)}); give Sampling(temperature=0.8)")
    if not (sampling.seed is None or is_whole(sampling.seed)):
        raise ValueError(f"sampling.seed must be one number for one protein (got {described(sampling.seed)})")
    return dataclasses.replace(sampling, max_length=None, stop_tokens=(), stop_sequences=())
