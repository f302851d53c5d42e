"""Shared tasks: losses and scores against their formulas, ignored targets, packed rows, masks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinuous.core.data import packed
from sinuous.core.tasks.classification import Classification
from sinuous.core.tasks.labelling import Labelling
from sinuous.core.tasks.language_modelling import IGNORED, LanguageModelling, Masking


class Fixed(nn.Module):
    """Gives the same output for every input, and remembers what it was called with."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        self.x, self.cu_seqlens = x, cu_seqlens
        return self.output


def computed(task: nn.Module) -> dict[str, float]:
    return {name: float(metric.compute()) for name, metric in task.scores.items()}  # type: ignore[union-attr]


def test_classification_smooths_in_training_and_scores_plainly() -> None:
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    model, task = Fixed(logits), Classification(3, smoothing=0.1)
    batch = (torch.zeros(6, 1), labels)
    assert torch.equal(task.loss(model, batch), F.cross_entropy(logits, labels, label_smoothing=0.1))
    seen = task.score(model, batch)
    assert torch.equal(seen[:, 0], logits.argmax(-1).double())
    assert torch.equal(seen[:, 2], labels.double())
    right = float((logits.argmax(-1) == labels).float().mean())
    assert computed(task) == pytest.approx({"accuracy": right, "loss": float(F.cross_entropy(logits, labels))})


def test_classification_without_augmentation_neither_smooths_nor_mixes() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    task = Classification(3, smoothing=0.5, mixing=lambda x, y: (x * 0, 1 - y))
    task.augment = False
    model = Fixed(logits)
    assert torch.equal(task.loss(model, (torch.ones(4, 2), labels)), F.cross_entropy(logits, labels))
    assert torch.equal(model.x, torch.ones(4, 2))


@pytest.mark.parametrize("task", [Classification(3), LanguageModelling("base"), Labelling(3)])
def test_packed_rows_reach_the_model_as_such(task: nn.Module) -> None:
    bounds = torch.tensor([0, 2, 5])
    logits = torch.randn(2, 3) if isinstance(task, Classification) else torch.randn(1, 5, 3)
    targets = torch.tensor([0, 2]) if isinstance(task, Classification) else torch.tensor([[0, 1, 2, 0, 1]])
    model = Fixed(logits)
    task.loss(model, (torch.zeros(1, 5, dtype=torch.long), targets, bounds))
    assert model.cu_seqlens is bounds
    model.cu_seqlens = None
    task.score(model, (torch.zeros(1, 5, dtype=torch.long), targets, bounds))
    assert model.cu_seqlens is bounds


def test_what_a_batch_says_by_name_reaches_the_model() -> None:
    class Positioned(Fixed):
        def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
            self.position_ids = position_ids
            return super().forward(x, cu_seqlens)

    model, positions = Positioned(torch.randn(2, 3, 5)), torch.arange(6).view(2, 3)
    targets = torch.randint(5, (2, 3))
    task = LanguageModelling("residue")
    plain = task.loss(model, (targets, targets))
    assert model.position_ids is None
    assert torch.equal(task.loss(model, (targets, targets, {"position_ids": positions})), plain)
    assert model.position_ids is positions
    task.score(model, (targets, targets, {"position_ids": positions}))
    assert model.cu_seqlens is None


@pytest.mark.parametrize("of_positions", [False, True])
def test_packing_joins_sequences_with_their_labels(of_positions: bool) -> None:
    rows = [torch.arange(length) for length in (3, 1, 4)]
    labels = [row + 10 for row in rows] if of_positions else [2, 0, 1]
    inputs, targets, cu_seqlens = packed(list(zip(rows, labels, strict=True)))
    assert cu_seqlens.tolist() == [0, 3, 4, 8]
    assert inputs.tolist() == [[0, 1, 2, 0, 0, 1, 2, 3]]
    assert torch.equal(targets, inputs + 10 if of_positions else torch.tensor([2, 0, 1]))


def test_ignored_targets_change_neither_loss_nor_bits() -> None:
    logits, targets = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    targets[0, 1:] = IGNORED
    counted = targets != IGNORED
    nats = F.cross_entropy(logits[counted], targets[counted])
    model, task = Fixed(logits), LanguageModelling("base")
    batch = (torch.zeros(2, 5, dtype=torch.long), targets)
    torch.testing.assert_close(task.loss(model, batch), nats)
    assert task.score(model, batch) == 6
    assert computed(task) == pytest.approx({"bits_per_base": float(nats) / math.log(2)})


def test_bits_are_a_mean_over_targets_and_not_over_batches() -> None:
    task = LanguageModelling("byte")
    nats, count = 0.0, 0
    for size in (1, 6):
        logits, targets = torch.randn(size, 3, 4), torch.randint(4, (size, 3))
        task.score(Fixed(logits), (targets, targets))
        nats += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        count += targets.numel()
    assert computed(task)["bits_per_byte"] == pytest.approx(nats / count / math.log(2))


