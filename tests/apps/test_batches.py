"""The DataModule: order and augmentation are functions of seed, epoch and example, whoever reads the examples."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sinuous.apps.batches import Batches, LikeLengths, SeededExamples, SeededSampler, evenly, lengths_of


class Noisy(Dataset[Any]):
    """Example i is i with noise of every generator that transforms draw from."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        noise = [random.random(), np.random.rand(), float(torch.rand(()))]  # noqa: NPY002 - as transforms of others do
        return torch.tensor([index, *noise], dtype=torch.float64)


class Data:
    noun = "numbers"
    augment = True

    def split(self, name: str) -> Noisy:
        return Noisy(24)

    def example(self) -> Tensor:
        return torch.zeros(1, 4)


def epoch(number: int, **options: Any) -> Tensor:
    batches = Batches(Data(), **{"batch_size": 4, "eval_batch_size": 4, "seed": 3, **options})
    loader = batches.train_dataloader()
    loader.sampler.set_epoch(number)
    return torch.cat(list(loader))


@pytest.mark.parametrize("repeats", [0, 3])
def test_batches_are_the_same_however_many_processes_read(repeats: int) -> None:
    alone = epoch(1, repeats=repeats)
    torch.manual_seed(99)
    random.seed(99)
    assert torch.equal(epoch(1, repeats=repeats, num_workers=2), alone)


def test_noise_changes_with_epoch_seed_and_example_alone() -> None:
    first = epoch(0)
    by_example = {int(row[0]): row for row in first}
    assert len(by_example) == 24
    assert not torch.equal(epoch(1), first)
    again = {int(row[0]): row for row in epoch(0, batch_size=3)}
    assert all(torch.equal(again[i], by_example[i]) for i in range(24))
    assert len({tuple(row[1:].tolist()) for row in first}) == 24
    assert not set(map(tuple, epoch(0, seed=4)[:, 1:].tolist())) & set(map(tuple, first[:, 1:].tolist()))


def test_an_example_that_is_repeated_is_changed_anew() -> None:
    rows = epoch(0, repeats=3)
    assert len({tuple(row[1:].tolist()) for row in rows}) == len(rows)


def test_a_loader_goes_on_from_the_middle_of_an_epoch() -> None:
    whole = epoch(2)
    states = {}
    for workers in (0, 2):
        loader = Batches(Data(), batch_size=4, eval_batch_size=4, seed=3, num_workers=workers).train_dataloader()
        loader.sampler.set_epoch(2)
        reading = iter(loader)
        next(reading), next(reading)
        states[workers] = loader.state_dict()
    for workers in (0, 2):
        other = Batches(Data(), batch_size=4, eval_batch_size=4, seed=3, num_workers=workers).train_dataloader()
        other.sampler.set_epoch(2)
        other.load_state_dict(states[workers])
        assert torch.equal(torch.cat(list(other)), whole[8:])


def test_reading_examples_leaves_the_generators_of_the_training_alone() -> None:
    examples = SeededExamples(Noisy(4))
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index] # noqa: NPY002
    examples.__getitems__([(0, 1), (3, 2)])
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index] # noqa: NPY002
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


@pytest.mark.parametrize("limit", [1, 3, 7, 30])
def test_a_limit_takes_examples_from_everywhere(limit: int) -> None:
    labels = [0] * 10 + [1] * 10 + [2] * 10
    taken = evenly(labels, limit)
    assert len(taken) == limit
    if limit >= 3:
        assert {taken[i] for i in range(limit)} == {0, 1, 2}
    assert evenly(labels, None) is labels


def test_examples_as_they_are_when_nothing_is_to_be_augmented() -> None:
    data = Data()
    Batches(data, batch_size=4, eval_batch_size=4, augment=False)
    assert data.augment is False


def test_the_order_of_an_epoch_is_torchs() -> None:
    order = torch.utils.data.DistributedSampler(Noisy(10), 1, 0, seed=5)
    sampler = SeededSampler(order, 5)
    sampler.set_epoch(2)
    assert [place for place, _ in sampler] == list(order)


class Lengths(Noisy):
    """Examples that say how long they are: the lengths of neighbours differ most."""

    @property
    def lengths(self) -> list[int]:
        return [1 + 7 * i % self.count for i in range(self.count)]


def test_batches_of_examples_with_lengths_are_of_like_length_and_miss_none() -> None:
    class LongAndShort(Data):
        def split(self, name: str) -> Lengths:
            return Lengths(600)

    batches = Batches(LongAndShort(), batch_size=5, eval_batch_size=5, seed=3, limit=500)
    loader, lengths = batches.train_dataloader(), lengths_of(batches.split("train"))
    assert lengths is not None
    assert len(lengths) == 500
    whole = batches.split("train").dataset.lengths
    epochs = []
    for number in (0, 1):
        loader.sampler.set_epoch(number)
        epochs.append(torch.stack([batch[:, 0].long() for batch in loader]))
    spread = [max(whole[i] for i in row) - min(whole[i] for i in row) for row in epochs[0].tolist()]
    assert max(spread) < 60  # of 600; those of a random five lie 400 apart
    assert epochs[0].unique().numel() == 500
    firsts = [whole[int(row[0])] for row in epochs[0]]
    assert firsts != sorted(firsts)
    assert not torch.equal(epochs[0].sort(0).values, epochs[1].sort(0).values)


def test_a_last_batch_that_is_not_full_comes_last() -> None:
    order = LikeLengths(_Places(13), list(range(13)), batch_size=5, seed=0)
    assert sorted(order) == list(range(13))
    assert list(order)[10:] == [10, 11, 12]


class _Places(list):
    def __init__(self, count: int) -> None:
        super().__init__(range(count))

    def set_epoch(self, epoch: int) -> None:
        pass
