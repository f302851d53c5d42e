"""The report on molecules counts what it says, and RDKit is silent only as long as it takes."""

from __future__ import annotations

import itertools
import logging

import pytest

from sinuous.genomics.molecule_sets import molecule_report

pytest.importorskip("rdkit")


def test_shares_are_of_all_of_the_valid_and_of_those_that_differ() -> None:
    smiles = ["CCO", "OCC", "c1ccccc1", "C(C", "CC(C)(C)(C)C", "CCN", "c1cccc1", ""]
    report = molecule_report(smiles, reference=["C(O)C", "C1=CC=CC=C1", "broken("])
    assert report["valid"] == 4 / 8  # two spellings of ethanol, benzene, ethylamine
    assert report["unique"] == 3 / 4
    assert report["novel"] == 1 / 3
    assert report["scaffolds"] == 1
    assert molecule_report(["CCO"])["novel"] == 1


def test_scaffolds_are_rings_and_their_links() -> None:
    smiles = ["Cc1ccccc1", "CCc1ccccc1", "c1ccccc1CCC1CC1", "CCCC"]
    assert molecule_report(smiles)["scaffolds"] == 2


def test_diversity_is_one_less_the_mean_similarity_of_pairs() -> None:
    from rdkit import Chem
    from rdkit.Chem.rdFingerprintGenerator import GetMorganGenerator
    from rdkit.DataStructs import TanimotoSimilarity

    smiles = ["CCO", "CCN", "c1ccccc1O", "CCCCCC"]
    morgan = GetMorganGenerator(radius=2, fpSize=2048)
    prints = [morgan.GetFingerprint(Chem.MolFromSmiles(text)) for text in smiles]
    similarities = [TanimotoSimilarity(a, b) for a, b in itertools.combinations(prints, 2)]
    report = molecule_report([*smiles, "OCC"])
    assert report["diversity"] == pytest.approx(1 - sum(similarities) / len(similarities), abs=1e-12)
    assert molecule_report(["CCO", "OCC"])["diversity"] == 0


def test_nothing_valid_gives_zeros() -> None:
    assert molecule_report(["C(", "x"]) == {"valid": 0, "unique": 0, "novel": 0, "scaffolds": 0, "diversity": 0}


@pytest.mark.parametrize(
    ("smiles", "reference"), [("CCO", ()), (None, ()), (b"CCO", ()), (["CCO"], "CCO"), (["CCO"], 3)]
)
def test_what_is_no_list_is_refused(smiles: object, reference: object) -> None:
    with pytest.raises(ValueError, match="must be a list of SMILES"):
        molecule_report(smiles, reference)  # type: ignore[arg-type]


def test_no_molecules_and_other_things_than_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="one molecule at least"):
        molecule_report([])
    with pytest.raises(ValueError, match=r"must be a SMILES \(got 7\)"):
        molecule_report(["CCO", 7])  # type: ignore[list-item]


def test_generators_are_read_once() -> None:
    assert molecule_report(iter(["CCO", "CCN"]), iter(["CCN"]))["novel"] == 0.5


def test_rdkit_is_silent_and_then_speaks_as_before(capfd: pytest.CaptureFixture[str]) -> None:
    from rdkit import Chem, RDLogger

    level = logging.getLogger("rdkit").level
    molecule_report(["C(", "CC(C)(C)(C)C", "CCO"], ["C("])
    assert capfd.readouterr() == ("", "")
    Chem.MolFromSmiles("C(")
    assert "C(" in capfd.readouterr().err
    RDLogger.DisableLog("rdApp.*")
    try:
        molecule_report(["C("])
        Chem.MolFromSmiles("C(")
        assert capfd.readouterr().err == ""
    finally:
        RDLogger.EnableLog("rdApp.*")
    assert logging.getLogger("rdkit").level == level