def test_a_batch_without_targets_gives_a_loss_of_zero() -> None:
    targets = torch.full((2, 5), IGNORED)
    for task in (LanguageModelling("byte"), Labelling(3)):
        model = Fixed(torch.randn(2, 5, 3, requires_grad=True))
        loss = task.loss(model, (torch.zeros(2, 5, dtype=torch.long), targets))
        loss.backward()
        assert float(loss.detach()) == 0
        assert model.output.grad is not None
        assert task.score(model, (torch.zeros(2, 5, dtype=torch.long), targets)) == 0


def test_masking_hides_the_share_asked_for_and_scores_the_same_places_each_time() -> None:
    ids = torch.randint(1, 50, (40, 100))
    targets = ids.clone()
    targets[:, 50:] = IGNORED
    hidden, wanted = Masking(0.15, mask_token=0, vocab_size=50)(ids, targets, torch.Generator().manual_seed(0))
    chosen = wanted != IGNORED
    assert not chosen[:, 50:].any()
    assert 0.13 < float(chosen[:, :50].float().mean()) < 0.17
    assert torch.equal(hidden[~chosen], ids[~chosen])
    assert torch.equal(wanted[chosen], ids[chosen])
    shares = float((hidden[chosen] == 0).float().mean()), float((hidden[chosen] == ids[chosen]).float().mean())
    assert shares == pytest.approx((0.8, 0.1), abs=0.06)
    task = LanguageModelling("base", Masking(0.15, 0, 50))
    model = Fixed(torch.zeros(40, 100, 50))
    task.score(model, (ids, targets))
    first = model.x
    task.score(model, (ids, targets))
    assert torch.equal(model.x, first)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Masking(0.0, 0, 4), r"masking.rate must lie above 0 and not above 1 \(got 0.0\)"),
        (lambda: Masking(0.5, 4, 4), r"masking.mask_token must lie between 0 and 3 \(got 4\)"),
        (lambda: Classification(3, smoothing=1.0), r"task.smoothing must be in \[0, 1\) \(got 1.0\)"),
        (lambda: Labelling(3, background=3), r"task.background must lie between 0 and 2 \(got 3\)"),
        (lambda: Labelling(3, class_weights=[1.0]), r"one number for each of the 3 classes \(got 1\)"),
    ],
)
def test_options_out_of_range_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_labelling_in_one_axis_and_in_two() -> None:
    labels = torch.tensor([[0, 1, 2, IGNORED]])
    predicted = torch.tensor([[0, 1, 1, 2]])
    logits = F.one_hot(predicted, 3).float()
    for model, targets in ((Fixed(logits), labels), (Fixed(logits.mT.unflatten(2, (2, 2))), labels.view(1, 2, 2))):
        task = Labelling(3)
        kept = logits[0, :3]
        torch.testing.assert_close(task.loss(model, (targets, targets)), F.cross_entropy(kept, labels[0, :3]))
        assert task.score(model, (targets, targets)) == 3
        # Class 0 is right, class 1 is half right, class 2 is never found.
        assert computed(task) == pytest.approx({"accuracy": 2 / 3, "mean_iou": (1 + 0.5 + 0) / 3})


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([[0, 3, -1, 2]]), r"classes from 0 to 2, or -100 .*got -1, 3.; correct the labels"),
        (torch.zeros(1, 5, dtype=torch.long), r"of the model's positions, \[1, 4\] .got \[1, 5\].*of the same size"),
        (torch.zeros(1, 2, 3, dtype=torch.long), r"of the model's positions, \[1, 2, 2\] .got \[1, 2, 3\]"),
    ],
)
def test_labels_of_other_classes_or_sizes_are_told(labels: Tensor, message: str) -> None:
    model = Fixed(torch.randn(1, 4, 3) if labels.ndim == 2 else torch.randn(1, 3, 2, 2))
    for call in (Labelling(3).loss, Labelling(3).score):
        with pytest.raises(ValueError, match=message):
            call(model, (labels, labels))


def test_the_background_counts_as_a_mistake_but_not_in_the_mean() -> None:
    labels, predicted = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 1, 1]])
    task = Labelling(3, background=0)
    task.score(Fixed(F.one_hot(predicted, 3).float()), (labels, labels))
    assert computed(task)["mean_iou"] == pytest.approx(2 / 3)


def test_weights_of_classes_are_in_the_loss_and_not_in_checkpoints() -> None:
    logits, labels = torch.randn(1, 4, 3), torch.tensor([[0, 1, 2, 0]])
    task = Labelling(3, class_weights=[1.0, 2.0, 3.0])
    expected = F.cross_entropy(logits[0], labels[0], torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(task.loss(Fixed(logits), (labels, labels)), expected)
    assert task.state_dict() == {}
