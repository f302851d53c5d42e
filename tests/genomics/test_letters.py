"""Letters become the published numbers, wrong ones are named with their place, and what is read is written again."""

from __future__ import annotations

import copy
import csv
import gzip
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sinuous.genomics import letters
from sinuous.genomics.letters import DNATokenizer, ProteinTokenizer, SelfiesTokenizer, SmilesTokenizer

SAMPLES = Path(letters.__file__).parent / "samples"
TOKENIZERS = (DNATokenizer, ProteinTokenizer, SmilesTokenizer, SelfiesTokenizer)
SMILES = (
    "CC(=O)Oc1ccccc1C(=O)O",
    "C/C=C\\C",
    "F/C=C/F",
    "N[C@@H](C)C(=O)O",
    "[13CH3][18OH]",
    "[2H]OC",
    "[O-][N+](=O)c1ccccc1",
    "[NH4+].[Cl-]",
    "[Fe+2]",
    "[Cu++]",
    "[S--]",
    "[CH3:12]C",
    "C1CCCCC%10CCCCC1CC%10",
    "C%(123)CCCC%(123)",
    "[Sn](C)(C)(C)C",
    "Sn1cccc1",
    "c1c[se]cc1",
    "c1cc[te]c1",
    "c1c[as]ccc1",
    "C[Si](C)(C)C",
    "c1cc[nH]c1",
    "[Sc]c1ccccc1",
    "B1OCCO1",
    "[H][H]",
    "[H+]",
    "*C",
    "[#6]C",
    "C$C",
    "C~C",
    "N->[Pt]<-N",
    "[NH3]->[Co@OH12](<-[NH3])(F)(Cl)(Br)I",
    "C[Pt@SP1](F)(Cl)Br",
    "F[P@TB1](Cl)(Br)(N)C",
    "OC(Cl)=[C@AL1]=CC",
    "C[C@TH1H](F)Cl",
    "[Uuo]",
    "['Rf']",
    "[Og]",
    "CC>>CCO",
    "C\\\\C=C\\\\C",
    "[CoH]",
    "[CH2-]C:C",
    "[U+6]",
    "[No]",
    "[Cn]",
)
LEARNT = (
    *("[PAD]", "[BEG]", "C", "c", "1", "(", "=", "O", ")", "n", "-", "2", ".", "Cl", "N", "3", "S", "/", "[", "+", "]"),
    *("P", "@", "H", "o", "F", "Br", "#", "4", "5", "Na", "6", "7", "s", "Si", "I", "K", "Au", "Pt", "Se", "Fe", "8"),
    *(
        "se",
        "Li",
        "[END]",
        "B",
        "9",
        "Cu",
        "Te",
        "As",
        "Ni",
        "Sb",
        "Ba",
        "Mn",
        "Ag",
        "Pb",
        "Eu",
        "Ca",
        "Zn",
        "Ti",
        "Al",
    ),
    *(
        "*",
        "Bi",
        "0",
        "Mg",
        "%10",
        "U",
        "Sr",
        "Gd",
        "Cf",
        "Sm",
        "Ra",
        "La",
        "%11",
        "V",
        "p",
        "Cs",
        "Dy",
        "b",
        "Be",
        "Nd",
    ),
    *("Lu", "Th", "Ac", "He", "Xe", "Rb", "Kr", "Ne", "Er", "Lr", "te", *(f"%{i}" for i in range(12, 25))),
)
"""The table of the model that its authors trained on molecules in context: 105 tokens, of 200 rows."""
LEARNT_CHEMBL = (
    *("[PAD]", "[BEG]", "C", "O", "c", "1", "2", "(", "=", ")", "N", "3", "n", "[END]", "F", "-", "Cl", "S", "4", "#"),
    *("s", "o", "5", "Br", "[", "H", "]", "+", "6", "I", "P", "7", "8", "9", "%10", "%11"),
)
"""A table as a training on ChEMBL makes it: 36 tokens, of 37 rows."""


