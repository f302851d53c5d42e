"""Double bonds of aromatic systems: whether they can be told at all, also while a system is being written."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence


def has_double_bonds(must: Collection[int], may: Collection[int], links: Mapping[int, Sequence[int]]) -> bool:
    """Whether each atom of `must` can have one double bond, to a neighbour that has no other.

    A matching that covers `must`, found by trying the atom with the fewest neighbours left first.

    Args:
        must: atoms that have a double bond within the system.
        may: atoms that may have one, or not.
        links: neighbours of each atom within the system.
    """
    return _covered(set(must), {*must, *may}, links)


def _covered(uncovered: set[int], single: set[int], links: Mapping[int, Sequence[int]]) -> bool:
    if not uncovered:
        return True
    partners = {atom: [other for other in links.get(atom, ()) if other in single] for atom in uncovered}
    atom = min(uncovered, key=lambda atom: len(partners[atom]))
    return any(_covered(uncovered - {atom, other}, single - {atom, other}, links) for other in partners[atom])
