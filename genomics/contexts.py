"""Proteins behind others: a context is read once, and each of many sequences goes on from its state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sinuous.core.ragged import run_ragged, select_rows
from sinuous.genomics.reading import encode_all
from sinuous.genomics.spans import cut

CHUNK = 2048
"""Letters that are read at a time."""
ROWS = 16
"""Sequences that are read together."""

Placed = tuple[Tensor, Tensor]
"""Ids `[T]` and their positions `[T]`."""


def started(row: Tensor, tokenizer: Any) -> Placed:
    """Ids with the token that starts a sequence in front, and positions from 0."""
    if hasattr(tokenizer, "span_masks"):
        return cut(row, [], tokenizer)
    return torch.cat([row.new_tensor([tokenizer.start]), row]), torch.arange(len(row) + 1)


def read_context(model: Any, context: Sequence[str]) -> Any:
    """State of a causal model behind some sequences, one after another; None without any.

    Raises:
        ValueError: if they are no list of texts, or one has a letter that the model does not know.
    """
    placed = [started(row, model.tokenizer) for row in encode_all(model.tokenizer, context, "context")]
    return read_on(model, torch.cat([torch.stack(pair) for pair in placed], 1), None)[1] if placed else None


def read_on(model: Any, placed: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Read ids and positions, `[2, T]`, in chunks; logits of the last, `[V]`, and the state behind it."""
    device = next(model.parameters()).device
    for ids, places in placed.to(device)[:, None].split(CHUNK, 2):
        logits, state = model.prefill(ids, state, last_only=True, position_ids=places)
    return logits[0, -1, : model.vocab_size], state


def continue_from(model: Any, state: Any, rows: Sequence[Placed], last_only: bool = False) -> Iterator[Tensor]:
    """Yield logits of each of some sequences that follow one state, `[T, V]`, or `[1, V]` of the last letter alone.

    Args:
        model: a causal one.
        state: of `read_context`.
        rows: sequences with their positions; with `last_only` of one length.
        last_only: compute the last letter's logits alone.
    """
    device = next(model.parameters()).device

    def read(x: Tensor, before: Any) -> tuple[Tensor, Any]:
        logits, after = model.prefill(x[..., 0], before, last_only=last_only, position_ids=x[..., 1])
        return logits[..., : model.vocab_size], after

    for start in range(0, len(rows), ROWS):
        group = [torch.stack(pair, -1) for pair in rows[start : start + ROWS]]
        x = nn.utils.rnn.pad_sequence(group, batch_first=True).to(device)
        before = None if state is None else select_rows(state, [0] * len(group))
        stages, _ = run_ragged(read, x, [len(row) for row in group], before)
        for i in range(len(group)):
            yield torch.cat([stage.output[stage.rows.index(i)] for stage in stages if i in stage.rows])