def learnt(folder: Path, tokens: tuple[str, ...] = LEARNT, vocab_size: int = 200) -> Path:
    file = folder / "init_arguments.json"
    labels = {token: i for i, token in enumerate(tokens)}
    back = {str(i): token for token, i in labels.items()}
    file.write_text(json.dumps({"vocab_size": vocab_size, "token2label": labels, "label2token": back}))
    return file


# ---------------------------------------------------------------------------------------------------------------- DNA


def test_bases_have_the_published_numbers() -> None:
    assert DNATokenizer().encode("ACGTN").tolist() == [7, 8, 9, 10, 11]
    assert DNATokenizer().vocab_size == 12


def test_lower_case_codes_and_uracil_are_read() -> None:
    dna = DNATokenizer()
    assert torch.equal(dna.encode("acgtun"), dna.encode("ACGTTN"))
    assert dna.decode(dna.encode("RYSWKMBDHVryswkmbdhv")) == "N" * 20
    assert torch.equal(dna.encode(b"acgT"), dna.encode("ACGT"))


@pytest.mark.parametrize("letter", [*"-.*XEFIJLOPQZ 5\n\r\t", "\0", "é", "𝔸"])
def test_other_letters_are_refused_with_record_position_and_letter(letter: str) -> None:
    with pytest.raises(ValueError, match="'chr1' at position 4 of 5, counted from 1") as error:
        DNATokenizer().encode(f"ACG{letter}T", "chr1")
    assert repr(letter) in str(error.value)


@given(st.text("ACGTN"))
def test_bases_are_written_as_they_were_read(text: str) -> None:
    dna = DNATokenizer()
    assert dna.decode(dna.encode(text)) == text
    assert dna.decode(dna.encode(text.lower())) == text


@given(st.text("ACGTN", min_size=1))
def test_the_other_strand_of_the_other_strand_is_the_first(text: str) -> None:
    dna = DNATokenizer()
    ids = dna.encode(text)
    other = dna.complement[ids].flip(-1)
    assert dna.decode(other) == text[::-1].translate(str.maketrans("ACGT", "TGCA"))
    assert torch.equal(dna.complement[other].flip(-1), ids)
    assert torch.equal(dna.complement[dna.special], dna.special)


# ----------------------------------------------------------------------------------------------------------- proteins


def test_residues_have_the_published_numbers() -> None:
    protein = ProteinTokenizer()
    assert protein.encode("LAGVSERTIDPKQNFYMHWC").tolist() == list(range(4, 24))
    assert protein.encode("XBUZO").tolist() == list(range(24, 29))
    assert protein.vocab_size == 38
    assert [protein.tokens[i] for i in (0, 1, 2, 3, 29, 30, 32, 37)] == [
        *("<cls>", "<pad>", "<eos>", "<unk>", ".", "-", "<mask>", "<mask-5>")
    ]
    assert [protein.tokens[i] for i in protein.span_masks] == [f"<mask-{k}>" for k in range(1, 6)]


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("M-K.V", "MKV"),
        ("MkvL", "MKVL"),
        ("MJL", "MXL"),
        ("MKV*", "MKV"),
        ("MKV*--.", "MKV"),
        ("*", ""),
        ("", ""),
        ("--", ""),
    ],
)
def test_gaps_insertions_and_the_last_star_are_read(text: str, read: str) -> None:
    protein = ProteinTokenizer()
    assert protein.decode(protein.encode(text)) == read


@pytest.mark.parametrize(
    ("text", "place"), [("MK*V", 3), ("MK**", 3), ("-MK*-V", 4), ("MK V", 3), ("MK1", 3), ("Mé", 2)]
)
def test_other_residues_are_refused_at_their_place_in_the_record(text: str, place: int) -> None:
    with pytest.raises(ValueError, match=f"'P1' at position {place} of {len(text)}"):
        ProteinTokenizer().encode(text, "P1")


