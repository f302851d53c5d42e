"""States for another day: what a mixer, a layer or a model carries from step to step, written to a file and read back.

    _, state = model.prefill(ids)
    save_state(state, "novel.state", metadata={"read": "chapters 1 to 3"})
    logits, state = model.step(next_id, load_state("novel.state"))

A file is safetensors: the tensors in the order in which they stand in the state, and among its metadata how they stand
in it. Nothing in a file is executed, and no module is imported because a file names it: classes of states are those
that mixers have registered.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sinuous.core.checks import described
from sinuous.core.mixers.contract import state_classes

FORM = "sinuous.state"
"""Entry of a file's metadata that says how its tensors stand in the state."""


def save_state(state: Any, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
    """Write a state to a file, whole or not at all.

    Args:
        state: of a mixer, a stack, a model or a layer: tensors and `None` in tuples and registered NamedTuples, nested.
        path: of the file.
        metadata: words to keep with it; `state_metadata` reads them.

    Raises:
        ValueError: if the state has a part of another kind, or the metadata are no words.
    """
    words = {} if metadata is None else metadata
    if not (isinstance(words, Mapping) and all(isinstance(word, str) for pair in words.items() for word in pair)):
        raise ValueError(f"metadata must be a dictionary, words to words (got {described(metadata)})")
    if FORM in words:
        raise ValueError(f"metadata must not have the key {FORM!r}, which says how the state is made; choose another")
    tensors: list[Tensor] = []
    form = json.dumps(_taken_apart(state, "state", tensors))
    numbered = {f"{i}": t.detach().cpu().contiguous().clone() for i, t in enumerate(tensors)}
    target = Path(path)
    unfinished = target.with_name(f"{target.name}.{os.getpid()}.unfinished")
    try:
        save_file(numbered, unfinished, metadata={**words, FORM: form})
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def load_state(path: str | os.PathLike[str], device: torch.device | str | None = None) -> Any:
    """Read a state that `save_state` wrote.

    Args:
        path: of the file.
        device: where its tensors go; the CPU if absent.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or holds something else, or a mixer that is not registered made the state.
    """
    form, tensors, _ = _read(path, with_tensors=True)
    place = torch.device("cpu") if device is None else torch.device(device)
    try:
        return _put_together(json.loads(form), {name: t.to(place) for name, t in tensors.items()}, path)
    except (KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: its tensors make no state; save the state again") from error


def state_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the words that `save_state` was given.

    Raises:
        FileNotFoundError, ValueError: as `load_state` does.
    """
    return _read(path, with_tensors=False)[2]


def _read(path: str | os.PathLike[str], with_tensors: bool) -> tuple[str, dict[str, Tensor], dict[str, str]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            words = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()} if with_tensors else {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); save the state again") from error
    if FORM not in words:
        raise ValueError(f"{path} holds no state but other tensors, as of weights; give a file that save_state wrote")
    return words.pop(FORM), tensors, words


def _taken_apart(part: Any, place: str, tensors: list[Tensor]) -> Any:
    """Describe a state for JSON, and collect its tensors: None, the number of a tensor, the same as
    {"complex": number} where it is stored as pairs, or [class or "", parts]."""
    if part is None:
        return None
    if isinstance(part, Tensor):
        tensors.append(torch.view_as_real(part) if part.is_complex() else part)  # no file has doubled complex numbers
        return {"complex": len(tensors) - 1} if part.is_complex() else len(tensors) - 1
    if type(part) is tuple:
        return ["", [_taken_apart(inner, f"{place}[{i}]", tensors) for i, inner in enumerate(part)]]
    names = {cls: name for name, cls in state_classes().items()}
    if type(part) not in names:
        raise ValueError(
            f"{place} must be a tensor, a tuple or a registered state (got {described(part)}); give what prefill, step "
            "or initial_state returned, and decorate a class of your own with register_state"
        )
    inner = [_taken_apart(value, f"{place}.{key}", tensors) for key, value in part._asdict().items()]
    return [names[type(part)], inner]


def _put_together(form: Any, tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> Any:
    if form is None:
        return None
    if isinstance(form, int):
        return tensors[str(form)]
    if isinstance(form, dict):
        return torch.view_as_complex(tensors[str(form["complex"])])
    if not (isinstance(form, list) and [type(part) for part in form] == [str, list]):
        raise TypeError(f"{form!r} describes no part of a state")
    name, inner = form
    parts = [_put_together(part, tensors, path) for part in inner]
    if not name:
        return tuple(parts)
    if name not in state_classes():
        raise ValueError(
            f"{path} holds a state of class {name!r}, which no mixer has registered; import the package of that mixer"
        )
    return state_classes()[name](*parts)
