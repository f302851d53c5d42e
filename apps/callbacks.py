"""Lightning callbacks: state to go on from, the best weights as safetensors, clean stops, progress in plain lines."""

from __future__ import annotations

import json
import logging
import random
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from sinuous.core.checkpoints import save_safetensors

log = logging.getLogger(__name__)


class RunStopped(Exception):
    """A signal ended the run; its state is saved."""

    def __init__(self, signum: int, checkpoint: Path, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}; the state is in {checkpoint}")
        self.signum, self.checkpoint, self.step = signum, checkpoint, step


def _random_states() -> dict[str, Any]:
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002 - timm's Mixup draws from the global generator
    assert isinstance(numpy_state, dict)
    return {
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": numpy_state["state"]["key"].tolist()}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_states(states: Mapping[str, Any]) -> None:
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    inner = dict(states["numpy"]["state"])
    inner["key"] = np.asarray(inner["key"], np.uint32)
    np.random.set_state({**states["numpy"], "state": inner})  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


class Resumable(Callback):
    """Keeps `last.ckpt` fresh, with the state of every random generator, and ends the run at a step on a signal.

    The file is written every `every_n_steps` optimizer steps, at the end of each epoch, and on SIGINT and SIGTERM,
    which let the current step (or the current validation) finish. A second Ctrl-C ends the process at once.

    Args:
        folder: where `last.ckpt` goes.
        every_n_steps: steps between two writings.
    """

    def __init__(self, folder: str, every_n_steps: int = 200) -> None:
        self.folder, self.every_n_steps = Path(folder), every_n_steps
        self._random: list[dict[str, Any]] = []
        self._signal = 0
        self._between_epochs = False
        self._handlers: dict[int, Any] = {}

    @property
    def path(self) -> Path:
        return self.folder / "last.ckpt"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.folder = Path(trainer.strategy.broadcast(str(self.folder)))

    def state_dict(self) -> dict[str, Any]:
        states_here = _random_states()
        if not dist.is_initialized():
            return {"random": [states_here]}
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, states_here)
        return {"random": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._random = state_dict["random"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Only now: setting up the data loaders has drawn random numbers after the checkpoint was read.
        if len(self._random) == trainer.world_size:
            _set_random_states(self._random[trainer.global_rank])
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._handlers[signum] = signal.signal(signum, self._note)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore_handlers()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._handlers = {}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._signal == signal.SIGINT == signum:
            raise KeyboardInterrupt
        self._signal = signum

    def _signalled(self, trainer: L.Trainer) -> bool:
        return bool(trainer.strategy.reduce_boolean_decision(bool(self._signal), all=False))

    def _stop(self, trainer: L.Trainer) -> None:
        raise RunStopped(self._signal or signal.SIGTERM, self.path, trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # After the last batch of an epoch comes its validation; on_train_epoch_end saves once that is done.
        if trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        stopping = self._signalled(trainer)
        if stopping or trainer.global_step % self.every_n_steps == 0:
            trainer.save_checkpoint(self.path)
        if stopping:
            self._stop(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._between_epochs = True
        trainer.save_checkpoint(self.path)
        self._between_epochs = False
        if self._signalled(trainer):
            self._stop(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._between_epochs:  # the next epoch begins with a fresh loader, not at the end of this one's
            checkpoint["loops"]["fit_loop"]["state_dict"].pop("combined_loader", None)


def finite(model: nn.Module) -> bool:
    """Whether every parameter is a number."""
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters())


class BestWeights(ModelCheckpoint):
    """Lightning's checkpoint of the best validation score, and beside it the bare weights as safetensors.

    Args:
        model_name: written into the metadata of the safetensors file.
        options: those of `lightning.pytorch.callbacks.ModelCheckpoint`.
    """

    def __init__(self, model_name: str, **options: Any) -> None:
        super().__init__(save_top_k=1, save_on_train_epoch_end=False, enable_version_counter=False, **options)
        self.model_name = model_name

    @property
    def weights(self) -> Path:
        return Path(self.best_model_path).with_suffix(".safetensors")

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        before = self.best_model_score
        super().on_validation_end(trainer, pl_module)
        if self.best_model_score is not before and self.best_model_path:
            self.export(trainer, pl_module, self.weights)

    def check_monitor_top_k(self, trainer: L.Trainer, current: Tensor | None = None) -> bool:
        """Whether `current` is the best score so far; never with weights that are not numbers."""
        return finite(trainer.lightning_module) and bool(super().check_monitor_top_k(trainer, current))

    def export(self, trainer: L.Trainer, pl_module: Any, path: Path) -> None:
        """Write the weights that are evaluated; every process must call it."""
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: Any = get_model_state_dict(pl_module.evaluated, options=whole)
        if trainer.is_global_zero:
            metadata = {"model": self.model_name, "step": str(trainer.global_step)}
            if self.best_model_score is not None:
                metadata[str(self.monitor)] = f"{float(self.best_model_score):.6f}"
            data: Any = trainer.datamodule.data  # type: ignore[attr-defined]
            facts = data.facts() if hasattr(data, "facts") else {}
            save_safetensors(state, path, metadata | {"data": json.dumps(facts)})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best score so far, also of a run whose folder has moved; not of one whose best weights are
        elsewhere."""
        here = Path(str(self.dirpath))

        def moved(path: str) -> str:
            return str(here / Path(path).name) if path else ""

        if not (here / Path(state_dict["best_model_path"]).name).is_file():
            return
        paths = {key: moved(state_dict[key]) for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
        known = {moved(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **paths, "best_k_models": known, "dirpath": self.dirpath})


class LineProgress(Callback):
    """One line per `every_n_steps` steps and one per epoch, for output that is no terminal."""

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self._mark = (0.0, 0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._mark = (time.perf_counter(), trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if not trainer.is_global_zero or step % self.every_n_steps or step == self._mark[1]:
            return
        now = time.perf_counter()
        speed = (step - self._mark[1]) / (now - self._mark[0])
        self._mark = (now, step)
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        total = int(trainer.estimated_stepping_batches)
        loss = float(trainer.callback_metrics.get("train/loss", float("nan")))
        log.info("step %d of %d  loss %.4f  lr %.2e  %.1f steps/s", step, total, loss, rate, speed)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and trainer.state.fn == "fit":
            scores = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}
            listed = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
            log.info("epoch %d of %d  %s", trainer.current_epoch + 1, trainer.max_epochs or 0, listed)


def progress(every_n_steps: int = 50) -> Callback:
    """A progress bar on a terminal, plain lines elsewhere."""
    return RichProgressBar() if sys.stdout.isatty() else LineProgress(every_n_steps)
