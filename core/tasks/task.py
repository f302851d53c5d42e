"""A task as plain torch: the loss that trains a model, the scores that judge it, the lines that a person reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from sinuous.core.data import Data


class Task(nn.Module):
    """Trains and judges a model on batches of data; knows nothing of optimizers, loops or files of runs.

    Batches are tuples `(inputs, targets)`, or `(inputs, targets, cu_seqlens)` where sequences of different lengths are
    packed into one row, or `(inputs, targets, {name: tensor})` where the model is given more, see `apply`.

    Attributes:
        takes: the class of `sinuous.core.data` that says what data must offer.
        scores: metrics of torchmetrics by the name under which they are logged; `score` updates them.
        augment: whether the loss smooths, mixes or otherwise keeps a model from learning examples by heart; a run that
            wants the plain loss sets it to False.
    """

    takes: ClassVar[type] = Data

    def __init__(self, scores: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.scores = nn.ModuleDict(scores)
        self.augment = True

    def count(self, name: str, *arguments: Any) -> None:
        """Update the metric `name` of `scores`."""
        cast("Any", self.scores[name]).update(*arguments)

    def prepare(self, model: nn.Module) -> None:
        """Make the task's own parameters, where it has any; called once, before a model is trained or scored.

        They are trained beside the model's, without decay, and are no part of its exported weights.
        """

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Loss of a training batch, a scalar."""
        raise NotImplementedError

    def score(self, model: nn.Module, batch: Any) -> Any:
        """Update `scores` by a batch.

        Returns:
            What `report` needs of the batch, detached, or None. Tensors are kept on the CPU until then.
        """
        raise NotImplementedError

    def report(
        self, model: nn.Module, data: Any, seen: Sequence[Any], scores: Mapping[str, float], folder: Path, split: str
    ) -> list[str]:
        """Lines for a person about the split that has just been scored; figures and samples go into `folder`.

        Args:
            model: the one that was scored.
            data: where the split comes from, limited to the examples that were scored.
            seen: what `score` returned, batch by batch in the order of the split; of this process alone.
            scores: the values of `scores`, over all batches and processes.
            folder: of the run.
            split: `val` or `test`.
        """
        return [f"{split} " + ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in scores.items())]


def apply(model: nn.Module, batch: Sequence[Any]) -> Tensor:
    """Output of a model for a batch `(inputs, targets)`, or one whose third entry says more.

    That entry is `cu_seqlens`, or a dictionary of what the model is given by name, such as `position_ids`.
    """
    output: Tensor = model(batch[0], **more_of(batch))
    return output


def more_of(batch: Sequence[Any]) -> Mapping[str, Any]:
    """What the third entry of a batch, where it has one, gives a model by name."""
    more = batch[2] if len(batch) > 2 else {}
    return more if isinstance(more, Mapping) else {"cu_seqlens": more}