@given(st.text("ACDEFGHIKLMNPQRSTVWYXBUZO"))
def test_residues_are_written_as_they_were_read(text: str) -> None:
    protein = ProteinTokenizer()
    assert protein.decode(protein.encode(text)) == text
    assert protein.decode(protein.encode(text.lower() + "*")) == text


# ---------------------------------------------------------------------------------------------------------- molecules


@pytest.mark.parametrize("smiles", SMILES)
def test_smiles_are_tokenized_and_joined_without_a_loss(smiles: str) -> None:
    tokenizer = SmilesTokenizer()
    assert "".join(tokenizer.tokenize(smiles)) == smiles
    ids = tokenizer.encode(smiles)
    assert tokenizer.decode(ids) == smiles
    assert torch.isin(ids, tokenizer.letters).all()


def test_elements_stand_in_brackets_only() -> None:
    tokenizer = SmilesTokenizer()
    assert tokenizer.tokenize("Sn1[Sn]") == ["S", "n", "1", "[", "Sn", "]"]
    assert tokenizer.tokenize("[13C@@H2+2:10]%12Br") == [
        *("[", "1", "3", "C", "@", "@", "H", "2", "+", "2", ":", "1", "0", "]", "%12", "Br")
    ]
    assert tokenizer.tokenize("[Co@OH12]") == ["[", "Co", "@", "OH", "1", "2", "]"]
    assert tokenizer.tokenize("[OH]") == ["[", "O", "H", "]"]


def test_every_smiles_that_rdkit_writes_or_reads_is_tokenized() -> None:
    chem = pytest.importorskip("rdkit.Chem")
    tokenizer = SmilesTokenizer()
    table = chem.GetPeriodicTable()
    for number in range(1, 119):
        for smiles in (f"[{table.GetElementSymbol(number)}]", f"[12{table.GetElementSymbol(number)}H2-]"):
            assert chem.MolFromSmiles(smiles, sanitize=False) is not None
            assert tokenizer.decode(tokenizer.encode(smiles)) == smiles
    for smiles in SMILES:
        if ">" not in smiles.replace("->", ""):
            assert chem.MolFromSmiles(smiles, sanitize=False) is not None, smiles


@given(st.lists(st.sampled_from([*"BCNOPSFIbcnops()[]=#-+\\/:.@%*0123456789H", "Cl", "%10", "[nH]", "[C@@H]"])))
def test_any_text_of_smiles_characters_is_joined_again(parts: list[str]) -> None:
    tokenizer, text = SmilesTokenizer(), "".join(parts)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("text", "token", "place"), [("CC ethane", " ", 3), ("C[Xx]", "X", 3), ("CéC", "é", 2), ("QC", "Q", 1)]
)
def test_what_is_no_smiles_is_refused_at_its_place(text: str, token: str, place: int) -> None:
    with pytest.raises(ValueError, match=f"^'{token}' is not .* 'm1' at position {place} of {len(text)}"):
        SmilesTokenizer().encode(text, "m1")


def test_a_learnt_vocabulary_keeps_its_numbers(tmp_path: Path) -> None:
    file = learnt(tmp_path)
    assert len(LEARNT) == 105
    for path in (file, tmp_path, str(file)):
        tokenizer = SmilesTokenizer.from_file(path)
        assert tokenizer.vocab_size == 200
        assert (tokenizer.pad, tokenizer.start, tokenizer.end) == (0, 1, 44)
        assert tokenizer.encode("CCl.[Na+]").tolist() == [2, 13, 12, 18, 30, 19, 20]
    chembl = SmilesTokenizer.from_file(learnt(tmp_path, LEARNT_CHEMBL, 37))
    assert (chembl.vocab_size, chembl.end, len(chembl.letters)) == (37, 13, 33)
    assert chembl.decode(chembl.encode("CC(=O)Nc1ccc(Br)cc1")) == "CC(=O)Nc1ccc(Br)cc1"


