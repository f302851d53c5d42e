"""A SMILES that is being written, token by token: what is open, what may follow, and how far it is to an end.

Source of the grammar: OpenSMILES (opensmiles.org), and RDKit's (Code/GraphMol/SmilesParse/smiles.yy).
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

from sinuous.genomics.kekule import has_double_bonds
from sinuous.genomics.molecule_letters import AROMATIC, ELEMENTS, RINGS

VALENCES = {"B": 3, "C": 4, "N": 3, "O": 2, "P": 5, "S": 6, "F": 1, "Cl": 1, "Br": 1, "I": 1, "*": 9}
"""Bonds that atoms without brackets may have."""
NEIGHBOURS = {"c": 3, "n": 3, "o": 2, "s": 2, "p": 3, "b": 3}
"""Bonds of aromatic atoms, of whichever order."""
PI: dict[str, bool | None] = {"c": True, "n": None, "o": False, "s": False, "p": None, "b": False}
"""Whether an aromatic atom without brackets needs a double bond: a carbon does that has none outside the system, a
nitrogen with two neighbours."""
FREE = 9
"""Bonds of atoms in brackets whose valence is not known here."""
ORDERS = {"": 1, "-": 1, "/": 1, "\\": 1, "=": 2, "#": 3}
DIGITS = tuple("0123456789")
NEW_RING, SYMBOL = "new ring", "symbol"
"""What `legal` says for all numbers of rings that are not open, and for all elements."""
OUTSIDE = (*VALENCES, *NEIGHBOURS)
BONDS = tuple(bond for bond in ORDERS if bond)
RING_TOKENS = (*DIGITS[1:], "0", *RINGS)
SYMBOLS = (*ELEMENTS, *AROMATIC, "*")
BRACKET = {"[": 2, SYMBOL: 1, "@": 1, "@@": 1, "H": 1, "hydrogens": 1, "charge": 1, "charged": 1, ":": 2, "map": 1}
"""Places in a bracket, and the tokens that close it from there."""


class SmilesText:
    """A SMILES that is being written: what is open, and to which atom the next one is bound.

    Attributes:
        kind: of the last token: `"start"`, `"atom"`, `"bond"`, `"ring"`, `"open"`, `"close"`, `"dot"`, or a place in a
            bracket.
        atom: number of the atom to which the next is bound, -1 for none.
        free: for each atom, the bonds that it may still have.
        lower, ringed: for each atom, whether it is aromatic, and whether a ring begins or ends there.
        pi: for each atom, whether it needs a double bond in an aromatic system; None where its neighbours will tell.
        branches: atoms at which open branches begin.
        rings: for each open ring, its first atom and the bond written there.
        bonded: pairs of atoms.
        links: those that may be bound by an aromatic bond.
    """

    def __init__(self) -> None:
        self.kind = "start"
        self.atom = -1
        self.free: list[int] = []
        self.lower: list[bool] = []
        self.ringed: list[bool] = []
        self.pi: list[bool | None] = []
        self.links: list[tuple[int, int]] = []
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
        kinds = (self.free, self.lower, self.ringed, self.pi)
        atom = () if self.atom < 0 else tuple(kind[self.atom] for kind in kinds)
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
            self._add(VALENCES.get(token) or NEIGHBOURS[token], token in NEIGHBOURS, PI.get(token))
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

    def _add(self, valence: int, aromatic: bool, pi: bool | None) -> None:
        self.free.append(valence)
        self.lower.append(aromatic)
        self.ringed.append(False)
        self.pi.append(pi)
        added = len(self.free) - 1
        if self.atom >= 0:
            self._bind(self.atom, added, self.bond, may_be_aromatic=bool(self.rings))
            self._use(self.atom, ORDERS[self.bond])
            self._use(added, ORDERS[self.bond])
        self.atom, self.kind, self.bond = added, "atom", ""

    def _bind(self, first: int, second: int, bond: str, may_be_aromatic: bool = True) -> None:
        """Note a bond; one that was written where no ring was open is in none."""
        self.bonded.add(_pair(first, second))
        if self.lower[first] and self.lower[second] and may_be_aromatic and not bond:
            self.links.append((first, second))

    def _use(self, atom: int, order: int) -> None:
        self.free[atom] -= 1 if self.lower[atom] else order
        if order == 2:
            self.pi[atom] = False  # bound by it outside the system

    def _ring(self, ring: str) -> None:
        self.ringed[self.atom] = True
        if ring in self.rings:
            first, bond = self.rings.pop(ring)
            self._bind(first, self.atom, bond or self.bond)
            self._use(self.atom, ORDERS[bond or self.bond])
        else:
            self.rings[ring] = self.atom, self.bond
            self._use(self.atom, ORDERS[self.bond])
        self.kind, self.bond = "ring", ""

    def _take_in_bracket(self, token: str) -> None:
        kind = self.kind
        if token == "]":
            self._add(*_bracketed(self.symbol, self.hydrogens, self.charge))
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
        return self._after(token).cost()

    def _after(self, token: str) -> SmilesText:
        after = copy(self)
        after.free, after.lower, after.ringed = list(self.free), list(self.lower), list(self.ringed)
        after.branches, after.rings, after.bonded = list(self.branches), dict(self.rings), set(self.bonded)
        after.pi, after.links = list(self.pi), list(self.links)
        after.take(token)
        return after

    # ------------------------------------------------------------------------------------------------------- valence

    def fits(self, token: str) -> bool:
        """Whether a legal token keeps to the valences, and aromatic atoms to rings."""
        if self.kind in BRACKET:
            return self._fits_in_bracket(token)
        if self.atom < 0:
            return True
        free, aromatic = self.free[self.atom], self.lower[self.atom]
        ring = token == NEW_RING or token in self.rings
        if aromatic and self.kind == "atom" and not self.rings and not self.ringed[self.atom]:
            return ring
        if token == ")":
            return not self.rings or any(self.free[first] > 0 for first in self.branches)
        if token not in (*OUTSIDE, *BONDS, "(", "[") and not ring:
            return True
        if ring:
            order = ORDERS[self.bond or (self.rings[token][1] if token in self.rings else "")]
            goes_on = free > order or (len(self.rings) == 1 and token in self.rings)
            return free >= order and (goes_on or any(self.free[first] > 0 for first in self.branches))
        if token in BONDS:
            if aromatic and ORDERS[token] > 1:
                return free >= 1 and token == "=" and self.pi[self.atom] is True
            return free >= ORDERS[token]
        if self.kind != "bond" and free < 1:
            return False
        if token in ("(", "["):
            return True
        order = ORDERS[self.bond]
        valence = VALENCES.get(token) or NEIGHBOURS[token]
        goes_on = valence > order or not self.rings or any(self.free[atom] > 0 for atom in self.branches)
        return valence >= order and goes_on and (order == 1 or token in ("c", *VALENCES))

    def _fits_in_bracket(self, token: str) -> bool:
        """Whether what is written of an atom leaves it the bonds that it needs: to the atom before it, and two in a
        ring if it is aromatic, or one to go on by where a ring is open."""
        if token not in ("]", "H", "-", ":") or not self.symbol:
            return True
        free, aromatic, _ = _bracketed(self.symbol, self.hydrogens or token == "H", self.charge or -(token == "-"))
        order = ORDERS[self.bond] if self.atom >= 0 else 0
        if aromatic:
            return free >= min(order, 1) + (1 if self.rings and self.atom >= 0 else 2)
        goes_on = not self.rings or any(self.free[first] > 0 for first in self.branches)
        return free >= order + (not goes_on)

    # --------------------------------------------------------------------------------------------- aromatic systems

    def kekulizable(self, choices: Sequence[str]) -> Sequence[str]:
        """Those of the choices that leave each aromatic atom its ring, and a double bond where it must have one."""
        if self.kind in BRACKET or self.atom < 0:
            return choices
        aromatic = self.lower[self.atom]
        closing = [token for token in choices if token in self.rings and self.lower[self.rings[token][0]]]
        if not aromatic and not closing:
            return choices
        starts = {self.atom}
        told: dict[str, bool] = {}

        def holds(kind: str) -> bool:
            if kind not in told:
                told[kind] = self._after(kind)._is_kekulizable(starts)
            return told[kind]

        def keeps(token: str) -> bool:
            if token in closing:
                return self._after(token)._is_kekulizable({self.atom, self.rings[token][0]})
            if not aromatic or token == NEW_RING or token in self.rings or token == "=":
                return True
            if token in OUTSIDE:
                return holds("C" if token in VALENCES else "o" if PI[token] is False else "c")
            if token == "[":
                return holds("C") or holds("c") or holds("o")
            if token in BONDS:  # of a ring, perhaps, which leaves the atom open
                return bool(self.rings) or holds("C")
            if token == "(":
                inside = self._after("(")
                return any(inside._after(kind)._is_kekulizable(starts) for kind in ("C", "c", "="))
            return holds(")") if token == ")" else self._is_kekulizable(starts, ended=True)

        return [token for token in choices if keeps(token)]

    def _is_kekulizable(self, starts: set[int], ended: bool = False) -> bool:
        """Whether the aromatic systems of some atoms, and of the last one, go round and can have double bonds."""
        links: dict[int, list[int]] = {}
        for first, second in self.links:
            links.setdefault(first, []).append(second)
            links.setdefault(second, []).append(first)
        system = {*starts, self.atom}
        reached = list(system)
        while reached:
            for other in links.get(reached.pop(), ()):
                if other not in system:
                    system.add(other)
                    reached.append(other)
        firsts = [first for first, _ in self.rings.values()]
        going_on = set() if ended else {self.atom, *self.branches}
        must, may = [], []
        for atom in system:
            if not self.lower[atom]:
                continue
            open_end = atom in going_on and self.free[atom] > 0
            if not open_end and len(links.get(atom, ())) + firsts.count(atom) < 2:
                return False
            if self.pi[atom] is False:
                continue
            if atom in firsts or open_end:
                may.append(atom)
            elif self.pi[atom] or self.free[atom] > 0:
                must.append(atom)
        return has_double_bonds(must, may, links)


def _pair(first: int, second: int) -> tuple[int, int]:
    return (first, second) if first < second else (second, first)


def _bracketed(symbol: str, hydrogens: int, charge: int) -> tuple[int, bool, bool | None]:
    """Bonds that an atom in brackets may have beside its hydrogens, whether it is aromatic, and whether it then needs a
    double bond."""
    if symbol == "n":
        pi = True if charge > 0 else False if charge or hydrogens else None
        return (3 if charge >= 0 else 2) - hydrogens, True, pi
    if symbol in AROMATIC:
        return NEIGHBOURS.get(symbol, 2) - hydrogens, True, PI.get(symbol, False) if not charge else None
    if symbol in ("N", "O", "P", "S") and charge > 0:
        return {"N": 4, "O": 3, "P": 4, "S": 3}[symbol] - hydrogens, False, None
    if symbol in ("O", "S", "N") and charge < 0:
        return VALENCES["O" if symbol == "S" else symbol] + charge - hydrogens, False, None
    if symbol in ("C", "B", "N", "O", "F", "Cl", "Br", "P", "S") and not charge:
        return VALENCES[symbol] - hydrogens, False, None
    return FREE, False, None
