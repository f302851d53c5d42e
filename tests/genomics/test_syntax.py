"""Texts that keep to the syntax parse, end in time, and are all that chemists write."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from sinuous.genomics.letters import SmilesTokenizer
from sinuous.genomics.smiles_text import SmilesText
from sinuous.genomics.syntax import SmilesSyntax

MOLECULES = (
    "CC(=O)Oc1ccccc1C(=O)O",
    "CN1C=NC2=C1C(=O)N(C(=O)N2C)C",
    "C[C@H](CCCC(C)C)[C@H]1CC[C@@H]2[C@@]1(CC[C@H]3[C@H]2CC=C4[C@@]3(CC[C@@H](C4)O)C)C",
    "O=c1cc[nH]cc1",
    "C/C=C\\C#N",
    "[O-][N+](=O)c1ccc(cc1)S(=O)(=O)NC",
    "FC(F)(F)c1ccc2[nH]c(=S)sc2c1",
    "c1ccc2c(c1)[nH]c1ccccc12",
    "C1CC12CC2",
    "[13CH3:1][C@@H](O)C.[Na+].[Cl-]",
    "OP(=O)(O)OC",
    "CC1(C)C2CCC1(C)C(=O)C2",
    "C%10CCCCC%10",
    "B(O)(O)c1ccncc1",
    "Brc1cnc(I)s1",
)
WEIGHTS = {
    "C": 5,
    "c": 5,
    "N": 2,
    "O": 2,
    "(": 3,
    ")": 2,
    "1": 2,
    "2": 1,
    "3": 0.5,
    "=": 1,
    "n": 1,
    "[": 0.5,
    "[END]": 0.01,
}
LEARNT = ("[PAD]", "[BEG]", *"COc12(=)N3n", "[END]", "F", "-", "Cl", "S", *"4#so5", "Br", *"[H]+6IP789", "%10", "%11")


def drawn(syntax: SmilesSyntax, limit: int, seed: int, weights: torch.Tensor) -> tuple[list[str], bool]:
    """A random text, and whether it ended by itself."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    while len(ids) < limit:
        mask = syntax(0, ids, limit - len(ids))
        assert mask.any()
        i = int(torch.multinomial(mask.double() * weights, 1, generator=generator))
        if syntax.tokens[i] in syntax.ends:
            return [syntax.tokens[i] for i in ids], True
        ids.append(i)
    return [syntax.tokens[i] for i in ids], False


@pytest.mark.parametrize("tokens", [SmilesTokenizer().tokens, LEARNT])
@pytest.mark.parametrize("likely", [False, True])
def test_random_texts_parse_whatever_their_limit(tokens: tuple[str, ...], likely: bool) -> None:
    chem = pytest.importorskip("rdkit.Chem")
    weights = torch.tensor([WEIGHTS.get(token, 0.05 if likely else 1.0) if likely else 1.0 for token in tokens])
    ended = 0
    for seed, limit in itertools.product(range(12), (1, 2, 3, 4, 5, 7, 10, 15, 25, 40)):
        written, by_itself = drawn(SmilesSyntax(tokens, ["[END]"]), limit, seed, weights.double())
        assert written
        assert len(written) <= limit
        assert chem.MolFromSmiles("".join(written), sanitize=False) is not None, "".join(written)
        ended += by_itself
    assert ended


@pytest.mark.parametrize("smiles", MOLECULES)
def test_molecules_are_admitted_token_by_token_and_in_little_more_room_than_they_need(smiles: str) -> None:
    tokenizer = SmilesTokenizer()
    ids = tokenizer.encode(smiles).tolist()
    for room in (200, len(ids) + 1):  # rings are counted as if no atom closed two
        syntax = SmilesSyntax(tokenizer.tokens, ["[END]"])
        for n, i in enumerate(ids):
            assert syntax(0, ids[:n], room - n)[i], (smiles, tokenizer.decode(ids[:n]), tokenizer.tokens[i])
    assert SmilesSyntax(tokenizer.tokens, ["[END]"])(0, ids, 1)[tokenizer.end]


