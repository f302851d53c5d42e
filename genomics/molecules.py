"""Molecules as RDKit sees them, without its messages."""

from __future__ import annotations

from typing import Any

from sinuous.core.checks import described
from sinuous.genomics.packages import package


def read_smiles(smiles: str) -> Any:
    """The molecule of a SMILES, sanitized by RDKit, or `None` if it is none; a text without atoms is none.

    Raises:
        ValueError: if `smiles` is no text.
        ModuleNotFoundError: if the extra `genomics` is missing.
    """
    if not isinstance(smiles, str):
        raise ValueError(f"a molecule must be a SMILES (got {described(smiles)}); write it with Chem.MolToSmiles")
    chem = package("rdkit.Chem")
    with package("rdkit.rdBase").BlockLogs():
        molecule = chem.MolFromSmiles(str(smiles))
    return molecule if molecule is not None and molecule.GetNumAtoms() else None


def canonical(molecule: Any) -> str:
    """RDKit's canonical SMILES of a molecule."""
    smiles: str = package("rdkit.Chem").MolToSmiles(molecule)
    return smiles


def problem(smiles: str) -> str | None:
    """Why RDKit does not read a SMILES as a molecule, or `None` if it does."""
    if read_smiles(smiles) is not None:
        return None
    chem = package("rdkit.Chem")
    with package("rdkit.rdBase").BlockLogs():
        return _reason(chem, chem.MolFromSmiles(str(smiles), sanitize=False))


def read_mol_block(block: str) -> tuple[str | None, str]:
    """The canonical SMILES of a connection table, or `None`, and why RDKit does not read it."""
    chem = package("rdkit.Chem")
    with package("rdkit.rdBase").BlockLogs():
        molecule = chem.MolFromMolBlock(block)
        if molecule is not None and molecule.GetNumAtoms():
            return canonical(molecule), ""
        return None, _reason(chem, chem.MolFromMolBlock(block, sanitize=False))


def _reason(chem: Any, unsanitized: Any) -> str:
    if unsanitized is None:
        return "it does not parse"
    if not unsanitized.GetNumAtoms():
        return "it has no atoms"
    found = chem.DetectChemistryProblems(unsanitized)
    return str(found[0].Message()) if found else "it cannot be sanitized"
