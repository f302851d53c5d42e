"""Numbers by which sets of drawn molecules are compared.

report = molecule_report(sample_molecules(model, 1000), reference=training_molecules)
print(f"{report['valid']:.1%} valid, {report['novel']:.1%} of those that differ are new")
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rich.progress import track

from sinuous.core.checks import described
from sinuous.genomics.molecules import canonical, read_smiles
from sinuous.genomics.packages import package

COMPARED = 5_000
"""Molecules that are compared with one another at most, as their pairs are counted."""
LONG = 20_000
"""Molecules from which on a bar shows how far they are read."""


def molecule_report(smiles: Iterable[str], reference: Iterable[str] = ()) -> dict[str, float]:
    """Describe a set of molecules.

    Args:
        smiles: of the set, for instance as they were drawn.
        reference: molecules that are not new, for instance those of the training. What RDKit does not read among them
            is passed over.

    Returns:
        `valid`: share of all that RDKit parses and sanitizes, and that have atoms.
        `unique`: share of the valid that differ, as canonical SMILES.
        `novel`: share of those that differ which are not in the reference, as canonical SMILES.
        `scaffolds`: number of different Bemis–Murcko scaffolds (rings and what links them) of those that differ;
        molecules without rings have none.
        `diversity`: 1 - the mean Tanimoto similarity over all pairs of those that differ, of Morgan fingerprints
        (radius 2, 2048 bits); of the first 5,000 of them, and 0 if there are fewer than two.

        Shares of nothing are 0. Sources: Polykovskiy et al., "Molecular Sets" (arXiv 1811.12823), whose diversity
        counts each molecule's similarity with itself too; Bemis and Murcko (J. Med. Chem. 39, 1996).

    Raises:
        ValueError: if there are no molecules, or one is no text.
        ModuleNotFoundError: if the extra `genomics` is missing.
    """
    texts = _texts("smiles", smiles)
    if not texts:
        raise ValueError("smiles must be one molecule at least (got none)")
    valid = 0
    different: dict[str, Any] = {}
    for molecule in _molecules(texts, "reading molecules"):
        valid += 1
        different.setdefault(canonical(molecule), molecule)
    known = {canonical(molecule) for molecule in _molecules(_texts("reference", reference), "reading the reference")}
    molecules = list(different.values())
    return {
        "valid": valid / len(texts),
        "unique": len(different) / max(valid, 1),
        "novel": sum(text not in known for text in different) / max(len(different), 1),
        "scaffolds": len({scaffold for molecule in molecules if (scaffold := _scaffold(molecule))}),
        "diversity": _diversity(molecules[:COMPARED]),
    }


def _texts(name: str, smiles: Iterable[str]) -> list[str]:
    if isinstance(smiles, str | bytes) or not isinstance(smiles, Iterable):
        raise ValueError(f"{name} must be a list of SMILES (got {described(smiles)}); put a single one into a list")
    return list(smiles)


def _molecules(texts: list[str], what: str) -> Iterator[Any]:
    for text in track(texts, what, transient=True, disable=len(texts) < LONG):
        molecule = read_smiles(text)
        if molecule is not None:
            yield molecule


def _scaffold(molecule: Any) -> str:
    with package("rdkit.rdBase").BlockLogs():
        return canonical(package("rdkit.Chem.Scaffolds.MurckoScaffold").GetScaffoldForMol(molecule))


def _diversity(molecules: list[Any]) -> float:
    morgan = package("rdkit.Chem.rdFingerprintGenerator").GetMorganGenerator(radius=2, fpSize=2048)
    similarity = package("rdkit.DataStructs").BulkTanimotoSimilarity
    prints = [morgan.GetFingerprint(molecule) for molecule in molecules]
    pairs = len(prints) * (len(prints) - 1) // 2
    return 1 - sum(sum(similarity(prints[i], prints[:i])) for i in range(1, len(prints))) / pairs if pairs else 0.0