@pytest.mark.parametrize(
    ("text", "admitted", "refused"),
    [
        ("", "C c [ Br", "1 ( ) = . [END] ]"),
        ("C", "C 1 ( = . [END] [", ") ] @"),
        ("C=", "C N O 1 %12", "F Cl = ( ) . [END]"),
        ("CC(", "C F = [", ") ( 1 . [END]"),
        ("CC(C", ") C (", ". [END]"),
        ("CC(C)", "C ( . [END]", "1 )"),
        ("C1", "2 C", "1 . [END]"),
        ("C1C", "2 C (", "1 [END]"),
        ("C1CC", "1 2 C", "[END]"),
        ("C1CC1", "1 2 C [END]", ")"),
        ("C=1CC", "1 2", "[END]"),
        ("C=1CC-", "2 C", "1"),
        ("CF", ". [END]", "C = 1 ("),
        ("CC(C)(C)C", "C = [END]", ")"),
        ("CC(C)(C)(", "C F", "= #"),
        ("C[", "C se 1 H *", "] @ + ( 0"),
        ("C[C", "@ H + - : ]", "C ( 1 ."),
        ("C[C@", "@ H ]", "1 C"),
        ("C[NH", "2 3 + ]", "H @ C"),
        ("C[NH3+", "2 ]", "+ C"),
        ("C[CH3:", "1 9", "] 0 C"),
        ("c", "1 2 %10", "c C [END] ( ="),
        ("C12CC", "1 2", "[END]"),
        ("C12CC1", "C", "2"),
    ],
)
def test_what_may_follow(text: str, admitted: str, refused: str) -> None:
    tokenizer = SmilesTokenizer()
    mask = SmilesSyntax(tokenizer.tokens, ["[END]"])(0, tokenizer.encode(text).tolist(), 100)
    marks = {
        token: bool(mask[tokenizer.ids[token]]) for token in f"{admitted} {refused}".split() if token in tokenizer.ids
    }
    assert {token for token, mark in marks.items() if mark} == set(admitted.split())


def test_one_molecule_ends_at_a_dot_where_it_is_an_end() -> None:
    tokenizer = SmilesTokenizer()
    syntax = SmilesSyntax(tokenizer.tokens, ["[END]", "."])
    dot = tokenizer.ids["."]
    assert syntax(0, tokenizer.encode("CC").tolist(), 9)[dot]
    assert not syntax(1, tokenizer.encode("C(C").tolist(), 9)[dot]
    assert not syntax(2, [], 9)[dot]
    assert syntax(0, tokenizer.encode("CCC").tolist(), 1)[dot]  # an end needs no room behind it


def test_the_cost_of_an_end_is_paid_token_by_token() -> None:
    """From any text, some token lowers it, until nothing is open."""
    tokenizer, generator = SmilesTokenizer(), random.Random(0)
    for smiles in MOLECULES:
        tokens = tokenizer.tokenize(smiles)
        text = SmilesText()
        for token in tokens[: generator.randrange(1, len(tokens))]:
            text.take(token)
        while (cost := text.cost()) > 0:
            assert cost <= text.most()
            following = [token for token in text.legal() if text.cost_with(token) < cost]
            assert following
            text.take(generator.choice(following))
        assert text.complete()


@pytest.mark.parametrize(
    ("text", "admitted", "refused"),
    [
        ("c1cccc", "c n (", "C"),
        ("c1cccc1", "=", "C c [END] ."),  # five carbons do not share double bonds by twos
        ("c1ccc[nH]", "1", "C"),
        ("c1cccn1", "C c", "[END] ."),
        ("c1ccco", "1 c", "C"),
        ("c1ccccc", "1 c (", "C [END]"),
        ("c1ccccc1C", "C = [END]", ")"),
        ("c1ccccc1", "C c [END] =", ")"),
        ("Cc1c", "c n (", "C F"),
        ("C12CCO", "C", "1 2 ="),  # oxygen has no bond left to go on by
        ("C1CC(=O", ")", "C ="),
    ],
)
def test_what_is_no_molecule_is_masked_where_something_else_is_left(text: str, admitted: str, refused: str) -> None:
    tokenizer = SmilesTokenizer()
    mask = SmilesSyntax(tokenizer.tokens, ["[END]"])(0, tokenizer.encode(text).tolist(), 100)
    asked = f"{admitted} {refused}".split()
    assert {token for token in asked if mask[tokenizer.ids[token]]} == set(admitted.split())


def test_a_text_that_should_end_comes_to_its_end() -> None:
    """Where an end is the most probable token, tokens bring it nearer until it is admitted."""
    tokenizer, generator = SmilesTokenizer(), torch.Generator().manual_seed(0)
    logits = torch.zeros(tokenizer.vocab_size)
    logits[tokenizer.end] = 9
    for start in ("C1CC(C(=O)N", "c1cc(CC2CC", "CC(C)(C)C(", "[13C", "C1=CC=C2C(=C1"):
        syntax, ids = SmilesSyntax(tokenizer.tokens, ["[END]"]), tokenizer.encode(start).tolist()
        for _ in range(25):
            mask = syntax(0, ids, 200 - len(ids), logits)
            if mask[tokenizer.end]:
                break
            ids.append(int(torch.multinomial(mask.double(), 1, generator=generator)))
        assert mask[tokenizer.end], tokenizer.decode(ids)


def test_a_vocabulary_without_carbon_or_end_is_refused() -> None:
    for tokens, ends in ((("[END]", "N"), ["[END]"]), (("C", "N"), ["[END]"])):
        with pytest.raises(ValueError, match="must have C and one of"):
            SmilesSyntax(tokens, ends)