def test_a_learnt_vocabulary_cuts_as_its_authors_did(tmp_path: Path) -> None:
    tokenizer = SmilesTokenizer.from_file(learnt(tmp_path))
    assert tokenizer.tokenize("[Cs]C[Cs+][Sn]") == ["[", "Cs", "]", "C", "[", "C", "s", "+", "]", "[", "S", "n", "]"]
    assert tokenizer.decode(tokenizer.encode("[Cs].[Sn+4]")) == "[Cs].[Sn+4]"


@pytest.mark.parametrize(("smiles", "token", "place"), [("C/C=C\\C", "\\\\", 6), ("C[Hg]C", "Hg", 3), ("C$C", "$", 2)])
def test_a_learnt_vocabulary_names_what_it_lacks(tmp_path: Path, smiles: str, token: str, place: int) -> None:
    tokenizer = SmilesTokenizer.from_file(learnt(tmp_path))
    with pytest.raises(ValueError, match=f"position {place} of") as error:
        tokenizer.encode(smiles)
    assert str(error.value).startswith(f"'{token}' is not in the vocabulary")
    assert "init_arguments.json has 105 tokens" in str(error.value)


def test_rows_without_a_token_are_not_written(tmp_path: Path) -> None:
    tokenizer = SmilesTokenizer.from_file(learnt(tmp_path))
    assert set(range(105, 200)) < set(tokenizer.special.tolist())
    with pytest.raises(ValueError, match="no token 150"):
        tokenizer.decode([2, 150])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot read a vocabulary"),
        ("{", "cannot read a vocabulary"),
        ("[1]", "no token2label"),
        ('{"token2label": null}', "no token2label"),
        ('{"token2label": {"[PAD]": 0, "[BEG]": 1, "C": 2}}', "no token2label"),
        ('{"token2label": {"[PAD]": 0, "[BEG]": 1, "[END]": 1}}', "different numbers from 0 to 2"),
        ('{"token2label": {"[PAD]": 0, "[BEG]": 1, "[END]": 7}}', "different numbers from 0 to 2"),
        ('{"token2label": {"[PAD]": 0, "[BEG]": 1, "[END]": "2"}}', "different numbers from 0 to 2"),
    ],
)
def test_a_file_without_a_vocabulary_is_refused(tmp_path: Path, content: str | None, sentence: str) -> None:
    file = tmp_path / "init_arguments.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=sentence):
        SmilesTokenizer.from_file(file)


@pytest.mark.parametrize(
    "text",
    [
        "[C][=O]",
        "[C][=C][Ring1][=Branch1]",
        "[13CH2][C@@H1][Og+2].[2H]",
        "[-/Ring1][\\/Ring2][#Branch3]",
        "",
        "[Na+1].[Cl-1]",
    ],
)
def test_selfies_are_tokenized_and_joined_without_a_loss(text: str) -> None:
    tokenizer = SelfiesTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(("text", "place"), [("CCO", 1), ("[C]C", 4), ("[C", 1), ("[PAD]", 3), ("[C][[O]]", 4)])
def test_what_is_no_selfies_is_refused(text: str, place: int) -> None:
    with pytest.raises(ValueError, match=f"SELFIES .* at position {place} of .*encode_smiles"):
        SelfiesTokenizer().encode(text)


def test_selfies_of_smiles_are_the_same_molecules() -> None:
    pytest.importorskip("selfies")
    chem = pytest.importorskip("rdkit.Chem")
    tokenizer = SelfiesTokenizer()
    for smiles in SMILES[:9]:
        back = tokenizer.decode_smiles(tokenizer.encode_smiles(smiles))
        assert chem.CanonSmiles(back) == chem.CanonSmiles(smiles)
    assert tokenizer.encode("[nop]").tolist() == [tokenizer.pad]
    with pytest.raises(ValueError, match=r"cannot write 'C\(C' of 'm1'"):
        tokenizer.encode_smiles("C(C", "m1")
    with pytest.raises(ValueError, match="is no SELFIES"):
        tokenizer.decode_smiles(tokenizer.encode("[13CH1]")[:-1])


