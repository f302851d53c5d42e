"""Gaps of a protein filled by a model that reads both their sides, and other proteins before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sinuous.core.checks import described
from sinuous.core.sampling import Sampling
from sinuous.genomics import spans as fim
from sinuous.genomics.contexts import read_context, read_on
from sinuous.genomics.reading import check_continues, evaluating


@torch.no_grad()
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
    masks = fim.marks_of(tokenizer).masks
    ids = _without_gaps(tokenizer, sequence)
    ordered = fim.check_spans(spans, len(ids))
    draw = _Draw(sampling or Sampling(), tokenizer)
    for first, stop in ordered:
        ids[first:stop] = tokenizer.encode("X")
    with evaluating(model):
        behind_context = read_context(model, context)
        for number in range(0, len(ordered), fim.MOST):
            spans_now = ordered[number : number + fim.MOST]
            cut, places = fim.cut(ids, spans_now, tokenizer)
            chosen = _continue(model, torch.stack([cut, places]), behind_context, masks, draw)
            for first, stop in spans_now:
                ids[first:stop] = torch.tensor([next(chosen) for _ in range(first, stop)])
    filled: str = tokenizer.decode(ids)
    return filled


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


class _Draw:
    """Residues drawn one after another."""

    def __init__(self, sampling: Sampling, tokenizer: Any) -> None:
        if not isinstance(sampling, Sampling):
            raise ValueError(f"sampling must be a Sampling (got {described(sampling)}); give Sampling(temperature=0.8)")
        seeds = [sampling.seed] if sampling.seed is None or isinstance(sampling.seed, int) else list(sampling.seed)
        if len(seeds) != 1:
            raise ValueError(f"sampling.seed must be one number for one protein (got {len(seeds)})")
        self.sampling, self.natural = sampling, tokenizer.natural
        seed = int(torch.randint(2**62, ())) if seeds[0] is None else seeds[0]
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor, seen: Tensor) -> int:
        """One of the twenty residues, by logits `[V]`, where `seen` have been read."""
        natural = self.natural.to(logits.device)
        uniform = torch.rand(1, generator=self.generator, dtype=torch.float64).to(logits.device)
        read = torch.isin(natural, seen.to(logits.device))[None] if self.sampling.repetition_penalty != 1 else None
        return int(natural[self.sampling.choose(logits[None, natural], uniform, read)])


def _continue(model: Any, placed: Tensor, state: Any, masks: Sequence[int], draw: _Draw) -> Any:
    """Yield residues for the places behind the last `<eos>` of a cut protein, which are not read."""
    tokens, places = placed.clone()
    end = len(tokens) - 1 - tokens.tolist()[::-1].index(model.tokenizer.end)
    logits, state = read_on(model, placed[:, : end + 1], state)
    device = logits.device
    for i in range(end + 1, len(tokens)):
        if int(tokens[i]) not in masks:
            tokens[i] = draw(logits, tokens[:i])
            yield int(tokens[i])
        logits, state = model.step(tokens[i : i + 1].to(device), state, position_ids=places[i : i + 1].to(device))
        logits = logits[0, : model.vocab_size]
