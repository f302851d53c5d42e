"""The one DataModule: plain data in batches, in the same order and changed in the same way for the same seed.

The order of training examples is a function of (seed, epoch), and the random numbers with which an example is changed
are a function of (seed, epoch, example). A run thus goes on exactly where it stopped, however many processes read.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Dataset, DistributedSampler, Sampler, Subset
from torchdata.stateful_dataloader import StatefulDataLoader

from sinuous.core.data import Data

Draw = tuple[int, int]
"""An example's place in its dataset, and the seed of the random numbers with which it is changed."""


class Batches(L.LightningDataModule):
    """Batches of the splits `train`, `val` and `test` of some data.

    Args:
        data: see `sinuous.core.data`.
        batch_size: training examples per batch and process.
        eval_batch_size: examples per batch without gradients.
        num_workers: processes that read examples; 0 reads in the training process, best for sets held in memory.
        repeats: times that an example comes in one batch, each time augmented anew (arXiv 1901.09335); 0 and 1: once.
        limit: use only so many training examples, evenly spread over the set.
        eval_limit: the same for validation and test.
        seed: of order and augmentation, together with the epoch.
        augment: False gives training examples as they are, for data that knows how.

    Raises:
        ValueError: if a size is too small, or the data cannot do without augmentation.
    """

    def __init__(
        self,
        data: Data,
        *,
        batch_size: int,
        eval_batch_size: int,
        num_workers: int = 0,
        repeats: int = 0,
        limit: int | None = None,
        eval_limit: int | None = None,
        seed: int = 0,
        augment: bool = True,
    ) -> None:
        super().__init__()
        _at_least(1, batch_size=batch_size, eval_batch_size=eval_batch_size, limit=limit, eval_limit=eval_limit)
        _at_least(0, num_workers=num_workers, repeats=repeats)
        self.data = data
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.repeats, self.limit, self.eval_limit, self.seed = repeats, limit, eval_limit, seed
        if not augment and hasattr(data, "augment"):
            data.augment = False
        self._splits: dict[str, Any] = {}

    def split(self, name: str) -> Any:
        """The dataset of one split, cut to its limit."""
        if name not in self._splits:
            whole: Any = self.data.split(name)
            self._splits[name] = evenly(whole, self.limit if name == "train" else self.eval_limit)
        return self._splits[name]

    def scored(self) -> ScoredData:
        """The data with only those examples that this process scores, in the order in which it does."""
        return ScoredData(self.data, self._of_process)

    def _of_process(self, name: str) -> Any:
        examples = self.split(name)
        world, rank = _world()
        return examples if world == 1 else Subset(examples, range(rank, len(examples), world))

    def train_dataloader(self) -> StatefulDataLoader:
        examples = self.split("train")
        world, rank = _world()
        if len(examples) < self.batch_size * world:
            raise ValueError(
                f"{len(examples)} training {self.data.noun} do not fill one batch of {self.batch_size} on {world} "
                "process(es); lower data.batch_size"
            )
        order: Any
        if self.repeats > 1:
            order = RepeatAugSampler(examples, world, rank, shuffle=True, num_repeats=self.repeats, selected_round=0)
        else:
            order = DistributedSampler(examples, world, rank, shuffle=True, seed=self.seed)
            if (lengths := lengths_of(examples)) is not None:
                order = LikeLengths(order, lengths, self.batch_size, self.seed)
        sampler = SeededSampler(order, self.seed, rank if self.repeats > 1 else None)
        # Worker processes take their indices before Lightning tells the sampler at which epoch a run goes on.
        sampler.set_epoch(self.trainer.current_epoch if self.trainer else 0)
        return self._loader(SeededExamples(examples), self.batch_size, sampler=sampler, drop_last=True)

    def val_dataloader(self) -> StatefulDataLoader:
        return self._evaluation("val")

    def test_dataloader(self) -> StatefulDataLoader:
        return self._evaluation("test")

    def _evaluation(self, split: str) -> StatefulDataLoader:
        examples = self.split(split)
        world, rank = _world()
        sampler: Any = DistributedSampler(examples, world, rank, shuffle=False) if world > 1 else None
        return self._loader(examples, self.eval_batch_size, sampler=sampler)

    def _loader(self, examples: Any, batch_size: int, **options: Any) -> StatefulDataLoader:
        return StatefulDataLoader(
            examples,
            batch_size,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            collate_fn=getattr(self.data, "collate", None),
            # Of its own: drawing the workers' seeds from the global generator would shift what follows.
            generator=torch.Generator().manual_seed(self.seed),
            **options,
        )


