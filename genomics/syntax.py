"""Which tokens may come next in a SMILES, so that every ring, branch and bracket is closed before the text must end.

A finite memory of the text so far (open branches, open rings, what a bracket has) tells the tokens that the grammar
admits, and how many tokens close all that is open. A token is masked where too few would be left after it.

Beyond the grammar, bonds that exceed the valence of an atom, and aromatic atoms outside a ring, are masked wherever
something else is left. Aromatic systems are not checked: a text of the grammar may still fail RDKit's sanitization.

Source of the grammar: OpenSMILES (opensmiles.org), and RDKit's (Code/GraphMol/SmilesParse/smiles.yy).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from sinuous.genomics.molecule_letters import AROMATIC, ELEMENTS, RINGS

VALENCES = {"B": 3, "C": 4, "N": 3, "O": 2, "P": 5, "S": 6, "F": 1, "Cl": 1, "Br": 1, "I": 1, "*": 9}
"""Bonds that atoms without brackets may have."""
NEIGHBOURS = {"c": 3, "n": 3, "o": 2, "s": 2, "p": 3, "b": 3}
"""Bonds of aromatic atoms, of whichever order."""
FREE = 9
"""Bonds of atoms in brackets whose valence is not known here."""
ORDERS = {"": 1, "-": 1, "/": 1, "\\": 1, "=": 2, "#": 3}
DIGITS = tuple("0123456789")
NEAR = 10
"""Tokens that one token and those that it asks for may add to what must still come: further from the end than this, and
what is open, nothing need be counted."""


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
        self.texts: dict[int, tuple[int, SmilesText]] = {}
        self.masks: dict[tuple[Any, ...], Tensor] = {}

    def __call__(self, row: int, ids: Sequence[int], left: int) -> Tensor:
        """Mark the tokens that may come next, bool `[V]`.

        Args:
            row: of the batch; a row's text is followed from call to call.
            ids: its tokens so far.
            left: tokens that may still come.
        """
        read, text = self.texts.get(row, (0, SmilesText()))
        for i in ids[read:]:
            text.take(self.tokens[i])
        self.texts[row] = len(ids), text
        if text.most() + NEAR > left:
            return self._mask(self._choices(text, left), text)
        situation = text.situation()
        if situation not in self.masks:
            self.masks[situation] = self._mask(self._choices(text, left), text)
        return self.masks[situation]

    def restart(self) -> None:
        """Forget all texts, for a new batch."""
        self.texts.clear()

    def _choices(self, text: SmilesText, left: int) -> list[str]:
        legal = [token for token in text.legal() if token in self.ids or token in (NEW_RING, SYMBOL)]
        ends = self.ends if text.complete() else []
        if text.most() + NEAR > left:
            legal = [token for token in legal if text.cost_with(token) < left]
        legal = [token for token in legal if token not in ends]
        fitting = [token for token in legal if text.fits(token)] + [token for token in ends if text.fits(token)]
        return fitting or legal + ends

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


class SmilesText:
    """A SMILES that is being written: what is open, and to which atom the next one is bound.

    Attributes:
        kind: of the last token: `"start"`, `"atom"`, `"bond"`, `"ring"`, `"open"`, `"close"`, `"dot"`, or a place in a
            bracket.
        atom: number of the atom to which the next is bound, -1 for none.
        free: for each atom, the bonds that it may still have.
        branches: atoms at which open branches begin.
        rings: for each open ring, its first atom and the bond written there.
        bonded: pairs of atoms.
    """

    def __init__(self) -> None:
        self.kind = "start"
        self.atom = -1
        self.free: list[int] = []
        self.lower: list[bool] = []
        self.ringed: list[bool] = []
        self.branches: list[int] = []
        self.rings: dict[str, tuple[int, str]] = {}
        self.bonded: set[tuple[int, int]] = set()
        self.bond = ""
        self.bond_after = ""
        self.symbol, self.hydrogens, self.charge, self.digits = "", 0, 0, 0

    # ------------------------------------------------------------------------------------------------- the grammar

    def legal(self) -> Sequence[str]:
        """Tokens that the grammar admits next, ends left out."""
        if self.kind in BRACKET:
            return self._in_bracket()
        atoms = (*OUTSIDE, "[")
        if self.kind in ("start", "dot"):
            return atoms
        if self.kind == "open":
            return (*atoms, *BONDS)
        if self.kind == "bond":
            return (*atoms, *self._ring_tokens()) if self.bond_after in ("atom", "ring") else atoms
        tokens = [*atoms, *BONDS, "("]
        if self.branches:
            tokens.append(")")
        elif not self.rings:
            tokens.append(".")
        return tokens if self.kind == "close" else [*tokens, *self._ring_tokens()]

    def complete(self) -> bool:
        """Whether the text may end here."""
        return self.kind in ("atom", "ring", "close") and not self.branches and not self.rings

    def _ring_tokens(self) -> list[str]:
        if ORDERS[self.bond] > 2:
            return []
        return [NEW_RING, *(ring for ring in self.rings if self._closes(ring))]

    def _closes(self, ring: str) -> bool:
        first, bond = self.rings[ring]
        differ = bond and self.bond and bond != self.bond
        return first != self.atom and _pair(first, self.atom) not in self.bonded and not differ

    def _in_bracket(self) -> Sequence[str]:
        closing = ("]", ":")
        if self.kind == "[":
            return (SYMBOL, *DIGITS[self.digits == 0 :]) if self.digits < 3 else (SYMBOL,)
        if self.kind == SYMBOL:
            return ("@", "H", "+", "-", *closing) if self.symbol != "H" else ("+", "-", *closing)
        if self.kind == "@":
            return ("@", "H", "+", "-", *closing)
        if self.kind == "@@":
            return ("H", "+", "-", *closing)
        if self.kind == "H":
            return ("1", "2", "3", "4", "+", "-", *closing)
        if self.kind == "hydrogens":
            return ("+", "-", *closing)
        if self.kind == "charge":
            return ("1", "2", "3", "4", *closing)
        if self.kind == "charged":
            return closing
        if self.kind == ":":
            return DIGITS[1:]
        return (*DIGITS, "]") if self.digits < 3 else ("]",)

    def situation(self) -> tuple[Any, ...]:
        """All that `legal`, `complete` and `fits` look at."""
        if self.kind in BRACKET:
            return self.kind, self.digits, self.symbol == "H"
        rings = tuple((ring, bond, self._closes(ring)) for ring, (_, bond) in self.rings.items())
        atom = () if self.atom < 0 else (self.free[self.atom], self.lower[self.atom], self.ringed[self.atom])
        goes_on = any(self.free[first] > 0 for first in self.branches)
        return self.kind, self.bond, self.bond_after, bool(self.branches), goes_on, atom, rings

    # ------------------------------------------------------------------------------------------------ what it becomes

    def take(self, token: str) -> None:
        """Go on by a token that is legal."""
        if self.kind in BRACKET:
            self._take_in_bracket(token)
        elif token == "[":
            self.kind, self.symbol, self.hydrogens, self.charge, self.digits = "[", "", 0, 0, 0
        elif token in VALENCES or token in NEIGHBOURS:
            self._add(VALENCES.get(token) or NEIGHBOURS[token], token in NEIGHBOURS)
        elif token in BONDS:
            self.bond_after, self.kind, self.bond = self.kind, "bond", token
        elif token == "(":
            self.branches.append(self.atom)
            self.kind = "open"
        elif token == ")":
            self.atom = self.branches.pop() if self.branches else self.atom
            self.kind = "close"
        elif token == ".":
            self.kind, self.atom = "dot", -1
        elif token in RING_TOKENS or token == NEW_RING:
            self._ring(token)

    def _add(self, valence: int, aromatic: bool) -> None:
        self.free.append(valence)
        self.lower.append(aromatic)
        self.ringed.append(False)
        added = len(self.free) - 1
        if self.atom >= 0:
            self._bind(self.atom, added, ORDERS[self.bond])
        self.atom, self.kind, self.bond = added, "atom", ""

    def _bind(self, first: int, second: int, order: int) -> None:
        self.bonded.add(_pair(first, second))
        for atom in (first, second):
            self._use(atom, order)

    def _use(self, atom: int, order: int) -> None:
        self.free[atom] -= 1 if self.lower[atom] else order

    def _ring(self, ring: str) -> None:
        self.ringed[self.atom] = True
        if ring in self.rings:
            first, bond = self.rings.pop(ring)
            self.bonded.add(_pair(first, self.atom))
            self._use(self.atom, ORDERS[bond or self.bond])
        else:
            self.rings[ring] = self.atom, self.bond
            self._use(self.atom, ORDERS[self.bond])
        self.kind, self.bond = "ring", ""

    def _take_in_bracket(self, token: str) -> None:
        kind = self.kind
        if token == "]":
            self._add(_valence(self.symbol, self.hydrogens, self.charge), self.symbol in AROMATIC)
        elif kind == "[" and token not in DIGITS:
            self.symbol, self.kind = token, SYMBOL
        elif token == "@":
            self.kind = "@@" if kind == "@" else "@"
        elif token == "H":
            self.hydrogens, self.kind = 1, "H"
        elif token in ("+", "-"):
            self.charge, self.kind = (1 if token == "+" else -1), "charge"
        elif token == ":":
            self.kind, self.digits = ":", 0
        elif kind == "H":
            self.hydrogens, self.kind = int(token), "hydrogens"
        elif kind == "charge":
            self.charge, self.kind = self.charge * int(token), "charged"
        else:  # a digit of the isotope or of the map
            self.digits += 1
            self.kind = "[" if kind == "[" else "map"

    # ---------------------------------------------------------------------------------------------- how far to an end

    def cost(self) -> int:
        """Tokens that close all that is open: branches by `)`, each ring by its number at an atom that may have it."""
        atom, cost = self.atom, len(self.branches)
        can_close = self.kind in ("atom", "ring")
        if self.kind in BRACKET:
            cost += BRACKET[self.kind]
            can_close = True
        elif self.kind in ("start", "dot", "open", "bond"):
            cost += 1
            can_close = True
        if not self.rings:
            return cost
        if self.kind in BRACKET or self.kind in ("start", "dot", "open", "bond"):
            firsts = [first for first, _ in self.rings.values()]  # closed at an atom that is bound to `atom` alone
            rest = 2 * len(firsts)
            return cost + (rest - 1 if any(first != atom for first in firsts) else rest)
        firsts = [first for first, _ in self.rings.values()]
        closable = [first for first in firsts if first != atom and _pair(first, atom) not in self.bonded]
        if can_close and closable:
            others = list(firsts)
            others.remove(closable[0])
            return cost + 1 + 2 * len(others) + (bool(others) and all(first == atom for first in others))
        return cost + 2 * len(firsts) + all(first == atom for first in firsts)

    def most(self) -> int:
        """A cost that is quickly counted and at least the true one."""
        return len(self.branches) + 2 * len(self.rings) + 4

    def cost_with(self, token: str) -> int:
        """The cost after a token."""
        after = copy(self)
        after.free, after.lower, after.ringed = list(self.free), list(self.lower), list(self.ringed)
        after.branches, after.rings, after.bonded = list(self.branches), dict(self.rings), set(self.bonded)
        after.take(token)
        return after.cost()

    # ------------------------------------------------------------------------------------------------------- valence

    def fits(self, token: str) -> bool:
        """Whether a legal token keeps to the valences, and aromatic atoms to rings."""
        if self.kind in BRACKET or self.atom < 0:
            return True
        free, aromatic = self.free[self.atom], self.lower[self.atom]
        ring = token == NEW_RING or token in self.rings
        if aromatic and self.kind == "atom" and not self.rings and not self.ringed[self.atom]:
            return ring
        if token not in (*OUTSIDE, *BONDS, "(", "[") and not ring:  # a branch or the text ends
            return True
        if ring:
            written = self.rings[token][1] if token in self.rings else ""
            return self.kind == "bond" or free >= ORDERS[written]
        if token in BONDS:
            return free >= (1 if aromatic and ORDERS[token] < 3 else ORDERS[token])
        if self.kind != "bond" and free < 1:
            return False
        if token in ("(", "["):
            return True
        order = ORDERS[self.bond]
        valence = VALENCES.get(token) or NEIGHBOURS[token]
        goes_on = valence > order or not self.rings or any(self.free[atom] > 0 for atom in self.branches)
        return valence >= order and goes_on and (order == 1 or token in ("c", *VALENCES))


def _pair(first: int, second: int) -> tuple[int, int]:
    return (first, second) if first < second else (second, first)


def _valence(symbol: str, hydrogens: int, charge: int) -> int:
    """Bonds that an atom in brackets may have beside its hydrogens."""
    if symbol == "n":
        return (3 if charge >= 0 else 2) - hydrogens
    if symbol in ("N", "O", "P", "S") and charge > 0:
        return {"N": 4, "O": 3, "P": 4, "S": 3}[symbol] - hydrogens
    if symbol in ("O", "S", "N") and charge < 0:
        return VALENCES["O" if symbol == "S" else symbol] + charge - hydrogens
    if symbol in ("C", "B", "N", "O", "F", "Cl", "Br", "P", "S") and not charge:
        return VALENCES[symbol] - hydrogens
    return FREE


NEW_RING, SYMBOL = "new ring", "symbol"
"""What `legal` says for all numbers of rings that are not open, and for all elements."""
OUTSIDE = (*VALENCES, *NEIGHBOURS)
BONDS = tuple(bond for bond in ORDERS if bond)
RING_TOKENS = (*DIGITS[1:], "0", *RINGS)
SYMBOLS = (*ELEMENTS, *AROMATIC, "*")
BRACKET = {"[": 2, SYMBOL: 1, "@": 1, "@@": 1, "H": 1, "hydrogens": 1, "charge": 1, "charged": 1, ":": 2, "map": 1}
"""Places in a bracket, and the tokens that close it from there."""
