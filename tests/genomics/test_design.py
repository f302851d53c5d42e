"""Molecules are drawn as many as asked for, alike for one seed, in context, and closed where syntax is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sinuous.core.generation import Sampling, generate
from sinuous.genomics import design
from sinuous.genomics.chem_xlstm import ChemXLSTM
from sinuous.genomics.design import sample_molecules
from sinuous.genomics.letters import SelfiesTokenizer, SmilesTokenizer


def build(tokenizer: Any = None, **options: Any) -> ChemXLSTM:
    """A model of large random weights, whose choices differ, in float64."""
    tokenizer = tokenizer or SmilesTokenizer()
    model = ChemXLSTM(dim=16, depth=1, num_heads=2, vocab_size=tokenizer.vocab_size, **options).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.tokenizer = tokenizer
    return model


def drawing(**options: Any) -> Sampling:
    return Sampling(**{"temperature": 1.0, "max_new_tokens": 20, "seed": 0, **options})


def test_as_many_molecules_come_as_were_asked_for_and_none_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    molecules = sample_molecules(model, 7, sampling=drawing())
    assert len(molecules) == 7
    assert all(molecules)
    assert len(set(molecules)) > 1
    assert not any(special in text for text in molecules for special in ("[PAD]", "[BEG]", "[END]"))
    monkeypatch.setattr(design, "ROWS", 3)
    assert sample_molecules(model, 7, sampling=drawing()) == molecules
    assert sample_molecules(model, 7, sampling=drawing(seed=list(range(7)))) == molecules
    assert sample_molecules(model, 7, sampling=drawing(seed=7)) != molecules
    torch.manual_seed(1)
    unseeded = sample_molecules(model, 3)
    torch.manual_seed(1)
    assert sample_molecules(model, 3) == unseeded


@pytest.mark.parametrize("limit", [1, 2, 5, 12, 40])
@pytest.mark.parametrize("like", [(), ("CCO", "c1ccccc1O")])
def test_syntax_closes_all_that_is_open_before_the_limit(limit: int, like: tuple[str, ...]) -> None:
    chem = pytest.importorskip("rdkit.Chem")
    molecules = sample_molecules(build(), 20, like, syntax=True, sampling=drawing(max_new_tokens=limit))
    assert all(molecules)
    for smiles in molecules:
        assert chem.MolFromSmiles(smiles, sanitize=False) is not None
        assert len(SmilesTokenizer().tokenize(smiles)) <= limit
        assert not like or "." not in smiles


def test_molecules_in_context_are_read_first_and_the_drawn_one_ends_at_a_dot() -> None:
    model = build()
    tokenizer = model.tokenizer
    like = ["CCO", "[Na+].[Cl-]"]
    drawn = sample_molecules(model, 5, iter(like), sampling=drawing(max_new_tokens=60))
    prompt = [tokenizer.start, *tokenizer.encode("CCO.[Na+].[Cl-].").tolist()]
    stops = [tokenizer.end, tokenizer.ids["."]]
    expected = generate(
        model,
        [prompt] * 5,
        drawing(max_new_tokens=60, stop_tokens=stops),
        allowed=lambda row, tokens, left, logits: torch.tensor(
            [
                (i in tokenizer.letters and (len(tokens) > 0 or i not in stops)) or (i in stops and len(tokens) > 0)
                for i in range(tokenizer.vocab_size)
            ]
        ),
    )
    assert drawn == [tokenizer.decode(tokens) for tokens in expected.tokens]
    assert not any("." in text for text in drawn)
    assert drawn != sample_molecules(model, 5, sampling=drawing(max_new_tokens=60))


def test_rows_of_a_learnt_vocabulary_without_a_token_are_never_drawn(tmp_path: Path) -> None:
    tokens = ("[PAD]", "[BEG]", "[END]", *"CNOcn()=123[]+-H.")
    labels = {token: i for i, token in enumerate(tokens)}
    (tmp_path / "init_arguments.json").write_text(json.dumps({"vocab_size": 40, "token2label": labels}))
    model = build(SmilesTokenizer.from_file(tmp_path))
    assert model.vocab_size == 40
    for syntax in (False, True):
        assert len(sample_molecules(model, 20, syntax=syntax, sampling=drawing())) == 20
    with pytest.raises(ValueError, match=r"'Cl' is not in the vocabulary .*'like\[1\]' at position 2"):
        sample_molecules(model, 1, like=["CC", "CCl"])


def test_selfies_models_draw_smiles() -> None:
    pytest.importorskip("selfies")
    chem = pytest.importorskip("rdkit.Chem")
    model = build(SelfiesTokenizer())
    molecules = sample_molecules(model, 20, syntax=True, sampling=drawing())
    assert all(chem.MolFromSmiles(smiles) is not None for smiles in molecules)
    assert len(sample_molecules(model, 20, like=["CCO"], sampling=drawing())) == 20


def test_greedy_molecules_are_all_alike() -> None:
    assert len(set(sample_molecules(build(), 4, sampling=Sampling(max_new_tokens=9)))) == 1


@pytest.mark.parametrize(
    ("change", "options", "sentence"),
    [
        ({"tokenizer": None}, {}, "must have a tokenizer of molecules"),
        ({"tokenizer": SelfiesTokenizer()}, {}, "must have as many tokens as the model, 268"),
        ({}, {"count": 0}, "count must be at least 1"),
        ({}, {"count": 1.5}, "count must be a whole number"),
        ({}, {"like": "CCO"}, "like must be a list"),
        ({}, {"like": [""]}, "like must be a list of SMILES .* at place 0"),
        ({}, {"like": [None]}, "like must be a list of SMILES .* at place 0"),
        ({}, {"like": ["C C"]}, r"' ' is not in the vocabulary .*'like\[0\]'"),
        ({}, {"sampling": 0.7}, "sampling must be a Sampling"),
        ({}, {"sampling": Sampling(seed=[1, 2])}, "seed must have one number for each of the 3 molecules"),
    ],
)
def test_what_cannot_be_drawn_is_said(change: dict[str, Any], options: dict[str, Any], sentence: str) -> None:
    model = build()
    for name, value in change.items():
        setattr(model, name, value)
    with pytest.raises(ValueError, match=sentence):
        sample_molecules(model, **{"count": 3, **options})


def test_models_that_give_no_next_token_are_refused() -> None:
    model = build(head="sequence", num_classes=2)
    with pytest.raises(ValueError, match="must have head='lm'"):
        sample_molecules(model, 1)
    with pytest.raises(ValueError, match="tokenizer of molecules"):
        sample_molecules(object(), 1)
