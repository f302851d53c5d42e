"""Going on with a run: which one, in which folder, and with which settings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

LAST = Path("checkpoints") / "last.ckpt"
"""Place, in a run folder, of the state from which the run goes on."""

IN_FORCE: tuple[str, ...] = (
    "optimizer",
    "scheduler",
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.limit_train_batches",
    "trainer.accumulate_grad_batches",
    "data.batch_size",
    "data.limit",
    "data.repeats",
)
"""Settings that shape optimizer and schedule, which come back from the checkpoint."""

_OF_THIS_START = ("ckpt_path", "output_dir", "runs", "task_name", "schedule", "model.checkpoint_path")


def claim(folder: Path) -> bool:
    """Make a folder that is nobody's yet; False if it is there already."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


_CLAIMED: dict[Path, Path] = {}


def new_folder(folder: str) -> str:
    """`folder`, or where another process has made it already, the same with a number; once claimed, it stays this
    process's answer."""
    wish = Path(folder)
    if wish not in _CLAIMED:
        number, place = 1, wish
        while not claim(place):
            number += 1
            place = wish.with_name(f"{wish.name}_{number}")
        _CLAIMED[wish] = place
    return str(_CLAIMED[wish])


def run_folder(runs: str, ckpt_path: str | None, now: str) -> str:
    """Where a run writes: a folder of its own, or the one of the run that it goes on with."""
    if ckpt_path == "last":
        return str(newest_run(runs))
    if ckpt_path and Path(ckpt_path).parts[-2:] == LAST.parts and Path(ckpt_path).is_file():
        return str(Path(ckpt_path).absolute().parents[1])
    return new_folder(str(Path(runs) / now))


def _ledger(runs: str | os.PathLike[str]) -> Path:
    """A file with a line for each start of a run of this name, wherever its folder is, the newest last."""
    return Path(runs).parent / ".runs" / Path(runs).name


def enter(runs: str, folder: Path) -> None:
    """Note in the ledger that a run starts, or goes on, in `folder`."""
    ledger = _ledger(runs)
    ledger.parent.mkdir(parents=True, exist_ok=True)
    with ledger.open("a") as file:
        file.write(f"{folder.absolute()}\n")
    for wish in [wish for wish, place in _CLAIMED.items() if place == folder]:
        del _CLAIMED[wish]  # the next run of this process is another one


def newest_run(runs: str | os.PathLike[str]) -> Path:
    """The folder of the run of this name that was started or gone on with last and can be gone on with.

    The order of starts decides, not the clock. Folders that were copied here from elsewhere, which no start is known
    of, come after those that are known, by the time at which their state was written.

    Raises:
        FileNotFoundError: if no run has a state to go on from.
    """
    ledger = _ledger(runs)
    started = ledger.read_text().splitlines() if ledger.is_file() else []
    for folder in reversed(started):
        if (Path(folder) / LAST).is_file():
            return Path(folder)
    copied = sorted(Path(runs).glob(f"*/{LAST}"), key=lambda path: path.stat().st_mtime)
    if not copied:
        raise FileNotFoundError(
            f"ckpt_path=last: no run in {Path(runs).resolve()} has a {LAST}; train once without it, or give a path"
        )
    return copied[-1].parents[1]


def start_of(config: DictConfig) -> Path | None:
    """The checkpoint from which the run goes on, or None.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged, or holds weights alone.
    """
    if not config.ckpt_path:
        return None
    path = newest_run(config.runs) / LAST if config.ckpt_path == "last" else Path(config.ckpt_path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path.resolve()} to go on from; check ckpt_path")
    try:
        content = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is no intact checkpoint of sinuous train; take another one") from error
    if not isinstance(content, dict) or not {"state_dict", "optimizer_states", "loops"} <= content.keys():
        raise ValueError(
            f"{path} holds no state to go on from, as {LAST} of a run does; to start from weights alone, give "
            "+model.checkpoint_path instead of ckpt_path"
        )
    return path


def check_folder(folder: Path, start: Path | None) -> None:
    """Refuse a folder that holds another run than the one that is gone on with.

    Raises:
        ValueError: naming it, and both ways out.
    """
    goes_on = start is not None and start.resolve().parents[1] == folder.resolve()
    if (folder / "config.yaml").exists() and not goes_on:
        raise ValueError(
            f"{folder} holds a run already; go on with it by ckpt_path={folder / LAST}, or give another hydra.run.dir"
        )


def changed_settings(config: DictConfig, start: Path) -> list[str]:
    """Settings that differ from those of the run whose checkpoint is `start`, and that are in force from now on, as
    `name: before → now`.

    Raises:
        ValueError: if some are not in force because the checkpoint brings its own, unless `schedule=new` is given.
    """
    before_file = start.parents[1] / "config.yaml"
    if not before_file.is_file():
        return []
    before = dict(_flat(OmegaConf.to_container(OmegaConf.load(before_file))))
    now = dict(_flat(OmegaConf.to_container(config, resolve=True)))
    absent = "absent"
    changes = {
        name: (before.get(name, absent), now.get(name, absent))
        for name in sorted(before.keys() | now.keys())
        if before.get(name, absent) != now.get(name, absent) and not _within(name, _OF_THIS_START)
    }
    told = {name: f"{name}: {was} → {is_now}" for name, (was, is_now) in changes.items()}
    kept = [name for name in changes if _within(name, IN_FORCE)]
    if kept and config.schedule != "new":
        raise ValueError(
            f"a run that goes on keeps its optimizer and its schedule, and {told[kept[0]]} would change them"
            + (f" (and {len(kept) - 1} more)" if len(kept) > 1 else "")
            + "; give schedule=new to go on with the new settings, or start anew from its weights with "
            "+model.checkpoint_path"
        )
    return list(told.values())


def _within(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names of all values."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node
