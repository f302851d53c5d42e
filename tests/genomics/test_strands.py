"""Models of both strands: equivariance, heads, packing, and causal trunks that are read in parts."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sinuous
from sinuous.genomics.letters import DNATokenizer

DNA = DNATokenizer()
CLASSES, ORDER = 3, [0, 2, 1]  # neither strand, the first, the second
BOTH = ["shared", "conjoined"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def _compiled_anew() -> None:
    """Models of one class share a limit on the number of graphs."""
    torch.compiler.reset()


def create(strands: str = "shared", head: str = "lm", name: str = "dna_xlstm_nano", **options: Any) -> nn.Module:
    if head != "lm":
        options = {"num_classes": CLASSES, **options}
        if strands != "single":
            options.setdefault("class_complement", ORDER)
    sizes = {"dim": 32, "depth": 2, "num_heads": 2, "pattern": ["slstm", "mlstm"]}
    model = sinuous.create_model(name, strands=strands, head=head, dtype=torch.float64, **{**sizes, **options})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def draw_ids(batch: int = 2, steps: int = 11) -> Tensor:
    return torch.randint(12, (batch, steps))


@pytest.mark.parametrize("direction", ["causal", "tied", "alternating"])
@pytest.mark.parametrize("heads", [1, 2, 3, 4])
@pytest.mark.parametrize("cell", ["slstm", "mlstm"])
@pytest.mark.parametrize("strands", BOTH)
def test_the_other_strand_has_the_same_logits_in_its_own_order(
    strands: str, cell: str, heads: int, direction: str
) -> None:
    options: dict[str, Any] = {"rotary": True, "bias": True} if cell == "mlstm" else {"sinusoidal": True}
    options |= {"dim": 96 if heads == 3 else 32, "num_heads": heads}
    model, ids = create(strands, pattern=cell, direction=direction, **options), draw_ids()
    turned = model(model.reverse_complement(ids))
    assert (turned - model(ids).flip(1)[..., DNA.complement]).abs().max() < 1e-11
    assert not model.causal


@pytest.mark.parametrize("strands", BOTH)
@pytest.mark.parametrize("join_dim", [0, 8])
def test_labels_of_positions_change_strands_with_the_sequence(strands: str, join_dim: int) -> None:
    model, ids = create(strands, "position", join_dim=join_dim), draw_ids()
    assert (model(model.reverse_complement(ids)) - model(ids).flip(1)[..., ORDER]).abs().max() < 1e-11


@pytest.mark.parametrize("strands", BOTH)
def test_labels_of_sequences_are_the_same_for_both_strands(strands: str) -> None:
    ids = draw_ids()
    model = create(strands, "sequence")
    assert (model(model.reverse_complement(ids)) - model(ids)[..., ORDER]).abs().max() < 1e-11
    model = create(strands, "sequence", class_complement=None)
    assert (model(model.reverse_complement(ids)) - model(ids)).abs().max() < 1e-11


def test_both_strands_are_two_calls_of_one_model() -> None:
    ids = draw_ids()
    models = {strands: create(strands, direction="tied") for strands in ("single", *BOTH)}
    single = models["single"]
    for model in models.values():
        model.load_state_dict(single.state_dict())
    other = models["shared"].reverse_complement(ids)
    u, w = single.forward_features(ids), single.forward_features(other)
    for strands in BOTH:
        features = models[strands].forward_features(ids)
        torch.testing.assert_close(features, torch.cat([u, w.flip(1, 2)], -1), rtol=0, atol=1e-12)
    total = single(ids) + single(other).flip(1)[..., DNA.complement]
    torch.testing.assert_close(models["shared"](ids), total, rtol=0, atol=1e-12)
    torch.testing.assert_close(models["conjoined"](ids), total / 2, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("strands", "head", "direction"),
    list(itertools.product(["single", *BOTH], ["lm", "position", "sequence"], ["causal", "tied", "alternating"])),
)
def test_every_head_takes_every_strand_and_direction_packed_or_not(strands: str, head: str, direction: str) -> None:
    model = create(strands, head, direction=direction)
    ids, bounds = draw_ids(1, 9), torch.tensor([0, 3, 3, 9])
    parts = [model(ids[:, a:b]) for a, b in itertools.pairwise(bounds.tolist())]
    separate = torch.cat(parts, 0 if head == "sequence" else 1)
    torch.testing.assert_close(model(ids, bounds), separate, rtol=0, atol=1e-11)
    again = model.forward_head(model.forward_features(ids, bounds), ids, bounds)
    torch.testing.assert_close(again, separate, rtol=0, atol=1e-11)
    model(draw_ids()).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith("head"))


def test_padding_changes_no_label_of_a_sequence_whose_letters_are_pooled() -> None:
    """The mean is over letters alone; what the recurrence carries over padding is its own matter."""
    model, ids = create("shared", "sequence"), torch.randint(7, 11, (1, 6))
    features = model.forward_features(ids)
    padded = torch.cat([features, torch.randn(1, 3, features.shape[2], dtype=torch.float64)], 1)
    longer = torch.cat([ids, torch.full((1, 3), DNA.pad)], 1)
    torch.testing.assert_close(model.forward_head(padded, longer), model(ids), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"rotary": True}, {"sinusoidal": True}], ids=str)
@pytest.mark.parametrize("join_dim", [0, 8])
def test_causal_trunks_of_both_strands_join_in_parts_to_the_whole(join_dim: int, options: dict[str, Any]) -> None:
    model, ids = create("shared", "position", join_dim=join_dim, **options), draw_ids(steps=10)

    def in_parts(strand: Tensor) -> Tensor:
        state, parts = None, []
        for chunk in strand.split([4, 5, 1], 1):
            features, state = model.trunk.prefill(chunk, state)
            parts.append(features)
        return torch.cat(parts, 1)

    u, v = in_parts(ids), in_parts(model.reverse_complement(ids)).flip(1)
    torch.testing.assert_close(model.join(u, v), model(ids), rtol=0, atol=1e-10)
    state = model.trunk.initial_state(len(ids))
    torch.testing.assert_close(model.trunk.step(ids[:, 0], state)[0], u[:, 0], rtol=0, atol=1e-10)


def test_models_of_both_strands_have_no_state_of_their_own() -> None:
    model, ids = create("shared"), draw_ids()
    with pytest.raises(NotImplementedError, match="looks at the future"):
        model.prefill(ids)
    with pytest.raises(ValueError, match="no trunk for single ones"):
        _ = create("shared", published_strands=True).trunk
    with pytest.raises(ValueError, match="nothing to join; build the model with strands='shared'"):
        create("single").join(ids, ids)


@pytest.mark.parametrize(
    ("x", "sentence"),
    [
        (torch.randn(1, 4, 32, dtype=torch.float64), "complements letters and needs ids"),
        (torch.tensor([[7, 12]]), "ids must lie between 0 and 11"),
        (torch.tensor([[7, -1]]), "ids must lie between 0 and 11"),
        (torch.tensor([7, 8]), r"ids must be \[B, T\]"),
        (torch.tensor([[7, 8]], dtype=torch.int16), "ids must be int64 or int32"),
        ([[7, 8]], "x must be a tensor of ids"),
    ],
    ids=["embeddings", "high", "low", "one row", "int16", "list"],
)
def test_what_has_no_other_strand_is_refused(x: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        create("shared")(x)


@pytest.mark.parametrize("strands", ["single", "shared"])
@pytest.mark.parametrize(
    ("batch", "bounds", "sentence"),
    [
        (1, torch.tensor([0, 1, 5]), "cu_seqlens must rise from 0 to the packed length 4"),
        (1, torch.tensor([0, 3, 2, 4]), "cu_seqlens must rise"),
        (2, torch.tensor([0, 4, 8]), "packed input has batch size 1"),
        (1, [0, 4], "cu_seqlens must be an int32 or int64 tensor"),
    ],
    ids=["beyond the end", "falling", "batch of two", "list"],
)
def test_boundaries_that_cut_no_row_are_refused(strands: str, batch: int, bounds: Any, sentence: str) -> None:
    model, ids = create(strands, "sequence", direction="alternating"), draw_ids(batch, 4)
    with pytest.raises(ValueError, match=sentence):
        model(ids, bounds)
    with pytest.raises(ValueError, match=sentence):
        model.forward_head(model.forward_features(ids), ids, bounds)


def test_positions_of_choice_and_features_of_one_strand_are_refused() -> None:
    model, ids = create("shared", rotary=True), draw_ids()
    with pytest.raises(ValueError, match="position_ids are for strands='single'"):
        model(ids, position_ids=torch.zeros_like(ids))
    with pytest.raises(ValueError, match=r"features of both strands are \[B, T, 64\]"):
        model.forward_head(torch.randn(2, 11, 32, dtype=torch.float64))


@pytest.mark.parametrize("head", ["lm", "position", "sequence"])
def test_models_of_both_strands_start_on_meta(head: str) -> None:
    with torch.device("meta"):
        model = sinuous.create_model(
            "dna_xlstm_nano", strands="shared", head=head, num_classes=0 if head == "lm" else 2, sinusoidal=True
        )
    model = model.to_empty(device="cpu")
    model.init_weights()
    ids = draw_ids()
    turned = model(model.reverse_complement(ids))
    expected = model(ids).flip(1)[..., DNA.complement] if head == "lm" else model(ids)
    torch.testing.assert_close(turned, expected.flip(1) if head == "position" else expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("_compiled_anew")
@pytest.mark.parametrize("direction", ["causal", "tied", "alternating"])
def test_models_of_both_strands_are_exported_and_compiled_whole(direction: str) -> None:
    model, ids = create("shared", "sequence", direction=direction), draw_ids(1, 7)
    bounds = torch.tensor([0, 3, 7])
    expected = model(ids, bounds)
    exported = torch.export.export(model, (ids, bounds)).module()
    torch.testing.assert_close(exported(ids, bounds), expected, rtol=0, atol=1e-12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, bounds), expected, rtol=0, atol=1e-12)


def test_a_saved_model_of_both_strands_comes_back(tmp_path: Any) -> None:
    model, ids = create("shared", "position", direction="alternating", join_dim=4), draw_ids()
    sinuous.save(model, tmp_path / "model")
    again = sinuous.load(tmp_path / "model")
    torch.testing.assert_close(again(ids), model(ids), rtol=0, atol=0)
    assert again.class_complement == tuple(ORDER)
