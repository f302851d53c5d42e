"""Tasks of sequences: the other strand is the reverse complement, strands merge, rows are told by their relatives."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import sinuous
from sinuous.core.tasks.language_modelling import IGNORED, Masking
from sinuous.genomics.letters import DNATokenizer
from sinuous.genomics.tasks import Annotation, GenomeModelling, ProteinModelling


class Table(nn.Module):
    """Logits by the id alone, and all inputs that it has seen."""

    def __init__(self, tokens: int, classes: int) -> None:
        super().__init__()
        self.table = torch.randn(tokens, classes, generator=torch.Generator().manual_seed(0))
        self.seen: list[Tensor] = []

    def forward(self, ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        self.seen.append(ids)
        return self.table[ids]


def computed(task: nn.Module) -> dict[str, float]:
    return {name: float(metric.compute()) for name, metric in task.scores.items()}  # type: ignore[union-attr]


def bits(model: Table, ids: Tensor, targets: Tensor) -> float:
    return float(F.cross_entropy(model.table[ids].flatten(0, 1), targets.flatten(), ignore_index=IGNORED)) / math.log(2)


def window(text: str) -> tuple[Tensor, Tensor]:
    letters = DNATokenizer().encode(text)[None]
    start = torch.full((1, 1), DNATokenizer.start)
    return torch.cat([start, letters[:, :-1]], 1), torch.where(letters == DNATokenizer.ignored, IGNORED, letters)


def test_the_other_strand_is_the_window_of_the_reverse_complement() -> None:
    task, model = GenomeModelling("base"), Table(12, 12)
    forward, reverse = window("AACGTNCCATGN"), window("NCATGGNACGTT")
    for made, wanted in zip(task.other_strand(*forward), reverse, strict=True):
        assert torch.equal(made, wanted)
    assert task.score(model, forward) == 10
    one, other = bits(model, *forward), bits(model, *reverse)
    scores = computed(task)
    assert scores == pytest.approx({"bits_per_base": one, "bits_per_base_of_both_strands": (one + other) / 2})
    alone = GenomeModelling("base", both_strands=False)
    alone.score(model, forward)
    assert computed(alone) == pytest.approx({"bits_per_base": one})


def test_bases_already_counted_are_not_counted_on_the_other_strand() -> None:
    ids, targets = window("AACGTTCCATGG")
    targets[:, :4] = IGNORED
    reverse_ids, reverse_targets = GenomeModelling("base").other_strand(ids, targets)
    assert DNATokenizer().decode(reverse_ids[0, 1:]) == "CCATGGAACGT"
    assert (reverse_targets[0] == IGNORED).tolist() == [False] * 8 + [True] * 4


def test_hidden_bases_have_another_strand_too() -> None:
    letters = DNATokenizer().encode("AACGTTCC")[None]
    task = GenomeModelling("base", Masking(0.5, 3, 12))
    ids, targets = task.other_strand(letters, letters)
    assert DNATokenizer().decode(ids[0]) == DNATokenizer().decode(targets[0]) == "GGAACGTT"


def test_weights_that_continue_bases_begin_a_model_that_labels_them_from_both_strands(tmp_path: Path) -> None:
    sizes = {"dim": 16, "depth": 1, "num_heads": 2}
    trained = sinuous.create_model("dna_xlstm_nano", **sizes)
    save_file(trained.state_dict(), tmp_path / "best.safetensors")
    options = {"head": "position", "num_classes": 5, "strands": "shared", "join_dim": 8, **sizes}
    with pytest.warns(UserWarning, match="the new head has random weights"):
        model = sinuous.create_model("dna_xlstm_nano", checkpoint_path=tmp_path / "best.safetensors", **options)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in trained.state_dict().items() if name in state)
    save_file(state, tmp_path / "labels.safetensors")
    again = sinuous.create_model("dna_xlstm_nano", checkpoint_path=tmp_path / "labels.safetensors", **options)
    assert torch.equal(again.join_layer.weight, model.join_layer.weight)


def test_merged_strands_sum_their_probabilities() -> None:
    task = Annotation(5)
    # gene + is the likeliest of five, but the two codings together are likelier than the two genes.
    probabilities = torch.tensor([0.05, 0.35, 0.0, 0.3, 0.3]).clamp(min=1e-9)
    model = lambda ids: probabilities.log().expand(*ids.shape, 5)  # noqa: E731
    ids = torch.zeros(1, 4, dtype=torch.long)
    task.score(model, (ids, torch.tensor([[1, 3, 4, IGNORED]])))  # type: ignore[arg-type]
    scores = computed(task)
    assert scores["accuracy"] == pytest.approx(1 / 3)
    assert scores["accuracy_of_merged_strands"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match=r"task.num_classes must be 5"):
        Annotation(3)


def test_proteins_are_scored_by_the_relatives_before_them() -> None:
    task, model = ProteinModelling("residue", [0, 1]), Table(38, 38)
    rows = [[0, 5, 6, 7], [0, 5, 0, 7], [0, 9, 9, 9]]
    targets = [[5, 6, 7, IGNORED], [IGNORED, IGNORED, 7, IGNORED], [9, 9, 9, IGNORED]]
    batch = (torch.tensor(rows), torch.tensor(targets), {"position_ids": torch.zeros(3, 4, dtype=torch.long)})
    assert task.score(model, batch) == 7
    scores = computed(task)
    assert scores["bits_per_residue"] == pytest.approx(bits(model, *batch[:2]))
    assert scores["bits_per_residue_after_0"] == pytest.approx(bits(model, batch[0][[0, 2]], batch[1][[0, 2]]))
    assert scores["bits_per_residue_after_1"] == pytest.approx(bits(model, batch[0][[1]], batch[1][[1]]))
    assert len(scores) == 3
