"""The one LightningModule: a model and a plain task, with timm's optimizers, schedules and weight averaging."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.strategies import ModelParallelStrategy
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from sinuous.apps import learning_rates
from sinuous.core.registry import check_weights
from sinuous.core.stack import Stack
from sinuous.core.tasks.task import Task


class Training(L.LightningModule):
    """Trains and scores a model by a task.

    Args:
        model: any module with timm's contract (`no_weight_decay` and `group_matcher` are used by the optimizer).
            Modules in it may declare learning rates of their parameters, see `sinuous.apps.learning_rates`.
        task: gives loss and scores, see `sinuous.core.tasks`.
        optimizer: `optimizer(model)`, timm's `create_optimizer_v2` with its options filled in; None where the model is
            only scored.
        scheduler: `scheduler(optimizer, num_epochs=, updates_per_epoch=)`, timm's `create_scheduler_v2` likewise; it
            is stepped after every update.
        ema_decay: decay of a moving average of the weights (timm's ModelEmaV3, with warm-up of the decay); the
            average is what is validated, tested and exported. None keeps none.
        new_schedule: in a run that goes on, optimizer and schedule follow the options given here and not those of the
            checkpoint; the moments of the optimizer stay.

    Raises:
        ValueError: if `ema_decay` is not in [0, 1).
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        optimizer: Callable[..., Any] | None = None,
        scheduler: Callable[..., Any] | None = None,
        ema_decay: float | None = None,
        new_schedule: bool = False,
    ) -> None:
        super().__init__()
        if ema_decay is not None and not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), or null for no average (got {ema_decay})")
        self.model = model
        self.task = task
        task.prepare(model)
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.ema_decay, self.new_schedule = ema_decay, new_schedule
        self._last_finite = "none was finite"
        self.ema: ModelEmaV3 | None = None
        self.seen: list[Any] = []
        self.batches_read = 0

    @property
    def evaluated(self) -> nn.Module:
        """The weights that are validated, tested and exported: the averaged ones where there are any."""
        return self.model if self.ema is None else self.ema.module

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batches_read += 1
        loss = self.task.loss(self.model, batch)
        # A look at a GPU's loss waits for the GPU: there, not at every step.
        if loss.device.type == "cpu" or self.global_step % self.trainer.log_every_n_steps == 0:
            self._check_loss(float(loss.detach()))
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def _check_loss(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} in step {self.global_step + 1} ({self._last_finite}): the training has diverged; "
                "lower optimizer.lr, or give trainer.gradient_clip_val=1"
            )
        self._last_finite = f"the last finite one was {loss:.4g}, in step {self.global_step + 1}"

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._score("val", batch)

    def on_test_start(self) -> None:
        self.seen = []

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(move_data_to_device(self._score("test", batch), torch.device("cpu")))

    def _score(self, split: str, batch: Any) -> Any:
        seen = self.task.score(self.evaluated, batch)
        for name, metric in self.task.scores.items():
            self.log(f"{split}/{name}", metric, on_step=False, on_epoch=True, prog_bar=True)
        return seen

    def scores(self) -> dict[str, float]:
        """The scores of the last test, by name."""
        measured = self.trainer.callback_metrics
        return {name: float(measured[f"test/{name}"]) for name in self.task.scores}

    def report(self, data: Any, folder: Path, split: str) -> list[str]:
        """Lines for a person about the last test; figures go into `folder`."""
        return self.task.report(self.evaluated, data, self.seen, self.scores(), folder, split)

    def configure_model(self) -> None:
        """Copy the model for the moving average; shard it for FSDP2, one unit per block."""
        sharded = isinstance(self.trainer.strategy, ModelParallelStrategy)
        if self.ema_decay is not None and self.ema is None and not sharded:
            self.ema = ModelEmaV3(self.model, decay=self.ema_decay, use_warmup=True)
            self.ema.module.requires_grad_(False)
        if not sharded or hasattr(self.model, "unshard"):
            return
        if self.ema_decay is not None:
            raise ValueError(
                "ema_decay keeps a whole copy of the model, which trainer=fsdp would not shard; set it to null"
            )
        mesh = self.device_mesh
        assert mesh is not None
        stacked = [block for stack in self.model.modules() if isinstance(stack, Stack) for block in stack]
        named = [self.model.get_submodule(info["module"]) for info in getattr(self.model, "feature_info", [])]
        for block in stacked or named:
            fully_shard(block, mesh=mesh["data_parallel"])
        fully_shard(self.model, mesh=mesh["data_parallel"])
        if hasattr(self.model, "loss"):  # which gathers the weights outside the blocks as `forward` does
            register_fsdp_forward_method(self.model, "loss")

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update(self.model, step=self.global_step)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "state_dict" in checkpoint:  # sharded strategies have loaded and removed it
            check_weights(checkpoint["state_dict"], self)
        if self.new_schedule:
            checkpoint["lr_schedulers"] = []

    def configure_optimizers(self) -> Any:
        assert self.make_optimizer is not None, "a model that is only scored needs no optimizer"
        try:
            optimizer = self.make_optimizer(self.model)
        except (TypeError, ValueError) as error:
            raise ValueError(f"optimizer: {error}; correct its options") from error
        if of_task := [parameter for parameter in self.task.parameters() if parameter.requires_grad]:
            optimizer.add_param_group({"params": of_task, "weight_decay": 0.0})
        learning_rates.honour(self.model, optimizer)
        optimizer.register_load_state_dict_pre_hook(_check_groups)
        if self.new_schedule:
            optimizer.register_load_state_dict_pre_hook(_keep_options)
        if self.make_scheduler is None:
            return optimizer
        updates, epochs = self._updates_per_epoch(), float(max(self.trainer.max_epochs or 1, 1))
        if self.trainer.max_steps > 0:
            epochs = min(epochs, self.trainer.max_steps / updates)
        try:
            scheduler, _ = self.make_scheduler(
                optimizer, num_epochs=epochs, updates_per_epoch=updates, step_on_epochs=False
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"scheduler: {str(error).rstrip('.')}; correct its options") from error
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _updates_per_epoch(self) -> int:
        # Lightning's own count, `estimated_stepping_batches`, sets up the loaders before it has read from the
        # checkpoint where they stood, and they then begin the epoch anew.
        trainer = self.trainer
        batches: int = len(trainer.datamodule.train_dataloader())  # type: ignore[attr-defined]
        limit = trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        updates: int = math.ceil(batches / trainer.accumulate_grad_batches)
        return updates

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(num_updates=self.global_step)


def _check_groups(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    there, here = ([len(g["params"]) for g in groups] for groups in (state["param_groups"], optimizer.param_groups))
    if there != here:
        raise ValueError(
            f"the optimizer of the checkpoint has groups of {there} parameters and this one of {here}: its run had "
            "other options of the model or the optimizer; give those of the config.yaml in its run folder, or start "
            "anew without ckpt_path"
        )


def _keep_options(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The state to load, with the options of the optimizer as they are now."""
    groups = zip(state["param_groups"], optimizer.state_dict()["param_groups"], strict=True)
    return {**state, "param_groups": [{**now, "params": saved["params"]} for saved, now in groups]}