class ScoredData:
    """Data with other splits: what a task's report reads, so that its examples are in the order of what was scored."""

    def __init__(self, data: Data, split: Callable[[str], Any]) -> None:
        self.data, self.split = data, split

    def __getattr__(self, name: str) -> Any:
        return getattr(self.data, name)


class LikeLengths(Sampler[int]):
    """The places of `order`, arranged so that the examples of a batch are of like length, and the batches in any order.

    Fifty batches at a time are sorted by length: examples of one batch still differ from epoch to epoch.

    Args:
        order: a sampler with `set_epoch`.
        lengths: of all examples.
        batch_size: examples in a batch.
        seed: of the order of the batches, together with the epoch.
    """

    SORTED = 50

    def __init__(self, order: Any, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.order, self.lengths, self.batch_size, self.seed, self.epoch = order, lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        places, size = list(self.order), self.batch_size
        whole = len(places) - len(places) % size
        batches = []
        for start in range(0, whole, self.SORTED * size):
            part = sorted(places[start : min(start + self.SORTED * size, whole)], key=self.lengths.__getitem__)
            batches += [part[i : i + size] for i in range(0, len(part), size)]
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        for batch in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[batch]
        yield from places[whole:]


class SeededSampler(Sampler[Draw]):
    """The places of `order`, each with the seed of its example in this epoch.

    Args:
        order: a sampler of torch's or timm's, with `set_epoch`.
        seed: of the run.
        rank: None where the seed depends on the example alone. Where examples come several times in an epoch, the
            process, and the seed depends on it and on the position in the epoch instead.
    """

    def __init__(self, order: Any, seed: int, rank: int | None = None) -> None:
        self.order, self.seed, self.rank, self.epoch = order, seed, rank, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Draw]:
        epoch = self.epoch
        for position, place in enumerate(self.order):
            key = (self.seed, epoch, place) if self.rank is None else (self.seed, epoch, self.rank, position)
            yield place, int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest(), "big")


class SeededExamples(Dataset[Any]):
    """A dataset by `Draw`s: every random generator stands at the draw's seed while its example is made."""

    def __init__(self, examples: Any) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, draw: Draw) -> Any:
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: Sequence[Draw]) -> list[Any]:
        made = []
        with _generators_restored():
            for place, seed in draws:
                random.seed(seed)
                np.random.seed(seed)  # noqa: NPY002 - transforms of others draw from the global generator
                torch.default_generator.manual_seed(seed)
                made.append(self.examples[place])
        return made


@contextlib.contextmanager
def _generators_restored() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def evenly(examples: Any, limit: int | None) -> Any:
    """`limit` examples spread evenly over a dataset, so that one sorted by class gives some of each; None: all."""
    count = len(examples)
    if limit is None or limit >= count:
        return examples
    return Subset(examples, [(2 * i + 1) * count // (2 * limit) for i in range(limit)])


def lengths_of(examples: Any) -> Sequence[int] | None:
    """The lengths that a dataset offers, of those examples that are left of it; None where it offers none."""
    if isinstance(examples, Subset):
        lengths = lengths_of(examples.dataset)
        return None if lengths is None else [lengths[index] for index in examples.indices]
    return getattr(examples, "lengths", None)


def _world() -> tuple[int, int]:
    """Number of processes, and which of them this is."""
    return (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)


def _at_least(least: int, **options: int | None) -> None:
    for name, value in options.items():
        if value is not None and not (isinstance(value, int) and value >= least):
            raise ValueError(f"data.{name} must be a whole number of at least {least} (got {value!r})")