def test_the_bundled_molecules_are_tokenized_and_joined() -> None:
    tokenizer, read = SmilesTokenizer(), 0
    for name in ("train", "test"):
        with gzip.open(SAMPLES / f"solubility.{name}.csv.gz", "rt") as file:
            for row in csv.DictReader(file):
                smiles = next(value for column, value in row.items() if column.lower() == "smiles")
                assert tokenizer.decode(tokenizer.encode(smiles)) == smiles
                read += 1
    assert read > 1000


@pytest.mark.slow
def test_all_of_molsets_is_tokenized_and_joined() -> None:
    """1.94 million molecules, where SINUOUS_MOLSETS names the folder of {train,test,test_scaffolds}.csv.gz."""
    if "SINUOUS_MOLSETS" not in os.environ:
        pytest.skip("SINUOUS_MOLSETS names no folder with the files of the package molsets")
    folder = Path(os.environ["SINUOUS_MOLSETS"])
    tokenizer = SmilesTokenizer()
    for name in ("train", "test", "test_scaffolds"):
        with gzip.open(folder / f"{name}.csv.gz", "rt") as file:
            for row in csv.DictReader(file):
                tokens = tokenizer.tokenize(row["SMILES"])
                assert "".join(tokens) == row["SMILES"]
                assert all(token in tokenizer.ids for token in tokens)


# ---------------------------------------------------------------------------------------------------------------- all


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_letters_and_special_tokens_are_the_whole_vocabulary(tokenizer: type) -> None:
    made = tokenizer()
    assert torch.equal(torch.cat((made.letters, made.special)).sort().values, torch.arange(made.vocab_size))
    assert torch.isin(made.natural, made.letters).all()
    assert len(set(made.tokens)) == made.vocab_size == len(made.tokens)
    for role in ("start", "end", "pad", "mask", "unknown"):
        assert getattr(made, role) is None or getattr(made, role) in made.special
    assert made.ignored is None or made.ignored in made.letters


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_start_end_and_padding_are_not_written(tokenizer: type) -> None:
    made = tokenizer()
    text = {DNATokenizer: "ACGT", SelfiesTokenizer: "[C]"}.get(tokenizer, "C")
    ids = torch.cat((torch.tensor([made.start]), made.encode(text), torch.tensor([made.end, made.pad])))
    assert made.decode(ids) == made.decode(ids.tolist()) == made.decode(ids.numpy()) == text
    assert made.decode([]) == ""
    if made.mask is not None:
        assert made.decode([made.mask]) == made.tokens[made.mask]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_texts_and_ids_of_the_wrong_kind_are_refused(tokenizer: type) -> None:
    made = tokenizer()
    for text in (None, 7, ["C"], torch.tensor([1])):
        with pytest.raises(ValueError, match="must be a string"):
            made.encode(text)
    for ids in ([[1, 2]], [1.5], [True], None, "AC"):
        with pytest.raises(ValueError, match="whole numbers"):
            made.decode(ids)
    for ids in ([made.vocab_size], [-1]):
        with pytest.raises(ValueError, match=f"no token {ids[0]}"):
            made.decode(ids)
    assert made.encode("").shape == (0,)
    assert made.encode("").dtype == torch.long


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_tokenizers_are_copied_and_sent_to_other_processes(tokenizer: type) -> None:
    made = tokenizer()
    text = "[C]" if tokenizer is SelfiesTokenizer else "C"
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert other.tokens == made.tokens
        assert torch.equal(other.encode(text), made.encode(text))
