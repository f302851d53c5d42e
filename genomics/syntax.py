"""Which tokens may come next in a SMILES, so that every ring, branch and bracket is closed before the text must end.

A finite memory of the text so far (open branches, open rings, what a bracket has) tells the tokens that the grammar
admits, and how many tokens close all that is open. A token is masked where too few would be left after it.

Beyond the grammar, tokens are masked wherever something else is left that exceed the valence of an atom, leave an
aromatic atom without a ring, or end an aromatic system whose double bonds no longer go round. So most texts are
molecules, but not all: atoms in brackets have what charge and hydrogens they are written with.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from sinuous.genomics.smiles_text import NEW_RING, RING_TOKENS, SYMBOL, SYMBOLS, SmilesText

NEAR = 10
"""Tokens that one token and those that it asks for may add to what must still come: further from the end than this, and
what is open, nothing need be counted."""
PATIENCE = 6
"""Steps that a text which should end may go round."""


class SmilesSyntax:
    """Tells `generate(allowed=…)` which tokens of a vocabulary may come next.

    Args:
        tokens: of the vocabulary, in the order of their ids.
        ends: those after which nothing comes, such as `[END]`; where `.` is one, a text is one molecule.

    Raises:
        ValueError: if the vocabulary has no carbon, or no end.
    """

    def __init__(self, tokens: Sequence[str], ends: Collection[str]) -> None:
        self.ids = {token: i for i, token in enumerate(tokens) if token}
        self.ends = [token for token in ends if token in self.ids]
        if "C" not in self.ids or not self.ends:
            raise ValueError(f"a vocabulary of SMILES must have C and one of {list(ends)} (got {list(tokens)[:5]} …)")
        self.size = len(tokens)
        self.tokens = tuple(tokens)
        self.texts: dict[int, tuple[int, SmilesText, int]] = {}
        self.choices: dict[tuple[Any, ...], list[str]] = {}
        self.masks: dict[tuple[str, ...], Tensor] = {}

    def __call__(self, row: int, ids: Sequence[int], left: int, logits: Tensor | None = None) -> Tensor:
        """Mark the tokens that may come next, bool `[V]`.

        Args:
            row: of the batch; a row's text is followed from call to call.
            ids: its tokens so far.
            left: tokens that may still come.
            logits: `[V]`. Where an end would be the most probable token, but something is open, only tokens are marked
                that bring the end nearer.
        """
        read, text, waited = self.texts.get(row, (0, SmilesText(), 0))
        for i in ids[read:]:
            text.take(self.tokens[i])
        at_end = logits is not None and not text.complete() and self.tokens[int(logits.argmax())] in self.ends
        choices = self._choices(text, left, PATIENCE - waited if at_end else None)
        self.texts[row] = len(ids), text, waited + at_end
        key = (*choices, *text.rings) if NEW_RING in choices else tuple(choices)
        if key not in self.masks:
            self.masks[key] = self._mask(choices, text)
        return self.masks[key]

    def restart(self) -> None:
        """Forget all texts, for a new batch."""
        self.texts.clear()

    def _choices(self, text: SmilesText, left: int, patience: int | None) -> Sequence[str]:
        """What the grammar admits within the limit, and of this what is sound, where anything is.

        At an end (`patience` is told), only what brings it nearer, or, while there is patience, goes a step round so as
        to stay sound.
        """
        rooms = [left]
        if patience is not None:
            rooms = [min(left, text.cost() + more) for more in ((0, 2) if patience > 0 else (0,))]
        fitting = [self._fitting(text, room) for room in rooms]
        sound = next(filter(None, map(text.kekulizable, fitting)), None) or next(filter(None, fitting), None)
        return sound or self._legal(text, rooms[0]) or self._legal(text, left)

    def _fitting(self, text: SmilesText, left: int) -> list[str]:
        if text.most() + NEAR > left:
            return [token for token in self._legal(text, left) if text.fits(token)]
        situation = text.situation()
        if situation not in self.choices:
            self.choices[situation] = [token for token in self._legal(text, left) if text.fits(token)]
        return self.choices[situation]

    def _legal(self, text: SmilesText, left: int) -> list[str]:
        ends = self.ends if text.complete() else []
        legal = [token for token in text.legal() if token in self.ids or token in (NEW_RING, SYMBOL)]
        if text.most() + NEAR > left:
            legal = [token for token in legal if text.cost_with(token) < left]
        return [token for token in legal if token not in ends] + ends

    def _mask(self, choices: Sequence[str], text: SmilesText) -> Tensor:
        mask = torch.zeros(self.size, dtype=torch.bool)
        for choice in choices:
            meant: Sequence[str] = (choice,)
            if choice == SYMBOL:
                meant = SYMBOLS
            elif choice == NEW_RING:
                meant = [ring for ring in RING_TOKENS if ring not in text.rings]
            mask[[self.ids[token] for token in meant if token in self.ids]] = True
        return mask
