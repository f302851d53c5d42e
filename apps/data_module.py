"""The one DataModule: a dataset in batches, in the same order for the same seed wherever a run goes on from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import lightning as L
import torch
import torch.distributed as dist
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor
from torch.utils.data import Dataset, Sampler, Subset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler


def at_least(least: int, **options: int | None) -> None:
    """Refuse options of the data below `least`, by name; None is allowed."""
    for name, value in options.items():
        if value is not None and not (isinstance(value, int) and value >= least):
            raise ValueError(f"data.{name} must be a whole number of at least {least} (got {value!r})")


class Splits(L.LightningDataModule):
    """Batches of the `train`, `val` and `test` splits of a dataset.

    Args:
        batch_size: training examples per batch and process.
        eval_batch_size: examples per batch without gradients.
        num_workers: processes that read examples; 0 reads in the training process, best for sets held in memory, and
            the setting with which a run goes on exactly where it stopped.
        repeats: times that an example comes in one batch, each time augmented anew (arXiv 1901.09335); 0 and 1: once.
        limit: use only so many training examples.
        seed: of the order of the training examples, together with the epoch.

    Raises:
        ValueError: if a size is too small.
    """

    examples: ClassVar[str]
    """What one example is, in the plural."""

    def __init__(
        self,
        *,
        batch_size: int,
        eval_batch_size: int,
        num_workers: int = 0,
        repeats: int = 0,
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        at_least(1, batch_size=batch_size, eval_batch_size=eval_batch_size, limit=limit)
        at_least(0, num_workers=num_workers, repeats=repeats)
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.repeats, self.limit, self.seed = repeats, limit, seed
        self._sets: dict[str, Any] = {}

    def make(self, name: str) -> Any:
        """The whole dataset of one split."""
        raise NotImplementedError

    def example(self) -> Tensor:
        """A batch of one input of zeros, with which a model can be tried."""
        raise NotImplementedError

    def split(self, name: str) -> Any:
        """The dataset of one split, cut to `limit` for training."""
        if name not in self._sets:
            made = self.make(name)
            if name == "train" and self.limit is not None:
                made = Subset(made, range(min(self.limit, len(made))))
            self._sets[name] = made
        return self._sets[name]

    def train_dataloader(self) -> StatefulDataLoader:
        data = self.split("train")
        world = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if dist.is_initialized() else 0
        if len(data) < self.batch_size * world:
            raise ValueError(
                f"{len(data)} training {self.examples} do not fill one batch of {self.batch_size} on {world} "
                "process(es); lower data.batch_size"
            )
        sampler: Sampler[int]
        if self.repeats > 1:
            sampler = RepeatAugSampler(data, world, rank, shuffle=True, num_repeats=self.repeats, selected_round=0)
        else:
            sampler = StatefulDistributedSampler(data, world, rank, shuffle=True, seed=self.seed)
        # Worker processes take their indices before Lightning tells the sampler at which epoch a run goes on.
        sampler.set_epoch(self.trainer.current_epoch if self.trainer else 0)  # type: ignore[attr-defined]
        return self._loader(data, self.batch_size, sampler=sampler, drop_last=True)

    def val_dataloader(self) -> StatefulDataLoader:
        return self._evaluation("val")

    def test_dataloader(self) -> StatefulDataLoader:
        return self._evaluation("test")

    def _evaluation(self, split: str) -> StatefulDataLoader:
        data = self.split(split)
        sampler = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            sampler = StatefulDistributedSampler(data, dist.get_world_size(), dist.get_rank(), shuffle=False)
        return self._loader(data, self.eval_batch_size, sampler=sampler)

    def _loader(self, data: Any, batch_size: int, **options: Any) -> StatefulDataLoader:
        return StatefulDataLoader(
            data,
            batch_size,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            # Of its own: drawing the workers' seeds from the global generator would shift what follows.
            generator=torch.Generator().manual_seed(self.seed),
            **options,
        )


class LabelledImages(Splits):
    """Batches `(images [B, C, H, W], labels [B])`.

    Args:
        dataset: `dataset(split=..., transform=...)` makes a split; it lists its `classes`.
        train_transform: a PIL image to a tensor, with augmentation.
        eval_transform: the same without.
        num_classes: what the model predicts; the data must have as many classes.
        in_chans: channels of an image.
        img_size: height and width of an image.
        mean: per channel, to show pictures as they were.
        std: per channel, likewise.
        **options: of `Splits`.

    Raises:
        ValueError: if the data has another number of classes than `num_classes`.
    """

    examples: ClassVar[str] = "images"

    def __init__(
        self,
        dataset: Callable[..., Dataset[Any]],
        train_transform: Callable[[Any], Any],
        eval_transform: Callable[[Any], Any],
        *,
        num_classes: int,
        in_chans: int,
        img_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.dataset, self.train_transform, self.eval_transform = dataset, train_transform, eval_transform
        self.num_classes, self.in_chans, self.img_size = num_classes, in_chans, img_size
        self.mean, self.std = tuple(mean), tuple(std)

    def make(self, name: str) -> Any:
        made: Any = self.dataset(split=name, transform=self.train_transform if name == "train" else self.eval_transform)
        if len(made.classes) != self.num_classes:
            raise ValueError(
                f"the {name} data has {len(made.classes)} classes and the model predicts {self.num_classes}; "
                f"give data.num_classes={len(made.classes)}"
            )
        return made

    def example(self) -> Tensor:
        return torch.zeros(1, self.in_chans, self.img_size, self.img_size)


class ByteText(Splits):
    """Batches `(bytes [B, T], the next bytes [B, T])` of a text.

    Args:
        dataset: `dataset(split=...)` makes a split.
        length: T, bytes in a window.
        **options: of `Splits`.
    """

    examples: ClassVar[str] = "windows"

    def __init__(self, dataset: Callable[..., Dataset[Any]], *, length: int, **options: Any) -> None:
        super().__init__(**options)
        at_least(1, length=length)
        self.dataset, self.length = dataset, length

    def make(self, name: str) -> Any:
        return self.dataset(split=name)

    def example(self) -> Tensor:
        return torch.zeros(1, self.length, dtype=torch.long)
