"""Chem-xLSTM: sizes, and the authors' weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from xlstm_equations import Sizes, features, file_of

import sinuous

SMALL = Sizes(vocab=11, dim=32, kinds="mm", heads=2)


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        ("chem_xlstm_1_6m", {}, 1_644_296),
        ("chem_xlstm_15m", {}, 14_816_400),
        ("chem_xlstm_15m", {"vocab_size": 200}, 14_983_312),
        ("chem_xlstm_15m", {"vocab_size": 100}, 14_880_912),
    ],
)
def test_models_have_the_authors_numbers_of_parameters(name: str, options: dict[str, int], parameters: int) -> None:
    with torch.device("meta"):
        model = sinuous.create_model(name, **options)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_nano_model_is_small_enough_to_ship_and_reads_smiles() -> None:
    model = sinuous.create_model("chem_xlstm_nano")
    assert sum(p.numel() for p in model.parameters()) <= 2_000_000
    ids = model.tokenizer.encode("C/C=C\\C(=O)[O-]")
    assert model(ids[None]).shape == (1, len(ids), model.tokenizer.vocab_size)


def test_the_authors_vocabulary_is_not_taken_for_ours() -> None:
    assert sinuous.create_model("chem_xlstm_1_6m").tokenizer is None


def create(file: Path, **options: int) -> torch.nn.Module:
    sizes = {"vocab_size": SMALL.vocab, "dim": SMALL.dim, "depth": 2, "num_heads": SMALL.heads}
    return sinuous.create_model("chem_xlstm_1_6m", checkpoint_path=file, dtype=torch.float64, **{**sizes, **options})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.save({f"model.{name}": tensor for name, tensor in file_of(SMALL).items()}, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def test_the_authors_weights_give_their_logits(file: Path) -> None:
    torch.manual_seed(0)
    state, ids = file_of(SMALL), torch.randint(SMALL.vocab, (2, 9))
    expected = features(state, SMALL, ids) @ state["lm_head.weight"].T
    torch.testing.assert_close(create(file)(ids), expected, rtol=0, atol=1e-10)


def test_weights_with_other_tokens_or_heads_are_refused_with_the_remedy(file: Path) -> None:
    with pytest.raises(ValueError, match="11 tokens and the model 12; build the model with vocab_size=11"):
        create(file, vocab_size=12)
    with pytest.raises(ValueError, match="2 heads and the model's 1"):
        create(file, num_heads=1)
    with pytest.raises(ValueError, match="build the model with num_heads=2"):
        create(file, num_heads=1)
