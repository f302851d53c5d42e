"""Annotations, variants and molecules are read as they are written, and what is wrong with a file is said."""

from __future__ import annotations

import gzip
from collections.abc import Callable

import pytest
from biological_files import Write

from sinuous.genomics.io import Feature, Variant, read_features, read_molecules, read_variants

MOL = """\
ethanol
  made by hand

  3  2  0  0  0  0  0  0  0  0999 V2000
    0.0000    0.0000    0.0000 C   0  0  0  0  0  0  0  0  0  0  0  0
    1.5000    0.0000    0.0000 C   0  0  0  0  0  0  0  0  0  0  0  0
    2.0000    1.2000    0.0000 O   0  0  0  0  0  0  0  0  0  0  0  0
  1  2  1  0
  2  3  1  0
M  END
"""


def test_gtf_gff3_and_bed_give_the_same_places(write: Write) -> None:
    gtf = '#!genome-build\n1\taraport\tCDS\t11\t20\t.\t-\t0\tgene_id "AT1"; tag "x"; tag "y; z"; exon_number 2;\n'
    gff = (
        "##gff-version 3\r\n1\taraport\tCDS\t11\t20\t.\t-\t0\tID=cds%3B1;Parent=a,b;Note=x%20y\r\n###\r\n>1\r\nACGT\r\n"
    )
    bed = "track name=genes\nbrowser position\n1\t10\t20\tCDS\t0\t-\n1 30 40\n"
    assert list(read_features(write(gtf))) == [
        Feature("1", "CDS", 10, 20, "-", {"gene_id": "AT1", "tag": "x,y; z", "exon_number": "2"})
    ]
    assert list(read_features(write(gff))) == [
        Feature("1", "CDS", 10, 20, "-", {"ID": "cds;1", "Parent": "a,b", "Note": "x y"})
    ]
    assert list(read_features(write(gzip.compress(bed.encode())))) == [
        Feature("1", "CDS", 10, 20, "-", {"name": "CDS", "score": "0"}),
        Feature("1", "region", 30, 40, ".", {}),
    ]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (">a\nACGT\n", "line 1: no feature .* not a FASTA"),
        ("gene\tplace\n", "line 1: no feature"),
        ("1\ta\tCDS\t20\t11\t.\t+\t0\t.\n", "line 1: start must be at least 1 and at most end"),
        ("1\ta\tCDS\t0\t11\t.\t+\t0\t.\n", "line 1: start must be at least 1"),
        ("1\ta\tCDS\t1\t11\t.\t+\t0\t.\n1\ta\tCDS\tx\t11\t.\t+\t0\t.\n", "line 2: start must be a whole number"),
        ("1\ta\tCDS\t1\t11\t.\t+\t0\t.\n1 a CDS 1 11\n", "line 2: a GTF or GFF3 line has nine columns between tabs"),
        ("1\t20\t10\n", "line 1: start must be at most end"),
        ("#x\n1\t1\t10\n1\t-1\t10\n", "line 3: start must be a whole number"),
        ("1\t1\t10\n1\t1\n", "line 2: a BED line"),
    ],
)
def test_what_is_wrong_with_an_annotation_is_said(write: Write, content: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        list(read_features(write(content)))


def test_features_without_attributes_are_read(write: Write) -> None:
    path = write("1\ta\tgene\t1\t9\t.\t?\t.\n1\ta\tgene\t1\t9\t.\t.\t.\t.\n")
    assert list(read_features(path)) == [Feature("1", "gene", 0, 9, ".", {})] * 2
    assert list(read_features(write("##gff-version 3\n"))) == []


def test_alleles_of_a_vcf_come_one_by_one(write: Write) -> None:
    head = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
    rows = ["1\t10\trs1\tA\tG,T", "1\t12\t.\tac\tA", "2\t1\t.\tN\t.", "2\t3\t.\tG\tGA,*"]
    path = write(head + "".join(f"{row}\t.\t.\t.\n" for row in rows))
    assert list(read_variants(path)) == [
        Variant("1", 10, "A", "G"),
        Variant("1", 10, "A", "T"),
        Variant("1", 12, "ac", "A"),
        Variant("2", 3, "G", "GA"),
    ]
    assert list(read_variants(write(head))) == []


def test_symbolic_alleles_are_refused_or_counted(write: Write) -> None:
    path = write("#CHROM\tPOS\tID\tREF\tALT\n1\t10\t.\tA\tG\n1\t11\t.\tA\t<DEL>,T\n1\t12\t.\tA\tA[2:3[\n")
    with pytest.raises(ValueError, match=r"line 3: ALT must be letters \(got '<DEL>' at 1:11\)"):
        list(read_variants(path))
    with pytest.warns(UserWarning, match="2 symbolic alleles"):
        variants = list(read_variants(path, on_symbolic="skip"))
    assert variants == [Variant("1", 10, "A", "G"), Variant("1", 11, "A", "T")]
    with pytest.raises(ValueError, match="on_symbolic must be 'raise' or 'skip'"):
        read_variants(path, on_symbolic="no")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("1 10 . A G\n", "line 1: no variant"),
        ("#CHROM\n1\tx\t.\tA\tG\n", "line 2: POS must be a whole number"),
        ("1\t10\t.\t-\tG\n", "line 1: REF must be letters"),
        ("1\t0\t.\tA\tG\n", "line 1: POS must be at least 1"),
        ("1\t5\t.\tA\t\n", "line 1: ALT must be letters"),
        (">a\nACGT\n", "line 1: no variant"),
    ],
)
def test_what_is_wrong_with_a_vcf_is_said(write: Write, content: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        list(read_variants(write(content)))


# ---------------------------------------------------------------------------------------------------------- molecules


@pytest.mark.parametrize(
    ("content", "molecules"),
    [
        ("CCO ethanol\nc1ccccc1\tbenzene ring\n\nC\n", [("CCO", "ethanol"), ("c1ccccc1", "benzene ring"), ("C", "")]),
        ("\ufeffCCO\r\nC\r\n", [("CCO", ""), ("C", "")]),
        ("smiles name\nCCO ethanol\n", [("CCO", "ethanol")]),
        ("CCO |$a;b;c$| ethanol\n", [("CCO", "ethanol")]),
        ("# made\nCCO\n", [("CCO", "")]),
        ("SMILES,SPLIT\nCCO,train\n\nC,test\n", [("CCO", ""), ("C", "")]),
        ('id;Canonical_SMILES\n"x;1";CCO\n2; C \n', [("CCO", "x;1"), ("C", "2")]),
        ("name\tlogP\tisomeric smiles\nethanol\t-0.1\tCCO\n", [("CCO", "ethanol")]),
        ("smiles\nCCO\nC\n", [("CCO", ""), ("C", "")]),
        (f"{MOL}> <SOL>\n1.1\n\n$$$$\n{MOL.replace('ethanol', '')}$$$$\n\n", [("CCO", "ethanol"), ("CCO", "")]),
        (MOL, [("CCO", "ethanol")]),
    ],
)
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_molecules_of_lists_tables_and_sdf_are_read(
    write: Write, content: str, molecules: list[tuple[str, str]], pack: Callable[[bytes], bytes]
) -> None:
    pytest.importorskip("rdkit")
    read = list(read_molecules(write(pack(content.encode()))))
    assert read == [smiles for smiles, _ in molecules]
    assert [(molecule.smiles, molecule.name) for molecule in read] == molecules


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("CCO\n\nCC(C)(C)(C)C bad\nC\n", r"line 3: 'CC\(C\)\(C\)\(C\)C' is not valid \(Explicit valence for atom # 1"),
        ("C\nc1cccc1\n", r"line 2: 'c1cccc1' is not valid \(Can't kekulize"),
        ("C\nCCO,1.5\n", r"line 2: 'CCO,1\.5' is not valid \(it does not parse"),
        ('id,smiles\n"a\nb",C\n\nc,C1\n', "line 5: 'C1' is not valid"),
        ("id,smiles\n1\n", "line 2: '' is not valid .it has no atoms"),
        (f"{MOL}$$$$\n{MOL.replace('  1  2  1', '  1  9  1')}$$$$\n", "line 12: the molecule 'ethanol' is not valid"),
    ],
)
def test_an_invalid_molecule_is_told_with_its_line_or_counted(
    write: Write, content: str, sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rdkit")
    path = write(content)
    with pytest.raises(ValueError, match=sentence):
        list(read_molecules(path))
    with pytest.warns(UserWarning, match=f"1 of . molecules were skipped; {sentence}"):
        list(read_molecules(path, on_invalid="skip"))
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ValueError, match="on_invalid must be 'raise' or 'skip'"):
        read_molecules(path, on_invalid="drop")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("smiles,name\n", "has no molecules"),
        ("# nothing\n", "has no molecules"),
        (f"{MOL}$$$$\n{MOL[:200]}", "line 12: the molecule 'ethanol' has no end"),
    ],
)
def test_a_file_without_molecules_or_a_cut_one_is_told(write: Write, content: str, sentence: str) -> None:
    pytest.importorskip("rdkit")
    with pytest.raises(ValueError, match=sentence):
        list(read_molecules(write(content)))


def test_rdkit_speaks_as_before_after_a_file_was_read(write: Write, capfd: pytest.CaptureFixture[str]) -> None:
    chem = pytest.importorskip("rdkit.Chem")
    with pytest.warns(UserWarning, match="skipped"):
        list(read_molecules(write("C\nC(\n"), "skip"))
    assert capfd.readouterr().err == ""
    chem.MolFromSmiles("C(")
    assert "C(" in capfd.readouterr().err
