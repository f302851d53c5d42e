"""Heads for tokens, positions and sequences: shapes, packing, what is pooled, and weights of another head."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sinuous

CLASSES = 3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def _compiled_anew() -> None:
    """Models of one class share a limit on the number of graphs."""
    torch.compiler.reset()


def create(head: str, **options: Any) -> nn.Module:
    if head != "lm":
        options.setdefault("num_classes", CLASSES)
    sizes = {"dim": 16, "depth": 2, "num_heads": 2, "pattern": ["mlstm", "slstm"]}
    return sinuous.create_model("chem_xlstm_nano", head=head, dtype=torch.float64, **{**sizes, **options}).eval()


def molecules(*texts: str) -> list[torch.Tensor]:
    tokenizer = create("lm").tokenizer
    return [tokenizer.encode(text)[None] for text in texts]


@pytest.mark.parametrize("head", ["lm", "position", "sequence"])
def test_packed_sequences_have_the_logits_of_separate_calls(head: str) -> None:
    model, parts = create(head), molecules("CCO", "c1ccccc1", "", "N")
    bounds = torch.tensor([0, *(part.shape[1] for part in parts)]).cumsum(0)
    packed = model(torch.cat(parts, 1), bounds)
    separate = torch.cat([model(part) for part in parts], 0 if head == "sequence" else 1)
    torch.testing.assert_close(packed, separate, rtol=0, atol=1e-12)
    assert packed.shape[-1] == (model.vocab_size if head == "lm" else CLASSES)


def test_a_sequence_head_reads_letters_alone() -> None:
    model, (ids,) = create("sequence"), molecules("CC(=O)O")
    padding = torch.full((1, 4), model.tokenizer.pad)
    torch.testing.assert_close(model(torch.cat([ids, padding], 1)), model(ids), rtol=0, atol=1e-12)


@pytest.mark.parametrize("head", ["lm", "position"])
def test_prefill_and_steps_give_what_the_whole_gives(head: str) -> None:
    model, (ids,) = create(head), molecules("CC(=O)Oc1ccccc1")
    first, state = model.prefill(ids[:, :4])
    rest = []
    for t in range(4, ids.shape[1]):
        logits, state = model.step(ids[:, t], state)
        rest.append(logits)
    torch.testing.assert_close(torch.cat([first, torch.stack(rest, 1)], 1), model(ids), rtol=0, atol=1e-10)


def test_a_sequence_head_has_no_steps() -> None:
    model, (ids,) = create("sequence"), molecules("CC")
    with pytest.raises(NotImplementedError, match="reads the whole sequence"):
        model.prefill(ids)
    with pytest.raises(NotImplementedError, match="reads the whole sequence"):
        model.step(ids[:, 0], model.initial_state(1))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"head": "lm", "num_classes": 3}, "num_classes must be 0 with head='lm'"),
        ({"head": "position", "num_classes": 0}, "num_classes must be at least 1 with head='position'"),
        ({"head": "words"}, "head must be one of 'lm', 'sequence', 'position'"),
    ],
)
def test_heads_and_classes_that_do_not_fit_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        create(**options)


def test_features_of_other_tokens_are_refused() -> None:
    model, (ids,) = create("sequence"), molecules("CCC")
    with pytest.raises(ValueError, match=r"ids must be those of the features, \[1, 3\]"):
        model.forward_head(model.forward_features(ids), ids[:, :2])


def saved(model: nn.Module, file: Path) -> Path:
    torch.save(model.state_dict(), file)
    return file


def test_weights_of_a_language_model_start_a_model_of_labels(tmp_path: Path) -> None:
    model, (ids,) = create("lm"), molecules("CCN")
    with pytest.warns(UserWarning, match="no head='position' for 3 classes: the new head has random weights"):
        labels = create("position", checkpoint_path=saved(model, tmp_path / "lm.pt"))
    torch.testing.assert_close(labels.forward_features(ids), model.forward_features(ids), rtol=0, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = create("position", checkpoint_path=saved(labels, tmp_path / "labels.pt"))
    torch.testing.assert_close(again(ids), labels(ids), rtol=0, atol=0)


def test_weights_of_labels_are_refused_by_a_language_model(tmp_path: Path) -> None:
    file = saved(create("sequence"), tmp_path / "labels.pt")
    with pytest.raises(ValueError, match="build the model with head='sequence', num_classes=3"):
        create("lm", checkpoint_path=file)


@pytest.mark.parametrize("head", ["lm", "position", "sequence"])
def test_heads_start_anew_and_on_meta(head: str) -> None:
    with torch.device("meta"):
        model = create(head)
    model = model.to_empty(device="cpu")
    model.init_weights()
    (ids,) = molecules("CCO")
    assert model(ids).isfinite().all()
    assert model.is_letter.sum() == len(model.tokenizer.letters)


@pytest.mark.slow
@pytest.mark.usefixtures("_compiled_anew")
@pytest.mark.parametrize("head", ["lm", "position", "sequence"])
def test_heads_are_exported_and_compiled_whole(head: str) -> None:
    model, (ids,) = create(head), molecules("CCOCC")
    bounds = torch.tensor([0, 2, 5])
    expected = model(ids, bounds)
    exported = torch.export.export(model, (ids, bounds)).module()
    torch.testing.assert_close(exported(ids, bounds), expected, rtol=0, atol=1e-12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, bounds), expected, rtol=0, atol=1e-12)
