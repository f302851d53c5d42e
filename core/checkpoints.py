"""Checkpoints: reading those of others without running anything in them, and writing safetensors.

A torch checkpoint is a pickle, and a pickle is a program. Files are therefore read with torch's weights-only
unpickler, which knows tensors and plain containers. Two more bags of values are let in, which training scripts store
beside their weights: `argparse.Namespace` (hustvl/Vim among them), and yacs' `CfgNode` (LaMamba-Diff), which is read as
a plain dictionary, whether yacs is installed or not. Any other name in the file is refused.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

WRAPPERS = ("model", "state_dict", "module", "model_state_dict", "net")
"""Keys under which training scripts put the weights, in the order in which they are looked for."""

AVERAGED = ("ema",)
"""Keys under which they put averaged weights, which are taken first: a run that keeps them is judged by them."""

_BAGS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    (collections.OrderedDict, "yacs.config.CfgNode"),
]

_WRAPPING_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and of torch.compile


def load_state_dict(path: str | os.PathLike[str], prefer: str | None = None) -> dict[str, Tensor]:
    """Read the weights of a safetensors or torch file, without the wrapping that the training script added.

    Args:
        path: a `.safetensors` file, or a file of `torch.save` (zip or the older stream format).
        prefer: the sub-dictionary to take where the file has several: `"model_ema"` takes the averaged weights that lie
            beside `"model"`. A name other than `"model"` must exist. `None` takes averaged weights called `"ema"` where
            there are some, else the model's. In a Lightning checkpoint of `sinuous train` the averaged weights come
            first, as that run was evaluated with them.

    Returns:
        Parameter names to tensors, on the CPU. Entries that are no tensors are left out.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, holds no weights, or names a Python object that reading would have to run.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint at {path}; check the path")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a checkpoint; give the path of a file inside it")
    with path.open("rb") as file:
        head = file.read(9)
    if not head:
        raise ValueError(f"{path} is empty; copy or download it again")
    content = _read_safetensors(path) if head[8:9] == b"{" else _read_torch(path)
    state = _unwrap(content, prefer, path)
    if "pytorch-lightning_version" in content:
        state = _of_lightning(state)
    return {_without_wrapping(name): tensor for name, tensor in state.items()}


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read what a safetensors file says of itself; empty for other files and for one that is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError):
        return {}


def data_facts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what weights of `sinuous train` know of the data that they were trained on: sizes, names of classes, the
    mean and deviation with which inputs are normalised. Empty for other files."""
    try:
        facts = json.loads(read_metadata(path).get("data", "{}"))
    except json.JSONDecodeError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is a damaged safetensors file ({error}); copy or download it again") from error


def _read_torch(path: Path) -> Mapping[str, Any]:
    try:
        with torch.serialization.safe_globals(_BAGS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(_why_unreadable(path, error)) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of weights; save `state_dict()`")
    return content


def _why_unreadable(path: Path, error: Exception) -> str:
    text = str(error)
    if "TorchScript" in text:
        return f"{path} is a TorchScript program, not weights; load it with torch.jit.load and save its state_dict()"
    if ".tar format" in text:
        return f"{path} has the tar format of torch before 0.1.10; load and save it again with a newer torch"
    # Both the message on a name that is not allowed and the one on a name that is blocked outright quote it.
    named = re.search(r"GLOBAL ([\w.]+)", text) or re.search(
        r"from blocklisted module ([\w.]+)|function ([\w.]+)", text
    )
    if isinstance(error, pickle.UnpicklingError) and named:
        name = next(group for group in named.groups() if group)
        return (
            f"{path} is refused: it contains {name}, which reading would have to run; "
            "save only the state_dict() from the code that made the file"
        )
    return f"{path} is not a checkpoint, or is damaged: torch.load gave up with {type(error).__name__}; get it again"


def _unwrap(content: Mapping[str, Any], prefer: str | None, path: Path) -> dict[str, Tensor]:
    by_default = prefer in (None, "model")
    keys: tuple[str, ...] = WRAPPERS if by_default else (str(prefer),)
    if prefer is None and any(_holds_weights(content.get(key)) for key in AVERAGED):
        keys = (*AVERAGED, *WRAPPERS)
    inner, unwrapped = content, False
    while key := next((k for k in keys if isinstance(inner.get(k), Mapping)), None):
        inner, unwrapped, keys = inner[key], True, WRAPPERS
    if not by_default and not unwrapped and any(isinstance(value, Mapping) for value in content.values()):
        raise ValueError(f"{path} has no {prefer!r}; it has {', '.join(map(repr, content))}")
    state = {name: value for name, value in inner.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not state:
        have = ", ".join(repr(key) for key in list(content)[:8]) or "nothing"
        other = next((key for key, value in content.items() if _holds_tensors(value)), None)
        remedy = f"; give prefer={other!r} to take its {other!r}" if other else ""
        raise ValueError(
            f"{path} holds no weights: no dictionary of tensors under {' or '.join(keys)} (it has {have}){remedy}"
        )
    return state


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(inner, Tensor) for inner in value.values())


def _holds_weights(value: Any) -> bool:
    """Whether a dictionary holds tensors, itself or one wrapping further in."""
    return _holds_tensors(value) or (isinstance(value, Mapping) and any(map(_holds_tensors, value.values())))


def _of_lightning(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the model out of its LightningModule, and with it what others keep beside it, as an encoder and a decoder.

    `ema.` and `task.` are parts of the module of `sinuous train`.
    """
    for prefix in ("ema.module.", "model."):
        inner = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        if inner:
            beside = {n: t for n, t in state.items() if not n.startswith(("ema.", "task.", "model."))}
            return {**beside, **inner}
    return state


def _without_wrapping(name: str) -> str:
    while any(name.startswith(prefix) for prefix in _WRAPPING_PREFIXES):
        name = name.partition(".")[2]
    return name


def save_safetensors(
    state: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write weights to `path`, under another name first, so that `path` is never a half-written file.

    Tensors that share memory are stored once each: safetensors has no notion of sharing.

    Raises:
        OSError: if the file cannot be written; an older file at `path` is then untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    seen: set[int] = set()
    single: dict[str, Tensor] = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        single[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors makes files that only their owner may read
        save_file(single, temporary, metadata={key: str(value) for key, value in (metadata or {}).items()})
        temporary.chmod(mode)
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def unwrapped(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of a training script's file: what is under `model` or `state_dict`, without DDP's `module.`."""
    for wrapper in ("model", "state_dict"):
        state_dict = state_dict.get(wrapper, state_dict)
    return {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
