"""Features, probabilities and scores of texts: as of each text alone, and as the equations say."""

import pytest
import torch
from letter_models import TOKENIZERS, letter_model, letters

import sinuous
from sinuous import genomics
from sinuous.genomics import embed, position_probabilities, reading, score

TEXTS = [letters("dna", length, length) for length in (5, 1, 64, 17, 130)] + ["acgtNNryACGT"]


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("pattern", ["mlstm", "slstm", "mamba"])
@pytest.mark.parametrize("packed", [16_384, 70, 1])
def test_no_text_meets_another(pattern: str, packed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PACKED", packed)  # 1: each letter by itself, with the state carried
    model = letter_model("dna", pattern)
    several = embed(model, TEXTS), position_probabilities(model, TEXTS), list(score(model, TEXTS))
    monkeypatch.setattr(reading, "PACKED", 16_384)
    for i, text in enumerate(TEXTS):
        ids = TOKENIZERS["dna"].encode(text)
        read = torch.cat([torch.tensor([2]), ids])[None]
        with torch.no_grad():
            features, logits = model.forward_features(read)[0, 1:], model(read)[0, :-1]
        close(several[0][i], features)
        p = torch.zeros(len(text), 12, dtype=torch.float64)
        p[:, 7:11] = logits[:, 7:11].softmax(-1)
        close(several[1][i], p)
        known = ids < 11
        close(several[2][i], p[torch.arange(len(text)), ids][known].log().mean())
        for alone, together in zip((embed, position_probabilities, score), several, strict=True):
            close(alone(model, [text])[0], together[i])


def test_the_sum_of_scores_is_log_p() -> None:
    model = letter_model("dna")
    words = [a + b + c for a in "ACGT" for b in "ACGT" for c in "ACGT"]
    close(score(model, words, reduce="sum").exp().sum(), torch.tensor(1.0, dtype=torch.float64))
    close(score(model, words, reduce="sum"), 3 * score(model, words))
    close(score(model, ["ACN", "AC"], reduce="sum")[:1], score(model, ["ANC", "AC"], reduce="sum")[1:])
    assert score(model, ["N", ""], reduce="sum").tolist() == [0, 0]


def test_letters_do_not_see_those_behind_them() -> None:
    for kind in ("dna", "protein"):
        model, text = letter_model(kind), letters(kind, 40)
        changed = text[:25] + letters(kind, 15, 1)
        a, b = position_probabilities(model, [text, changed])
        close(a[:26], b[:26])
        assert (a[26:] - b[26:]).abs().max() > 1e-6


def test_specials_have_no_probability() -> None:
    for kind, text in (("protein", "MKTXBUAC"), ("smiles", "CC(=O)[13CH3]"), ("dna", "ACNGT")):
        tokenizer = TOKENIZERS[kind]
        (p,) = position_probabilities(letter_model(kind), [text])
        assert p.shape == (len(tokenizer.encode(text)), tokenizer.vocab_size)
        assert not p[:, tokenizer.special].any()
        close(p.sum(-1), torch.ones(len(p), dtype=torch.float64))
        assert score(letter_model(kind), [text]).isfinite().all()
    assert not p[:, 11].any()


def test_models_that_see_both_sides_give_features_alone() -> None:
    model = letter_model("dna", causal=False)
    with torch.no_grad():
        for features, text in zip(embed(model, TEXTS), TEXTS, strict=True):
            close(features, model.forward_features(TOKENIZERS["dna"].encode(text)[None])[0])
    for call in (position_probabilities, score):
        with pytest.raises(ValueError, match="must be causal"):
            call(model, TEXTS)


def test_no_texts_and_empty_texts() -> None:
    model = letter_model("dna")
    assert embed(model, []) == position_probabilities(model, []) == []
    assert score(model, []).shape == (0,)
    assert [tuple(features.shape) for features in embed(model, ["", "A"])] == [(0, 16), (1, 16)]
    assert [tuple(p.shape) for p in position_probabilities(model, ["", "A"])] == [(0, 12), (1, 12)]


def test_a_model_in_training_is_read_as_it_will_be_used() -> None:
    model = letter_model("dna", drop_rate=0.5)
    wanted = score(model, TEXTS)
    model.train()
    close(score(model, TEXTS), wanted)
    assert all(module.training for module in model.modules())


def test_what_cannot_be_read_is_refused() -> None:
    model = letter_model("dna")
    with pytest.raises(ValueError, match="must be a list of texts"):
        embed(model, "ACGT")
    with pytest.raises(ValueError, match="'text 2' at position 3"):
        score(model, ["ACGT", "ACE"])
    with pytest.raises(ValueError, match="text 2 has no letter that counts"):
        score(model, ["ACGT", "NN"])
    with pytest.raises(ValueError, match="reduce must be 'mean' or 'sum'"):
        score(model, ["ACGT"], reduce="median")
    with pytest.raises(ValueError, match="head='lm'"):
        score(letter_model("dna", head="position", num_classes=3, tie_head=True), ["ACGT"])
    model.tokenizer = None
    for call in (embed, position_probabilities, score):
        with pytest.raises(ValueError, match=r"set model\.tokenizer"):
            call(model, ["ACGT"])
    with pytest.raises(ValueError, match="must be a list of texts"):
        embed(letter_model("dna"), [3, 4].__iter__())
    assert genomics.score is score


@pytest.mark.parametrize("strands", ["shared", "conjoined"])
@pytest.mark.parametrize("name", ["dna_xlstm_nano", "caduceus_ps_1k"])
def test_both_strands_are_embedded_as_published(name: str, strands: str) -> None:
    own = {"num_heads": 2} if name == "dna_xlstm_nano" else {}
    model = sinuous.create_model(name, dim=16, depth=2, strands=strands, **own).double().eval()
    with torch.no_grad():
        for features, text in zip(embed(model, TEXTS), TEXTS, strict=True):
            close(features, model.forward_features(TOKENIZERS["dna"].encode(text)[None])[0])
            assert features.shape == (len(text), 32)
    for call in (position_probabilities, score):
        with pytest.raises(ValueError, match="must be causal"):
            call(model, TEXTS)


def test_scores_of_proteins_count_positions_from_each_start() -> None:
    model = sinuous.create_model("prot_xlstm_nano", dim=16, depth=2, num_heads=2).double().eval()
    texts = [letters("protein", length, length) for length in (30, 7, 51)]
    together = score(model, texts)
    for i, text in enumerate(texts):
        close(score(model, [text])[0], together[i])
